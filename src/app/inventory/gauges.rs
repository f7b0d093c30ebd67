//! The inventory as gauges, computed for each scrape: an identity that the store no longer has leaves no series.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::clock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};
use sds_server::store::{Demand, Entry};
use workload_identity::Account;

use super::{Inventory, STATES, State, state};

/// The renewal time and the end of a certificate.
#[derive(Debug, Clone, Copy)]
struct Term {
    renew_at: SystemTime,
    not_after: SystemTime,
}

impl Term {
    /// The term of the certificate in use: the one that the agent serves, or the one that a client holds from before the agent's start.
    fn of(entry: &Entry) -> Option<Self> {
        match (entry.current(), entry.demand()) {
            (Some(svid), _) => Some(Self { renew_at: svid.renew_at, not_after: svid.chain.validity.not_after }),
            (None, Some(Demand::Held { renew_at, not_after })) => Some(Self { renew_at, not_after }),
            (None, Some(Demand::Now) | None) => None,
        }
    }

    /// The elapsed share of the renewal window, which begins at the planned renewal and ends with the certificate: from 0 to 1.
    fn overdue(&self, now: SystemTime) -> f64 {
        let late = now.duration_since(self.renew_at).unwrap_or_default();
        match self.not_after.duration_since(self.renew_at) {
            Ok(window) if window > Duration::ZERO => (late.as_secs_f64() / window.as_secs_f64()).min(1.0),
            _ if now >= self.not_after => 1.0,
            _ => 0.0,
        }
    }

    fn earliest(self, other: Self) -> Self {
        Self { renew_at: self.renew_at.min(other.renew_at), not_after: self.not_after.min(other.not_after) }
    }
}

fn timestamp(time: SystemTime) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(clock::unix_seconds(time)).unwrap_or(i64::MAX))
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: &impl EncodeMetric) -> fmt::Result {
    value.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

impl Collector for Inventory {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = self.clock.now();
        let mut counts = [0_i64; STATES.len()];
        let mut earliest: Option<SystemTime> = None;
        let mut overdue = 0.0_f64;
        let mut accounts: BTreeMap<Account, Term> = BTreeMap::new();
        for entry in &self.store.snapshot() {
            let state = state(entry, now);
            counts[state as usize] += 1;
            let Some(term) = Term::of(entry).filter(|_| state != State::Idle) else { continue };
            earliest = Some(earliest.map_or(term.not_after, |earliest| earliest.min(term.not_after)));
            overdue = overdue.max(term.overdue(now));
            if let Some(account) = entry.identity.account.as_ref().filter(|_| self.per_workload) {
                let term = accounts.get(account).map_or(term, |other| term.earliest(*other));
                accounts.insert(account.clone(), term);
            }
        }
        let mut family =
            encoder.encode_descriptor("certificates", "Identities, by the state of their certificate", None, MetricType::Gauge)?;
        for ((_, name), count) in STATES.iter().zip(counts) {
            ConstGauge::new(count).encode(family.encode_family(&[("state", *name)])?)?;
        }
        let help = "The largest elapsed share of the renewal window, from the planned renewal to the expiry, of the certificates in use: \
                    0 if no renewal is late, 1 if a certificate has expired";
        gauge(&mut encoder, "certificate_renewal_overdue_ratio", help, &ConstGauge::new(overdue))?;
        if let Some(earliest) = earliest {
            let help = "Earliest expiry of the certificates in use; absent if none is in use";
            gauge(&mut encoder, "certificate_earliest_expiration_timestamp_seconds", help, &timestamp(earliest))?;
        }
        let help = "Earliest expiry of this service account's certificates on the node; with metrics.perWorkload";
        by_account(&mut encoder, "certificate_expiration_timestamp_seconds", help, &accounts, |term| term.not_after)?;
        let help = "Earliest planned renewal of this service account's certificates on the node; with metrics.perWorkload";
        by_account(&mut encoder, "certificate_renewal_timestamp_seconds", help, &accounts, |term| term.renew_at)
    }
}

fn by_account(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    accounts: &BTreeMap<Account, Term>,
    value: impl Fn(&Term) -> SystemTime,
) -> fmt::Result {
    if accounts.is_empty() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (Account { namespace, name }, term) in accounts {
        let labels: [(&str, Arc<str>); 2] = [("namespace", namespace.clone()), ("service_account", name.clone())];
        timestamp(value(term)).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
