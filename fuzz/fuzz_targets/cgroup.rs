//! Cgroup files as workloads can create them.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/cgroup.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
