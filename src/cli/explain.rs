//! `sds-agent explain`: prints the reference of the configuration, with the texts of `docs/configuration.md`.

use std::fmt::Write as _;

use serde_json::json;

use super::{
    Exit,
    output::{self, Format},
};
use crate::config::reference::{self, Completeness, Field, GROUPS, Kind};

/// The flags of `explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Path of a field, such as certificate.renewAt [default: all fields]
    #[arg(value_name = "FIELD")]
    pub field: Option<String>,
    /// Format of the output: json is a JSON Schema of the field, or of the whole file
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

const EXAMPLES: &str = "\
Examples:
  sds-agent explain                            list all fields, one on each line
  sds-agent explain certificate                describe a section and its fields
  sds-agent explain 'profiles[0].match'        describe a field by its path in an error
  sds-agent explain -o json > agent.schema.json
      for an editor: begin the file with `# yaml-language-server: $schema=agent.schema.json`

Exit codes: 0 printed, 1 the output failed, 64 usage or unknown field.";

/// Prints the description or the schema.
pub fn print(args: &Args) -> Exit {
    let text = explained(args, output::width());
    match text.map(|text| output::say(&text)) {
        Ok(Ok(())) => Exit::Ok,
        Ok(Err(error)) => output::unsaid(&error),
        Err(remedy) => {
            let field = output::printable(args.field.as_deref().unwrap_or_default());
            output::complain(format_args!("{field} is not a field of the configuration; {remedy}"));
            Exit::Usage
        }
    }
}

/// The text, or the remedy for an unknown field.
fn explained(args: &Args, width: Option<usize>) -> Result<String, String> {
    let field = match &args.field {
        Some(name) => Some(reference::find(name).ok_or_else(|| remedy(name))?),
        None => None,
    };
    Ok(match (args.output, field) {
        (Format::Text, Some(field)) => whole(field, width),
        (Format::Text, None) => all(width),
        (Format::Json, field) => {
            let mut schema = reference::schema(field, Completeness::Whole);
            schema["$schema"] = json!("http://json-schema.org/draft-07/schema#");
            format!("{schema:#}\n")
        }
    })
}

fn remedy(name: &str) -> String {
    reference::nearest(name).map_or_else(|| "`sds-agent explain` lists all fields".to_owned(), |near| format!("did you mean {near}?"))
}

/// Width of the column of paths; longer paths go beyond it.
const MAX_COLUMN_CHARS: usize = 44;

/// One line for each field: its path and the first sentence of its description.
fn all(width: Option<usize>) -> String {
    let widest = reference::all().map(|field| field.path.len()).filter(|length| *length <= MAX_COLUMN_CHARS).max().unwrap_or(0);
    let mut out = String::new();
    for group in GROUPS {
        let _ = writeln!(out, "{}:", group.title);
        for field in group.fields {
            let meaning = reference::plain(field.meaning);
            let end = meaning.find(". ").unwrap_or(meaning.len());
            let line = format!("  {:widest$}  {}", field.path, meaning[..end].trim_end_matches('.'));
            // A path is not cut.
            let _ = writeln!(out, "{}", cut(&line, width.map(|width| width.max(field.path.len() + 5))));
        }
        out.push('\n');
    }
    out.push_str("`sds-agent explain FIELD` prints its full description, its type, its default, and when a change takes effect.\n");
    out
}

fn cut(line: &str, width: Option<usize>) -> String {
    match width {
        Some(width) if line.chars().count() > width => line.chars().take(width - 1).chain(['…']).collect(),
        _ => line.to_owned(),
    }
}

/// The full description of a field and of the fields below it.
fn whole(field: &Field, width: Option<usize>) -> String {
    let mut out = one(field, width);
    if let Some(change) = field.change() {
        let _ = writeln!(out, "    A change takes effect {}.", change.when());
    }
    for below in field.below() {
        let _ = write!(out, "\n{}", one(below, width));
        if let Some(change) = below.change().filter(|_| field.change().is_none()) {
            let _ = writeln!(out, "    A change takes effect {}.", change.when());
        }
    }
    out
}

fn one(field: &Field, width: Option<usize>) -> String {
    let default = match field.kind {
        Kind::Section => String::new(),
        _ => reference::plain(&field.default.words()),
    };
    let default = match default.as_str() {
        "" => String::new(),
        default => format!("; default {default}"),
    };
    let mut out = format!("{}: {}{default}\n", field.path, field.kind.words());
    for line in output::wrapped(&reference::plain(field.meaning), width.map(|width| width.saturating_sub(4))) {
        let _ = writeln!(out, "    {line}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explain(field: &str, output: Format) -> Result<String, String> {
        explained(&Args { field: (!field.is_empty()).then(|| field.to_owned()), output }, Some(80))
    }

    #[test]
    fn a_field_is_told_with_its_kind_default_and_change() {
        let text = explain("certificate.renewAt", Format::Text).unwrap();
        assert!(text.starts_with("certificate.renewAt: number, 0.1 to 0.9; default 0.5\n    The share of its life"), "{text}");
        assert!(text.ends_with("A change takes effect at once.\n"), "{text}");
        let section = explain("sockets", Format::Text).unwrap();
        assert!(section.contains("\nsockets.perPod.driverName: text; default csi.sds-agent.io\n"), "{section}");
        assert!(section.contains("\n    A change takes effect at the next start.\n"), "{section}");
        assert!(section.lines().all(|line| line.chars().count() <= 80), "{section}");
    }

    #[test]
    fn all_fields_are_a_line_each() {
        let text = explain("", Format::Text).unwrap();
        assert!(reference::all().all(|field| text.contains(&format!("  {} ", field.path))), "{text}");
        assert!(text.lines().count() < reference::all().count() + 30);
        assert!(text.lines().all(|line| line.chars().count() <= 130), "{text}");
    }

    #[test]
    fn a_schema_is_one_of_the_field() {
        let whole: serde_json::Value = serde_json::from_str(&explain("", Format::Json).unwrap()).unwrap();
        assert_eq!((&whole["type"], &whole["required"][0]), (&json!("object"), &json!("issuer")));
        let key: serde_json::Value = serde_json::from_str(&explain("certificate.key", Format::Json).unwrap()).unwrap();
        assert_eq!(key["enum"][0], "ecdsa-p256");
    }

    #[test]
    fn what_is_not_a_field_has_a_way_out() {
        assert_eq!(explain("renewAt", Format::Text).unwrap_err(), "did you mean certificate.renewAt?");
        assert_eq!(explain("certificate.lifetme", Format::Text).unwrap_err(), "did you mean certificate.lifetime?");
        assert_eq!(explain("certificate.key.size", Format::Text).unwrap_err(), "`sds-agent explain` lists all fields");
    }
}
