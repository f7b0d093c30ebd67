//! What a doctor has found: named steps, each with its evidence, and what to do where it failed.

use serde::Serialize;

use crate::cli::{Exit, output};

/// How a step came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It works, and somebody should look at it.
    Warning,
    /// Not as it should be.
    Failed,
    /// It could not be looked at.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub result: Outcome,
    /// The evidence; several lines where there is more than one piece of it.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl Step {
    /// As it should be.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, result: Outcome::Ok, detail: detail.into(), remedy: None, exit: Exit::Ok }
    }

    /// It works, and somebody should look at it; no reason to end with a failure.
    pub fn warning(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, result: Outcome::Warning, detail: detail.into(), remedy: Some(remedy.into()), exit: Exit::Ok }
    }

    /// Not as it should be; `exit` is how the doctor ends if this is the first such step.
    pub fn failed(name: &'static str, exit: Exit, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, result: Outcome::Failed, detail: detail.into(), remedy: Some(remedy.into()), exit }
    }

    /// Not looked at, and why.
    pub fn unknown(name: &'static str, detail: impl Into<String>, remedy: Option<&str>) -> Self {
        Self { name, result: Outcome::Unknown, detail: detail.into(), remedy: remedy.map(str::to_owned), exit: Exit::Ok }
    }
}

/// All of it, in the order of the request path.
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

    /// How the doctor ends: as the first failed step says.
    pub fn exit(&self) -> Exit {
        self.steps.iter().find(|step| step.result == Outcome::Failed).map_or(Exit::Ok, |step| step.exit)
    }

    /// For people.
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

    /// For programs.
    pub fn json(&self) -> String {
        // Strings and a truth: there is nothing in it that JSON cannot say.
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
