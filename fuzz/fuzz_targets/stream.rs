//! The state of an SDS stream against a model of the protocol. An input is the choices of a sequence of requests and changes.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/stream.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
