//! A confined agent reads what its configuration names, also after a change: a trust file in a directory of a volume, which the kubelet
//! replaces by a link to another directory.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Child,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tempfile::TempDir;

use super::stalled_reader::{PATIENCE, command};

/// Killed when dropped.
pub(super) struct Agent {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
    pub(super) dir: TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn root() -> String {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.self_signed(&rcgen::KeyPair::generate().expect("a key")).expect("a certificate").pem()
}

/// Puts `ca.pem` into a new version of the volume, as the kubelet does.
fn publish(volume: &Path, version: &str, pem: &str) {
    let directory = volume.join(version).join("sub");
    fs::create_dir_all(&directory).expect("a directory");
    fs::write(directory.join("ca.pem"), pem).expect("a file");
    symlink(version, volume.join("..data_tmp")).expect("a link");
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("the swap");
}

impl Agent {
    /// `source` is the only one of the trust.
    pub(super) fn start(dir: TempDir, source: &serde_json::Value) -> Self {
        // The directory of the configuration is read too, so it must not be one above the roots.
        let (config, log, socket) = (dir.path().join("config/agent.yaml"), dir.path().join("log"), dir.path().join("run/sds.sock"));
        fs::create_dir(dir.path().join("config")).expect("a directory");
        let text = format!(
            "attestation: unix\nissuer: {{ embedded: {{}} }}\nsockets: {{ shared: {{ path: {} }} }}\n\
             trust: {{ sources: [ {source} ] }}\nadmin: {{ address: '127.0.0.1:0' }}\n\
             metrics: {{ address: '127.0.0.1:0' }}\nprobes: {{ address: '127.0.0.1:0' }}\n",
            socket.display(),
        );
        fs::write(&config, text).expect("the configuration");
        let mut command = command(&["run", "--config", config.to_str().expect("a plain path")]);
        let child = command.stderr(File::create(&log).expect("the log")).spawn().expect("the agent starts");
        Self { child, log, socket, dir }
    }

    pub(super) fn until_it_serves(&self, pem: &str) {
        let begun = Instant::now();
        let socket = self.socket.to_str().expect("a plain path");
        let last_line = pem.trim().lines().rev().nth(1).expect("a line of base64");
        loop {
            let output = command(&["fetch", "--socket", socket, "--name", "ROOTCA", "-o", "json"]).output().expect("fetch runs");
            let seen = String::from_utf8_lossy(&output.stdout).into_owned();
            if seen.contains(last_line) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{seen}\n{}", self.log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Landlock binds to the directory that existed at the start. Only a restart gives the agent the new one.
#[test]
fn an_agent_whose_directory_of_sockets_is_replaced_ends_as_failed() {
    let dir = tempfile::tempdir().expect("a directory");
    let roots = root();
    publish(&dir.path().join("roots"), "..one", &roots);
    let trust = dir.path().join("roots/..data/sub/ca.pem");
    let mut agent = Agent::start(dir, &json!({"file": trust}));
    agent.until_it_serves(&roots);
    if !agent.log().contains("\"landlock\":\"in force") {
        // Without Landlock, the agent makes the directory again.
        return;
    }
    let directory = agent.socket.parent().expect("a directory");
    fs::remove_dir_all(directory).expect("the directory");
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = agent.child.try_wait().expect("the agent") {
            break status;
        }
        assert!(begun.elapsed() < PATIENCE, "{}", agent.log());
        thread::sleep(Duration::from_millis(100));
    };
    assert!(!status.success() && agent.log().contains("Permission denied"), "{status}: {}", agent.log());
}

#[test]
fn roots_of_a_volume_are_read_after_its_directory_was_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    let volume = dir.path().join("roots");
    let roots = [root(), root()];
    publish(&volume, "..one", &roots[0]);
    symlink("..data/sub", volume.join("sub")).expect("a link");
    let agent = Agent::start(dir, &json!({"file": volume.join("sub/ca.pem")}));
    agent.until_it_serves(&roots[0]);
    // The kubelet removes the former version after the swap; the agent does not depend on it.
    publish(&volume, "..two", &roots[1]);
    agent.until_it_serves(&roots[1]);
    let log = agent.log();
    assert!(log.contains("\"reads_all\":false") && !log.contains("cannot watch"), "{log}");
}

/// The link can lead anywhere next, so the agent reads every file, and reports it.
#[test]
fn roots_behind_a_link_to_elsewhere_are_read_after_the_link_was_changed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (named, elsewhere) = (dir.path().join("named"), dir.path().join("elsewhere"));
    fs::create_dir_all(&named).expect("a directory");
    let roots = [root(), root()];
    publish(&elsewhere, "one", &roots[0]);
    symlink(elsewhere.join("..data/sub"), named.join("current")).expect("a link");
    let agent = Agent::start(dir, &json!({"file": named.join("current/ca.pem")}));
    agent.until_it_serves(&roots[0]);
    let further = agent.dir.path().join("further");
    publish(&further, "two", &roots[1]);
    symlink(further.join("two/sub"), named.join("next")).expect("a link");
    fs::rename(named.join("next"), named.join("current")).expect("the swap");
    agent.until_it_serves(&roots[1]);
    assert!(agent.log().contains("\"reads_all\":true"), "{}", agent.log());
}
