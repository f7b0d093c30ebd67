//! Compares `docs/metrics.md` with the code: its tables show the registry after every module has registered all of its series.
//!
//! Each module that registers metrics has an entry in [`MODULES`], with a function that registers them and creates every series. A test
//! fails if an entry is missing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use agent_runtime::{
    metrics::{ANY, Exposition, Format, PREFIX},
    readiness, telemetry,
};
use issuance::{issuer, rotation};
use prometheus_client::registry::Registry;
use sds_server::{attest, sds, session, trust};

use crate::{admin, app, build_info, config, csi, events, handover, interfaces, pod_sockets, process, warm};

mod monitoring;

/// The metrics of one source file, which are one table of the page.
struct Module {
    /// The source file that registers the metrics; `None` for those of the registry itself.
    file: Option<&'static str>,
    title: &'static str,
    sample: fn(&mut Registry),
}

const fn module(file: &'static str, title: &'static str, sample: fn(&mut Registry)) -> Module {
    Module { file: Some(file), title, sample }
}

/// The modules in the order of the tables, including those that only some configurations use (`sockets.perPod`, cert-manager).
const MODULES: &[Module] = &[
    module("src/app/inventory.rs", "Certificates", app::sample_inventory),
    module("crates/issuance/src/rotation/metrics.rs", "Issuing and renewing", rotation::metrics::Metrics::sample),
    module("crates/sds-server/src/sds/metrics.rs", "Streams and secrets", sds::metrics::Metrics::sample),
    module("crates/sds-server/src/session/metrics.rs", "Connections", session::metrics::Metrics::sample),
    module("crates/sds-server/src/attest.rs", "Attestation", attest::Metrics::sample),
    module("src/handover/metrics.rs", "The path of the shared socket", handover::Metrics::sample),
    module("crates/sds-server/src/trust.rs", "Trust bundles", trust::Metrics::sample),
    module("crates/agent-kube/src/metrics.rs", "The Kubernetes API", agent_kube::Metrics::sample),
    module(
        "crates/issuance/src/issuer/certificate_request/requests.rs",
        "CertificateRequests",
        issuer::certificate_request::Metrics::sample,
    ),
    module(
        "src/warm/metrics.rs",
        "Certificates ordered before the first call (`warmUp`, `sockets.perPod`)",
        warm::metrics::Metrics::sample,
    ),
    module("src/pod_sockets/metrics.rs", "Sockets of pods (`sockets.perPod`)", pod_sockets::metrics::Metrics::sample),
    module("src/csi/metrics.rs", "The mount helper (`sds-agent mount-helper`)", csi::metrics::Metrics::sample),
    module("crates/approver/src/metrics.rs", "The approver (`sds-agent approver`)", approver::Metrics::sample),
    module("src/events.rs", "Events about pods", events::Metrics::sample),
    module("src/config/reloads.rs", "The configuration file", config::reloads::Metrics::sample),
    module("crates/agent-runtime/src/readiness.rs", "Readiness", readiness::Metrics::sample),
    module("src/process.rs", "Memory", process::Metrics::sample),
    module("crates/agent-runtime/src/telemetry/metrics.rs", "The log", telemetry::Metrics::sample),
    module("src/admin/metrics.rs", "Probes, metrics and the admin address", admin::Metrics::sample),
    Module { file: None, title: "Build and process", sample: |_| {} },
];

/// Labels whose values are not a closed set, and their meaning.
const OPEN: [(&str, &str); 8] = [
    ("issuer", "the first profile that uses the issuer, or `default`"),
    ("namespace", "namespace of the workload"),
    ("revision", "revision of the source"),
    ("service_account", "service account of the workload"),
    (
        "source",
        "as configured: `configMap <namespace>/<name>[<key>]`, `clusterTrustBundle <selection>`, `file <path>`, `inline <field>`, `issuer <name>`",
    ),
    ("version", "version of the release"),
    ("reason of approver_decisions", "`none`, or the reason of the denial as in the request's condition"),
    ("code of kube_request", "the HTTP status, `timeout`, or `error` if there was no answer"),
];

/// The description of one metric on the page.
#[derive(Debug, Default)]
struct Described {
    name: String,
    help: String,
    kind: String,
    labels: BTreeMap<String, Vec<String>>,
}

/// Parses an exposition; the metrics keep their order.
fn described(page: &str) -> Vec<Described> {
    let mut out: Vec<Described> = Vec::new();
    for line in page.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            out.push(Described { name: name.to_owned(), help: help.trim_end_matches('.').to_owned(), ..Described::default() });
        } else if let Some((_, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            out.last_mut().unwrap().kind = kind.to_owned();
        } else if let Some((_, rest)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            let labels = rest.rsplit_once('}').unwrap().0;
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let (name, value) = label.split_once('=').unwrap();
                let values = out.last_mut().unwrap().labels.entry(name.to_owned()).or_default();
                let value = value.trim_matches('"').to_owned();
                if name != "le" && !values.contains(&value) {
                    values.push(value);
                }
            }
        }
    }
    for metric in &mut out {
        metric.labels.remove("le");
        metric.labels.values_mut().for_each(|values| values.sort_unstable());
    }
    out
}

