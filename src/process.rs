//! Hardens the process before it holds a key: no core dumps, not dumpable, memory locked, file descriptor limit raised.
//!
//! Owns these process-wide settings and the report about them. The caller runs [`harden`] once, at the start of `main` and before it starts
//! threads, and logs the result as soon as there is a log. [`memory`] decides whether memory is locked.
//!
//! `RLIMIT_CORE` alone is not enough: the kernel ignores it if `core_pattern` pipes dumps to a program. A process that is not dumpable has
//! no core dump at all, and other processes of the same user cannot read its memory with ptrace or `/proc`.

use nix::{
    errno::Errno,
    sys::{
        prctl,
        resource::{Resource, getrlimit, rlim_t, setrlimit},
    },
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

pub mod confinement;
pub mod memory;

pub use memory::{Locked, Unlocked};

use confinement::Confined;

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::process";

/// When key memory is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMemory {
    /// Lock if the process may lock memory without a limit and the machine has swap.
    Auto,
    /// Lock, and do not start if that is not possible.
    Always,
    /// Do not lock.
    Never,
}

/// The process cannot be hardened, so it must not hold keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `keys.lockMemory` is `always`, and memory cannot be locked.
    #[error("keys.lockMemory is always, but {0}")]
    NotLocked(Unlocked),
    /// The kernel refused a setting that it usually allows; a sandbox may be the cause.
    #[error("cannot {action}: {cause}")]
    Refused {
        /// The operation that failed.
        action: &'static str,
        /// The kernel's error.
        cause: Errno,
    },
}

/// The result of hardening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hardened {
    /// Whether key memory can reach swap.
    pub locked: Locked,
    /// The limit of open file descriptors. A connection uses two.
    pub open_files: OpenFiles,
}

/// The file descriptor limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFiles {
    /// The soft limit in force.
    pub limit: u64,
    /// The soft limit at the start of the process.
    pub before: u64,
}

/// Hardens this process permanently.
///
/// # Errors
///
/// The kernel refuses a setting, or memory is not locked although `policy` requires it.
pub fn harden(policy: LockMemory) -> Result<Hardened, Error> {
    let refused = |action| move |cause| Error::Refused { action, cause };
    // The hard limit too, so that the soft limit cannot be raised again.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("set RLIMIT_CORE to 0"))?;
    prctl::set_dumpable(false).map_err(refused("make the process not dumpable"))?;
    let open_files = raise_open_files().map_err(refused("read RLIMIT_NOFILE"))?;
    let locked = memory::lock(policy).map_err(Error::NotLocked)?;
    Ok(Hardened { locked, open_files })
}

/// Raises the soft limit to the hard limit. If the kernel refuses, because the hard limit exceeds its maximum, the limit stays.
fn raise_open_files() -> Result<OpenFiles, Errno> {
    let (soft, hard): (rlim_t, rlim_t) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = soft >= hard || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    Ok(OpenFiles { limit: if raised { hard } else { soft }, before: soft })
}

impl Hardened {
    /// Logs the result in one line.
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

/// The metrics of hardening.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    memory_locked: Gauge,
    confined: Family<By, Gauge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct By {
    by: &'static str,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "memory_locked",
            "1 if the memory of the process is locked, so that it is never swapped out; 0 if it is not locked",
            metrics.memory_locked.clone(),
        );
        registry.register("confined", "1 if the process is confined by this mechanism, else 0 (`confinement`)", metrics.confined.clone());
        metrics
    }

    /// Registers the metrics and makes every series, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        for by in ["landlock", "seccomp"] {
            metrics.confined.get_or_create(&By { by }).set(1);
        }
    }

    /// Sets the gauges from the results of hardening and confinement.
    pub fn observe(&self, hardened: &Hardened, confined: &Confined) {
        self.memory_locked.set(i64::from(hardened.locked == Locked::Yes));
        for (by, outcome) in confined.outcomes() {
            self.confined.get_or_create(&By { by }).set(outcome.is_in_force().into());
        }
    }
}

#[cfg(test)]
mod tests;
