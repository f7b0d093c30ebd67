//! `sds-agent check-config`: every error of a configuration at once, and what it means where there is none.

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;
use serde::Serialize;

use super::{Exit, output};
use crate::{
    config::{self, Attestation, Config, Env, IssuerConfig, Loaded, Problem, RequestNamespace, TrustSource, Warning},
    identity::Resolver,
};

/// The flags of `check-config`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The configuration, a YAML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// One object: valid, errors, warnings, summary
    Json,
}

const EXAMPLES: &str = "\
Errors and warnings go to standard error, one a line: field, value, what is wrong, what to do. It exits with 0, or with 64
where there is an error. Outside a cluster, variables that only a pod has are not missed.

Examples:
  sds-agent check-config --config agent.yaml
  sds-agent check-config --config agent.yaml -o json | jq -r '.errors[].path'";

/// What a configuration means.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Where all pods of the node are served.
    socket: Option<PathBuf>,
    /// The driver that hands out a socket to each pod.
    csi_driver: Option<String>,
    /// The kind of workload that the example is of.
    example_workload: String,
    /// Its identity.
    example_spiffe_id: String,
    /// Its DNS names.
    example_dns_names: Vec<String>,
    /// The key of certificates.
    key: &'static str,
    /// Their lifetime.
    lifetime_seconds: u64,
    /// The window in which they are replaced.
    renewal_seconds: [u64; 2],
    /// The issuers, in words.
    issuers: Vec<String>,
    /// The trust sources, in words.
    trust: Vec<String>,
    /// Whose requests the approver approves.
    approver_agents: Vec<String>,
    /// Requests per second for each 1,000 identities.
    requests_per_second_per_1000: f64,
}

#[derive(Serialize)]
struct Report<'a> {
    valid: bool,
    errors: &'a [Problem],
    warnings: &'a [Warning],
    summary: Option<&'a Summary>,
}

/// Checks and prints.
pub fn check(args: &Args, env: Env<'_>) -> Exit {
    let (valid, text) = match load(args, env) {
        Ok(Loaded { config, warnings }) => {
            let summary = summary(&config);
            let text = match args.output {
                Format::Json => json(&Report { valid: true, errors: &[], warnings: &warnings, summary: summary.as_ref() }),
                Format::Text => {
                    for warning in &warnings {
                        output::tell(format_args!("warning: {warning}"));
                    }
                    format!("{} is fine.\n{}", args.config.display(), summary.map(|s| words(&s)).unwrap_or_default())
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
    // Strings, numbers and lists: there is nothing in it that JSON cannot say.
    let mut text = serde_json::to_string_pretty(report).unwrap_or_default();
    text.push('\n');
    text
}

/// On a workstation or in a build nobody has a node's name: stand-ins take its place, and a warning says so.
fn load(args: &Args, env: Env<'_>) -> Result<Loaded, config::Errors> {
    if env("KUBERNETES_SERVICE_HOST").is_some() || env("NODE_NAME").is_some() {
        return Config::load(&args.config, env);
    }
    let elsewhere = |name: &str| {
        let stand_in = match name {
            "NODE_NAME" => "node",
            "POD_NAMESPACE" => "sds-agent",
            "POD_NAME" => "agent",
            "POD_UID" => "uid",
            _ => return env(name),
        };
        env(name).or_else(|| Some(stand_in.to_owned()))
    };
    let mut loaded = Config::load(&args.config, &elsewhere)?;
    if loaded.config.attestation == Attestation::Kubernetes {
        let message = "is not set here; in its pod the agent needs it, and should have POD_NAMESPACE, POD_NAME and POD_UID \
                       (docs/configuration.md shows how)";
        loaded.warnings.push(Warning { path: "NODE_NAME".into(), message: message.into() });
    }
    Ok(loaded)
}

fn summary(config: &Config) -> Option<Summary> {
    let profile = &config.default_profile;
    let resolver = Resolver { trust_domain: config.trust_domain.clone(), default_profile: profile.clone() };
    let workload = config::sample_workload(config.attestation);
    // The templates have been tried on this very workload.
    let identity = resolver.resolve(&workload).ok()?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a lifetime, rounded for people")]
    let renewal = |spread: f64| (profile.lifetime.as_secs_f64() * profile.renew_at * spread).round() as u64;
    let federated = config.federated.iter().map(|(domain, source)| format!("{domain} from {}", source_in_words(source)));
    Some(Summary {
        socket: config.shared_socket.as_ref().map(|socket| socket.path.clone()),
        csi_driver: config.per_pod.as_ref().map(|per_pod| per_pod.driver_name.clone()),
        example_workload: workload.to_string(),
        example_spiffe_id: identity.spiffe_id.to_string(),
        example_dns_names: identity.dns_names.to_vec(),
        key: profile.key.as_str(),
        lifetime_seconds: profile.lifetime.as_secs(),
        renewal_seconds: [renewal(1.0 - profile.jitter), renewal(1.0 + profile.jitter)],
        issuers: config.issuers.values().map(issuer_in_words).collect(),
        trust: config.trust_sources.iter().map(source_in_words).chain(federated).collect(),
        approver_agents: config.approver.agents.clone(),
        requests_per_second_per_1000: config::renewals_per_second(profile.lifetime, profile.renew_at, 1000),
    })
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
        TrustSource::File { path } => format!("file {}", path.display()),
    }
}

fn words(summary: &Summary) -> String {
    let span = |seconds: u64| humantime::format_duration(Duration::from_secs(seconds)).to_string();
    let [first, last] = summary.renewal_seconds;
    let mut lines = Vec::new();
    lines.extend(summary.socket.iter().map(|path| ("socket", path.display().to_string())));
    lines.extend(summary.csi_driver.iter().map(|driver| ("per pod", format!("a socket by CSI driver {driver}"))));
    lines.push(("identity", format!("{} for {}", summary.example_spiffe_id, summary.example_workload)));
    if !summary.example_dns_names.is_empty() {
        lines.push(("DNS names", summary.example_dns_names.join(", ")));
    }
    lines.push(("certificate", format!("{} for {}", summary.key, span(summary.lifetime_seconds))));
    lines.push((
        "renewal",
        if first == last { format!("after {}", span(first)) } else { format!("after {} to {}", span(first), span(last)) },
    ));
    lines.extend(summary.issuers.iter().map(|issuer| ("signed by", issuer.clone())));
    lines.extend(summary.trust.iter().map(|source| ("trust", source.clone())));
    lines.push(("approver", format!("approves requests of {}", summary.approver_agents.join(", "))));
    let rate = summary.requests_per_second_per_1000;
    lines.push(("load", format!("{rate:.2} requests per second for each 1,000 identities of the cluster")));
    lines.iter().map(|(label, text)| format!("  {label:<12} {text}\n")).collect()
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
        (dir, Args { config, output: Format::Text })
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
        let missing = Args { config: "/nonexistent/agent.yaml".into(), output: Format::Text };
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
