//! Runs every input of the fuzz corpus once, as a regression test. `fuzz/README.md` says how to find more inputs.

#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, unreachable_pub, reason = "tests fail loudly, and print the input")]

use std::{fs, path::Path};

#[path = "../fuzz/check/authority.rs"]
mod authority;
#[path = "../fuzz/check/cgroup.rs"]
mod cgroup;
#[path = "../fuzz/check/config.rs"]
mod config;
#[path = "../fuzz/check/csi.rs"]
mod csi;
#[path = "../fuzz/check/csr.rs"]
mod csr;
#[path = "../fuzz/check/framing.rs"]
mod framing;
#[path = "../fuzz/check/pem.rs"]
mod pem;
#[path = "../fuzz/check/stream.rs"]
mod stream;
#[path = "../fuzz/check/x509.rs"]
mod x509;

/// Runs `check` on each file of `fuzz/corpus/<target>`.
fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut inputs = 0;
    for file in files.map(|entry| entry.expect("a readable folder").path()) {
        // The output names the input of a panic.
        println!("{}", file.display());
        check(&fs::read(&file).expect("a readable file"));
        inputs += 1;
    }
    assert!(inputs > 20, "{inputs} inputs are no corpus");
}

#[test]
fn frames_of_http2() {
    replay("authority", authority::check);
}

#[test]
fn cgroup_files() {
    replay("cgroup", cgroup::check);
}

#[test]
fn configuration_files() {
    replay("config", config::check);
}

#[test]
fn publish_requests() {
    replay("csi", csi::check);
}

#[test]
fn certificate_requests() {
    replay("csr", csr::check);
}

#[test]
fn request_bodies() {
    replay("framing", framing::check);
}

#[test]
fn certificates_and_revocation_lists() {
    replay("pem", pem::check);
}

#[test]
fn certificates_and_paths() {
    replay("x509", x509::check);
}

#[test]
fn sequences_of_requests() {
    replay("stream", stream::check);
}
