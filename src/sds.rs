//! The secret discovery service (SDS v3): names, the state of a stream, encoding, and the service itself.

pub mod held;
pub mod metrics;
pub mod names;
pub mod secret;
pub mod service;
pub mod spread;
pub mod stream;
