//! The report of `doctor`: named steps, each with its evidence, and a remedy if it failed.

use serde::Serialize;

use crate::cli::{Exit, output};

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// No problem.
    Ok,
    /// It works, but needs attention.
    Warning,
    /// A problem.
    Failed,
    /// It could not be checked.
    Unknown,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The name of the check.
    pub name: &'static str,
    /// Its result.
    pub result: Outcome,
    /// The evidence, one piece on each line.
    pub detail: String,
    /// The remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl Step {
    /// A step without a problem.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, result: Outcome::Ok, detail: detail.into(), remedy: None, exit: Exit::Ok }
    }

    /// A step that works but needs attention. It does not change the exit code.
    pub fn warning(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, result: Outcome::Warning, detail: detail.into(), remedy: Some(remedy.into()), exit: Exit::Ok }
    }

    /// A failed step; `exit` is the exit code if this is the first failed step.
    pub fn failed(name: &'static str, exit: Exit, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, result: Outcome::Failed, detail: detail.into(), remedy: Some(remedy.into()), exit }
    }

    /// A step that could not be checked; `detail` is the reason.
    pub fn unknown(name: &'static str, detail: impl Into<String>, remedy: Option<&str>) -> Self {
        Self { name, result: Outcome::Unknown, detail: detail.into(), remedy: remedy.map(str::to_owned), exit: Exit::Ok }
    }
}

/// All steps, in the order of the request path.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Whether no step failed.
    pub healthy: bool,
    /// The steps.
    pub steps: Vec<Step>,
}

impl Report {
    /// A report of `steps`.
    pub fn new(steps: Vec<Step>) -> Self {
        Self { healthy: steps.iter().all(|step| step.result != Outcome::Failed), steps }
    }

    /// The exit code: that of the first failed step.
    pub fn exit(&self) -> Exit {
        self.steps.iter().find(|step| step.result == Outcome::Failed).map_or(Exit::Ok, |step| step.exit)
    }

    /// The report as text for users.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for step in &self.steps {
            let mark = match step.result {
                Outcome::Ok => "ok",
                Outcome::Warning => "warning",
                Outcome::Failed => "FAILED",
                Outcome::Unknown => "unknown",
            };
            let mut lines = step.detail.lines().map(output::printable);
            out += &format!("{mark:<8} {:<16} {}\n", step.name, lines.next().unwrap_or_default());
            lines.for_each(|line| out += &format!("{:26}{line}\n", ""));
            if let Some(remedy) = &step.remedy {
                out += &format!("{:26}-> {}\n", "", output::printable(remedy));
            }
        }
        out
    }

    /// The report as JSON.
    pub fn json(&self) -> String {
        // Serialisation does not fail, because the report contains only strings and booleans.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failed_step_decides_and_what_is_not_known_is_no_failure() {
        let unknown = Step::unknown("pod", "no cluster", Some("name --config"));
        let warning = Step::warning("clock", "it is 9s behind", "synchronise it");
        let report = Report::new(vec![unknown.clone(), warning, Step::ok("process", "it runs")]);
        assert_eq!((report.exit(), report.healthy), (Exit::Ok, true));
        let rights = Step::failed("rights", Exit::NotPermitted, "no", "bind the role");
        let report = Report::new(vec![unknown, rights, Step::failed("pod", Exit::Failed, "x", "y")]);
        assert_eq!((report.exit(), report.healthy), (Exit::NotPermitted, false));
    }

    #[test]
    fn people_and_programs_read_the_same() {
        let report = Report::new(vec![Step::ok("cgroups", "a\nb\u{1b}[2J"), Step::failed("pod", Exit::Failed, "none", "look")]);
        let expected = "ok       cgroups          a\n                          b\\u{1b}[2J\n\
                        FAILED   pod              none\n                          -> look\n";
        assert_eq!(report.text(), expected);
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["healthy"], false);
        assert_eq!(json["steps"][1], serde_json::json!({"name": "pod", "result": "failed", "detail": "none", "remedy": "look"}));
        assert!(json["steps"][0].get("remedy").is_none());
    }
}
