//! What is wrong with a configuration, in words that name the field, its value and the way out.
//!
//! Owns the wording's form, so that a person and a script read every error alike. The reader fills it; nobody else makes one.

use std::fmt;

use agent_runtime::text;
use serde::Serialize;
use serde_json::Value;

/// No value is shown with more characters than this.
const MAX_VALUE_CHARS: usize = 80;

/// One error: `{path}: {value} {what}; {remedy}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The field, an environment variable, or a place in the file.
    pub path: String,
    /// What stands there, where something does.
    pub value: Option<String>,
    /// What is wrong with it.
    pub what: String,
    /// The way out.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path)?;
        if let Some(value) = &self.value {
            write!(f, "{value} ")?;
        }
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

/// Every error of one configuration, one a line. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub Vec<Problem>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// Something that works, and that the operator should know: `{path}: {message}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The field or environment variable.
    pub path: String,
    /// What to know about it.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// What a value parser says: the sentence without its subject, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FieldError {
    /// What is wrong.
    pub what: String,
    /// The way out.
    pub remedy: String,
}

impl FieldError {
    /// Joins the two halves.
    pub(super) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

/// The value as it is shown: on one line, bounded, and never a private key, or a part of one, that was pasted into the wrong place.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

/// `text` in quotes, escaped and bounded.
pub(super) fn quoted(text: &str) -> String {
    if text.contains("PRIVATE KEY") {
        return "(a private key, not shown)".to_owned();
    }
    let text = text::redact(text);
    match text.char_indices().nth(MAX_VALUE_CHARS) {
        Some((end, _)) => format!("{:?}", format!("{}…", &text[..end])),
        None => format!("{text:?}"),
    }
}
