use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path};

use serde_json::{Map, Value, json};

use super::*;
use crate::config::{Config, Errors, live, parse};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A file that contains every section that a single file can have.
fn base() -> Value {
    let config_map = json!({"namespace": "a", "name": "b"});
    json!({
        "trustDomain": "mesh.example",
        "sockets": {"perPod": {"enabled": true}},
        "warmUp": {"enabled": true},
        "issuer": {"certManager": {"issuerRef": {"name": "mesh-ca", "kind": "ClusterIssuer"}}},
        "profiles": [{"name": "a", "match": {}, "issuerRef": {"name": "other-ca", "kind": "Issuer"}}],
        "trust": {"sources": [{"configMap": config_map}], "federated": {"partner.example": {"configMap": config_map}}},
    })
}

fn in_a_pod(name: &str) -> Option<String> {
    matches!(name, "NODE_NAME" | "POD_NAMESPACE" | "POD_NAME" | "POD_UID").then(|| "n1".to_owned())
}

fn parsed(tree: &Value) -> Result<Config, Errors> {
    Config::parse(&tree.to_string(), &in_a_pod).map(|loaded| loaded.config)
}

/// The mapping that contains `path` in a tree like [`base`], created if it is missing, and the last name.
fn place<'t>(tree: &'t mut Value, path: &str) -> (&'t mut Map<String, Value>, String) {
    let mut at = tree;
    let parts: Vec<_> = path.split('.').collect();
    let (last, before) = parts.split_last().unwrap();
    for part in before {
        at = match part.strip_suffix("[]") {
            Some(list) => at.as_object_mut().unwrap().entry(list).or_insert_with(|| json!([{}])).get_mut(0).unwrap(),
            None if *part == "<name>" => at.get_mut("partner.example").unwrap(),
            None => at.as_object_mut().unwrap().entry(*part).or_insert_with(|| json!({})),
        };
    }
    (at.as_object_mut().unwrap(), (*last).to_owned())
}

fn with(path: &str, value: Value) -> Value {
    let mut tree = base();
    let (section, name) = place(&mut tree, path);
    section.insert(name, value);
    tree
}

fn without(path: &str) -> Value {
    let mut tree = base();
    let (section, name) = place(&mut tree, path);
    section.remove(&name);
    tree
}

/// The parser's errors about this value in this field.
fn complaints(path: &str, value: Value) -> Vec<String> {
    let place = path.replace("[]", "[0]").replace("<name>", "partner.example");
    let problems = parsed(&with(path, value)).err().map(|errors| errors.0).unwrap_or_default();
    problems.into_iter().filter(|p| is_within(&p.path, &place)).map(|p| format!("{}; {}", p.what, p.remedy)).collect()
}

#[test]
fn the_base_of_these_tests_is_a_good_file() {
    parsed(&base()).unwrap();
}

#[test]
fn the_table_knows_what_the_parser_knows() {
    let table: Vec<&str> = all().map(|field| field.path).collect();
    let known = parse::known_fields();
    assert_eq!(
        table.iter().map(|path| (*path).to_owned()).collect::<BTreeSet<_>>(),
        known,
        "src/config/reference/fields.rs and the parser"
    );
    assert_eq!(table.len(), known.len(), "a field occurs twice");
}

#[test]
fn the_table_explains_every_field() {
    for Field { path, meaning, .. } in all() {
        let fine = meaning.ends_with(['.', '`']) || meaning.ends_with(".)");
        assert!(fine && !meaning.contains(['|', '\n']), "{path}: {meaning:?}");
    }
}

#[test]
fn a_default_is_what_counts_where_nothing_stands() {
    for field in all() {
        match field.default {
            Absence::Value(value) => {
                // The default is written as YAML.
                let value = serde_saphyr::from_str(value).unwrap_or_else(|e| panic!("{}: {e}", field.path));
                let absent = parsed(&without(field.path)).unwrap_or_else(|e| panic!("{}: {e}", field.path));
                let present = parsed(&with(field.path, value)).unwrap_or_else(|e| panic!("{}: {e}", field.path));
                assert_eq!(absent, present, "{}", field.path);
            }
            Absence::Required => {
                let errors = parsed(&without(field.path)).expect_err(field.path).to_string();
                assert!(errors.contains("missing") || errors.contains("names no"), "{}: {errors}", field.path);
            }
            Absence::Nothing | Absence::Words(_) => {}
        }
    }
}

