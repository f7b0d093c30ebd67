//! Properties of any configuration file. An input is its text.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/config.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
