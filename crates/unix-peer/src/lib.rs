//! Building blocks of servers on Unix sockets: a listener, peer credentials, and an HTTP/2 filter. The user brings the server, such as
//! `hyper::server::conn::http2`; `session.rs` of `sds-server` shows how to combine them.
//!
//! - [`peer`] reads the credentials of a caller and a handle on its process (`SO_PEERPIDFD`), which pid reuse does not affect.
//! - [`listener`] binds a socket under a temporary name and renames it into place, so that one server replaces another without a gap.
//! - [`socket_file`] looks at the socket of another process, connects to exactly that one, and waits until its path leads elsewhere.
//! - [`authority_rewrite`] replaces the `:authority` of HTTP/2 requests, because the `h2` crate rejects the path of a socket
//!   (hyperium/h2#487).
//! - [`fd`] registers file descriptors with tokio.

// The crate writes no file; its tests do.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod authority_rewrite;
pub mod fd;
pub mod listener;
pub mod peer;
pub mod socket_file;
