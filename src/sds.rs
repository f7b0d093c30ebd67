//! The secret discovery service (SDS v3): names, the state of a stream, encoding, and the service itself.

pub mod names;
pub mod stream;
