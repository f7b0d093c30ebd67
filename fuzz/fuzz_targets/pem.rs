//! Properties of any PEM text, read as the chain of an issuer, as a bundle and as revocation lists.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/pem.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
