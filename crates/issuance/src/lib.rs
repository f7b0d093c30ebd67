//! Issuance of workload certificates: the schedule, the orders, the issuers, and the checks before a certificate is published.
//!
//! - [`rotation`] owns the schedule ([`rotation::planner`], [`rotation::schedule`]), orders certificates, and publishes them into the
//!   server's store. It publishes only certificates that [`issuer::verify`] has accepted.
//! - [`issuer`] owns the issuers: [`issuer::certificate_request`] for cert-manager, and [`issuer::embedded`] for development.

pub mod issuer;
pub mod rotation;
