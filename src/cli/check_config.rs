//! `sds-agent check-config`: prints all errors of a configuration, or a summary of a valid one.

use std::{path::PathBuf, sync::Arc, time::Duration};

use cert_manager::RequestNamespace;
use serde::Serialize;
use workload_identity::{Match, Pattern, Profile, Resolver, Workload};

use self::fleet::{Fleet, Load};
use super::{
    Exit,
    output::{self, Format},
};
use crate::config::{self, Attestation, BundleSelection, Config, Env, IssuerConfig, Loaded, Problem, TrustSource, Warning};

pub mod fleet;

/// The flags of `check-config`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Configuration, a YAML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Format of the output: json is one object with valid, errors, warnings, summary
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// The cluster's size.
    #[command(flatten)]
    pub fleet: Fleet,
}

const EXAMPLES: &str = "\
Errors and warnings go to standard error, one on each line: field, value, problem, remedy.
Outside a cluster, variables from the downward API are not required.

Examples:
  sds-agent check-config --config agent.yaml
  sds-agent check-config --config agent.yaml --nodes 1000 --identities 30 --cert-manager 1.20
  sds-agent check-config --config agent.yaml -o json | jq -r '.errors[].path'

Exit codes: 0 the configuration is valid, 64 usage, or the configuration is invalid.";

/// The summary of a valid configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Path of the shared socket, if it is enabled.
    socket: Option<PathBuf>,
    /// Name of the CSI driver, if pods have their own sockets.
    csi_driver: Option<String>,
    /// The certificates of workloads that no profile matches.
    #[serde(flatten)]
    default: Certificates,
    /// The issuers, in words.
    issuers: Vec<String>,
    /// The trust sources, in words.
    trust: Vec<String>,
    /// The accounts whose requests the approver approves.
    approver_agents: Vec<String>,
    /// The profiles, in their order.
    profiles: Vec<ProfileSummary>,
    /// The load of the whole cluster, if its size is known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cluster: Vec<Load>,
}

/// The certificates of a profile.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Certificates {
    /// The workload of the example.
    example_workload: String,
    /// Its identity.
    example_spiffe_id: String,
    /// Its DNS names.
    example_dns_names: Vec<String>,
    /// The key of certificates.
    key: &'static str,
    /// Their lifetime.
    lifetime_seconds: u64,
    /// The earliest and latest renewal, in seconds after the start of the lifetime.
    renewal_seconds: [u64; 2],
    /// Whether each pod has its own certificate.
    per_pod: bool,
    /// The issuer, in words.
    signed_by: String,
    /// Requests per second for each 1,000 identities.
    requests_per_second_per_1000: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct ProfileSummary {
    name: String,
    /// The pods that it matches, in words.
    holds_for: String,
    /// Whether only pods that select it get it.
    selectable: bool,
    #[serde(flatten)]
    certificates: Certificates,
}

#[derive(Serialize)]
struct Report<'a> {
    valid: bool,
    errors: &'a [Problem],
    warnings: &'a [Warning],
    summary: Option<&'a Summary>,
}

/// Checks the configuration and prints the result.
pub fn check(args: &Args, env: Env<'_>) -> Exit {
    let (valid, text) = match load(args, env) {
        Ok(Loaded { config, mut warnings }) => {
            let (cluster, too_much) = args.fleet.loads(&config);
            warnings.extend(too_much);
            let summary = summary(&config).map(|summary| Summary { cluster, ..summary });
            let text = match args.output {
                Format::Json => json(&Report { valid: true, errors: &[], warnings: &warnings, summary: summary.as_ref() }),
                Format::Text => {
                    for warning in &warnings {
                        output::tell(format_args!("warning: {warning}"));
                    }
                    format!("{} is valid.\n{}", args.config.display(), summary.map(|s| words(&s)).unwrap_or_default())
                }
            };
            (true, text)
        }
        Err(errors) => {
            let text = match args.output {
                Format::Json => json(&Report { valid: false, errors: &errors.0, warnings: &[], summary: None }),
                Format::Text => {
                    output::tell(format_args!("{errors}"));
                    String::new()
                }
            };
            (false, text)
        }
    };
    match output::say(&text) {
        Err(error) if valid => output::unsaid(&error),
        _ if valid => Exit::Ok,
        _ => Exit::Usage,
    }
}

