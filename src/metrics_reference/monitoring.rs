//! Compares the alerts and the dashboard with the code and the runbook: every named metric exists, and every alert has an entry.

use serde_json::Value;

use super::*;

const RULES: &str = include_str!("../../daemonset/monitoring/prometheusrule.yaml");
const DASHBOARD: &str = include_str!("../../daemonset/monitoring/dashboard.json");
const RUNBOOK: &str = include_str!("../../docs/runbook.md");
const RULES_TEST: &str = include_str!("../../tests/monitoring/rules_test.yaml");

/// Names in `text` that look like metrics of the agent and are none.
fn unknown(text: &str) -> BTreeSet<&str> {
    let names = names();
    let is_known = |word: &str| {
        let part_of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
        // A value of the label `reason`.
        let is_label = word == attest::Reason::process_gone.as_str();
        is_label
            || names.contains_key(word)
            || part_of_histogram.is_some_and(|name| names.get(name).is_some_and(|kind| kind == "histogram"))
    };
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| (word.starts_with("sds_agent_") || word.starts_with("process_")) && !is_known(word)).collect()
}

fn alerts() -> Vec<Value> {
    let rule: Value = serde_saphyr::from_str(RULES).unwrap();
    let groups = rule["spec"]["groups"].as_array().unwrap();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

#[test]
fn every_metric_that_is_named_anywhere_exists() {
    assert_eq!(
        unknown("rate(sds_agent_sds_acks_total[5m]) sds_agent_acks sds_agent_ready_sum"),
        ["sds_agent_acks", "sds_agent_ready_sum"].into()
    );
    for (place, text) in [("rules", RULES), ("dashboard", DASHBOARD), ("runbook", RUNBOOK), ("rules_test", RULES_TEST)] {
        let unknown = unknown(text);
        assert!(unknown.is_empty(), "{place}: {unknown:?}");
        assert!(text.contains("sds_agent_certificate_renewal_overdue_ratio"), "{place} does not contain the expected metrics");
    }
}

#[test]
fn every_alert_has_its_words_a_test_and_an_entry_in_the_runbook() {
    let alerts = alerts();
    for alert in &alerts {
        let (name, expr) = (text(alert, "alert"), text(alert, "expr"));
        assert!(["critical", "warning"].contains(&text(&alert["labels"], "severity")), "{name}");
        let annotations = &alert["annotations"];
        assert_eq!(text(annotations, "runbook_url"), format!("docs/runbook.md#{}", name.to_lowercase()));
        assert!(RUNBOOK.contains(&format!("\n## {name}\n")), "docs/runbook.md has no entry {name}");
        assert!(RULES_TEST.contains(&format!("- name: {name}\n")), "tests/monitoring/rules_test.yaml does not fire {name}");
        // A label that the expression drops would be empty in the text.
        let kept: Vec<&str> = match expr.split_once(" by (") {
            Some((_, rest)) => rest.split_once(')').unwrap().0.split(", ").collect(),
            None => vec!["node", "job"],
        };
        for part in ["summary", "description"] {
            for used in text(annotations, part).split("$labels.").skip(1) {
                let label = used.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap();
                assert!(kept.contains(&label), "{name}: {part} uses {label}, and there are {kept:?}");
            }
        }
    }
    let names: BTreeSet<&str> = alerts.iter().map(|alert| text(alert, "alert")).collect();
    let entries: BTreeSet<&str> =
        RUNBOOK.lines().filter_map(|line| line.strip_prefix("## ")).filter(|line| line.starts_with("Sds")).collect();
    assert_eq!(entries, names, "the runbook has entries for alerts that do not exist");
    assert!(names.len() > 10 && names.len() == alerts.len());
}

#[test]
fn each_runbook_entry_has_all_its_required_parts() {
    for entry in RUNBOOK.split("\n## ").filter(|entry| entry.starts_with("Sds")) {
        for part in ["**For users**", "**See**", "**Wait**"] {
            assert!(entry.contains(part), "{part} is missing: {entry}");
        }
        assert!(entry.contains("**Do**") || entry.contains("**do**"), "{entry}");
    }
}

#[test]
fn no_panel_of_the_dashboard_lies_on_another_and_each_says_what_it_shows() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        assert!(!text(panel, "title").is_empty());
        let side = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(side("x") + side("w") <= 24, "{}", panel["title"]);
        for y in side("y")..side("y") + side("h") {
            for x in side("x")..side("x") + side("w") {
                assert!(taken.insert((x, y)), "{} lies on another panel", panel["title"]);
            }
        }
        let targets = panel["targets"].as_array();
        assert!(panel["type"] == "row" || targets.is_some_and(|targets| targets.iter().all(|target| !text(target, "expr").is_empty())));
    }
}
