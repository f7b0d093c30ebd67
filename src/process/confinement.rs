//! Confines the process to what its configuration names: files, TCP ports and system calls.
//!
//! Landlock limits the files and the ports, a seccomp filter the system calls. Both are permanent, and threads and children that start later
//! inherit them. Neither needs a privilege, because the process first gives up to gain privileges (`no_new_privs`). A kernel without one of
//! them confines the process by the other.
//!
//! A confined agent may read the files that [`Access`] names, make and remove sockets in the directories of its sockets, and listen on its
//! TCP ports. It may not write a file, bind a socket elsewhere, start a program, or read the memory of another process. Outside of a
//! cluster a kubeconfig can name files anywhere, and a program that gets a token. Then every file can be read, and programs can start.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use nix::libc::{self, c_long};
#[cfg(target_arch = "x86_64")]
use seccompiler::sock_filter;
use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule};
use tracing::{info, warn};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::process";

/// The newest version of Landlock that is used: access to files and TCP ports, abstract sockets and signals.
const NEWEST: ABI = ABI::V6;
/// Directories that libraries read: name resolution, certificates, the list of processors, random numbers.
const OF_LIBRARIES: [&str; 9] =
    ["/etc", "/usr", "/lib", "/lib64", "/proc", "/sys/fs/cgroup", "/sys/devices/system/cpu", "/dev/null", "/dev/urandom"];

/// System calls that no part of the agent makes, and that an attacker would make next.
const DENIED: &[c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Mounts and namespaces; see also `NEW_NAMESPACES`.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_open_by_handle_at,
    // The kernel.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_personality,
    // The keyring of the kernel.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];
/// System calls that start a program.
const STARTS_PROGRAM: [c_long; 2] = [libc::SYS_execve, libc::SYS_execveat];

/// The flags of `clone` that make a namespace: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET. The flags of `clone3`
/// are in memory, which a filter cannot read.
const NEW_NAMESPACES: [u64; 7] = [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];

/// `confinement`: whether the process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Confine as far as the kernel supports it.
    Auto,
    /// Confine by Landlock and seccomp, and do not start if that is not possible.
    Always,
    /// Do not confine.
    Never,
}

/// The rights of a confined process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Directories below which sockets are made and removed. They must exist.
    pub sockets: Vec<PathBuf>,
    /// Files and directories that are read, with everything below them. Missing ones are left out. `None`: every file.
    pub reads: Option<Vec<PathBuf>>,
    /// TCP ports on which the process listens. Port 0 is one that the kernel chooses.
    pub ports: Vec<u16>,
    /// Whether programs may be started.
    pub starts_programs: bool,
}

/// The result for one of the two mechanisms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// In force, entirely.
    InForce,
    /// In force, as far as this kernel supports it.
    PartlyInForce,
    /// Not in force.
    No(NotConfined),
}

impl Outcome {
    /// Whether the mechanism is in force, at least partly.
    pub fn is_in_force(&self) -> bool {
        !matches!(self, Self::No(_))
    }
}

/// Why a mechanism is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotConfined {
    /// `confinement` is `never`.
    Never,
    /// The kernel does not support it, or it is turned off.
    Unavailable,
    /// The kernel refused it.
    Refused(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InForce => f.write_str("in force"),
            Self::PartlyInForce => f.write_str("in force, as far as this kernel supports it"),
            Self::No(NotConfined::Never) => f.write_str("confinement is never"),
            Self::No(NotConfined::Unavailable) => f.write_str("this kernel does not support it"),
            Self::No(NotConfined::Refused(cause)) => write!(f, "the kernel refused it: {cause}"),
        }
    }
}

/// The confinement of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confined {
    /// Files, ports, abstract sockets and signals.
    pub landlock: Outcome,
    /// System calls.
    pub seccomp: Outcome,
}

