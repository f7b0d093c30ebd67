//! The boundaries between the crates: the dependencies of each, as cargo resolves them.

#![allow(clippy::expect_used, clippy::panic, reason = "tests fail loudly")]

use std::{collections::BTreeSet, fs, path::Path, process::Command};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A crate, the crates of the workspace that it may depend on, and further crates that it must not depend on.
struct Boundary {
    name: &'static str,
    may_reach: &'static [&'static str],
    must_not_reach: &'static [&'static str],
}

/// The crate that the tests with real programs share.
const HARNESS: &str = "test-harness";
const KUBERNETES: [&str; 3] = ["kube", "kube-client", "k8s-openapi"];

/// The agent itself may depend on everything, and nothing depends on it. No library parses a command line or the configuration.
const BOUNDARIES: [Boundary; 10] = [
    Boundary { name: "unix-peer", may_reach: &[], must_not_reach: &["kube", "k8s-openapi", "hyper", "tonic", "prometheus-client"] },
    Boundary { name: "agent-runtime", may_reach: &["unix-peer"], must_not_reach: &["kube", "k8s-openapi", "hyper", "tonic", "rcgen"] },
    Boundary {
        name: "workload-identity",
        may_reach: &[],
        must_not_reach: &["kube", "k8s-openapi", "tokio", "rustls", "x509-parser", "rcgen"],
    },
    Boundary { name: "envoy-x509", may_reach: &[], must_not_reach: &["kube", "k8s-openapi", "tokio", "rustls", "x509-parser", "rcgen"] },
    Boundary {
        name: "sds-server",
        may_reach: &["agent-runtime", "envoy-x509", "unix-peer", "workload-identity"],
        must_not_reach: &["kube", "kube-client", "k8s-openapi", "rcgen"],
    },
    Boundary {
        name: "agent-kube",
        may_reach: &["agent-runtime", "unix-peer", "workload-identity"],
        must_not_reach: &["tonic", "prost", "rcgen"],
    },
    Boundary {
        name: "cert-manager",
        may_reach: &["agent-kube", "agent-runtime", "unix-peer", "workload-identity"],
        must_not_reach: &["tonic", "prost", "rcgen"],
    },
    Boundary {
        name: "attest-kubernetes",
        may_reach: &["agent-kube", "agent-runtime", "envoy-x509", "sds-server", "unix-peer", "workload-identity"],
        must_not_reach: &["rcgen"],
    },
    Boundary {
        name: "issuance",
        may_reach: &["agent-kube", "agent-runtime", "cert-manager", "envoy-x509", "sds-server", "unix-peer", "workload-identity"],
        must_not_reach: &[],
    },
    // The approver has no access to keys and streams.
    Boundary {
        name: "approver",
        may_reach: &["agent-kube", "agent-runtime", "cert-manager", "unix-peer", "workload-identity"],
        must_not_reach: &["tonic", "prost", "rcgen"],
    },
];

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(ROOT).output().expect("cargo runs");
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo writes UTF-8")
}

/// The names of the workspace's libraries: all crates except the agent's and the harness of its tests.
fn libraries() -> BTreeSet<String> {
    let metadata: serde_json::Value =
        serde_json::from_str(&cargo(&["metadata", "--no-deps", "--offline", "--format-version", "1"])).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let names = packages.iter().map(|package| package["name"].as_str().expect("a name").to_owned());
    names.filter(|name| !["sds-agent", HARNESS].contains(&name.as_str())).collect()
}

/// All dependencies of a crate, as its users get them.
fn reached(name: &str) -> BTreeSet<String> {
    let tree = cargo(&["tree", "--offline", "--locked", "--package", name, "--edges", "normal", "--prefix", "none", "--format", "{p}"]);
    let names = tree.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned);
    names.filter(|reached| reached != name).collect()
}