fn json(report: &Report<'_>) -> String {
    // Serialisation does not fail, because the report contains only strings, numbers and lists.
    let mut text = serde_json::to_string_pretty(report).unwrap_or_default();
    text.push('\n');
    text
}

/// A variable of the environment outside of a pod: an example value replaces one of the downward API.
pub(super) fn outside_of_a_pod(name: &str, env: Env<'_>) -> Option<String> {
    let stand_in = match name {
        "NODE_NAME" => "node",
        "POD_NAMESPACE" => "sds-agent",
        "POD_NAME" => "agent",
        "POD_UID" => "uid",
        _ => return env(name),
    };
    env(name).or_else(|| Some(stand_in.to_owned()))
}

/// Outside a cluster, on a workstation or in a build, example values replace the variables of the pod, with a warning.
fn load(args: &Args, env: Env<'_>) -> Result<Loaded, config::Errors> {
    if env("KUBERNETES_SERVICE_HOST").is_some() || env("NODE_NAME").is_some() {
        return Config::load(&args.config, env);
    }
    let mut loaded = Config::load(&args.config, &|name: &str| outside_of_a_pod(name, env))?;
    if loaded.config.attestation == Attestation::Kubernetes {
        let message = "is not set here; in its pod the agent needs it, and it should have POD_NAMESPACE, POD_NAME and POD_UID \
                       (docs/configuration.md shows how)";
        loaded.warnings.push(Warning { path: "NODE_NAME".into(), message: message.into() });
    }
    Ok(loaded)
}

fn summary(config: &Config) -> Option<Summary> {
    let (resolver, sample) = (config.resolver(), config::sample_workload(config.attestation));
    let federated = config.federated.iter().map(|(domain, source)| format!("{domain} from {}", source_in_words(source)));
    let profiles = config.profiles.iter().map(|rule| {
        let (profile, workload) = (&rule.profile, example(&rule.matches, &sample));
        let certificates = certificates(config, &resolver, profile, &workload)?;
        let holds_for = rule.matches.to_string();
        Some(ProfileSummary { name: profile.name.to_string(), holds_for, selectable: rule.selectable, certificates })
    });
    Some(Summary {
        socket: config.shared_socket.as_ref().map(|socket| socket.path.clone()),
        csi_driver: config.per_pod.as_ref().map(|per_pod| per_pod.driver_name.clone()),
        default: certificates(config, &resolver, &config.default_profile, &sample)?,
        issuers: config.issuers.values().map(issuer_in_words).collect(),
        trust: config.trust_sources.iter().map(source_in_words).chain(federated).collect(),
        approver_agents: config.approver.agents.clone(),
        profiles: profiles.collect::<Option<_>>()?,
        cluster: Vec::new(),
    })
}

/// The certificates that `workload` gets from `profile`. The templates were already checked with such a workload.
fn certificates(config: &Config, resolver: &Resolver, profile: &Arc<Profile>, workload: &Workload) -> Option<Certificates> {
    let identity = resolver.identity(profile, workload).ok()?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a lifetime, rounded for display")]
    let renewal = |spread: f64| (profile.lifetime.as_secs_f64() * profile.renew_at * spread).round() as u64;
    Some(Certificates {
        example_workload: workload.to_string(),
        example_spiffe_id: identity.spiffe_id.to_string(),
        example_dns_names: identity.dns_names.to_vec(),
        key: profile.key.as_str(),
        lifetime_seconds: profile.lifetime.as_secs(),
        renewal_seconds: [renewal(1.0 - profile.jitter), renewal(1.0 + profile.jitter)],
        per_pod: profile.per_pod,
        signed_by: config.issuers.get(&profile.issuer).map(issuer_in_words).unwrap_or_default(),
        requests_per_second_per_1000: config::renewals_per_second(profile.lifetime, profile.renew_at, 1000),
    })
}