fn sampled(module: &Module) -> Vec<Described> {
    let page = if module.file.is_none() {
        Exposition::new(build_info::VERSION, build_info::REVISION).encode(Format::OpenMetrics).unwrap()
    } else {
        let mut registry = Registry::with_prefix(PREFIX);
        (module.sample)(&mut registry);
        let mut page = String::new();
        prometheus_client::encoding::text::encode_registry(&mut page, &registry).unwrap();
        page
    };
    described(&page)
}

/// Every metric with its type, its labels and their values. `*` replaces values that are not a closed set.
pub(crate) fn series() -> Vec<String> {
    let metrics = MODULES.iter().flat_map(sampled);
    let shown = metrics.map(|metric| {
        let labels = metric.labels.iter().map(|(name, values)| format!(" {name}={}", values.join(",")));
        let labels: String = labels.collect();
        format!("{} {}{labels}", shown_name(&metric), metric.kind)
    });
    shown.collect()
}

/// The name of every metric as a query uses it, with its type.
fn names() -> BTreeMap<String, String> {
    MODULES.iter().flat_map(sampled).map(|metric| (shown_name(&metric), metric.kind)).collect()
}

fn shown_name(metric: &Described) -> String {
    format!("{}{}", metric.name, if metric.kind == "counter" { "_total" } else { "" })
}

fn shown_label(metric: &Described, name: &str, values: &[String]) -> String {
    let open = |key: &str| OPEN.iter().find(|(label, _)| *label == key).map(|(_, words)| *words);
    let special =
        ["kube_request", "approver_decisions"].into_iter().find(|part| metric.name.contains(part)).map(|part| format!("{name} of {part}"));
    match special.and_then(|key| open(&key)).or_else(|| open(name)) {
        Some(words) => format!("`{name}`: {words}"),
        None => {
            let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
            format!("`{name}`: {}", values.join(", "))
        }
    }
}

fn tables() -> String {
    let mut out = String::new();
    for module in MODULES {
        write!(out, "\n## {}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", module.title).unwrap();
        for metric in sampled(module) {
            let labels: Vec<String> = metric.labels.iter().map(|(name, values)| shown_label(&metric, name, values)).collect();
            writeln!(out, "| `{}` | {} | {} | {} |", shown_name(&metric), metric.kind, labels.join("<br>"), metric.help).unwrap();
        }
    }
    out
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_reference_is_what_the_registry_shows() {
    const BEGIN: &str = "<!-- From here on generated by `UPDATE_DOCS=1 cargo test --lib metrics_reference`. -->\n";
    let path = root().join("docs/metrics.md");
    let written = fs::read_to_string(&path).unwrap_or_default();
    let by_hand = written.split_once(BEGIN).map_or(&*written, |(by_hand, _)| by_hand);
    let right = format!("{by_hand}{BEGIN}{}", tables());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &right).unwrap();
        return;
    }
    let (written_lines, right_lines): (BTreeSet<&str>, BTreeSet<&str>) = (written.lines().collect(), right.lines().collect());
    let missing: Vec<String> = right_lines.difference(&written_lines).map(|line| format!("+ {line}")).collect();
    let surplus: Vec<String> = written_lines.difference(&right_lines).map(|line| format!("- {line}")).collect();
    assert!(
        written == right,
        "docs/metrics.md is not what the code says; run UPDATE_DOCS=1 cargo test --lib metrics_reference\n{}",
        [surplus, missing].concat().join("\n")
    );
}

#[test]
fn every_metric_has_the_form_of_its_type_and_a_meaning() {
    for metric in MODULES.iter().flat_map(sampled) {
        let Described { name, help, kind, labels } = &metric;
        assert!(!help.is_empty(), "{name}");
        assert!(name.starts_with("sds_agent_") || name.starts_with("process_"), "{name}");
        assert!(!name.ends_with("_total"), "{name}: the encoder adds it");
        assert!(kind != "histogram" || name.ends_with("_seconds"), "{name}: a histogram of something without its unit");
        assert!(["counter", "gauge", "histogram"].contains(&kind.as_str()), "{name}: {kind}");
        let open: BTreeSet<_> = labels.iter().filter(|(_, values)| values.iter().any(|value| value == ANY)).collect();
        assert!(open.iter().all(|(label, _)| OPEN.iter().any(|(known, _)| known.split(' ').next() == Some(label))), "{name}: {labels:?}");
    }
    // The loop above also passes on an empty page.
    let names = names();
    assert_eq!(names["sds_agent_issuances_total"], "counter");
    assert_eq!(names["sds_agent_certificate_expiration_timestamp_seconds"], "gauge");
    assert_eq!(names["sds_agent_csi_calls_total"], "counter");
    assert_eq!(names["process_open_fds"], "gauge");
}

/// Every module that registers metrics is in [`MODULES`].
#[test]
fn no_module_that_registers_is_forgotten() {
    let registers = |path: &PathBuf| fs::read_to_string(path).unwrap().contains("pub fn register(registry: &mut Registry)");
    let sources = interfaces::sources(root()).into_iter().filter(registers);
    let mut registering: BTreeSet<PathBuf> = sources.map(|path| path.strip_prefix(root()).unwrap().to_owned()).collect();
    // It only calls the `register` functions of the server's modules.
    registering.remove(Path::new("crates/sds-server/src/server.rs"));
    registering.insert("src/app/inventory.rs".into());
    let listed: BTreeSet<PathBuf> = MODULES.iter().filter_map(|module| module.file).map(PathBuf::from).collect();
    assert_eq!(listed, registering, "name each in MODULES of src/metrics_reference.rs, and regenerate docs/metrics.md");
}
