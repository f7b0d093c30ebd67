//! sds-agent: one agent per node that serves Envoy's secret discovery service (SDS v3) from cert-manager.
//!
//! The modules stand in the order in which a request passes them:
//!
//! 1. [`listener`] binds the Unix socket, [`session`] accepts a connection, [`peer`] takes the caller's credentials and a handle on it;
//! 2. [`attest`] proves which workload that is, once for each connection ([`caller`]); [`identity`] names it and picks the profile of its
//!    certificate;
//! 3. [`sds`] (names, pure stream state, encoding) subscribes to that identity in the [`store`] and answers with [`material`]: [`sds::service`]
//!    serves the secret;
//! 4. [`rotation`] owns when a certificate is made or replaced ([`rotation::planner`], [`rotation::schedule`]), orders it from an [`issuer`],
//!    and publishes nothing that [`issuer::verify`] has not passed;
//! 5. [`trust`] owns the bundles, which [`sds`] serves and [`rotation`] checks against.
//!
//! [`csi`] stands beside the first: it makes a socket for each pod, and the mount is the proof. [`warm`] asks the store ahead of a pod's
//! first call. [`approver`] is another program's path: it decides which of the agents' requests are signed.
//!
//! [`events`] hears of rotation's troubles and tells the pods.
//!
//! [`app`] composes them; [`config`], [`clock`] and the operations modules stand around the path; [`cli`] is the command line. Nobody
//! imports its caller.

// The agent writes no file; its tests do.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod csi;

pub mod warm;

pub mod app;

pub mod build_info;
pub mod cli;
pub mod config;
pub mod events;
pub mod handover;

pub mod admin;
pub mod process;

#[cfg(test)]
mod foreign_text;
#[cfg(test)]
mod interfaces;
#[cfg(test)]
mod metrics_reference;