/// The sample workload, changed so that `matches` holds for it.
fn example(matches: &Match, sample: &Workload) -> Workload {
    let mut workload = sample.clone();
    if let Workload::Pod { pod, service_account, labels, .. } = &mut workload {
        let like = |patterns: &[Pattern], filler: &str| patterns.first().map(|pattern| pattern.example(filler).into());
        pod.namespace = like(&matches.namespaces, &pod.namespace).unwrap_or_else(|| pod.namespace.clone());
        let account = service_account.as_deref().unwrap_or_default();
        *service_account = like(&matches.service_accounts, account).or_else(|| service_account.clone());
        *labels = matches.pod_labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    }
    workload
}

fn issuer_in_words(issuer: &IssuerConfig) -> String {
    match issuer {
        IssuerConfig::Embedded => "an authority in memory, for development only".to_owned(),
        IssuerConfig::CertManager(cert_manager) => {
            let issuer = &cert_manager.issuer_ref;
            let place = match &cert_manager.namespace {
                RequestNamespace::Fixed(namespace) => format!("namespace {namespace}"),
                RequestNamespace::Workload => "the namespace of each workload".to_owned(),
            };
            let note = if issuer.kind == "Issuer" { ", where the Issuer has to be" } else { "" };
            format!("{} {} of {}, by requests in {place}{note}", issuer.kind, issuer.name, issuer.group)
        }
    }
}

fn source_in_words(source: &TrustSource) -> String {
    match source {
        TrustSource::ConfigMap { namespace, name, key } => format!("ConfigMap {namespace}/{name}, key {key}"),
        TrustSource::ClusterTrustBundle(BundleSelection::Name(name)) => format!("ClusterTrustBundle {name}"),
        TrustSource::ClusterTrustBundle(of_signer) => format!("ClusterTrustBundles of {of_signer}"),
        TrustSource::File { path } => format!("file {}", path.display()),
        TrustSource::Inline { .. } => "PEM in this configuration".to_owned(),
    }
}

fn words(summary: &Summary) -> String {
    let mut lines = Vec::new();
    lines.extend(summary.socket.iter().map(|path| ("socket", path.display().to_string())));
    lines.extend(summary.csi_driver.iter().map(|driver| ("per pod", format!("a socket by CSI driver {driver}"))));
    lines.extend(of_certificates(&summary.default));
    lines.extend(summary.trust.iter().map(|source| ("trust", source.clone())));
    lines.push(("approver", format!("approves requests of {}", summary.approver_agents.join(", "))));
    lines.push(("load", load_in_words(&summary.default)));
    lines.extend(summary.cluster.iter().map(|load| {
        let Load { profile, requests_per_second, etcd_writes_per_second, cold_start_seconds, approver_memory_bytes } = load;
        let cold = humantime::format_duration(Duration::try_from_secs_f64(cold_start_seconds.ceil()).unwrap_or(Duration::MAX));
        let memory = approver_memory_bytes >> 20;
        let of = if profile == "default" { String::new() } else { format!(", if every identity had profile {profile}") };
        let rates = format!("{requests_per_second:.2} requests and {etcd_writes_per_second:.1} etcd writes per second{of}");
        ("cluster", format!("{rates}; from cold in {cold}; the approver needs {memory} MiB"))
    }));
    let mut text: String = lines.iter().map(|(label, text)| format!("  {label:<12} {text}\n")).collect();
    for profile in &summary.profiles {
        let picked = if profile.selectable { ", if the pod selects it" } else { "" };
        text += &format!("  profile {}, for {}{picked}\n", profile.name, profile.holds_for);
        let mut lines = of_certificates(&profile.certificates);
        lines.push(("load", load_in_words(&profile.certificates)));
        text.extend(lines.iter().map(|(label, text)| format!("    {label:<12} {text}\n")));
    }
    text
}

