//! Errors and warnings about a configuration. Each names the field, its value and the fix.
//!
//! Owns the form of the messages, so that users and scripts can read all errors in the same way. Only the reader creates them.

use std::fmt;

use agent_runtime::text;
use serde::Serialize;
use serde_json::Value;

/// Maximum characters of a quoted value.
const MAX_VALUE_CHARS: usize = 80;

/// One error: `{path}: {value} {what}; {remedy}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The field, an environment variable, or a position in the file.
    pub path: String,
    /// The value, if the field has one.
    pub value: Option<String>,
    /// The error, as a sentence without its subject.
    pub what: String,
    /// The fix.
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

/// All errors of one configuration, one on each line. Never empty.
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

/// A warning about a valid value: `{path}: {message}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The field or environment variable.
    pub path: String,
    /// The warning, as a sentence without its subject.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// The error of a value parser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FieldError {
    /// The error, as a sentence without its subject.
    pub what: String,
    /// The fix.
    pub remedy: String,
}

impl FieldError {
    /// An error and its fix.
    pub(super) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

/// The value for a message: on one line, at most [`MAX_VALUE_CHARS`] characters, and without any part of a private key that was pasted
/// into the wrong field.
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
