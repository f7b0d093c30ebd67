//! A server of Envoy's secret discovery service (SDS v3) on Unix sockets: state-of-the-world (SotW), incremental (delta) and unary.
//!
//! A request passes the modules in this order:
//!
//! 1. [`session`] accepts a connection, counts it against the quota of its caller and serves HTTP/2 on it.
//! 2. [`caller`] calls an [`attest::Attestor`] once for each connection: it proves which workload the peer is. A caller without an identity
//!    gets a gRPC status.
//! 3. [`sds`] (resource names, stream state, encoding) subscribes to that identity in the [`store`] and responds with [`material`] and
//!    [`trust`] bundles.
//! 4. [`grpc`] frames messages without copies of keys. It also serves other gRPC services, such as health, on the same socket.
//!
//! The user of this crate supplies an attestor, a resolver that maps workloads to identities, and a task that publishes certificates into
//! the [`store`]. [`server::Builder`] joins them with the parts of this crate. `examples/embed.rs` is a complete server.

// The library writes no file; its tests do.
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
