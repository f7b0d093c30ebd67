//! What the agent holds, for people (`/certs`) and as gauges: read from the store when asked, never kept.

use std::{sync::Arc, time::SystemTime};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};
use serde_json::{Value, json};

use crate::{
    clock::{self, Clock},
    store::{Demand, Entry, Status, Store},
};

/// A reader of the store.
#[derive(Debug, Clone)]
pub(super) struct Inventory {
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
}

/// What has become of an identity's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In use, and its renewal is to come.
    Valid,
    /// In use, and its renewal should have been.
    Overdue,
    /// Past its end: withheld.
    Expired,
    /// Being issued for the first time.
    Pending,
    /// A client holds a good one from before the agent's start.
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
    pub(super) fn new(store: Arc<Store>, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock }
    }

    /// One object for each identity.
    pub(super) fn rows(&self) -> Vec<Value> {
        let now = self.clock.now();
        let mut entries = self.store.snapshot();
        entries.sort_by(|a, b| a.identity.spiffe_id.cmp(&b.identity.spiffe_id));
        entries.iter().map(|entry| row(entry, now)).collect()
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
            _ => State::Pending,
        },
    }
}

fn name(state: State) -> &'static str {
    STATES.iter().find(|(s, _)| *s == state).map_or("", |(_, name)| name)
}

/// The fields are the same for every identity; what is not there is null.
fn row(entry: &Entry, now: SystemTime) -> Value {
    let (status, state) = (entry.status(), state(entry, now));
    let svid = entry.current();
    let chain = svid.as_ref().map(|svid| &svid.chain);
    let waits_for = waits_for(state, &status, now);
    json!({
        "spiffe_id": entry.identity.spiffe_id.as_str(),
        "dns_names": chain.map_or(&*entry.identity.dns_names, |chain| &chain.dns_names),
        "profile": &*entry.identity.profile.name,
        "issuer": entry.identity.profile.issuer.to_string(),
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

/// What an order that is under way or due waits for, in words; none where nothing is due.
fn waits_for(state: State, status: &Status, now: SystemTime) -> Option<String> {
    if status.request.is_some() {
        return Some(status.waits_for.as_deref().unwrap_or("the issuer's answer").to_owned());
    }
    match (state, status.next_attempt) {
        (State::Pending | State::Expired | State::Overdue, Some(at)) if at > now => {
            Some("the next attempt: the last one failed, see last_error".to_owned())
        }
        (State::Pending | State::Expired | State::Overdue, _) => {
            Some("its turn: the request is being made, or others of this issuer are before it".to_owned())
        }
        (State::Valid | State::HeldByClient | State::Idle, _) => None,
    }
}

impl Collector for Inventory {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let now = self.clock.now();
        let entries = self.store.snapshot();
        let mut counts = [0_i64; STATES.len()];
        let mut earliest: Option<SystemTime> = None;
        for entry in &entries {
            let state = state(entry, now);
            counts[state as usize] += 1;
            if let Some(svid) = entry.current().filter(|_| state != State::Idle) {
                let end = svid.chain.validity.not_after;
                earliest = Some(earliest.map_or(end, |e| e.min(end)));
            }
        }
        let mut family =
            encoder.encode_descriptor("certificates", "Identities, by the state of their certificate", None, MetricType::Gauge)?;
        for ((_, name), count) in STATES.iter().zip(counts) {
            ConstGauge::new(count).encode(family.encode_family(&[("state", *name)])?)?;
        }
        if let Some(earliest) = earliest {
            let gauge = ConstGauge::new(i64::try_from(clock::unix_seconds(earliest)).unwrap_or(i64::MAX));
            let help = "When the first of the certificates in use ends";
            gauge.encode(encoder.encode_descriptor(
                "certificate_earliest_expiration_timestamp_seconds",
                help,
                None,
                MetricType::Gauge,
            )?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use prometheus_client::{encoding::text, registry::Registry};

    use super::*;
    use crate::{
        clock::TestClock,
        identity::tests::identity,
        issuer::{Issuer as _, Order, Progress, embedded::Embedded},
        material::{CertificateChain, Svid},
    };

    #[tokio::test(start_paused = true)]
    async fn what_nobody_subscribes_to_is_idle_and_alarms_nobody() {
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let (store, _events) = Store::new();
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Inventory::new(store.clone(), Arc::new(clock.clone()))));
        let count = |state: &str| {
            let mut page = String::new();
            text::encode(&mut page, &registry).unwrap();
            (page.contains(&format!("certificates{{state=\"{state}\"}} 1")), page.contains("\ncertificate_earliest_expiration"))
        };

        let id = identity("a");
        let lease = store.lease(&id, Demand::Now, None);
        assert_eq!(count("pending"), (true, false));
        let (progress, _stage) = Progress::new();
        let order = Order { identity: id.clone(), evidence: None, progress };
        let issued = Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap().issue(order).await.unwrap();
        let chain = CertificateChain::from_pem(&issued.chain_pem).unwrap();
        let renew_at = clock.now() + Duration::from_secs(1800);
        let svid = Svid::new(id.clone(), chain, issued.key, renew_at, clock.now(), String::new());
        store.snapshot()[0].publish(Arc::new(svid));
        assert_eq!(count("valid"), (true, true));
        tokio::time::advance(Duration::from_secs(2000)).await;
        assert_eq!(count("overdue"), (true, true));
        drop(lease);
        assert_eq!(count("idle"), (true, false), "nobody renews it, because nobody needs it");
        tokio::time::advance(Duration::from_secs(2000)).await;
        assert_eq!(count("idle"), (true, false));
        let _lease = store.lease(&id, Demand::Now, None);
        assert_eq!(count("expired"), (true, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_row_has_every_field_and_says_why_it_waits() {
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let (store, _events) = Store::new();
        let inventory = Inventory::new(store.clone(), Arc::new(clock.clone()));
        let pod = crate::identity::PodRef { namespace: "shop".into(), name: "cart-0".into(), uid: "u".into() };
        let _leases = [Some(pod.clone()), Some(pod), None].map(|pod| store.lease(&identity("a"), Demand::Now, pod));
        let row = || inventory.rows().remove(0);
        let fields = [
            "dns_names",
            "fingerprint_sha256",
            "issuer",
            "last_error",
            "next_attempt",
            "not_after",
            "not_before",
            "pods",
            "profile",
            "renew_at",
            "request",
            "serial",
            "spiffe_id",
            "state",
            "subscribers",
            "waits_for",
        ];
        assert_eq!(row().as_object().unwrap().keys().collect::<Vec<_>>(), fields);
        assert_eq!((&row()["state"], &row()["subscribers"], &row()["pods"]), (&json!("pending"), &json!(3), &json!(["shop/cart-0"])));
        let why = || row()["waits_for"].as_str().unwrap_or_default().to_owned();
        assert!(why().starts_with("its turn: "), "{}", row());

        let entry = store.snapshot().remove(0);
        entry.set_status(|status| status.request = Some("r".into()));
        assert_eq!(why(), "the issuer's answer");
        entry.set_status(|status| status.waits_for = Some("an approver".into()));
        assert_eq!(why(), "an approver");
        let next = clock.now() + Duration::from_secs(9);
        entry.set_status(|status| *status = Status { next_attempt: Some(next), last_error: Some("no".into()), ..Status::default() });
        assert!(why().starts_with("the next attempt: "), "{}", row());
    }
}
