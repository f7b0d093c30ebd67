//! Each shape of certificate, bundle and revocation list is offered to the agent and to real Envoys, and their verdicts are compared.
//!
//! The oldest and the newest supported Envoy are asked twice: with the shape as it is, and with the secrets that the agent serves for it. An
//! Envoy connects to itself, so that a trial passes only if its client and its server accept the certificate.

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path, sync::OnceLock};

use envoys::{Trial, Verdict};
use futures::{StreamExt, stream};
use test_harness::tools;

use self::{agents::Served, der::Key, table::Shape};

mod agents;
mod der;
mod envoys;
mod example;
mod pki;
mod secrets;
mod table;

/// Agents at the same time.
const AT_ONCE: usize = 64;

/// Shapes that both Envoys accept and the agent does not serve, or does not serve with their lists.
struct Disagreement {
    shape: &'static str,
    reason: &'static str,
    remedy: &'static str,
}

const DISAGREEMENTS: &[Disagreement] = &[
    Disagreement {
        shape: "leaf with CA true",
        reason: "An X.509-SVID of a workload must not be of an authority. Envoy's SPIFFE validator and go-spiffe refuse it.",
        remedy: "Configure the issuer to sign leaf certificates.",
    },
    Disagreement {
        shape: "leaf with keyCertSign",
        reason: "As above: the SPIFFE X.509-SVID specification, section 4.3.",
        remedy: "Configure the issuer to set the key usages of the request.",
    },
    Disagreement {
        shape: "root with bytes after it",
        reason: "The bytes may be a second certificate, which Envoy loses without a word.",
        remedy: "Write each certificate in a block of its own.",
    },
    Disagreement {
        shape: "a second root without a list",
        reason: "Envoy refuses each certificate of that root. The agent serves the roots without lists, and an alert fires.",
        remedy: "Add the missing list, or remove the root.",
    },
];

/// The verdicts on one shape.
struct Row {
    shape: &'static Shape,
    agent: Result<Served, String>,
    /// Of each Envoy, on the shape as it is.
    offered: [Verdict; 2],
    /// Of each Envoy, on what the agent serves.
    served: Option<[Verdict; 2]>,
    has_lists: bool,
}

fn shapes() -> &'static [Shape] {
    static SHAPES: OnceLock<Vec<Shape>> = OnceLock::new();
    SHAPES.get_or_init(table::all)
}

