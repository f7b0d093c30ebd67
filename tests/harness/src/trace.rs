//! The file accesses and process settings of a process, recorded by strace.

use std::{fs, path::Path, time::Duration};

use crate::eventually;

/// Flags of an `open` that can change a file.
const WRITING: [&str; 6] = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"];

/// Files to which a write does not reach a disk.
const HARMLESS: [&str; 1] = ["\"/dev/null\""];

/// The words before a program that record file accesses, memory files and process settings in `log`, for its child processes too. The
/// tracer is a grandchild (`-D`): the process that is started is the program itself.
pub fn wrapper(strace: &Path, log: &Path) -> Vec<String> {
    let plain = |path: &Path| path.to_str().expect("a plain path").to_owned();
    let mut words = vec![plain(strace)];
    words.extend(["-D", "-f", "--seccomp-bpf", "-s", "256", "-e", "trace=%file,memfd_create,prctl", "-o"].map(str::to_owned));
    words.push(plain(log));
    words
}

/// Waits until the end of the traced program has been recorded.
pub async fn read(log: &Path, limit: Duration) -> String {
    eventually("the trace is whole", limit, async || {
        let trace = fs::read_to_string(log).map_err(|e| e.to_string())?;
        let last = trace.lines().last().unwrap_or_default().to_owned();
        if last.contains("+++ exited with ") || last.contains("+++ killed by ") { Ok(trace) } else { Err(last) }
    })
    .await
}

/// All calls that opened, created or truncated a file for writing, including failed ones.
pub fn writes(trace: &str) -> Vec<&str> {
    trace.lines().filter(|line| is_write(line)).collect()
}

fn is_write(line: &str) -> bool {
    // `1234  openat(AT_FDCWD, "/path", O_RDONLY) = 3`
    let Some((call, arguments)) = line.split_once('(') else { return false };
    let call = call.rsplit(' ').next().unwrap_or_default();
    match call {
        "open" | "openat" | "openat2" => {
            WRITING.iter().any(|flag| arguments.contains(flag)) && !HARMLESS.iter().any(|path| arguments.contains(path))
        }
        "creat" | "truncate" | "mknod" | "mknodat" | "memfd_create" | "link" | "linkat" => true,
        _ => false,
    }
}

/// Whether the process set itself not dumpable, and did not change it back.
pub fn not_dumpable(trace: &str) -> bool {
    let last = trace.lines().rfind(|line| line.contains("prctl(PR_SET_DUMPABLE, "));
    last.is_some_and(|line| line.contains("SUID_DUMP_DISABLE") && line.ends_with("= 0"))
}

/// The writable mappings in a `/proc/<pid>/smaps` that can be swapped out.
pub fn unlocked_writable(smaps: &str) -> Vec<&str> {
    let mut unlocked = Vec::new();
    let mut mapping = "";
    for line in smaps.lines() {
        // Attributes are `Name:  value`; a mapping begins with its range.
        let first = line.split(' ').next().unwrap_or_default();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let writable = mapping.split(' ').nth(1).is_some_and(|permissions| permissions.contains('w'));
            if writable && !flags.split_whitespace().any(|flag| flag == "lo") {
                unlocked.push(mapping);
            }
        } else if !first.ends_with(':') {
            mapping = line;
        }
    }
    unlocked
}
