//! sds-agent: one agent per node that serves Envoy's secret discovery service (SDS v3) from cert-manager.
//!
//! This package composes the libraries below `crates/` into the agent, the approver and the command line. A request passes them in this
//! order; each crate's first page goes on from here:
//!
//! 1. [`unix_peer`]: [`listener`](unix_peer::listener) has bound the Unix socket, [`peer`](unix_peer::peer) takes the caller's credentials and
//!    a handle on its process.
//! 2. [`sds_server`]: [`session`](sds_server::session) accepts the connection and counts it against its caller's
//!    [`quotas`](sds_server::session::quotas); [`caller`](sds_server::caller) has the attestor prove which workload the peer is, once for each
//!    connection, and makes the gRPC status of a caller that has no identity.
//! 3. [`attest_kubernetes`]: the [`attestor`](attest_kubernetes::attestor) that does so on a node: peer, cgroup, pod, service account.
//! 4. [`workload_identity`]: the [`Resolver`](workload_identity::Resolver) names the workload and picks the profile of its certificate.
//! 5. [`sds_server`] again: [`sds::service`](sds_server::sds::service) (each stream in its `drive.rs`) subscribes to that identity in the
//!    [`store`](sds_server::store) and answers with [`material`](sds_server::material) and [`trust`](sds_server::trust) bundles.
//!    [`sds::stream`](sds_server::sds::stream) keeps the protocol's state (versions, nonces, NACKs), and
//!    [`sds::holdings`](sds_server::sds::holdings) what the client holds already; neither does I/O.
//! 6. [`issuance`]: [`rotation`](issuance::rotation) decides when a certificate is made or replaced (the moment is
//!    [`schedule`](issuance::rotation::schedule)'s, the turn is the [`planner`](issuance::rotation::planner)'s), orders it from an [`issuer`](issuance::issuer), and
//!    publishes nothing that [`verify`](issuance::issuer::verify) has not passed.
//! 7. [`cert_manager`] has the types of a CertificateRequest; [`agent_kube`] is the way to the API server: its pace
//!    ([`RequestRate`](agent_kube::RequestRate)), its time-outs and its watches.
//!
//! [`approver`] is another process: it decides which of the agents' requests are signed ([`judge`](::approver::judge)), and which of
//! several replicas decides ([`role`](::approver::role)). [`agent_runtime`] is below all of them: clock, shutdown, readiness, log, metrics.
//!
//! In this package, [`csi`] makes a socket for each pod, and the mount is the proof; [`warm`] orders certificates ahead of a pod's first
//! call; [`app::config_map_source`] offers a ConfigMap's roots to the server's trust; [`events`] reports trouble on pods; [`handover`] takes the socket over from a predecessor. [`config`] reads the configuration into
//! the settings of all parts. [`app`] composes them, and its inventory is the state of all certificates, for metrics and `certs`.
//! [`cli`] is the command line. No module imports its caller.

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
mod mountinfo;

pub mod admin;
pub mod process;

#[cfg(test)]
mod foreign_text;
#[cfg(test)]
mod interfaces;
#[cfg(test)]
mod metrics_reference;
