//! Events on denied requests: for operators, in addition to the condition that programs read.
//!
//! Each denial has one Event, up to 300 Events per minute, so that a client that requests in a loop does not fill etcd. An Event that
//! cannot be created is counted and not retried.

use std::time::Duration;

use agent_kube::{Call, Failure};
use cert_manager::{APPROVER, GROUP, Request, denied, place};
use k8s_openapi::api::core::v1::Event;
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    judge::{Denial, evidence},
    metrics::{Metrics, Step},
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::approver::events";

/// Maximum length of an Event's message, in characters. The API server rejects longer messages.
const MESSAGE: usize = 1000;
/// Maximum number of Events in a [`WINDOW`].
const BUDGET: u32 = 300;
const WINDOW: Duration = Duration::from_secs(60);

/// Creates Events of denials. It owns their budget.
pub struct Events {
    client: Client,
    /// Name of the approver's pod.
    instance: String,
    metrics: Metrics,
    /// Begin of the current window, and the number of Events in it.
    spent: Mutex<Option<(Instant, u32)>>,
}

impl Events {
    /// Creates Events with `client`, reported by the replica `instance`.
    pub fn new(client: Client, instance: String, metrics: Metrics) -> Self {
        Self { client, instance, metrics, spent: Mutex::default() }
    }

    /// Creates the Event of a denial, if the budget allows it. `now` is in RFC 3339 format.
    ///
    /// # Cancel safety
    ///
    /// The budget is spent before the request is sent. If the future is dropped later, the Event may or may not exist.
    pub async fn tell(&self, request: &Request, denial: &Denial, now: &str) {
        let (namespace, _) = place(request);
        let Some(event) = self.event(request, denial, now).filter(|_| self.spend(Instant::now())) else { return };
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            self.metrics.failed(Step::event);
            let call = Call { verb: "create", resource: "events", name: None, namespace: Some(namespace) };
            let failure = Failure::of(&error, &call);
            tracing::debug!(target: LOG_TARGET, call = %call, error = %failure, "cannot create the Event of a denial");
        }
    }

    fn spend(&self, now: Instant) -> bool {
        let mut spent = self.spent.lock();
        let (begin, count) = spent.filter(|(begin, _)| now.duration_since(*begin) < WINDOW).unwrap_or((now, 0));
        *spent = Some((begin, count.saturating_add(1)));
        count < BUDGET
    }

    fn event(&self, request: &Request, denial: &Denial, now: &str) -> Option<Event> {
        let (namespace, name) = place(request);
        let pod = evidence(request)
            .map(|pod| json!({"apiVersion": "v1", "kind": "Pod", "namespace": &*pod.namespace, "name": &*pod.name, "uid": &*pod.uid}));
        let event = json!({
            "metadata": {"generateName": "sds-agent-", "namespace": namespace},
            "involvedObject": {
                "apiVersion": format!("{GROUP}/v1"), "kind": "CertificateRequest", "namespace": namespace, "name": name,
                "uid": request.metadata.uid, "resourceVersion": request.metadata.resource_version,
            },
            "related": pod,
            "type": if denial.code == denied::POD_GONE { "Normal" } else { "Warning" },
            "reason": denial.code,
            "message": denial.sentence.chars().take(MESSAGE).collect::<String>(),
            "action": "Deny",
            "source": {"component": APPROVER},
            "reportingComponent": APPROVER,
            "reportingInstance": self.instance,
            "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        });
        serde_json::from_value(event).ok()
    }
}
