//! The table of all fields of the configuration. `docs/configuration.md`, the schema of the chart's values and `sds-agent explain` are
//! generated from it.
//!
//! Tests compare it with the parser: both have the same fields and defaults, and the parser rejects every value that a kind excludes.

mod fields;
mod schema;

pub use fields::GROUPS;
pub use schema::{Completeness, plain, schema};

use super::{live, values};

/// The fields under one heading of the page.
#[derive(Debug)]
pub struct Group {
    /// The heading.
    pub title: &'static str,
    /// In the order of the page.
    pub fields: &'static [Field],
}

/// One field.
#[derive(Debug)]
pub struct Field {
    /// Path in the file, with `[]` for an index of a list and `<name>` for a key that the operator chooses.
    pub path: &'static str,
    /// The valid values.
    pub kind: Kind,
    /// The value if the field is absent.
    pub default: Absence,
    /// In Markdown, for the operator.
    pub meaning: &'static str,
}

/// The valid values of a field. Ranges include both ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A mapping of other fields.
    Section,
    /// A list of mappings.
    Sections,
    /// Mappings under names that the operator chooses.
    Entries,
    /// Text.
    Text,
    /// A list of texts.
    Texts,
    /// Labels of a pod.
    Labels,
    /// `true` or `false`.
    Boolean,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A duration with its unit.
    Duration,
    /// A whole number.
    Integer(u64, u64),
    /// A list of whole numbers.
    Integers(u64, u64),
    /// A share.
    Fraction(f64, f64),
    /// Permission bits in octal.
    Mode,
    /// An absolute path.
    Path,
    /// An IP address with a port.
    Address,
}

/// The value of an absent field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// No default is shown.
    Nothing,
    /// The field is required if its section is present.
    Required,
    /// This value, as written in the file.
    Value(&'static str),
    /// A default that depends on other values, described in Markdown.
    Words(&'static str),
}

impl Kind {
    /// The valid values in words.
    pub fn words(self) -> String {
        match self {
            Self::Section => "section".to_owned(),
            Self::Sections => "list of sections".to_owned(),
            Self::Entries => "sections by name".to_owned(),
            Self::Text => "text".to_owned(),
            Self::Texts => "list of texts".to_owned(),
            Self::Labels => "labels".to_owned(),
            Self::Boolean => "true or false".to_owned(),
            Self::Choice(names) => values::one_of(names),
            Self::Duration => "time".to_owned(),
            Self::Integer(least, u64::MAX) => format!("whole number, {least} or more"),
            Self::Integer(least, most) => format!("whole number, {least} to {most}"),
            Self::Integers(..) => "list of whole numbers".to_owned(),
            Self::Fraction(least, most) => format!("number, {least} to {most}"),
            Self::Mode => "octal mode in quotes".to_owned(),
            Self::Path => "absolute path".to_owned(),
            Self::Address => "IP address and port".to_owned(),
        }
    }
}

impl Absence {
    /// In Markdown.
    pub fn words(self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Required => "none".to_owned(),
            Self::Value(value) => format!("`{value}`"),
            Self::Words(words) => words.to_owned(),
        }
    }
}

impl Field {
    /// When a change of the field takes effect; `None` for a section whose fields differ in this.
    pub fn change(&self) -> Option<&'static live::Field> {
        live::FIELDS.iter().find(|field| is_within(self.path, field.path))
    }

    /// All fields below this section, in order.
    pub fn below(&self) -> impl Iterator<Item = &'static Self> {
        let path = self.path;
        all().filter(move |field| field.path != path && is_within(field.path, path))
    }
}

/// Every field, in the order of the page.
pub fn all() -> impl Iterator<Item = &'static Field> {
    GROUPS.iter().flat_map(|group| group.fields)
}

/// The field that `name` refers to. Indexes of a list may be left out, or be numbers as in error messages.
pub fn find(name: &str) -> Option<&'static Field> {
    let plain = |path: &str| {
        let parts = path.split('.').map(|part| part.split_once('[').map_or(part, |(name, _)| name));
        parts.collect::<Vec<_>>().join(".").to_lowercase()
    };
    let wanted = plain(name);
    all().find(|field| plain(field.path) == wanted)
}

/// The field that `name` probably refers to: a field of this name in another section, or of a similar name in the same section.
pub fn nearest(name: &str) -> Option<&'static str> {
    let split = |path: &str| path.rfind('.').map_or(0, |at| at + 1);
    if let Some(field) = all().find(|field| field.path[split(field.path)..].eq_ignore_ascii_case(name)) {
        return Some(field.path);
    }
    let section = &name[..split(name)];
    let beside: Vec<&str> = all().map(|field| field.path).filter(|path| &path[..split(path)] == section).collect();
    let names: Vec<&str> = beside.iter().map(|path| &path[section.len()..]).collect();
    let near = super::reader::nearest(&name[section.len()..], &names)?;
    beside.into_iter().find(|path| path[section.len()..] == *near)
}

/// Whether `path` is `section` or a field below it.
pub fn is_within(path: &str, section: &str) -> bool {
    path.strip_prefix(section).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

#[cfg(test)]
mod tests;
