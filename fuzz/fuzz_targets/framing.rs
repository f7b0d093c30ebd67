//! Properties of any request body. An input is the kind of its messages, a limit for names, the size of the pieces, and the body.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/framing.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
