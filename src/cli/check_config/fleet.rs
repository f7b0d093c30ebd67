//! Calculates the load of a configuration on a whole cluster, and warns if cert-manager cannot sign that many requests.

use std::time::Duration;

use workload_identity::Profile;

use crate::config::{self, Config, IssuerConfig, Warning};

/// Writes to etcd for each certificate: the request is created, approved, signed and deleted, and cert-manager writes three Events.
const WRITES: f64 = 7.0;
/// Requests of cert-manager's controllers to the API server for each certificate.
const CALLS: f64 = 4.0;
/// Up to this version, all controllers of cert-manager share one rate-limited client.
const LAST_LIMITED: Version = Version { major: 1, minor: 20 };
/// CertificateRequests per second that this client can sign with its default limit of 20 calls per second.
const LIMITED_RATE: f64 = 5.0;
/// Approvals per second of the approver (docs/sizing.md).
const APPROVALS: f64 = 50.0;
/// Certificates per second that one agent requests, with the default limit of 20 calls per second and two calls for each.
const PER_AGENT: f64 = 10.0;
/// Memory of the approver: without pods, and for each pod of the cluster, in bytes (docs/sizing.md).
const APPROVER_BYTES: u64 = 50 << 20;
const APPROVER_BYTES_PER_POD: u64 = 600;

/// The size of a cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, clap::Args)]
pub struct Fleet {
    /// Number of nodes of the cluster; needs --identities, and prints the load of all agents
    #[arg(long, value_name = "N", requires = "identities", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub nodes: Option<u32>,
    /// Number of identities on a node (service accounts, or pods with certificate.perPod)
    #[arg(long, value_name = "N", requires = "nodes", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub identities: Option<u32>,
    /// Version of cert-manager in the cluster, such as 1.21, which limits how many requests it can sign
    #[arg(long, value_name = "VERSION")]
    pub cert_manager: Option<Version>,
}

/// A version's first two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.trim_start_matches('v').split('.').map(str::parse);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Self { major, minor }),
            _ => Err("write a version such as 1.21 or v1.21.0".to_owned()),
        }
    }
}

/// The load of a cluster if every identity had the same profile.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Load {
    /// The profile.
    pub profile: String,
    /// CertificateRequests per second, on average.
    pub requests_per_second: f64,
    /// Writes to etcd per second.
    pub etcd_writes_per_second: f64,
    /// Seconds until all identities have a certificate, if none has one.
    pub cold_start_seconds: f64,
    /// Memory of the approver in bytes, if each identity is one pod.
    pub approver_memory_bytes: u64,
}

impl Fleet {
    /// The load for each profile, and a warning for each that exceeds the limit. Empty if the size of the cluster is not known.
    pub fn loads(&self, config: &Config) -> (Vec<Load>, Vec<Warning>) {
        let (Some(nodes), Some(identities)) = (self.nodes, self.identities) else { return (Vec::new(), Vec::new()) };
        let profiles = config.profiles.iter().enumerate().map(|(place, rule)| (format!("profiles[{place}].certificate"), &rule.profile));
        let all = [("certificate".to_owned(), &config.default_profile)].into_iter().chain(profiles);
        let (mut loads, mut warnings) = (Vec::new(), Vec::new());
        for (path, profile) in all {
            let rate = config::renewals_per_second(profile.lifetime, profile.renew_at, 1) * f64::from(nodes) * f64::from(identities);
            let all = f64::from(nodes) * f64::from(identities);
            loads.push(Load {
                profile: profile.name.to_string(),
                requests_per_second: rate,
                etcd_writes_per_second: rate * WRITES,
                cold_start_seconds: all / self.cold_rate(nodes),
                approver_memory_bytes: APPROVER_BYTES + APPROVER_BYTES_PER_POD * u64::from(nodes) * u64::from(identities),
            });
            let by_cert_manager = matches!(config.issuers.get(&profile.issuer), Some(IssuerConfig::CertManager(_)));
            if by_cert_manager && rate > LIMITED_RATE && self.cert_manager.is_none_or(|version| version <= LAST_LIMITED) {
                warnings.push(Warning { path: format!("{path}.lifetime"), message: self.too_much(profile, rate) });
            }
        }
        (loads, warnings)
    }

