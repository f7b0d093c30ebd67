//! A handle on a process by its pid, for kernels without `SO_PEERPIDFD`. It is taken shortly after the connection.
//!
//! `/proc/<pid>` is opened once, and every file is read relative to that descriptor. If the pid is reused later, reads fail, and never
//! return data of the new process. A reuse of the pid before the directory was opened cannot be detected; the effective user and group
//! have to be those of the credentials.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Maximum number of bytes that are read of a file in `/proc/<pid>`.
const MAX_BYTES: u64 = 16 << 10;

/// The directory of a process in `/proc`, and the start time of the process.
#[derive(Debug)]
pub struct ProcfsHandle {
    directory: OwnedFd,
    started: u64,
}

impl ProcfsHandle {
    /// Records the process that has `pid` now. `proc` is the mount point of procfs.
    ///
    /// # Errors
    ///
    /// `NotFound` if no process has the pid, the process is a zombie, or its effective user or group is not `uid` or `gid`. Other errors
    /// if procfs cannot be read.
    pub fn take(proc: &Path, pid: i32, uid: u32, gid: u32) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, proc.join(pid.to_string()), flags, Mode::empty())?;
        let started = started(&read(&directory, "stat")?)?;
        let status = read(&directory, "status")?;
        if effective_ids(&status) == Some((uid, gid)) { Ok(Self { directory, started }) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Returns the directory of the process in `/proc`.
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Returns whether the recorded process still runs.
    pub fn is_alive(&self) -> bool {
        read(&self.directory, "stat").and_then(|stat| started(&stat)).is_ok_and(|started| started == self.started)
    }

    /// Returns a pidfd of the recorded process, if the kernel supports `pidfd_open` (Linux 5.3) and the process still runs.
    pub fn pidfd(&self, pid: i32) -> Option<OwnedFd> {
        let handle = open(pid).ok()?;
        // If the pid has been reused, the recorded process has ended.
        self.is_alive().then_some(handle)
    }
}

/// Returns a pidfd of the process that has this pid now.
pub(super) fn open(pid: i32) -> io::Result<OwnedFd> {
    Ok(pidfd_open(Pid::from_raw(pid).ok_or(Errno::SRCH)?, PidfdFlags::empty())?)
}

/// Returns the effective user and group IDs in `/proc/<pid>/status`, the second of four numbers. `SO_PEERCRED` has effective IDs too.
pub(super) fn effective_ids(status: &str) -> Option<(u32, u32)> {
    let id = |field: &str| status.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().nth(1)?.parse::<u32>().ok());
    Some((id("Uid:")?, id("Gid:")?))
}

fn read(directory: &OwnedFd, name: &str) -> io::Result<String> {
    let file = File::from(openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Returns the start time in `/proc/<pid>/stat`, in clock ticks since boot. `NotFound` for a zombie.
fn started(stat: &str) -> io::Result<u64> {
    // The second field is the program's name in parentheses, which may contain any character.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or(Vec::new(), |(_, rest)| rest.split_whitespace().collect());
    match (fields.first(), fields.get(19).and_then(|ticks| ticks.parse().ok())) {
        (Some(&("Z" | "X" | "x")), _) => Err(io::ErrorKind::NotFound.into()),
        (_, Some(ticks)) => Ok(ticks),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a stat file without a start time")),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use rustix::{
        event::{PollFd, PollFlags, poll},
        process::{getegid, geteuid},
    };

    use super::*;

    fn ids() -> (u32, u32) {
        (geteuid().as_raw(), getegid().as_raw())
    }

    #[test]
    fn a_process_is_recorded_until_it_ends_even_before_it_is_reaped() {
        let (uid, gid) = ids();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let procfs_handle = ProcfsHandle::take(Path::new("/proc"), pid, uid, gid).unwrap();
        assert!(procfs_handle.is_alive() && procfs_handle.pidfd(pid).is_some());
        let pidfd = procfs_handle.pidfd(pid).unwrap();
        child.kill().unwrap();
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
        assert!(!procfs_handle.is_alive(), "it has ended, and is not reaped yet");
        child.wait().unwrap();
        assert!(!procfs_handle.is_alive() && procfs_handle.pidfd(pid).is_none());
        assert!(ProcfsHandle::take(Path::new("/proc"), pid, uid, gid).is_err());
    }

    #[test]
    fn another_users_process_is_not_the_one_that_connected() {
        let (uid, gid) = ids();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(ProcfsHandle::take(Path::new("/proc"), pid, uid, gid).unwrap().is_alive());
        for (uid, gid) in [(uid + 1, gid), (uid, gid + 1)] {
            assert_eq!(ProcfsHandle::take(Path::new("/proc"), pid, uid, gid).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }

    #[test]
    fn a_later_start_is_another_process_whatever_its_name_says() {
        let proc = tempfile::tempdir().unwrap();
        let (directory, stat) =
            (proc.path().join("7"), |state: &str, ticks: u64| format!("7 (a) S 1 (b) {state}{}{ticks} 0 0\n", " 1 ".repeat(18)));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("status"), "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n").unwrap();
        fs::write(directory.join("stat"), stat("S", 4711)).unwrap();
        let procfs_handle = ProcfsHandle::take(proc.path(), 7, 2, 6).unwrap();
        assert!(procfs_handle.is_alive());
        for (state, ticks) in [("S", 4712), ("Z", 4711)] {
            fs::write(directory.join("stat"), stat(state, ticks)).unwrap();
            assert!(!procfs_handle.is_alive(), "{state} {ticks}");
        }
        for broken in ["", "7 (x", "7 (x) S 1 2 3"] {
            fs::write(directory.join("stat"), broken).unwrap();
            assert!(!procfs_handle.is_alive() && ProcfsHandle::take(proc.path(), 7, 2, 6).is_err(), "{broken}");
        }
    }
}