#[test]
fn every_library_keeps_its_boundary() {
    let libraries = libraries();
    let listed = BOUNDARIES.iter().map(|boundary| boundary.name.to_owned()).collect();
    assert_eq!(libraries, listed, "left: the crates of the workspace, right: those with a boundary in this test");
    for Boundary { name, may_reach, must_not_reach } in BOUNDARIES {
        let reached = reached(name);
        let may_reach: BTreeSet<String> = may_reach.iter().map(|&name| name.to_owned()).collect();
        let ours: BTreeSet<String> = reached.intersection(&libraries).cloned().collect();
        assert!(ours.is_subset(&may_reach), "{name} reaches {:?}", ours.difference(&may_reach));
        for forbidden in must_not_reach.iter().chain(&["clap", "sds-agent"]) {
            assert!(!reached.contains(*forbidden), "{name} reaches {forbidden}");
        }
    }
}

/// Without this test, an empty dependency tree would pass the table.
#[test]
fn the_agent_reaches_all_of_them() {
    let reached = reached("sds-agent");
    for expected in libraries().iter().map(String::as_str).chain(KUBERNETES).chain(["clap", "tonic"]) {
        assert!(reached.contains(expected), "{expected} is not in {reached:?}");
    }
}

/// The harness uses the agent as a program, so a change of the agent does not recompile it.
#[test]
fn the_harness_of_the_tests_depends_on_no_crate_of_the_workspace() {
    let ours: Vec<_> = reached(HARNESS).into_iter().filter(|name| libraries().contains(name) || name == "sds-agent").collect();
    assert!(ours.is_empty(), "it reaches {ours:?}");
}

/// Other projects use these two crates. This test does not build the packages; `cargo package` without `--no-verify` does.
#[test]
fn the_server_and_the_socket_can_be_packaged_with_their_protocols() {
    let packages = ["unix-peer", "agent-runtime", "workload-identity", "envoy-x509", "sds-server"];
    let target = tempfile::tempdir().expect("a temporary folder");
    let target = target.path().to_str().expect("a path in UTF-8");
    let mut arguments = vec!["package", "--no-verify", "--allow-dirty", "--offline", "--locked", "--target-dir", target];
    arguments.extend(packages.iter().flat_map(|name| ["--package", name]));
    cargo(&arguments);
    let listed = cargo(&["package", "--list", "--allow-dirty", "--offline", "--package", "sds-server"]);
    for file in ["build.rs", "proto/envoy/service/secret/v3/sds.proto", "proto/google/rpc/status.proto", "src/sds/secret.rs"] {
        assert!(listed.lines().any(|line| line == file), "{file} is not in the package: {listed}");
    }
}

/// Two crates in one file would be two ways to write the same call. `nix` is for sockets, signals, limits and polling; `rustix` for files
/// relative to a directory, mounts, and calls that `nix` does not have. No file of these two crates uses more of `libc` than its constants.
#[test]
fn each_file_makes_its_system_calls_through_one_crate() {
    let mut files = vec![Path::new(ROOT).join("src"), Path::new(ROOT).join("crates")];
    let (mut by_nix, mut by_rustix) = (0, 0);
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            let [nix, rustix, libc] = ["nix::", "rustix::", "libc::"].map(|name| {
                let follows_a_name = |at: usize| text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || "_:".contains(c));
                let is_constant = |at: usize| name == "libc::" && text[at + name.len()..].starts_with(|c: char| c.is_ascii_uppercase());
                text.match_indices(name).any(|(at, _)| !follows_a_name(at) && !is_constant(at))
            });
            assert!(!(nix && rustix), "{} uses nix and rustix", path.display());
            assert!(!libc, "{} uses libc", path.display());
            (by_nix, by_rustix) = (by_nix + usize::from(nix), by_rustix + usize::from(rustix));
        }
    }
    assert!(by_nix > 5 && by_rustix > 5, "{by_nix} files use nix, {by_rustix} use rustix");
}
