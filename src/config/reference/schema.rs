//! The table as a JSON Schema (draft 7), for editors, pipelines and the values of the chart.

use serde_json::{Map, Value, json};

use super::{Absence, Field, Kind, all, is_within};

/// Whether the schema describes a complete file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completeness {
    /// The agent's file: required fields are required.
    Whole,
    /// A part of a file, which the chart completes: no field is required outside of lists.
    Part,
}

/// The schema of `section`, or of the whole file. It accepts some values that the parser rejects: rules between fields, names and paths
/// are not part of it.
pub fn schema(section: Option<&Field>, completeness: Completeness) -> Value {
    match section {
        Some(field) => of_field(field, completeness),
        None => object("", None, completeness),
    }
}

fn of_field(field: &Field, completeness: Completeness) -> Value {
    let mut schema = match field.kind {
        Kind::Section => object(field.path, Some(field), completeness),
        Kind::Sections => {
            let items = object(&format!("{}[]", field.path), None, Completeness::Whole);
            json!({"type": ["array", "null"], "items": items})
        }
        Kind::Entries => {
            let entry = object(&format!("{}.<name>", field.path), None, completeness);
            json!({"type": ["object", "null"], "additionalProperties": entry})
        }
        Kind::Text => json!({"type": ["string", "null"], "minLength": 1}),
        Kind::Texts => json!({"type": ["array", "null"], "items": {"type": "string", "minLength": 1}}),
        Kind::Labels => json!({"type": ["object", "null"], "additionalProperties": {"type": "string"}}),
        Kind::Boolean => json!({"type": ["boolean", "null"]}),
        Kind::Choice(names) => {
            let names: Vec<Value> = names.iter().map(|name| json!(name)).chain([Value::Null]).collect();
            json!({"enum": names})
        }
        Kind::Duration => json!({"type": ["string", "null"], "pattern": "^[0-9].*[a-z]$"}),
        Kind::Integer(least, most) => integer(least, most, &json!(["integer", "null"])),
        Kind::Integers(least, most) => json!({"type": ["array", "null"], "items": integer(least, most, &json!("integer"))}),
        Kind::Fraction(least, most) => json!({"type": ["number", "null"], "minimum": least, "maximum": most}),
        Kind::Mode => json!({"type": ["string", "null"], "pattern": "^(0o)?[0-7]{3,4}$"}),
        Kind::Path => json!({"type": ["string", "null"], "pattern": "^/"}),
        Kind::Address => json!({"type": ["string", "null"], "pattern": ":[0-9]+$"}),
    };
    if !field.meaning.is_empty() {
        schema["description"] = json!(plain(field.meaning));
    }
    schema
}

fn integer(least: u64, most: u64, kind: &Value) -> Value {
    let mut schema = json!({"type": kind, "minimum": least});
    if most != u64::MAX {
        schema["maximum"] = json!(most);
    }
    schema
}

/// The schema of the mapping at `path`, which accepts only known fields.
fn object(path: &str, field: Option<&Field>, completeness: Completeness) -> Value {
    let children: Vec<_> = all().filter_map(|field| Some((child(field.path, path)?, field))).collect();
    let properties: Map<_, _> = children.iter().map(|(name, field)| ((*name).to_owned(), of_field(field, completeness))).collect();
    let mut schema = json!({"type": "object", "additionalProperties": false, "properties": properties});
    let required: Vec<_> = children.iter().filter(|(_, field)| field.default == Absence::Required).map(|(name, _)| *name).collect();
    if completeness == Completeness::Whole && !required.is_empty() {
        schema["required"] = json!(required);
    } else if field.is_some() {
        schema["type"] = json!(["object", "null"]);
    }
    schema
}

/// The last name of `path` if it is a direct field of the mapping at `parent`.
fn child(path: &'static str, parent: &str) -> Option<&'static str> {
    let name = if parent.is_empty() { path } else { path.strip_prefix(parent)?.strip_prefix('.')? };
    (is_within(path, parent) || parent.is_empty()).then_some(name).filter(|name| !name.contains(['.', '[', '<']))
}

/// Markdown as plain text: a link becomes its text.
pub fn plain(markdown: &str) -> String {
    let mut out = String::with_capacity(markdown.len());
    let mut rest = markdown;
    while let Some((before, link)) = rest.split_once('[') {
        out.push_str(before);
        match link.split_once("](").and_then(|(text, after)| Some((text, after.split_once(')')?.1))) {
            Some((text, after)) if !text.contains(']') => {
                out.push_str(text);
                rest = after;
            }
            _ => {
                out.push('[');
                rest = link;
            }
        }
    }
    out.push_str(rest);
    out.replace('`', "")
}
