//! Checks that the configured issuer exists and can serve, before a request is created. The error names the mistake in the configuration.
//! Without the check, a request would stay pending.

use std::time::Duration;

use agent_kube::{Call, Cause, Failure};
use agent_runtime::text;
use cert_manager::{GROUP, IssuerRef, Status};
use futures::{FutureExt, future::BoxFuture, future::Shared};
use kube::{
    Api, Client,
    api::Object,
    core::{ApiResource, GroupVersionKind},
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::issuer::{Error, Retry, certificate_request::api_error};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::issuer::cert_manager::preflight";

/// Minimum time for which a positive result is used. Orders that fail together share the next check.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// Time for which a negative result is used. If the API server answered, it doubles with each further refusal, up to [`GOOD_FOR`]: after
/// an issuer is deleted, every node of the cluster checks it.
const BAD_FOR: Duration = Duration::from_secs(5);

/// Result of the last check, shared by all orders.
#[derive(Default)]
pub(super) struct Memo(Mutex<State>);

/// Result of a check. An error says whether the API server answered.
type Answer = Result<(), (Error, bool)>;
type Check = Shared<BoxFuture<'static, Answer>>;

#[derive(Default)]
struct State {
    check: Option<(Instant, Check)>,
    doubted: bool,
    /// Consecutive refusals by the API server before the current check.
    refusals: u32,
}

impl State {
    /// Time for which a negative result is used.
    fn bad_for(&self, answered: bool) -> Duration {
        let doublings = if answered { self.refusals.min(4) } else { 0 };
        (BAD_FOR * (1 << doublings)).min(GOOD_FOR)
    }
}

impl Memo {
    /// Returns the last result if it can still be used. Otherwise checks again.
    pub(super) async fn check(&self, client: &Client, issuer: &IssuerRef, namespace: Option<String>) -> Result<(), Error> {
        let check = {
            let mut state = self.0.lock();
            let standing = state.check.as_ref().filter(|(since, check)| match check.peek() {
                None => true,
                Some(Err((_, answered))) => since.elapsed() < state.bad_for(*answered),
                Some(Ok(())) => !state.doubted || since.elapsed() < GOOD_FOR,
            });
            match standing {
                Some((_, check)) => check.clone(),
                None => {
                    let (client, issuer) = (client.clone(), issuer.clone());
                    let new = async move { look(&client, &issuer, namespace.as_deref()).await }.boxed().shared();
                    let refused = state.check.as_ref().is_some_and(|(_, last)| matches!(last.peek(), Some(Err((_, true)))));
                    let refusals = if refused { state.refusals.saturating_add(1) } else { 0 };
                    *state = State { check: Some((Instant::now(), new.clone())), doubted: false, refusals };
                    new
                }
            }
        };
        check.await.map_err(|(error, _)| error)
    }

    /// Records that an order failed: the issuer may have changed.
    pub(super) fn doubt(&self) {
        self.0.lock().doubted = true;
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IssuerSpec {
    #[serde(default)]
    self_signed: Option<serde_json::Value>,
}

type AnyIssuer = Object<IssuerSpec, Status>;

/// Checks `issuer` for requests in `namespace`. Without a namespace, an `Issuer` is not checked. An external issuer is never checked.
///
/// # Errors
///
/// Returns [`Error::Configuration`] if the reference is wrong or names an issuer that cannot sign CSRs of the agent. Returns [`Error::Api`]
/// or [`Error::Timeout`] if the issuer does not exist or cannot be read. A missing permission to read it is logged and is no error.
pub async fn check(client: &Client, issuer: &IssuerRef, namespace: Option<&str>) -> Result<(), Error> {
    look(client, issuer, namespace).await.map_err(|(error, _)| error)
}

async fn look(client: &Client, issuer: &IssuerRef, namespace: Option<&str>) -> Answer {
    if !issuer.group.is_empty() && issuer.group != GROUP {
        tracing::debug!(target: LOG_TARGET, group = issuer.group, kind = issuer.kind, name = issuer.name, "an external issuer is not checked");
        return Ok(());
    }
    let kind = match issuer.kind.as_str() {
        "ClusterIssuer" => Kind::ClusterIssuer,
        "Issuer" | "" => Kind::Issuer,
        other => {
            let error = Error::Configuration(format!(
                "issuerRef.kind {other:?} does not exist in group {GROUP}: use Issuer or ClusterIssuer, or set issuerRef.group to the group \
                 of an external issuer"
            ));
            return Err((error, true));
        }
    };
    if kind == Kind::Issuer && namespace.is_none() {
        // Each namespace of a workload has its own issuer.
        return Ok(());
    }
    let name = &issuer.name;
    match kind.get(client, name, namespace).await {
        Ok(found) => judge(kind, name, &found).map_err(|error| (error, true)),
        Err(failure) => match failure.cause {
            Cause::Rbac | Cause::Policy => {
                tracing::warn!(target: LOG_TARGET, issuer = name, kind = kind.as_str(), error = %failure, "the issuer cannot be checked; going on without");
                Ok(())
            }
            Cause::NotFound => Err((missing(client, kind, name, namespace).await, true)),
            _ => {
                let answered = !failure.cause.is_ambiguous();
                Err((api_error(&kind.call(name, namespace), failure), answered))
            }
        },
    }
}

fn judge(kind: Kind, name: &str, found: &AnyIssuer) -> Result<(), Error> {
    if found.spec.self_signed.is_some() {
        return Err(Error::Configuration(format!(
            "{} {name:?} is of type SelfSigned, which signs with a key from a Secret and cannot sign for keys that stay in the agent's \
             memory: make a CA issuer from it and name that one in issuerRef",
            kind.as_str()
        )));
    }
    let ready = found.status.iter().flat_map(|s| &s.conditions).find(|c| c.kind == "Ready");
    match ready {
        Some(condition) if condition.status == "True" => {
            tracing::info!(target: LOG_TARGET, issuer = name, kind = kind.as_str(), "the issuer exists and is ready");
        }
        other => {
            let why = other.and_then(|c| c.message.as_deref()).unwrap_or("it has no Ready condition yet");
            let why = text::excerpt(why, text::MAX_MESSAGE_CHARS);
            tracing::warn!(target: LOG_TARGET, issuer = name, kind = kind.as_str(), why, "the issuer is not ready; requests will wait for it");
        }
    }
    Ok(())
}

/// Returns the error for an issuer that does not exist. It says whether an issuer of the other kind has the name.
async fn missing(client: &Client, kind: Kind, name: &str, namespace: Option<&str>) -> Error {
    let other = kind.other();
    let place = |kind: Kind| match (kind, namespace) {
        (Kind::Issuer, Some(namespace)) => format!(" in namespace {namespace}"),
        _ => String::new(),
    };
    let found = (other == Kind::ClusterIssuer || namespace.is_some()) && other.get(client, name, namespace).await.is_ok();
    if found {
        return Error::Configuration(format!(
            "{} {name:?} does not exist{}, but a resource of kind {} with this name does{}: set issuerRef.kind to {}",
            kind.as_str(),
            place(kind),
            other.as_str(),
            place(other),
            other.as_str()
        ));
    }
    let message = "it does not exist: create it, or correct issuerRef.name and issuerRef.kind".to_owned();
    Error::Api { action: kind.call(name, namespace).to_string(), message, retry: Retry::Backoff }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Issuer,
    ClusterIssuer,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Issuer => "Issuer",
            Self::ClusterIssuer => "ClusterIssuer",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Issuer => Self::ClusterIssuer,
            Self::ClusterIssuer => Self::Issuer,
        }
    }

    fn call<'a>(self, name: &'a str, namespace: Option<&'a str>) -> Call<'a> {
        match self {
            Self::Issuer => Call { verb: "get", resource: "issuers.cert-manager.io", name: Some(name), namespace },
            Self::ClusterIssuer => Call { verb: "get", resource: "clusterissuers.cert-manager.io", name: Some(name), namespace: None },
        }
    }

    async fn get(self, client: &Client, name: &str, namespace: Option<&str>) -> Result<AnyIssuer, Failure> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, "v1", self.as_str()));
        let api: Api<AnyIssuer> = match (self, namespace) {
            (Self::Issuer, Some(namespace)) => Api::namespaced_with(client.clone(), namespace, &resource),
            _ => Api::all_with(client.clone(), &resource),
        };
        api.get(name).await.map_err(|error| Failure::of(&error, &self.call(name, namespace)))
    }
}
