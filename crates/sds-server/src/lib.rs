//! A server of Envoy's secret discovery service (SDS v3): state-of-the-world, incremental and unary, on Unix sockets.
//!
//! A request passes the modules in this order:
//!
//! 1. [`session`] accepts a connection, counts it against its caller's quota and serves HTTP/2 on it;
//! 2. [`caller`] has an [`attest::Attestor`] prove which workload the peer is, once for each connection, and makes the status of a caller
//!    that has no identity;
//! 3. [`sds`] (names, pure stream state, encoding) subscribes to that identity in the [`store`] and answers with [`material`] and
//!    [`trust`] bundles;
//! 4. [`grpc`] frames messages without copies of keys, and serves other gRPC services beside.
//!
//! The user of this crate gives an attestor, a resolver from workloads to identities, and something that publishes certificates into the
//! [`store`]; [`server::Builder`] joins the rest. `examples/embed.rs` is a whole server.

// It writes no file; its tests do.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod attest;
pub mod caller;
pub mod grpc;
pub mod limits;
pub mod material;
pub mod proto;
pub mod sds;
pub mod server;
pub mod session;
pub mod store;
pub mod trust;