    /// Certificates per second of a cold start: the slowest of the agents, the approver and cert-manager. The authority may be slower.
    fn cold_rate(&self, nodes: u32) -> f64 {
        let is_limited = self.cert_manager.is_some_and(|version| version <= LAST_LIMITED);
        let signed = if is_limited { LIMITED_RATE } else { f64::INFINITY };
        (f64::from(nodes) * PER_AGENT).min(APPROVALS).min(signed)
    }

    fn too_much(&self, profile: &Profile, rate: f64) -> String {
        let lifetime = |rate: f64| profile.lifetime.mul_f64(rate / LIMITED_RATE);
        let hours = (lifetime(rate).as_secs_f64() / 3600.0).ceil();
        let enough = humantime::format_duration(Duration::from_secs_f64(hours * 3600.0));
        let unsure = if self.cert_manager.is_none() { " (name a newer one with --cert-manager)" } else { "" };
        format!(
            "{} makes {rate:.1} requests per second in such a cluster, and cert-manager up to 1.20 signs about {LIMITED_RATE} with its \
             defaults{unsure}: use a lifetime of {enough} or more, or give cert-manager --kube-api-qps={:.0}",
            humantime::format_duration(profile.lifetime),
            rate * CALLS * 1.5,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(lifetime: &str) -> Config {
        let text = format!(
            "issuer: {{ certManager: {{ issuerRef: {{ name: mesh-ca, kind: ClusterIssuer }} }} }}\n\
             trust: {{ sources: [ {{ file: /etc/roots.pem }} ] }}\ncertificate: {{ lifetime: {lifetime} }}\n\
             profiles: [ {{ name: short, match: {{ namespaces: [a] }}, certificate: {{ lifetime: 10m }} }} ]\n"
        );
        Config::parse(&text, &|name| (name == "NODE_NAME").then(|| "n".to_owned())).unwrap().config
    }

    fn fleet(nodes: u32, version: Option<&str>) -> Fleet {
        Fleet { nodes: Some(nodes), identities: Some(30), cert_manager: version.map(|v| v.parse().unwrap()) }
    }

    #[test]
    fn the_fleet_load_warns_when_an_old_cert_manager_is_too_slow() {
        let (loads, warnings) = fleet(5000, Some("v1.20.3")).loads(&config("24h"));
        assert!((loads[0].requests_per_second - 3.472).abs() < 0.01 && (loads[0].etcd_writes_per_second - 24.306).abs() < 0.01);
        // 150,000 identities, signed at the limit of the old cert-manager.
        assert!((loads[0].cold_start_seconds - 30_000.0).abs() < 1.0, "{loads:?}");
        assert_eq!(loads[0].approver_memory_bytes >> 20, 135);
        let newer = fleet(5000, Some("1.21")).loads(&config("24h")).0;
        assert!((newer[0].cold_start_seconds - 3_000.0).abs() < 1.0, "{newer:?}");
        let single = fleet(1, Some("1.21")).loads(&config("24h")).0;
        assert!((single[0].cold_start_seconds - 3.0).abs() < 0.1, "a single agent is the limit: {single:?}");
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let said = warnings[0].to_string();
        assert!(said.contains("profiles[0].certificate.lifetime") && said.contains("500.0 requests per second"), "{said}");
        assert!(said.contains("use a lifetime of 17h or more") && said.contains("--kube-api-qps=3000"), "{said}");
        assert_eq!(fleet(5000, Some("1.21")).loads(&config("1h")).1, []);
        assert_eq!(fleet(5000, None).loads(&config("1h")).1.len(), 2);
        assert!(fleet(5000, None).loads(&config("1h")).1[0].message.contains("--cert-manager"));
    }

    #[test]
    fn without_a_size_there_is_nothing_to_tell() {
        assert_eq!(Fleet::default().loads(&config("1h")), (Vec::new(), Vec::new()));
    }

    #[test]
    fn versions_are_read_as_people_write_them() {
        let version = |text: &str| text.parse::<Version>();
        assert_eq!(version("v1.21.0"), version("1.21"));
        assert!(version("1.9").unwrap() < version("1.20").unwrap());
        assert!(version("newest").is_err() && version("1").is_err());
    }
}
