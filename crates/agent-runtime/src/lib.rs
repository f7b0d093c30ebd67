//! The common parts of a node agent's process. This crate knows neither certificates nor xDS nor Kubernetes.
//!
//! - [`clock`]: wall-clock time that may be stepped, and waits that follow it;
//! - [`readiness`] and [`shutdown`]: when the process is ready, and how it ends;
//! - [`telemetry`]: the log, whose writer never delays service, and its rate limit;
//! - [`metrics`]: the page of metrics and the process's own;
//! - [`file`](mod@file): a file that is followed through replacements;
//! - [`token_bucket`]: rates with a burst;
//! - [`text`]: foreign text in errors and logs: cut, sanitised, and without keys.

pub mod clock;
pub mod file;
pub mod metrics;
pub mod readiness;
pub mod shutdown;
pub mod telemetry;
pub mod text;
pub mod token_bucket;
