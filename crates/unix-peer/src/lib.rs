//! Parts for servers on Unix sockets: a listener, callers by their processes, and a filter for HTTP/2. The server itself is its user's, such
//! as `hyper::server::conn::http2`; `sds-server` shows how the parts are joined (`session.rs`).
//!
//! - [`peer`] takes a caller's credentials and a handle on its process (`SO_PEERPIDFD`), which no later owner of its pid inherits.
//! - [`listener`] binds a socket under a temporary name and renames it into place, so that one server replaces another without a gap.
//! - [`authority_rewrite`] lets an HTTP/2 server take requests of any `:authority`: the `h2` crate rejects a socket's path
//!   (<https://github.com/hyperium/h2/issues/487>).
//! - [`fd`] waits for descriptors that the kernel makes readable.

// It writes no file; its tests do.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod authority_rewrite;
pub mod fd;
pub mod listener;
pub mod peer;
