//! What a request's status says: one pure reading, shared by all who look.
//!
//! A condition's words are an issuer's, and may repeat what it was given. They lose what looks like a key here; they keep their lines, by
//! which some are read, and are still foreign: they are shown by an [`excerpt`](text::excerpt).

use std::borrow::Cow;

use agent_runtime::text;

use crate::{Condition, Status};

/// How far a request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It waits for the approver or the signer.
    Pending {
        /// Whether an approver has said yes.
        approved: bool,
        /// What the signer says that it waits for, if anything.
        message: String,
    },
    /// Signed: `status.certificate` is complete.
    Issued,
    /// An approver said no; for good.
    Denied(Why),
    /// Signing failed; this request is never tried again.
    Failed(Why),
    /// cert-manager does not accept the request itself; for good.
    Invalid(Why),
}

/// The words of a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Why {
    /// One word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl Verdict {
    /// Reads `status`. The worst news wins: a request that is denied or invalid is never taken for an issued one.
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

    /// Whether nothing will change any more and there is no certificate.
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

/// A condition's message, without keys.
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
