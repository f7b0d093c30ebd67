//! The secret discovery service (SDS v3): names, the state of a stream, encoding, and the service itself.

pub mod client_version;
pub mod encoded;
pub mod holdings;
pub mod metrics;
pub mod names;
pub mod reissue_window;
pub mod secret;
pub mod service;
pub mod stream;
