//! Properties of any bytes that a client sends on a connection. An input is the size of the pieces, and frames of HTTP/2.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/authority.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
