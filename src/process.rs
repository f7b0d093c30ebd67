//! What the process does to itself before it holds a key: no core dump, not dumpable, memory locked, enough file descriptors.
//!
//! Owns those process-wide settings and the report about them. The caller runs [`harden`] once, at the start of `main` and before there
//! are other threads, and logs what it returns as soon as there is a log. Whether memory is locked is a pure decision ([`memory`]).
//!
//! `RLIMIT_CORE` alone is not enough: the kernel ignores it where dumps are piped to a program. Not being dumpable covers that, and keeps
//! other processes of the same user from reading our memory by ptrace or `/proc`.

use nix::{
    errno::Errno,
    sys::{
        prctl,
        resource::{Resource, getrlimit, rlim_t, setrlimit},
    },
};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};

pub mod memory;

pub use memory::{Locked, Unlocked};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::process";

/// When key memory is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMemory {
    /// Where it is allowed without a limit and there is swap.
    Auto,
    /// Or do not start.
    Always,
    /// Not at all.
    Never,
}

/// Why the process must not go on to hold keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `keys.lockMemory: always`, and it cannot be had.
    #[error("keys.lockMemory is always, but {0}")]
    NotLocked(Unlocked),
    /// A setting that the kernel always allows was refused: a sandbox is in the way.
    #[error("cannot {action}: {cause}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        cause: Errno,
    },
}

/// What was achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hardened {
    /// Whether key memory can reach swap.
    pub locked: Locked,
    /// How many descriptors may be open: a connection takes two.
    pub open_files: OpenFiles,
}

/// The file descriptor limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFiles {
    /// What holds now.
    pub limit: u64,
    /// What held at the start.
    pub before: u64,
}

/// Hardens this process. Nothing of it is undone.
pub fn harden(policy: LockMemory) -> Result<Hardened, Error> {
    let refused = |action| move |cause| Error::Refused { action, cause };
    // The hard limit too, so that nothing raises it again.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("set RLIMIT_CORE to 0"))?;
    prctl::set_dumpable(false).map_err(refused("make the process not dumpable"))?;
    let open_files = raise_open_files().map_err(refused("read RLIMIT_NOFILE"))?;
    let locked = memory::lock(policy).map_err(Error::NotLocked)?;
    Ok(Hardened { locked, open_files })
}

/// Raises the soft limit to the hard one. A refusal (a hard limit above the kernel's own maximum) leaves it as it was.
fn raise_open_files() -> Result<OpenFiles, Errno> {
    let (soft, hard): (rlim_t, rlim_t) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = soft >= hard || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    Ok(OpenFiles { limit: if raised { hard } else { soft }, before: soft })
}

impl Hardened {
    /// The one line about it.
    pub fn log(&self) {
        let (locked, why_not) = match &self.locked {
            Locked::Yes => (true, None),
            Locked::No(reason) => (false, Some(reason.to_string())),
        };
        tracing::info!(
            target: LOG_TARGET, memory_locked = locked,
            why_not,
            dumpable = false,
            core_dumps = false,
            open_files = self.open_files.limit,
            "process hardened"
        );
    }
}

/// What the process tells about its hardening.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    memory_locked: Gauge,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "memory_locked",
            "1 when no memory of the process can be swapped out, 0 when it can or was not asked to stay",
            metrics.memory_locked.clone(),
        );
        metrics
    }

    /// Registers and shows them all, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry);
    }

    /// Takes over what was achieved.
    pub fn observe(&self, hardened: &Hardened) {
        self.memory_locked.set(i64::from(hardened.locked == Locked::Yes));
    }
}

#[cfg(test)]
mod tests;
