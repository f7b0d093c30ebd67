//! The secret discovery service (SDS v3): resource names, stream state, encoding, and the service itself.
//!
//! Envoy describes SDS in its [configuration reference](https://www.envoyproxy.io/docs/envoy/latest/configuration/security/secret).

pub mod client_version;
pub mod encoded;
pub mod holdings;
pub mod metrics;
pub mod names;
pub mod reissue_window;
pub mod secret;
pub mod service;
pub mod stream;
