//! CSRs as any client can put them into a CertificateRequest.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/csr.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
