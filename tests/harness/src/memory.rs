//! Reads the memory of another process: its peak size, and whether its writable memory contains some bytes. The latter needs root.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use nix::unistd::Pid;

/// The number of bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// The peak of the resident memory of `process`, in bytes.
pub fn peak(process: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel reports it");
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kibibytes << 10
}

/// Begins to measure the [`peak`] of `process` again; returns the current resident memory. Needs root.
pub fn measure_again(process: Pid) -> u64 {
    fs::write(format!("/proc/{process}/clear_refs"), "5").expect("the process runs, and these tests need root");
    peak(process)
}

/// Whether the writable memory of `process` contains `needle`.
pub fn holds(process: Pid, needle: &[u8]) -> bool {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).expect("the process runs");
    let memory = File::open(format!("/proc/{process}/mem")).expect("these tests need root");
    let writable = maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|permissions| permissions.starts_with("rw")));
    let mut read = 0_u64;
    let found = writable.filter_map(range).any(|(start, end)| {
        let mut at = start;
        while at < end {
            // Parts overlap by the length of the needle.
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(CHUNK + needle.len());
            let mut part = vec![0; length];
            // A mapping can disappear while it is read.
            if memory.read_exact_at(&mut part, at).is_ok() {
                read += length as u64;
                if contains(&part, needle) {
                    return true;
                }
            }
            at += CHUNK as u64;
        }
        false
    });
    assert!(found || read > 1 << 20, "the memory of {process} cannot be read");
    found
}

fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

fn contains(part: &[u8], needle: &[u8]) -> bool {
    let Some((first, rest)) = needle.split_first() else { return true };
    let mut left = part;
    while let Some(at) = left.iter().position(|byte| byte == first) {
        left = &left[at + 1..];
        if left.starts_with(rest) {
            return true;
        }
    }
    false
}
