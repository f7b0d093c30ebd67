//! The configuration of `sds-agent dev`: no file, no cluster, the embedded authority, and callers identified by their uid.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;
use workload_identity::{IssuerName, KeyType, Profile, TrustDomain};

use super::{
    Approver, Attestation, AttestationPolicy, Config, Env, IssuerConfig, Limits, LockMemory, Names, NodeEnvironment, RequestRate,
    SharedSocket,
    certificates::LIFETIMES,
    error::{Errors, FieldError},
    reader::Report,
    template, values,
};
use crate::{admin::MountHelper, process::confinement::Policy};

/// Short, so that a user sees rotations within a minute.
const LIFETIME: Duration = Duration::from_secs(120);

/// The flags of `sds-agent dev`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dev {
    /// `--socket`
    pub socket: Option<PathBuf>,
    /// `--lifetime`
    pub lifetime: Option<Duration>,
    /// `--trust-domain`
    pub trust_domain: Option<String>,
    /// `--admin`
    pub admin: Option<SocketAddr>,
}

/// The default path of `dev`'s socket.
pub fn dev_socket(env: Env<'_>) -> PathBuf {
    let runtime = env("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    runtime.unwrap_or_else(|| PathBuf::from("/tmp")).join("sds-agent/sds.sock")
}

/// The configuration from the flags, or all errors.
///
/// The kernel chooses the ports for metrics and probes on 127.0.0.1, because the admin address serves the same pages.
pub fn dev(flags: Dev, env: Env<'_>) -> Result<Config, Errors> {
    let report = Report::default();
    let path = flags.socket.map_or_else(|| dev_socket(env), |path| std::path::absolute(&path).unwrap_or(path));
    let path = checked(&report, "--socket", &path.to_string_lossy(), |v| values::socket_path(v).map(|_| path.clone()));
    let name = flags.trust_domain.unwrap_or_else(|| "example.org".to_owned());
    let trust_domain = checked(&report, "--trust-domain", &name, |_| {
        let remedy = "use 1 to 255 lower-case letters, digits, '.', '-' or '_'";
        TrustDomain::new(&name).map_err(|_| FieldError::new("is not a trust domain", remedy))
    });
    let lifetime = humantime::format_duration(flags.lifetime.unwrap_or(LIFETIME)).to_string();
    let lifetime = checked(&report, "--lifetime", &lifetime, values::duration(LIFETIMES));
    let admin = flags.admin.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 15090)));
    let admin = checked(&report, "--admin", &admin.to_string(), |_| {
        let wrong = || FieldError::new("is not a loopback address", "use 127.0.0.1 or [::1]");
        admin.ip().is_loopback().then_some(admin).ok_or_else(wrong)
    });
    let (problems, _) = report.finish();
    match (path, trust_domain, lifetime, admin) {
        (Some(path), Some(trust_domain), Some(lifetime), Some(admin)) => Ok(config(&path, trust_domain, lifetime, admin)),
        _ => Err(Errors(problems)),
    }
}

fn checked<T>(report: &Report, flag: &str, value: &str, parse: impl FnOnce(&Value) -> Result<T, FieldError>) -> Option<T> {
    let value = Value::String(value.to_owned());
    parse(&value).map_err(|wrong| report.problem(flag, Some(super::error::shown(&value)), wrong)).ok()
}

fn config(path: &Path, trust_domain: TrustDomain, lifetime: Duration, admin: SocketAddr) -> Config {
    let issuer = IssuerName("embedded".into());
    let profile = Profile {
        name: "default".into(),
        issuer: issuer.clone(),
        authority: "embedded".into(),
        key: KeyType::EcdsaP256,
        lifetime,
        renew_at: 0.5,
        jitter: 0.1,
        spiffe_id: template::default_spiffe_id(Attestation::Unix).into(),
        dns_names: Vec::new(),
        per_pod: false,
        epoch: 0,
    };
    Config {
        trust_domain,
        shared_socket: Some(SharedSocket { path: path.to_owned(), mode: 0o666, accept_pid_reuse: false }),
        per_pod: None,
        attestation: Attestation::Unix,
        attestation_policy: AttestationPolicy::default(),
        warm_up: None,
        default_profile: Arc::new(profile),
        profiles: Vec::new(),
        issuers: BTreeMap::from([(issuer, IssuerConfig::Embedded)]),
        trust_sources: Vec::new(),
        federated: BTreeMap::new(),
        names: Names::default(),
        // A user starts and ends it, and may have files and sockets anywhere.
        confinement: Policy::Never,
        lock_memory: LockMemory::Auto,
        // The machine has one user, so one caller may use all of the limits.
        limits: Limits::default().undivided(),
        kubernetes: RequestRate::default(),
        reissue_over: Duration::from_secs(600),
        events: false,
        retention: Duration::from_secs(300),
        drain: Duration::from_secs(10),
        admin,
        metrics: SocketAddr::from(([127, 0, 0, 1], 0)),
        probes: SocketAddr::from(([127, 0, 0, 1], 0)),
        mount_helper: MountHelper { metrics: SocketAddr::from(([127, 0, 0, 1], 0)), probes: SocketAddr::from(([127, 0, 0, 1], 0)) },
        metrics_per_workload: false,
        worker_threads: 2,
        approver: Approver::of_namespace("sds-agent"),
        node: NodeEnvironment::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        (name == "XDG_RUNTIME_DIR").then(|| "/run/user/7".to_owned())
    }

    #[test]
    fn without_flags_it_serves_in_the_runtime_directory_or_in_tmp() {
        let config = dev(Dev::default(), &env).unwrap();
        let path = |config: Config| config.shared_socket.unwrap().path;
        assert_eq!(path(config.clone()), Path::new("/run/user/7/sds-agent/sds.sock"));
        assert_eq!(config.trust_domain.as_str(), "example.org");
        assert_eq!(config.admin.to_string(), "127.0.0.1:15090");
        assert_eq!(path(dev(Dev::default(), &|_| None).unwrap()), Path::new("/tmp/sds-agent/sds.sock"));
    }

    #[test]
    fn bad_flags_are_reported_at_once() {
        let flags = Dev {
            socket: Some("/".repeat(2).into()),
            lifetime: Some(Duration::from_secs(1)),
            trust_domain: Some("Example.org".into()),
            admin: Some("10.0.0.1:1".parse().unwrap()),
        };
        let errors = dev(flags, &env).unwrap_err().to_string();
        let expected = [
            r#"--socket: "//" names no file; add the socket's file name, such as sds.sock"#,
            r#"--trust-domain: "Example.org" is not a trust domain; use 1 to 255 lower-case letters, digits, '.', '-' or '_'"#,
            r#"--lifetime: "1s" is too short; use at least 10s"#,
            r#"--admin: "10.0.0.1:1" is not a loopback address; use 127.0.0.1 or [::1]"#,
        ];
        assert_eq!(errors.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_relative_socket_is_made_absolute() {
        let config = dev(Dev { socket: Some("sds.sock".into()), ..Dev::default() }, &env).unwrap();
        assert!(config.shared_socket.unwrap().path.is_absolute());
    }
}
