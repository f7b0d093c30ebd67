//! Certificates, bundles and revocation lists as an issuer or a trust source can provide them.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/x509.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