impl Confined {
    /// The outcomes by the names of the mechanisms.
    pub fn outcomes(&self) -> [(&'static str, &Outcome); 2] {
        [("landlock", &self.landlock), ("seccomp", &self.seccomp)]
    }

    /// The first mechanism that is not in force.
    pub fn missing(&self) -> Option<(&'static str, &Outcome)> {
        self.outcomes().into_iter().find(|(_, outcome)| !outcome.is_in_force())
    }

    /// Logs the outcomes in one line.
    pub fn log(&self, access: &Access) {
        let Self { landlock, seccomp } = self;
        let (reads_all, starts_programs) = (access.reads.is_none(), access.starts_programs);
        if self.missing().is_none() || *landlock == Outcome::No(NotConfined::Never) {
            info!(target: LOG_TARGET, %landlock, %seccomp, reads_all, starts_programs, "process confined");
        } else {
            warn!(target: LOG_TARGET, %landlock, %seccomp, reads_all, starts_programs, "process confined only partly");
        }
    }
}

/// Confines this process permanently. Call it before the first thread starts.
pub fn confine(policy: Policy, access: &Access) -> Confined {
    if policy == Policy::Never {
        let never = Outcome::No(NotConfined::Never);
        return Confined { landlock: never.clone(), seccomp: never };
    }
    let refused = |error: &dyn fmt::Display| Outcome::No(NotConfined::Refused(error.to_string()));
    Confined {
        landlock: landlock(access).unwrap_or_else(|error| refused(&error)),
        seccomp: seccomp(access).unwrap_or_else(|error| refused(&error)),
    }
}

fn landlock(access: &Access) -> Result<Outcome, RulesetError> {
    let reads = AccessFs::ReadFile | AccessFs::ReadDir;
    let everything = [PathBuf::from("/")];
    let named = access.reads.as_deref().unwrap_or(&everything);
    let of_libraries = OF_LIBRARIES.map(PathBuf::from);
    // A program that gets a token may write files, such as a cache.
    let handled = if access.starts_programs {
        AccessFs::MakeSock | AccessFs::MakeBlock | AccessFs::MakeChar | reads
    } else {
        AccessFs::from_all(NEWEST)
    };
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(handled)?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for path in named.iter().chain(&of_libraries) {
        rules = allow(rules, path, reads)?;
    }
    for directory in &access.sockets {
        rules = allow(rules, directory, (AccessFs::MakeSock | AccessFs::RemoveFile | reads) & handled)?;
    }
    for port in &access.ports {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Outcome::InForce,
        RulesetStatus::PartiallyEnforced => Outcome::PartlyInForce,
        RulesetStatus::NotEnforced => Outcome::No(NotConfined::Unavailable),
    })
}

/// Allows `rights` at `path` and below. A path that cannot be opened is left out.
fn allow(rules: RulesetCreated, path: &Path, rights: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    let Ok(opened) = PathFd::new(path) else { return Ok(rules) };
    let rights = if path.is_dir() { rights } else { rights & AccessFs::from_file(NEWEST) };
    rules.add_rule(PathBeneath::new(opened, rights))
}

fn seccomp(access: &Access) -> Result<Outcome, seccompiler::Error> {
    let programs = if access.starts_programs { &[][..] } else { &STARTS_PROGRAM[..] };
    let mut denied: BTreeMap<_, _> = DENIED.iter().chain(programs).map(|call| (*call, Vec::new())).collect();
    let makes = |flag: &u64| {
        let is_set = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(*flag), *flag)?;
        SeccompRule::new(vec![is_set])
    };
    let namespaces = NEW_NAMESPACES.iter().map(makes).collect::<Result<Vec<_>, seccompiler::BackendError>>();
    denied.insert(libc::SYS_clone, namespaces.map_err(seccompiler::Error::Backend)?);
    let Ok(architecture) = std::env::consts::ARCH.try_into() else { return Ok(Outcome::No(NotConfined::Unavailable)) };
    let eperm = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let mut filter: BpfProgram = SeccompFilter::new(denied, SeccompAction::Allow, eperm, architecture)?.try_into()?;
    deny_x32(&mut filter);
    seccompiler::apply_filter(&filter)?;
    Ok(Outcome::InForce)
}

/// Denies the calls of the x32 ABI, whose numbers have bit 30 set. The kernel reports them as calls of x86-64, so they would pass a filter
/// that lists numbers.
#[cfg(target_arch = "x86_64")]
fn deny_x32(filter: &mut BpfProgram) {
    /// After the check of the architecture: load it, compare it, kill.
    const AT: usize = 3;
    const LOAD: u16 = 0x20;
    let load_number = sock_filter { code: LOAD, jt: 0, jf: 0, k: 0 };
    let skip_unless_x32 = sock_filter { code: 0x35, jt: 0, jf: 1, k: 0x4000_0000 };
    let eperm = sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x0005_0000 | libc::EPERM.unsigned_abs() };
    // Jumps are relative, and none leads over this place.
    if filter.get(AT).is_some_and(|next| next.code == LOAD && next.k == 0) {
        filter.splice(AT..AT, [load_number, skip_unless_x32, eperm]);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn deny_x32(_: &mut BpfProgram) {}
