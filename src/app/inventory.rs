//! Reports the state of all certificates of the agent, for `/certs` and as gauges. Each report reads the store; nothing is cached.

use std::{sync::Arc, time::SystemTime};

use agent_runtime::clock::{self, Clock};
use issuance::rotation::plan::Plan;
use sds_server::store::{Demand, Entry, Status, Store};
use serde_json::{Value, json};
use tokio::sync::watch;

mod gauges;

#[cfg(test)]
pub(crate) use tests::sample;

/// Reads the store for reports.
#[derive(Debug, Clone)]
pub struct Inventory {
    store: Arc<Store>,
    plan: watch::Receiver<Arc<Plan>>,
    clock: Arc<dyn Clock>,
    per_workload: bool,
}

/// The state of an identity's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In use, and not overdue.
    Valid,
    /// In use, and its renewal is late by more than 5 % of the lifetime.
    Overdue,
    /// Expired: the agent withholds it, or a client still holds it.
    Expired,
    /// Being issued for the first time.
    Pending,
    /// The agent has none, but a client holds a valid one: from before the agent's start, or from before a change of the configuration.
    HeldByClient,
    /// No client subscribes. The agent keeps it for the configured `retention`, and renews it only if a client fetches it.
    Idle,
}

const STATES: [(State, &str); 6] = [
    (State::Valid, "valid"),
    (State::Overdue, "overdue"),
    (State::Expired, "expired"),
    (State::Pending, "pending"),
    (State::HeldByClient, "held_by_client"),
    (State::Idle, "idle"),
];

/// A renewal that is late by more than this share of the lifetime is overdue.
const OVERDUE: f64 = 0.05;

impl Inventory {
    /// Reports the identities in `store`, with the profiles of `plan`.
    pub fn new(store: Arc<Store>, plan: watch::Receiver<Arc<Plan>>, clock: Arc<dyn Clock>) -> Self {
        Self { store, plan, clock, per_workload: false }
    }

    /// Adds gauges for each service account. Default: off.
    pub fn per_workload(self, per_workload: bool) -> Self {
        Self { per_workload, ..self }
    }

    /// Returns one JSON object for each identity, sorted by SPIFFE ID.
    pub fn rows(&self) -> Vec<Value> {
        let now = self.clock.now();
        let mut entries = self.store.snapshot();
        entries.sort_by(|a, b| a.identity.spiffe_id.cmp(&b.identity.spiffe_id));
        let plan = self.plan.borrow().clone();
        entries.iter().map(|entry| row(entry, &plan, now)).collect()
    }
}

fn state(entry: &Entry, now: SystemTime) -> State {
    if !entry.is_leased() {
        return State::Idle;
    }
    match entry.current() {
        Some(svid) => {
            let validity = svid.chain.validity;
            if !validity.is_live(now) {
                State::Expired
            } else if now > svid.renew_at + validity.lifetime().mul_f64(OVERDUE) {
                State::Overdue
            } else {
                State::Valid
            }
        }
        None => match entry.demand() {
            Some(Demand::Held { not_after, .. }) if now < not_after => State::HeldByClient,
            Some(Demand::Held { .. }) => State::Expired,
            Some(Demand::Now) | None => State::Pending,
        },
    }
}

fn name(state: State) -> &'static str {
    STATES.iter().find(|(s, _)| *s == state).map_or("", |(_, name)| name)
}

/// Every row has the same fields; a field without a value is null.
fn row(entry: &Entry, plan: &Plan, now: SystemTime) -> Value {
    // The profile in force. If the plan no longer has the identity, the profile with which it was issued.
    let identity = plan.current(&entry.identity).unwrap_or_else(|| entry.identity.clone());
    let (status, state) = (entry.status(), state(entry, now));
    let svid = entry.current();
    let chain = svid.as_ref().map(|svid| &svid.chain);
    let waits_for = waits_for(state, &status, now);
    json!({
        "spiffe_id": entry.identity.spiffe_id.as_str(),
        "dns_names": chain.map_or(&*entry.identity.dns_names, |chain| &chain.dns_names),
        "profile": &*identity.profile.name,
        "issuer": identity.profile.issuer.to_string(),
        "state": name(state),
        "serial": chain.map(|chain| &chain.serial),
        "fingerprint_sha256": chain.map(|chain| &chain.fingerprint),
        "not_before": chain.map(|chain| clock::rfc3339(chain.validity.not_before)),
        "not_after": chain.map(|chain| clock::rfc3339(chain.validity.not_after)),
        "renew_at": svid.as_ref().map(|svid| clock::rfc3339(svid.renew_at)),
        "next_attempt": status.next_attempt.map(clock::rfc3339),
        "last_error": status.last_error,
        "request": status.request.as_deref(),
        "waits_for": waits_for,
        "subscribers": entry.subscribers(),
        "pods": entry.pods().iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

/// The reason why an order that runs or is due is not complete, as text; `None` if no order is due.
fn waits_for(state: State, status: &Status, now: SystemTime) -> Option<String> {
    if status.request.is_some() {
        return Some(status.waits_for.as_deref().unwrap_or("the issuer's answer").to_owned());
    }
    match (state, status.next_attempt) {
        (State::Pending | State::Expired | State::Overdue, Some(at)) if at > now => {
            Some("the next attempt: the last one failed, see last_error".to_owned())
        }
        (State::Pending | State::Expired | State::Overdue, _) => {
            Some("its turn: the request is being created, or other orders of this issuer are ahead of it".to_owned())
        }
        (State::Valid | State::HeldByClient | State::Idle, _) => None,
    }
}

#[cfg(test)]
mod tests;
