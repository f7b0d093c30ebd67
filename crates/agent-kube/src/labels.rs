//! Label values of the client's metrics, which its modules share.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};

/// Verb of a request, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Verb {
    /// Reads one object.
    get,
    /// Reads all selected objects.
    list,
    /// Streams the changes of selected objects.
    watch,
    /// Creates an object.
    create,
    /// Changes a part of an object.
    patch,
    /// Deletes an object.
    delete,
    /// Any other request.
    other,
}

/// Resource of a request, as a metric label.
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
    /// ClusterTrustBundles.
    clustertrustbundles,
    /// Events.
    events,
    /// Any other resource.
    other,
}

impl Resource {
    /// Returns the label's value: the plural of the resource.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::certificaterequests => "certificaterequests",
            Self::issuers => "issuers",
            Self::clusterissuers => "clusterissuers",
            Self::pods => "pods",
            Self::configmaps => "configmaps",
            Self::clustertrustbundles => "clustertrustbundles",
            Self::events => "events",
            Self::other => "other",
        }
    }

    /// Returns the resource that a path of the API names.
    pub(super) fn of(path: &str) -> Self {
        let mut segments = path.split('/').filter(|s| !s.is_empty());
        // `api/<version>` or `apis/<group>/<version>`.
        let skip = if segments.next() == Some("apis") { 2 } else { 1 };
        let rest: Vec<&str> = segments.skip(skip).take(3).collect();
        let plural = match rest[..] {
            ["namespaces", _, plural] | [plural, ..] => plural,
            [] => "",
        };
        const KNOWN: [Resource; 7] = [
            Resource::certificaterequests,
            Resource::issuers,
            Resource::clusterissuers,
            Resource::pods,
            Resource::configmaps,
            Resource::clustertrustbundles,
            Resource::events,
        ];
        KNOWN.into_iter().find(|r| r.as_str() == plural).unwrap_or(Self::other)
    }
}

/// Result of a request, as a metric label: the HTTP status, `timeout`, or `error` if there was no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// An HTTP status.
    Status(u16),
    /// No complete response in time.
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

/// Reason for which a request waited before it was sent, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Wait {
    /// The client's own rate limit.
    rate_limit,
    /// A delay that the server has asked for.
    retry_after,
}

/// Reason for which a watch failed, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Ended {
    /// The list failed.
    list_failed,
    /// The watch could not be started.
    start_failed,
    /// The watch failed while it ran.
    broken,
    /// The server no longer has the resource version to resume at; everything is listed again.
    expired,
}
