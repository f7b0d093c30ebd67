//! The version and the source revision of this build.

/// The version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The source revision: `SDS_AGENT_REVISION` at build time, `unknown` if it was not set.
pub const REVISION: &str = match option_env!("SDS_AGENT_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};
