//! Common parts of a node agent's process. This crate contains nothing about certificates, xDS or Kubernetes.
//!
//! - [`clock`]: wall-clock time that may be stepped, and waits that follow it;
//! - [`readiness`] and [`shutdown`]: the process's readiness, and its end;
//! - [`telemetry`]: the log, whose writer never delays service, and its rate limit;
//! - [`metrics`]: the metrics page, and the process's own metrics;
//! - [`file`](mod@file): a file that is followed through replacements;
//! - [`token_bucket`]: rates with a burst;
//! - [`text`]: untrusted text in errors and logs: truncated, sanitised, and without keys.

pub mod clock;
pub mod file;
pub mod metrics;
pub mod readiness;
pub mod shutdown;
pub mod telemetry;
pub mod text;
pub mod token_bucket;
