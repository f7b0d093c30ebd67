//! sds-agent: one agent per node that serves Envoy's secret discovery service (SDS v3) from cert-manager.
//!
//! This package composes the libraries in `crates/` into the agent, the approver and the command line. A client's request passes through
//! them in this order. The documentation of each crate has the details:
//!
//! 1. [`unix_peer`]: [`listener`](unix_peer::listener) binds the Unix socket. [`peer`](unix_peer::peer) reads the caller's
//!    credentials and takes a pidfd of its process.
//! 2. [`sds_server`]: [`session`](sds_server::session) accepts the connection and counts it against the caller's
//!    [`quotas`](sds_server::session::quotas). [`caller`](sds_server::caller) calls the attestor once for each connection, and makes the
//!    gRPC status of a caller that has no identity.
//! 3. [`attest_kubernetes`]: the [`attestor`](attest_kubernetes::attestor) finds the workload of a peer on a node: peer, cgroup, pod,
//!    service account.
//! 4. [`workload_identity`]: the [`Resolver`](workload_identity::Resolver) derives the workload's identity and picks the profile of its
//!    certificate.
//! 5. [`sds_server`] again: [`sds::service`](sds_server::sds::service) (each stream in its `drive.rs`) subscribes to that identity in the
//!    [`store`](sds_server::store) and answers with [`material`](sds_server::material) and [`trust`](sds_server::trust) bundles.
//!    [`sds::stream`](sds_server::sds::stream) keeps the protocol's state (versions, nonces, NACKs).
//!    [`sds::holdings`](sds_server::sds::holdings) keeps the certificates that the client already holds. Neither does I/O.
//! 6. [`issuance`]: [`rotation`](issuance::rotation) orders and renews certificates from an [`issuer`](issuance::issuer).
//!    [`schedule`](issuance::rotation::schedule) computes the renewal time, [`planner`](issuance::rotation::planner) the order in which
//!    requests start. Rotation publishes a certificate only after [`verify`](issuance::issuer::verify) has accepted it.
//! 7. [`cert_manager`] has the types of a CertificateRequest. [`agent_kube`] is the client of the API server: rate limit
//!    ([`RequestRate`](agent_kube::RequestRate)), timeouts and watches.
//!
//! [`approver`] runs in another process. It decides which of the agents' requests cert-manager may sign ([`judge`](::approver::judge)),
//! and which of several replicas decides ([`role`](::approver::role)). Agent and approver both use [`agent_runtime`]: clock, shutdown,
//! readiness, log, metrics.
//!
//! The modules of this package:
//!
//! - [`pod_sockets`] serves one socket for each pod; the mount proves which pod a caller is. [`csi`] is the mount helper, which runs in
//!   another process and mounts the sockets' directories; [`per_pod`] is what both share.
//! - [`warm`] orders certificates before a pod's first call.
//! - [`app::config_map_source`] reads trust roots from a ConfigMap, [`app::cluster_trust_bundle_source`] from ClusterTrustBundles.
//! - [`events`] writes Kubernetes Events on pods that get no certificate.
//! - [`handover`] takes the shared socket over from a predecessor.
//! - [`config`] reads the configuration into the settings of all parts.
//! - [`app`] composes them. Its inventory reports the state of all certificates, for metrics and `certs`.
//! - [`admin`] serves probes, metrics and the admin endpoints; [`process`] hardens the process.
//! - [`cli`] is the command line.
//!
//! No module imports the module that calls it.

// `clippy.toml` disallows methods that write files. The agent writes none; its tests do.
#![cfg_attr(test, allow(clippy::disallowed_methods))]
// The interface of this package is its command line; the libraries are in `crates/`.
#![allow(clippy::missing_errors_doc)]

pub mod csi;
pub mod per_pod;
pub mod pod_sockets;

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
