//! Issuance of workload certificates: the schedule, the orders, the issuers, and the checks before a certificate is published.
//!
//! - [`rotation`] owns the schedule ([`rotation::planner`], [`rotation::schedule`]), orders certificates and publishes them into the server's
//!   store; nothing is published that [`issuer::verify`] has not passed;
//! - [`issuer`] is where they come from: [`issuer::certificate_request`] for cert-manager, [`issuer::embedded`] for development.

pub mod issuer;
pub mod rotation;