#[test]
fn what_a_kind_excludes_the_parser_refuses() {
    for field in all() {
        let refused = |value: Value| {
            assert_ne!(complaints(field.path, value.clone()), [""; 0], "{} = {value}", field.path);
        };
        let in_range = |value: Value| {
            let said = complaints(field.path, value.clone());
            assert!(said.iter().all(|words| !words.contains("is out of range")), "{} = {value}: {said:?}", field.path);
        };
        match field.kind {
            Kind::Section | Kind::Entries | Kind::Labels => refused(json!("text")),
            Kind::Sections | Kind::Texts => refused(json!({"a": "b"})),
            Kind::Text => refused(json!({})),
            Kind::Boolean => refused(json!("maybe")),
            Kind::Choice(names) => {
                let said = complaints(field.path, json!("nonsense"));
                assert!(said[0].ends_with(&format!("use {}", values::one_of(names))), "{}: {said:?}", field.path);
            }
            Kind::Duration => [json!(5), json!("5"), json!("soon")].into_iter().for_each(refused),
            Kind::Integer(least, most) => {
                [json!(least), json!(most)].into_iter().for_each(in_range);
                [json!(-1), json!(1.5), json!("many")].into_iter().for_each(refused);
                [least.checked_sub(1), most.checked_add(1)].into_iter().flatten().for_each(|beyond| refused(json!(beyond)));
            }
            Kind::Integers(least, most) => {
                [json!([least]), json!([most])].into_iter().for_each(in_range);
                [json!(5), json!(["many"]), json!([most + 1])].into_iter().for_each(refused);
            }
            Kind::Fraction(least, most) => {
                [json!(least), json!(most)].into_iter().for_each(in_range);
                [json!(least - 0.01), json!(most + 0.01), json!("half")].into_iter().for_each(refused);
            }
            Kind::Mode => [json!(438), json!("0888"), json!("rw")].into_iter().for_each(refused),
            Kind::Path => [json!("relative"), json!(1)].into_iter().for_each(refused),
            Kind::Address => [json!("localhost"), json!("127.0.0.1")].into_iter().for_each(refused),
        }
    }
}

/// Every field is in the table of [`live`], by itself or through its section.
#[test]
fn every_field_changes_at_once_or_with_the_next_start() {
    for field in all() {
        let found = live::FIELDS.iter().filter(|section| is_within(field.path, section.path)).count();
        let is_above = live::FIELDS.iter().any(|section| is_within(section.path, field.path));
        assert!(found == 1 || (found == 0 && is_above), "{}: {found}", field.path);
    }
    for section in live::FIELDS {
        assert!(find(section.path).is_some(), "{}", section.path);
    }
}

#[test]
fn an_operator_finds_a_field_by_what_an_error_calls_it() {
    for (name, path) in [
        ("certificate.renewAt", "certificate.renewAt"),
        ("certificate.renewat", "certificate.renewAt"),
        ("profiles[3].match", "profiles[].match"),
        ("profiles.match", "profiles[].match"),
        ("trust.federated.<name>.file", "trust.federated.<name>.file"),
    ] {
        assert_eq!(find(name).map(|field| field.path), Some(path), "{name}");
    }
    assert!(find("certificate.renew").is_none() && find("").is_none());
    assert_eq!(nearest("renewAt"), Some("certificate.renewAt"));
    assert_eq!(nearest("certificate.renewal"), Some("certificate.renewAt"));
    let below: Vec<_> = find("names").unwrap().below().map(|field| field.path).collect();
    assert_eq!(below, ["names.certificate", "names.bundle"]);
}