fn of_certificates(certificates: &Certificates) -> Vec<(&'static str, String)> {
    let span = |seconds: u64| humantime::format_duration(Duration::from_secs(seconds)).to_string();
    let [first, last] = certificates.renewal_seconds;
    let mut lines = vec![("identity", format!("{} for {}", certificates.example_spiffe_id, certificates.example_workload))];
    if !certificates.example_dns_names.is_empty() {
        lines.push(("DNS names", certificates.example_dns_names.join(", ")));
    }
    let each = if certificates.per_pod { ", one for each pod" } else { "" };
    lines.push(("certificate", format!("{} for {}{each}", certificates.key, span(certificates.lifetime_seconds))));
    lines.push((
        "renewal",
        if first == last { format!("after {}", span(first)) } else { format!("after {} to {}", span(first), span(last)) },
    ));
    lines.push(("signed by", certificates.signed_by.clone()));
    lines
}

fn load_in_words(certificates: &Certificates) -> String {
    let rate = certificates.requests_per_second_per_1000;
    format!("{rate:.2} requests per second for each 1,000 identities of the cluster")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n\
                         trust: { sources: [ { file: /etc/roots.pem } ] }\n";

    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    fn args(text: &str) -> (tempfile::TempDir, Args) {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("agent.yaml");
        std::fs::write(&config, text).unwrap();
        (dir, Args { config, output: Format::Text, fleet: Fleet::default() })
    }

    #[test]
    fn the_summary_says_what_the_configuration_means() {
        let (_dir, args) = args(&format!("identity: {{ dnsNames: ['{{serviceAccount}}.{{namespace}}.svc'] }}\n{LEAST}"));
        let config = load(&args, &|_| None).unwrap().config;
        let expected = "  socket       /run/sds-agent/sds.sock\n  \
                          identity     spiffe://cluster.local/ns/shop/sa/cart for pod shop/cart-5d89c7b6f4-x2v9k\n  \
                          DNS names    cart.shop.svc\n  \
                          certificate  ecdsa-p256 for 1day\n  \
                          renewal      after 10h 48m to 13h 12m\n  \
                          signed by    ClusterIssuer mesh-ca of cert-manager.io, by requests in namespace sds-agent\n  \
                          trust        file /etc/roots.pem\n  \
                          approver     approves requests of system:serviceaccount:sds-agent:sds-agent\n  \
                          load         0.02 requests per second for each 1,000 identities of the cluster\n";
        assert_eq!(words(&summary(&config).unwrap()), expected);
    }

    #[test]
    fn every_kind_of_trust_source_is_told() {
        let root = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let sources = serde_json::json!([
            {"configMap": {"namespace": "a", "name": "b"}},
            {"clusterTrustBundle": {"name": "example.com:mesh:a"}},
            {"clusterTrustBundle": {"signerName": "example.com/mesh", "labelSelector": {"matchLabels": {"tier": "live"}}}},
            {"inline": root},
        ]);
        let (_dir, args) = args(&LEAST.replace("[ { file: /etc/roots.pem } ]", &sources.to_string()));
        let expected = [
            "ConfigMap a/b, key ca.crt",
            "ClusterTrustBundle example.com:mesh:a",
            "ClusterTrustBundles of signer example.com/mesh, labels tier=live",
            "PEM in this configuration",
        ];
        assert_eq!(summary(&load(&args, &|_| None).unwrap().config).unwrap().trust, expected);
    }

    #[test]
    fn each_profile_is_told_with_an_example_that_it_holds_for() {
        let profiles = "profiles:\n\
                        - { name: payments, match: { namespaces: [pay*], podLabels: { tier: gold } }, issuerRef: { name: pay-ca, kind: Issuer },\n\
                        \x20   namespace: requests, certificate: { lifetime: 1h, key: rsa-2048, perPod: true } }\n\
                        - { name: short, match: { serviceAccounts: [till] }, selectable: true, certificate: { lifetime: 30m, jitter: 0 } }\n";
        let (_dir, args) = args(&format!("{profiles}{LEAST}"));
        let config = load(&args, &|_| None).unwrap().config;
        let summary = summary(&config).unwrap();
        let text = words(&summary);
        let expected = "  profile payments, for namespace pay*, label tier=gold\n    \
                          identity     spiffe://cluster.local/ns/payshop/sa/cart for pod payshop/cart-5d89c7b6f4-x2v9k\n    \
                          certificate  rsa-2048 for 1h, one for each pod\n    \
                          renewal      after 27m to 33m\n    \
                          signed by    Issuer pay-ca of cert-manager.io, by requests in namespace requests, where the Issuer has to be\n    \
                          load         0.56 requests per second for each 1,000 identities of the cluster\n  \
                        profile short, for service account till, if the pod selects it\n    \
                          identity     spiffe://cluster.local/ns/shop/sa/till for pod shop/cart-5d89c7b6f4-x2v9k\n    \
                          certificate  ecdsa-p256 for 30m\n    \
                          renewal      after 15m\n    \
                          signed by    ClusterIssuer mesh-ca of cert-manager.io, by requests in namespace sds-agent\n    \
                          load         1.11 requests per second for each 1,000 identities of the cluster\n";
        assert!(text.ends_with(expected), "{text}");
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["profiles"][0]["name"], "payments");
        assert_eq!(json["profiles"][1]["example_spiffe_id"], "spiffe://cluster.local/ns/shop/sa/till");
        assert_eq!((&json["key"], json["issuers"].as_array().unwrap().len()), (&serde_json::json!("ecdsa-p256"), 2));
    }

    #[test]
    fn outside_a_cluster_a_missing_node_is_a_warning_and_inside_an_error() {
        let (_dir, args) = args(LEAST);
        let outside = load(&args, &|_| None).unwrap();
        assert_eq!(outside.warnings.len(), 1);
        assert!(outside.warnings[0].to_string().starts_with("NODE_NAME: is not set here"));
        let inside = |name: &str| (name == "KUBERNETES_SERVICE_HOST").then(|| "10.0.0.1".to_owned());
        assert!(load(&args, &inside).unwrap_err().to_string().starts_with("NODE_NAME: is not set, and"));
    }

    #[test]
    fn the_exit_code_tells_good_from_bad() {
        let (_dir, good) = args(LEAST);
        let missing = Args { config: "/nonexistent/agent.yaml".into(), ..good };
        assert_eq!(check(&missing, &|_| None), Exit::Usage);
        let (_dir, good) = args(LEAST);
        assert_eq!(check(&good, &|_| None), Exit::Ok);
        assert_eq!(check(&Args { output: Format::Json, ..good }, &|_| None), Exit::Ok);
        let (_dir, bad) = args("bogus: 1");
        assert_eq!(check(&bad, &|_| None), Exit::Usage);
        assert_eq!(check(&Args { output: Format::Json, ..bad }, &|_| None), Exit::Usage);
    }

    #[test]
    fn json_has_errors_with_their_parts() {
        let (_dir, args) = args("bogus: 1");
        let errors = load(&args, &|_| None).unwrap_err();
        let text = json(&Report { valid: false, errors: &errors.0, warnings: &[], summary: None });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["valid"], false);
        assert_eq!(value["errors"][1]["path"], "bogus");
        assert_eq!(value["errors"][1]["value"], serde_json::Value::Null);
        assert_eq!(value["errors"][1]["what"], "is not a field of the configuration");
    }
}
