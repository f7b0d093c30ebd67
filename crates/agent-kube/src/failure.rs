//! Explains an error of the Kubernetes API in one sentence for operators: the cause, and where it is known the fix.

use std::{error::Error as StdError, fmt, io, time::Duration};

use agent_runtime::text;
use kube::core::Status;

use crate::ANSWER_TIMEOUT;

/// No complete response within [`ANSWER_TIMEOUT`].
#[derive(Debug, thiserror::Error)]
#[error("no answer within {} s", ANSWER_TIMEOUT.as_secs())]
pub struct TimedOut;

/// The response body exceeds this number of bytes and was not read to its end.
#[derive(Debug, thiserror::Error)]
#[error("the answer is larger than {} MiB", .0 >> 20)]
pub struct TooLarge(pub usize);

/// An API call, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call<'a> {
    /// Verb: `create`, `get`, `list`, `watch`, `patch` or `delete`.
    pub verb: &'static str,
    /// Plural, with the group: `certificaterequests.cert-manager.io`.
    pub resource: &'a str,
    /// Name of the object, if the call concerns a single one.
    pub name: Option<&'a str>,
    /// Namespace, if the call is limited to one.
    pub namespace: Option<&'a str>,
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if let Some(name) = self.name {
            write!(f, " {name}")?;
        }
        match self.namespace {
            Some(namespace) => write!(f, " in namespace {namespace}"),
            None => Ok(()),
        }
    }
}

/// Class of a failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// 401: the token is not valid.
    Unauthorized,
    /// 403: no RBAC rule allows it.
    Rbac,
    /// 403: an admission policy or webhook denied the request.
    Policy,
    /// 403: a quota is used up.
    Quota,
    /// 403: the namespace is being deleted.
    NamespaceTerminating,
    /// 404: the kind is not known to the API server.
    NoSuchKind,
    /// 404: the namespace does not exist.
    NoNamespace,
    /// 404: the object does not exist.
    NotFound,
    /// 409: an object of this name exists.
    AlreadyExists,
    /// 409: another client changed the object first.
    Conflict,
    /// 410: the resource version to resume at is too old.
    Expired,
    /// 400, 422: the object is not valid.
    Invalid,
    /// 429, with the delay if the server named one.
    TooManyRequests(Option<Duration>),
    /// 5xx.
    Server,
    /// No complete response in time.
    Timeout,
    /// The response is too large to be read.
    TooLarge,
    /// The connection failed.
    Unreachable,
    /// Any other error.
    Other,
}

impl Cause {
    /// Returns whether the server may have carried out the request although the call failed.
    pub fn is_ambiguous(&self) -> bool {
        matches!(self, Self::Server | Self::Timeout | Self::TooLarge | Self::Unreachable | Self::Other)
    }
}

/// A failed call and its explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Class of the failure.
    pub cause: Cause,
    /// Explanation for operators: the cause, and where it is known the fix.
    pub message: String,
}

