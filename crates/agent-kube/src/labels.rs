//! The words that metrics of the client have in their labels, and that its parts share.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};

/// What is asked, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Verb {
    /// One object.
    get,
    /// Many.
    list,
    /// Their changes.
    watch,
    /// A new one.
    create,
    /// A part of it changed.
    patch,
    /// One less.
    delete,
    /// Something else.
    other,
}

/// Of what, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Resource {
    /// CertificateRequests.
    certificaterequests,
    /// Issuers.
    issuers,
    /// ClusterIssuers.
    clusterissuers,
    /// Pods.
    pods,
    /// ConfigMaps.
    configmaps,
    /// Events.
    events,
    /// Something else.
    other,
}

impl Resource {
    /// The label's value, which is the resource's plural.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::certificaterequests => "certificaterequests",
            Self::issuers => "issuers",
            Self::clusterissuers => "clusterissuers",
            Self::pods => "pods",
            Self::configmaps => "configmaps",
            Self::events => "events",
            Self::other => "other",
        }
    }

    /// The resource that a path of the API is about.
    pub(super) fn of(path: &str) -> Self {
        let mut segments = path.split('/').filter(|s| !s.is_empty());
        // `api/<version>` or `apis/<group>/<version>`.
        let skip = if segments.next() == Some("apis") { 2 } else { 1 };
        let rest: Vec<&str> = segments.skip(skip).take(3).collect();
        let plural = match rest[..] {
            ["namespaces", _, plural] | [plural, ..] => plural,
            [] => "",
        };
        const KNOWN: [Resource; 6] = [
            Resource::certificaterequests,
            Resource::issuers,
            Resource::clusterissuers,
            Resource::pods,
            Resource::configmaps,
            Resource::events,
        ];
        KNOWN.into_iter().find(|r| r.as_str() == plural).unwrap_or(Self::other)
    }
}

/// What came back, as a metric label: the HTTP status, `timeout`, or `error` where there was no answer at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// An HTTP status.
    Status(u16),
    /// Nothing in time.
    Timeout,
    /// The connection failed.
    Error,
}

impl EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        match self {
            Self::Status(code) => EncodeLabelValue::encode(code, encoder),
            Self::Timeout => "timeout".encode(encoder),
            Self::Error => "error".encode(encoder),
        }
    }
}

/// What a request waited for before it was sent, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Wait {
    /// The client's own limit.
    rate_limit,
    /// The server asked for time.
    retry_after,
}

/// Why a watch broke, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Ended {
    /// The list failed.
    list_failed,
    /// The watch could not be started.
    start_failed,
    /// It broke while it ran.
    broken,
    /// The server has forgotten the version to continue from: everything is listed again.
    expired,
}