async fn rows() -> Vec<Row> {
    let shapes = shapes();
    let agents: Vec<Result<Served, String>> = stream::iter(shapes).map(agents::verdict).buffered(AT_ONCE).collect().await;
    let mut trials = Vec::new();
    let mut has_lists = Vec::new();
    for (index, (shape, agent)) in shapes.iter().zip(&agents).enumerate() {
        let key = Key::new();
        let material = shape.make(&key.spki());
        has_lists.push(!material.lists.is_empty());
        trials.push(Trial {
            id: format!("offered{index}"),
            chain: agents::pem("CERTIFICATE", &material.chain),
            key: agents::pem("PRIVATE KEY", &[key.pkcs8().to_vec()]),
            roots: agents::pem("CERTIFICATE", &material.bundle),
            lists: (!material.lists.is_empty()).then(|| agents::pem("X509 CRL", &material.lists)),
        });
        if let Ok(served) = agent.clone() {
            let Served { chain, key, roots, lists } = served;
            trials.push(Trial { id: format!("served{index}"), chain, key, roots, lists });
        }
    }
    let programs = (tools::oldest_envoy(), tools::envoy());
    let (oldest, newest) = tokio::join!(envoys::verdicts(&programs.0, &trials), envoys::verdicts(&programs.1, &trials));
    let both = |id: String| Some([oldest.get(&id)?.clone(), newest.get(&id)?.clone()]);
    shapes
        .iter()
        .zip(agents)
        .zip(has_lists)
        .enumerate()
        .map(|(index, ((shape, agent), has_lists))| Row {
            shape,
            agent,
            offered: both(format!("offered{index}")).expect("a verdict for each shape"),
            served: both(format!("served{index}")),
            has_lists,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_served_is_what_envoys_accept() {
    let rows = rows().await;
    assert!(rows.len() >= 80, "{} shapes", rows.len());
    let names: BTreeSet<(&str, &str)> = rows.iter().map(|row| (row.shape.group, row.shape.name)).collect();
    assert_eq!(names.len(), rows.len(), "each shape has a name of its own");
    let mut faults = String::new();
    for row in &rows {
        for fault in row.faults() {
            let Row { shape, offered, served, .. } = row;
            let agent = row.words();
            writeln!(
                faults,
                "{}: {}: {fault}\n    agent: {agent}\n    offered: {offered:?}\n    served: {served:?}",
                shape.group, shape.name
            )
            .expect("a string");
        }
    }
    let listed: BTreeSet<&str> = DISAGREEMENTS.iter().map(|row| row.shape).collect();
    let met: BTreeSet<&str> = rows.iter().filter(|row| row.is_lost()).map(|row| row.shape.name).collect();
    assert!(faults.is_empty(), "{faults}");
    assert_eq!(listed, met, "the list has shapes that the agent serves");
    assert!(listed.len() <= 5);
    compare_with_docs(&rows);
}

impl Row {
    fn words(&self) -> &str {
        match &self.agent {
            Ok(_) => "served",
            Err(why) => why,
        }
    }

    /// The agent's verdict, without times.
    fn agent_in_words(&self) -> String {
        let is_changed = !self.offered.iter().all(Verdict::accepts);
        match &self.agent {
            Ok(served) if self.has_lists && served.lists.is_none() => "served without the lists".to_owned(),
            Ok(_) if is_changed => "served without the unusable part".to_owned(),
            Ok(_) => "served".to_owned(),
            Err(why) => {
                let why = why.strip_prefix("the issuer returned a certificate that must not be served: ").unwrap_or(why);
                let why = why.strip_prefix("the chain does not lead to the trust bundle: ").unwrap_or(why);
                let why = why.strip_prefix("trust bundle from file roots ").unwrap_or(why);
                let why = why.strip_suffix("; the last good one stays in use").unwrap_or(why);
                let words = why.split(' ').map(|word| match word {
                    time if time.starts_with("20") && time.contains('Z') => "(time)",
                    // A signature has no fixed length.
                    size if size.len() > 5 && size.bytes().all(|byte| byte.is_ascii_digit()) => "(size)",
                    word => word,
                });
                format!("refused: {}", words.collect::<Vec<_>>().join(" "))
            }
        }
    }

    fn lists_are_served(&self) -> bool {
        self.agent.as_ref().is_ok_and(|served| served.lists.is_some())
    }

    /// Whether both Envoys accept what the agent does not serve.
    fn is_lost(&self) -> bool {
        self.offered.iter().all(Verdict::accepts) && (self.agent.is_err() || self.has_lists && !self.lists_are_served())
    }

    fn faults(&self) -> Vec<&'static str> {
        let mut faults = Vec::new();
        if self.served.iter().flatten().any(|verdict| !verdict.accepts()) {
            faults.push("the agent serves what an Envoy refuses");
        }
        let differ = self.offered[0].accepts() != self.offered[1].accepts();
        if differ && self.agent.as_ref().is_err_and(|why| !why.contains("Envoy 1.")) {
            faults.push("the agent does not name the release of Envoy that is the reason");
        }
        if self.is_lost() && !DISAGREEMENTS.iter().any(|row| row.shape == self.shape.name) {
            faults.push("both Envoys accept what the agent does not serve");
        }
        faults
    }
}

fn compare_with_docs(rows: &[Row]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/shapes.md");
    let text = document(rows);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &text).expect("the page is written");
    }
    let current = fs::read_to_string(&path).unwrap_or_default();
    assert!(current == text, "docs/shapes.md differs from the verdicts; run this test with UPDATE_DOCS=1");
}

const INTRODUCTION: &str = "\
# Shapes of certificates

This page is for operators who debug a rejected certificate or bundle. It shows how the agent and Envoy judge odd certificates, bundles and
revocation lists.

The test `real_envoys::shapes` generates it. It offers each shape to the agent, as an issuer's answer and as a trust bundle, and to two real
Envoys: the oldest and the newest supported release. An Envoy accepts a shape if it takes the secrets and completes a mutual TLS handshake
with itself. Envoy is built with BoringSSL; builds with OpenSSL are not tested.

The agent never serves what one of the Envoys refuses. Where the releases differ, it follows the stricter one, and names the release in the
error.

";

/// The page: the verdicts on each shape, by group.
fn document(rows: &[Row]) -> String {
    let mut out = INTRODUCTION.to_owned();
    let served = rows.iter().filter(|row| row.agent.is_ok()).count();
    writeln!(out, "{} shapes: the agent serves {served} and refuses {}.", rows.len(), rows.len() - served).expect("a string");
    out.push_str("\n## Accepted by both Envoys and not served\n\n| shape | reason | remedy |\n|---|---|---|\n");
    for row in DISAGREEMENTS {
        writeln!(out, "| {} | {} | {} |", row.shape, row.reason, row.remedy).expect("a string");
    }
    let mut group = "";
    for row in rows {
        if row.shape.group != group {
            group = row.shape.group;
            writeln!(out, "\n## {}{}\n", group[..1].to_uppercase(), &group[1..]).expect("a string");
            out.push_str("| shape | Envoy 1.36 | Envoy 1.40 | agent |\n|---|---|---|---|\n");
        }
        let [oldest, newest] = row.offered.each_ref().map(Verdict::in_words);
        writeln!(out, "| {} | {oldest} | {newest} | {} |", row.shape.name, row.agent_in_words()).expect("a string");
    }
    out
}
