//! X.509 as Envoy reads and verifies it.
//!
//! A server of secrets must accept what its clients accept, and nothing else: a certificate that a peer refuses is an outage with a healthy
//! server, and one that the server alone refuses is an outage without a way out. Envoy uses BoringSSL, which builds one path and is strict in
//! other places than other implementations. This crate follows it:
//!
//! - [`Certificate::from_der`] reads what Envoy reads. One certificate that Envoy cannot read makes it reject a whole bundle.
//! - [`verify`] accepts a chain if all [supported releases](Release) accept it, on both sides of TLS.
//! - [`RevocationList`] and [`check_revocation`] do the same for revocation lists.
//!
//! All functions are pure and take the time. Signatures are verified with `aws-lc-rs`. The test `real_envoys::shapes` offers each shape of
//! certificate to this crate and to real Envoys and compares. Envoys that are built with OpenSSL are not tested.

use std::fmt;

pub use certificate::Certificate;
pub use constraints::{GeneralName, Names};
pub use crl::{ListRefusal, RevocationList, check_revocation};
pub use extension::{ExtendedKeyUsage, Extensions, KeyUsage, Side};
pub use name::Name;
pub use path::{Path, Place, Reason, Refusal, verify};
pub use signature::PublicKey;
pub use time::Time;

mod certificate;
mod constraints;
mod crl;
mod der;
mod extension;
mod name;
mod path;
mod policy;
mod signature;
mod time;

/// A fault of a certificate or a revocation list, in words that follow its name. It has no content of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault(&'static str);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Fault {}

/// The oldest and the newest supported release of Envoy. Their rules differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Release {
    /// Envoy 1.36.
    V1_36,
    /// Envoy 1.40.
    V1_40,
}

impl Release {
    /// All of them, the oldest first.
    pub const ALL: [Self; 2] = [Self::V1_36, Self::V1_40];
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1_36 => "1.36",
            Self::V1_40 => "1.40",
        })
    }
}
