//! Reads the status of a request as one [`Verdict`]. All readers of a status share this function.
//!
//! The message of a condition is text of an issuer, and may repeat the issuer's input. This module removes text that looks like a key. It
//! keeps the line breaks, because some messages are parsed by line. The text remains untrusted: show it only as an
//! [`excerpt`](text::excerpt).

use std::borrow::Cow;

use agent_runtime::text;

use crate::{Condition, Status};

/// State of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The request waits for an approver or for the signer.
    Pending {
        /// Whether an approver has approved the request.
        approved: bool,
        /// Message of the condition `Ready`, in which the signer names the cause of the wait. It may be empty.
        message: String,
    },
    /// The certificate is signed, and `status.certificate` is complete.
    Issued,
    /// An approver denied the request. Final.
    Denied(Why),
    /// Signing failed. cert-manager does not retry this request.
    Failed(Why),
    /// cert-manager rejects the request as invalid. Final.
    Invalid(Why),
}

/// Reason and message of a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Why {
    /// Machine-readable reason, as an excerpt.
    pub reason: String,
    /// Message for operators, without keys. Untrusted.
    pub message: String,
}

impl Verdict {
    /// Reads `status`. The most severe condition decides: a request that is denied or invalid is never read as issued.
    pub fn of(status: Option<&Status>) -> Self {
        let Some(status) = status else { return Self::Pending { approved: false, message: String::new() } };
        let find = |kind: &str, value: &str| status.conditions.iter().find(|c| c.kind == kind && c.status == value);
        if let Some(condition) = find("InvalidRequest", "True") {
            return Self::Invalid(Why::of(condition));
        }
        if let Some(condition) = find("Denied", "True") {
            return Self::Denied(Why::of(condition));
        }
        if find("Ready", "True").is_some() {
            return Self::Issued;
        }
        let approved = find("Approved", "True").is_some();
        match find("Ready", "False") {
            Some(condition) => match condition.reason.as_deref() {
                Some("Failed") => Self::Failed(Why::of(condition)),
                Some("Denied") => Self::Denied(Why::of(condition)),
                _ => Self::Pending { approved, message: message(condition) },
            },
            None => Self::Pending { approved, message: String::new() },
        }
    }

    /// Whether the request is final and has no certificate.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Denied(_) | Self::Failed(_) | Self::Invalid(_))
    }
}

impl Why {
    fn of(condition: &Condition) -> Self {
        let reason = condition.reason.as_deref().unwrap_or_default();
        Self { reason: text::excerpt(reason, text::MAX_NAME_CHARS), message: message(condition) }
    }
}

/// Returns the message of a condition, without keys.
fn message(condition: &Condition) -> String {
    condition.message.as_deref().map(text::redact).map(Cow::into_owned).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(conditions: &[(&str, &str, &str)]) -> Status {
        let condition = |(kind, status, reason): &(&str, &str, &str)| Condition {
            kind: (*kind).into(),
            status: (*status).into(),
            reason: Some((*reason).into()),
            message: Some("words".into()),
            last_transition_time: None,
        };
        Status { conditions: conditions.iter().map(condition).collect(), ..Status::default() }
    }

    #[test]
    fn every_shape_that_cert_manager_writes() {
        let pending = |approved, message: &str| Verdict::Pending { approved, message: message.into() };
        let why = |reason: &str| Why { reason: reason.into(), message: "words".into() };
        for (conditions, verdict) in [
            (&[][..], pending(false, "")),
            (&[("Approved", "True", "cert-manager.io")], pending(true, "")),
            (&[("Approved", "True", "cert-manager.io"), ("Ready", "False", "Pending")], pending(true, "words")),
            (&[("Ready", "False", "Pending")], pending(false, "words")),
            (&[("Ready", "Unknown", "?")], pending(false, "")),
            (&[("Approved", "True", "a"), ("Ready", "True", "Issued")], Verdict::Issued),
            (&[("Approved", "True", "a"), ("Ready", "False", "Failed")], Verdict::Failed(why("Failed"))),
            (&[("Denied", "True", "PodGone")], Verdict::Denied(why("PodGone"))),
            (&[("Ready", "False", "Denied"), ("Denied", "True", "PodGone")], Verdict::Denied(why("PodGone"))),
            (&[("Ready", "False", "Denied")], Verdict::Denied(why("Denied"))),
            (&[("InvalidRequest", "True", "x"), ("Ready", "False", "Failed")], Verdict::Invalid(why("x"))),
            (&[("InvalidRequest", "True", "x"), ("Ready", "True", "Issued")], Verdict::Invalid(why("x"))),
            (&[("Denied", "True", "x"), ("Ready", "True", "Issued")], Verdict::Denied(why("x"))),
            (&[("Denied", "False", "x")], pending(false, "")),
        ] {
            assert_eq!(Verdict::of(Some(&status(conditions))), verdict, "{conditions:?}");
        }
        assert_eq!(Verdict::of(None), pending(false, ""));
    }
}
