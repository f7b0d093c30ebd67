//! Locks the whole address space, so that no key reaches swap: the decision, the facts for it, and the system call.
//!
//! The process locks all its memory and not single buffers, because copies of keys pass through HTTP/2 buffers and stacks. `MLOCK_ONFAULT`
//! locks a page when it is first used, so that reserved but unused memory costs nothing.
//!
//! With a finite `RLIMIT_MEMLOCK` and without `CAP_IPC_LOCK`, `mlockall` succeeds, but the first mapping beyond the limit fails: a thread
//! does not start, or an allocation aborts the process. Therefore any finite limit counts as "not allowed".

use std::{fmt, fs, io};

use rustix::{
    io::Errno,
    mm::{MlockAllFlags, mlockall},
    process::{Resource, getrlimit},
    thread::{CapabilitySet, capabilities},
};

use crate::process::LockMemory;

/// The kernel's list of swap areas.
const SWAPS: &str = "/proc/swaps";

/// Whether memory is locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Locked {
    /// All memory is locked, including later mappings.
    Yes,
    /// No memory is locked.
    No(Unlocked),
}

/// Why memory is not locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unlocked {
    /// `keys.lockMemory` is `never`.
    Never,
    /// The machine has no swap.
    NoSwap,
    /// The process has neither `CAP_IPC_LOCK` nor an unlimited `RLIMIT_MEMLOCK`.
    NotAllowed {
        /// The soft `RLIMIT_MEMLOCK`, in bytes.
        limit: u64,
    },
    /// `mlockall` failed.
    Refused(Errno),
}

impl fmt::Display for Unlocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("keys.lockMemory is never"),
            Self::NoSwap => f.write_str("this machine has no swap"),
            Self::NotAllowed { limit } => write!(
                f,
                "memory cannot be locked without a limit (RLIMIT_MEMLOCK is {limit} bytes); \
                 give the agent the IPC_LOCK capability or an unlimited RLIMIT_MEMLOCK"
            ),
            Self::Refused(cause) => write!(f, "the kernel refused to lock memory: {cause}"),
        }
    }
}

/// The facts for the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// `CAP_IPC_LOCK` is in the effective set. Root in a container does not always have it.
    pub capability: bool,
    /// The soft `RLIMIT_MEMLOCK` in bytes; `None` if unlimited.
    pub limit: Option<u64>,
    /// The machine has swap. Swap that is turned on later is not noticed.
    pub swap: bool,
}

impl Facts {
    /// Reads the facts of this thread and this machine. If a fact cannot be read, it counts as no capability, or as swap.
    fn gather() -> Self {
        let capability = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
        let limit = getrlimit(Resource::Memlock).current;
        let swap = match fs::read_to_string(SWAPS) {
            Ok(table) => lists_swap(&table),
            // A kernel without swap support has no such file.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        };
        Self { capability, limit, swap }
    }
}

/// Whether the content of `/proc/swaps` has an entry below its heading.
fn lists_swap(table: &str) -> bool {
    table.lines().skip(1).any(|line| !line.trim().is_empty())
}

/// The decision whether to lock memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Lock memory.
    Lock,
    /// Continue without locking.
    Skip(Unlocked),
    /// Do not start.
    Fail(Unlocked),
}

/// Decides by `policy` and `facts`.
pub fn decide(policy: LockMemory, facts: Facts) -> Decision {
    let refusal = match facts {
        Facts { capability: true, .. } | Facts { limit: None, .. } => None,
        Facts { limit: Some(limit), .. } => Some(Unlocked::NotAllowed { limit }),
    };
    match (policy, refusal) {
        (LockMemory::Never, _) => Decision::Skip(Unlocked::Never),
        (LockMemory::Auto, _) if !facts.swap => Decision::Skip(Unlocked::NoSwap),
        (LockMemory::Auto, Some(reason)) => Decision::Skip(reason),
        (LockMemory::Always, Some(reason)) => Decision::Fail(reason),
        (LockMemory::Auto | LockMemory::Always, None) => Decision::Lock,
    }
}

/// The decision for this process now, without locking.
pub fn forecast(policy: LockMemory) -> Decision {
    decide(policy, Facts::gather())
}

/// Decides and locks. An error means that the process must not continue under `policy`.
pub(super) fn lock(policy: LockMemory) -> Result<Locked, Unlocked> {
    match decide(policy, Facts::gather()) {
        Decision::Skip(reason) => Ok(Locked::No(reason)),
        Decision::Fail(reason) => Err(reason),
        Decision::Lock => match mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT) {
            Ok(()) => Ok(Locked::Yes),
            Err(cause) if policy == LockMemory::Always => Err(Unlocked::Refused(cause)),
            Err(cause) => Ok(Locked::No(Unlocked::Refused(cause))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_locked_where_it_is_allowed_without_a_limit_and_needed() {
        use LockMemory::{Always, Auto, Never};
        let refused = Unlocked::NotAllowed { limit: 8 << 20 };
        let (finite, unlimited) = (Some(8 << 20), None);
        #[rustfmt::skip]
        let table = [
            // policy, capability, limit, swap → decision
            (Never,  true,  unlimited, true,  Decision::Skip(Unlocked::Never)),
            (Never,  false, finite,    false, Decision::Skip(Unlocked::Never)),
            (Auto,   true,  finite,    true,  Decision::Lock),
            (Auto,   false, unlimited, true,  Decision::Lock),
            (Auto,   false, finite,    true,  Decision::Skip(refused)),
            (Auto,   true,  unlimited, false, Decision::Skip(Unlocked::NoSwap)),
            (Auto,   false, finite,    false, Decision::Skip(Unlocked::NoSwap)),
            (Always, true,  finite,    true,  Decision::Lock),
            (Always, true,  finite,    false, Decision::Lock),
            (Always, false, unlimited, false, Decision::Lock),
            (Always, false, finite,    true,  Decision::Fail(refused)),
            (Always, false, finite,    false, Decision::Fail(refused)),
        ];
        for (policy, capability, limit, swap, expected) in table {
            let facts = Facts { capability, limit, swap };
            assert_eq!(decide(policy, facts), expected, "{policy:?} {facts:?}");
        }
    }

    #[test]
    fn swap_is_what_stands_below_the_heading() {
        const HEADING: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert!(!lists_swap(""));
        assert!(!lists_swap(HEADING));
        assert!(lists_swap(&format!("{HEADING}/dev/zram0  partition\t1048572\t0\t100\n")));
    }
}