impl Failure {
    /// Explains `error`, which `call` returned.
    pub fn of(error: &kube::Error, call: &Call<'_>) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(status, call),
            other => Self::of_transport(other),
        }
    }

    /// Explains a `Status` that the API server returned for `call`.
    pub fn of_status(status: &Status, call: &Call<'_>) -> Self {
        let cause = cause(status, call);
        // The text is untrusted: the API server and webhooks quote the request in it.
        let said = text::excerpt(&status.message, text::MAX_MESSAGE_CHARS);
        let message = match &cause {
            Cause::Unauthorized => "the API server does not accept the agent's token: is it mounted, and is its audience right?".to_owned(),
            Cause::Rbac => {
                let place = call.namespace.map_or_else(|| "in the whole cluster".to_owned(), |n| format!("in namespace {n}"));
                format!("forbidden by RBAC: this program's service account lacks the verb {} on {} {place}", call.verb, call.resource)
            }
            Cause::Policy => format!("refused by an admission policy: {said}"),
            Cause::Quota => format!("refused by a quota: {said}"),
            Cause::NamespaceTerminating => "the namespace is being deleted".to_owned(),
            Cause::NoSuchKind if call.resource.ends_with(".cert-manager.io") => {
                "cert-manager's CRDs are not installed in this cluster: install cert-manager, or check the issuer's group".to_owned()
            }
            Cause::NoSuchKind => format!("the API server does not know {}", call.resource),
            Cause::NoNamespace => "the namespace does not exist".to_owned(),
            Cause::NotFound => "it does not exist".to_owned(),
            Cause::AlreadyExists => "it exists already".to_owned(),
            Cause::Conflict => format!("another client changed it at the same time: {said}"),
            Cause::Expired => "the resource version to resume at is too old".to_owned(),
            Cause::Invalid => format!("the API server does not accept it: {said}"),
            Cause::TooManyRequests(Some(after)) => format!("the API server is busy and asks to wait {} s", after.as_secs()),
            Cause::TooManyRequests(None) => "the API server is busy".to_owned(),
            _ => format!("the API server answered {}: {said}", status.code),
        };
        Self { cause, message }
    }

    fn of_transport(error: &kube::Error) -> Self {
        let mut next: Option<&(dyn StdError + 'static)> = Some(error);
        let mut last = error.to_string();
        while let Some(error) = next {
            if error.is::<TimedOut>() {
                return Self { cause: Cause::Timeout, message: error.to_string() };
            }
            if error.is::<TooLarge>() {
                return Self { cause: Cause::TooLarge, message: error.to_string() };
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                match io.kind() {
                    io::ErrorKind::ConnectionRefused => {
                        let message = "the connection was refused: is the API server up, and its address right?".to_owned();
                        return Self { cause: Cause::Unreachable, message };
                    }
                    io::ErrorKind::TimedOut => return Self { cause: Cause::Timeout, message: "the connection timed out".to_owned() },
                    _ => {}
                }
            }
            // The innermost error is the most specific: the outer ones only name layers.
            last = error.to_string();
            next = error.source();
        }
        let cause = match error {
            kube::Error::Service(_) | kube::Error::HyperError(_) | kube::Error::ReadEvents(_) => Cause::Unreachable,
            _ => Cause::Other,
        };
        // An unreadable response is not quoted: it may contain anything.
        let message = match error {
            kube::Error::SerdeError(_) => "the answer could not be read".to_owned(),
            _ => format!("the API server could not be reached: {}", text::excerpt(&last, text::MAX_MESSAGE_CHARS)),
        };
        Self { cause, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

fn cause(status: &Status, call: &Call<'_>) -> Cause {
    let detail = |reason: &str| status.details.iter().flat_map(|d| &d.causes).any(|c| c.reason == reason);
    let kind = status.details.as_ref().map(|d| d.kind.as_str()).unwrap_or_default();
    match status.code {
        401 => Cause::Unauthorized,
        403 if detail("NamespaceTerminating") => Cause::NamespaceTerminating,
        403 if status.message.contains("exceeded quota") => Cause::Quota,
        403 if status.message.contains("admission webhook") || status.message.contains("AdmissionPolicy") => Cause::Policy,
        403 if status.message.contains(" cannot ") || status.message.is_empty() => Cause::Rbac,
        403 => Cause::Policy,
        404 if kind == "namespaces" => Cause::NoNamespace,
        // For an unknown kind the server returns a plain page, not a Status about an object.
        404 if status.reason != "NotFound" || matches!(call.verb, "create" | "list" | "watch") => Cause::NoSuchKind,
        404 if kind.is_empty() => Cause::NoSuchKind,
        404 => Cause::NotFound,
        409 if status.is_already_exists() => Cause::AlreadyExists,
        409 => Cause::Conflict,
        410 => Cause::Expired,
        400 | 422 => Cause::Invalid,
        429 => {
            let after = status.details.as_ref().map_or(0, |d| d.retry_after_seconds);
            Cause::TooManyRequests((after > 0).then(|| Duration::from_secs(after.into())))
        }
        500.. => Cause::Server,
        _ => Cause::Other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn create() -> Call<'static> {
        Call { verb: "create", resource: "certificaterequests.cert-manager.io", name: None, namespace: Some("sds-agent") }
    }

    fn failure(call: &Call<'_>, status: serde_json::Value) -> Failure {
        Failure::of_status(&serde_json::from_value(status).unwrap(), call)
    }

    #[test]
    fn forbidden_is_told_apart() {
        let forbidden = |message: &str| failure(&create(), json!({"code": 403, "reason": "Forbidden", "message": message}));
        let rbac = forbidden("certificaterequests.cert-manager.io is forbidden: User \"x\" cannot create resource \"y\"");
        assert_eq!(rbac.cause, Cause::Rbac);
        assert_eq!(
            rbac.message,
            "forbidden by RBAC: this program's service account lacks the verb create on certificaterequests.cert-manager.io in namespace sds-agent"
        );
        assert_eq!(forbidden("exceeded quota: crs, requested: 1, used: 5, limited: 5").cause, Cause::Quota);
        let policy = forbidden("ValidatingAdmissionPolicy 'sds-agent' with binding 'b' denied request: the node label is not yours");
        assert_eq!(policy.cause, Cause::Policy);
        assert!(policy.message.contains("the node label is not yours"));
        let terminating = json!({"code": 403, "reason": "Forbidden", "message": "unable to create new content",
            "details": {"causes": [{"reason": "NamespaceTerminating", "message": "x", "field": "y"}]}});
        assert_eq!(failure(&create(), terminating).cause, Cause::NamespaceTerminating);
    }

    #[test]
    fn not_found_is_told_apart() {
        let bare = failure(&create(), json!({"code": 404, "reason": "Failed to parse error data", "message": "404 page not found"}));
        assert_eq!(bare.cause, Cause::NoSuchKind);
        assert!(bare.message.starts_with("cert-manager's CRDs are not installed"), "{bare}");
        let namespace = json!({"code": 404, "reason": "NotFound", "message": "namespaces \"x\" not found",
            "details": {"kind": "namespaces", "name": "x"}});
        assert_eq!(failure(&create(), namespace).cause, Cause::NoNamespace);
        let get = Call { verb: "get", resource: "clusterissuers.cert-manager.io", name: Some("a"), namespace: None };
        let object = json!({"code": 404, "reason": "NotFound", "message": "m", "details": {"kind": "clusterissuers", "name": "a"}});
        assert_eq!(failure(&get, object).cause, Cause::NotFound);
        assert_eq!(failure(&get, json!({"code": 404, "reason": "NotFound", "message": "m"})).cause, Cause::NoSuchKind);
    }

    #[test]
    fn a_busy_server_says_how_long() {
        let busy = failure(&create(), json!({"code": 429, "reason": "TooManyRequests", "details": {"retryAfterSeconds": 7}}));
        assert_eq!(busy.cause, Cause::TooManyRequests(Some(Duration::from_secs(7))));
        assert_eq!(busy.message, "the API server is busy and asks to wait 7 s");
    }

    #[test]
    fn a_broken_transport_is_told_in_words() {
        let refused = kube::Error::Service(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        assert!(Failure::of(&refused, &create()).message.starts_with("the connection was refused"));
        let timed_out = Failure::of(&kube::Error::Service(TimedOut.into()), &create());
        assert_eq!((timed_out.cause, &*timed_out.message), (Cause::Timeout, "no answer within 30 s"));
    }
}
