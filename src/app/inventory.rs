//! What the agent holds, for people (`/certs`) and as gauges: read from the store when asked, never kept.

use std::{sync::Arc, time::SystemTime};

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    clock::{self, Clock},
    rotation::plan::Plan,
    store::{Demand, Entry, Store},
};

mod gauges;

#[cfg(test)]
pub(crate) use tests::sample;

/// A reader of the store.
#[derive(Debug, Clone)]
pub(super) struct Inventory {
    store: Arc<Store>,
    plan: watch::Receiver<Arc<Plan>>,
    clock: Arc<dyn Clock>,
    per_workload: bool,
}

/// What has become of an identity's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In use, and its renewal is to come.
    Valid,
    /// In use, and its renewal should have been.
    Overdue,
    /// Past its end: withheld, or what a client still holds.
    Expired,
    /// Being issued for the first time.
    Pending,
    /// A client holds a good one from before the agent's start, or of an identity that it had before the configuration changed.
    HeldByClient,
    /// Nobody subscribes: it is kept for a while in case somebody comes back, and not renewed.
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

/// A renewal that is late by more than this share of the life is overdue.
const OVERDUE: f64 = 0.05;

impl Inventory {
    pub(super) fn new(store: Arc<Store>, plan: watch::Receiver<Arc<Plan>>, clock: Arc<dyn Clock>) -> Self {
        Self { store, plan, clock, per_workload: false }
    }

    /// And with gauges for each service account.
    pub(super) fn per_workload(self, per_workload: bool) -> Self {
        Self { per_workload, ..self }
    }

    /// One object for each identity.
    pub(super) fn rows(&self) -> Vec<Value> {
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

fn row(entry: &Entry, plan: &Plan, now: SystemTime) -> Value {
    let status = entry.status();
    // As it is called now; of what is issued no more, as it was.
    let identity = plan.current(&entry.identity).unwrap_or_else(|| entry.identity.clone());
    let mut row = json!({
        "spiffe_id": entry.identity.spiffe_id.as_str(),
        "profile": &*identity.profile.name,
        "issuer": identity.profile.issuer.to_string(),
        "state": name(state(entry, now)),
        "subscribers": entry.subscribers(),
        "next_attempt": status.next_attempt.map(clock::rfc3339),
        "last_error": status.last_error,
        "request": status.request.as_deref(),
    });
    if let Some(svid) = entry.current() {
        row["serial"] = json!(svid.chain.serial);
        row["fingerprint_sha256"] = json!(svid.chain.fingerprint);
        row["dns_names"] = json!(svid.chain.dns_names);
        row["not_before"] = json!(clock::rfc3339(svid.chain.validity.not_before));
        row["not_after"] = json!(clock::rfc3339(svid.chain.validity.not_after));
        row["renew_at"] = json!(clock::rfc3339(svid.renew_at));
    }
    row
}

#[cfg(test)]
mod tests;
