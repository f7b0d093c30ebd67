//! Events on denied requests: for people, beside the condition that programs read.
//!
//! One for each denial, within a budget: whoever asks in a loop does not fill etcd by way of the approver. One that cannot be written is
//! counted, and not written again.

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

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::approver::events";

/// The API server refuses longer messages of Events.
const MESSAGE: usize = 1000;
/// Events in a [`WINDOW`].
const BUDGET: u32 = 300;
const WINDOW: Duration = Duration::from_secs(60);

/// See the module.
pub struct Events {
    client: Client,
    /// The name of the approver's pod.
    instance: String,
    metrics: Metrics,
    /// When the window began, and what has been spent of it.
    spent: Mutex<Option<(Instant, u32)>>,
}

impl Events {
    /// Written by `client` in the name of the replica `instance`.
    pub fn new(client: Client, instance: String, metrics: Metrics) -> Self {
        Self { client, instance, metrics, spent: Mutex::default() }
    }

    /// Tells of a denial, at a time in RFC 3339.
    pub async fn tell(&self, request: &Request, denial: &Denial, now: &str) {
        let (namespace, _) = place(request);
        let Some(event) = self.event(request, denial, now).filter(|_| self.spend(Instant::now())) else { return };
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            self.metrics.failed(Step::event);
            let call = Call { verb: "create", resource: "events", name: None, namespace: Some(namespace) };
            let failure = Failure::of(&error, &call);
            tracing::debug!(target: LOG_TARGET, call = %call, error = %failure, "no Event tells of the denial");
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