#[test]
fn the_schema_has_every_field_in_its_place() {
    let whole = schema(None, Completeness::Whole);
    assert_eq!(whole["required"], json!(["issuer"]));
    let certificate = &whole["properties"]["certificate"]["properties"];
    assert_eq!(certificate["renewAt"]["maximum"], json!(0.9));
    assert_eq!(certificate["key"]["enum"], json!(["ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", null]));
    let profile = &whole["properties"]["profiles"]["items"];
    assert_eq!(profile["required"], json!(["name", "match"]));
    assert_eq!(profile["properties"]["certificate"]["properties"]["lifetime"]["pattern"], "^[0-9].*[a-z]$");
    let federated = &whole["properties"]["trust"]["properties"]["federated"]["additionalProperties"];
    assert_eq!(federated["properties"]["configMap"]["required"], json!(["namespace", "name"]));
    assert_eq!(whole["properties"]["sockets"]["properties"]["shared"]["additionalProperties"], json!(false));

    let part = schema(None, Completeness::Part);
    assert!(part.get("required").is_none() && part["properties"]["issuer"].get("required").is_none());
    assert_eq!(part["properties"]["profiles"]["items"]["required"], json!(["name", "match"]));

    // The schema contains each field once, at its depth.
    fn count(schema: &Value) -> usize {
        let properties = schema["properties"].as_object().into_iter().flatten().map(|(_, field)| 1 + count(field)).sum::<usize>();
        properties
            + [&schema["items"], &schema["additionalProperties"]].into_iter().filter(|inner| inner.is_object()).map(count).sum::<usize>()
    }
    assert_eq!(count(&whole), all().count());
}

#[test]
fn markdown_is_made_plain() {
    assert_eq!(
        schema::plain("See [security.md](security.md#the-shared-socket), `[a, b]` and `x[0]`."),
        "See security.md, [a, b] and x[0]."
    );
}

fn table(group: &Group) -> String {
    let mut out = "| field | type | default | meaning |\n|---|---|---|---|\n".to_owned();
    for Field { path, kind, default, meaning } in group.fields {
        let kind = match kind {
            Kind::Choice(names) => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
            other => other.words(),
        };
        writeln!(out, "| `{path}` | {kind} | {} | {meaning} |", default.words()).unwrap();
    }
    out
}

fn changes() -> String {
    let mut out = "| field | takes effect |\n|---|---|\n".to_owned();
    for field in live::FIELDS {
        writeln!(out, "| `{}` | {} |", field.path, field.when()).unwrap();
    }
    out
}

/// The text up to the line `end`, with `part` between the lines `begin` and `end`; and the rest of the text.
fn replaced<'t>(text: &'t str, begin: &str, end: &str, part: &str) -> (String, &'t str) {
    let (before, rest) = text.split_once(begin).unwrap_or_else(|| panic!("there is no line {begin:?}"));
    let (_, after) = rest.split_once(end).unwrap_or_else(|| panic!("nothing ends {begin:?}"));
    (format!("{before}{begin}{part}{end}"), after)
}

fn page(written: &str) -> String {
    const BEGIN: &str = "<!-- Generated by `UPDATE_DOCS=1 cargo test --lib config::reference`. -->\n";
    const END: &str = "<!-- End. -->\n";
    let (mut out, mut rest) = (String::new(), written);
    for part in GROUPS.iter().map(table).chain([changes()]) {
        let (done, after) = replaced(rest, BEGIN, END, &part);
        out.push_str(&done);
        rest = after;
    }
    assert!(!rest.contains(BEGIN), "docs/configuration.md has more tables than there are groups");
    for Group { title, .. } in GROUPS {
        assert!(out.contains(&format!("### {title}\n")), "docs/configuration.md has no heading {title:?}");
    }
    out + rest
}

/// The chart supports only `attestation: kubernetes`.
fn values_schema(written: &str) -> String {
    let mut config = schema(None, Completeness::Part);
    config["properties"]["attestation"] = json!({"const": "kubernetes"});
    let config = serde_json::to_string_pretty(&config).unwrap().replace('\n', "\n    ");
    let (out, rest) = replaced(written, "    \"config\": ", "\n    \"maxDuration\": ", &format!("{config},"));
    out + rest
}

#[test]
fn the_page_and_the_schema_of_the_chart_are_what_the_table_says() {
    let update = std::env::var_os("UPDATE_DOCS").is_some();
    for (path, right) in [("docs/configuration.md", page as fn(&str) -> String), ("daemonset/chart/values.schema.json", values_schema)] {
        let path = Path::new(ROOT).join(path);
        let written = fs::read_to_string(&path).unwrap();
        let right = right(&written);
        if update {
            fs::write(&path, &right).unwrap();
            continue;
        }
        let missing: Vec<_> = right.lines().filter(|line| !written.contains(line)).collect();
        let surplus: Vec<_> = written.lines().filter(|line| !right.contains(line)).collect();
        assert!(
            written == right,
            "{} is not what the code says; run UPDATE_DOCS=1 cargo test --lib config::reference\nmissing: {missing:#?}\nsurplus: {surplus:#?}",
            path.display()
        );
    }
}
