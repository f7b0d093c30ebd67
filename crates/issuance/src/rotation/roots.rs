//! Effects of the trust bundle, and of its changes, on certificates and answers.

use std::{sync::Arc, time::Duration};

use rustls::pki_types::CertificateDer;
use sds_server::{
    material::{self, Svid},
    store::Entry,
};
use tracing::{info, warn};

use super::{Id, Rotation};
use crate::issuer::{Error, verify};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation::roots";

impl Rotation {
    /// Whether `anchor` is a root of the current bundle. The bundle may have changed since the order verified the chain.
    pub(super) fn is_current(&self, id: Id, anchor: Option<&CertificateDer<'_>>) -> bool {
        let set = self.parts.trust.borrow();
        let bundle = set.own.as_ref().map(|bundle| &bundle.roots);
        self.entries.get(&id).is_none_or(|entry| {
            let profile = entry.identity.profile.fingerprint();
            material::is_current_authority(&material::authority_digest(&profile, anchor), &profile, bundle)
        })
    }

    /// If revocation lists wait for a chain, renews one of `entries` whose certificate a client holds from before a restart of the agent:
    /// the earlier process knew its chain, and this one does not. Done once for each issuer, because every issued certificate shows its chain.
    pub(super) fn look_for_a_chain(&mut self, entries: impl IntoIterator<Item = Id>) {
        if !self.parts.trust.borrow().wants_chain {
            return;
        }
        let is_new = |entry: &Entry| !self.has_looked.contains(&entry.identity.profile.issuer);
        let held = |id| {
            self.entries.get(&id).filter(|entry| entry.is_leased() && entry.is_held() && is_new(entry)).map(|entry| (id, entry.clone()))
        };
        let Some((id, entry)) = entries.into_iter().find_map(held) else { return };
        let now = self.now();
        info!(target: LOG_TARGET, identity = %entry.identity, "renewed early: revocation lists wait for a chain");
        self.bring_forward(now, id, &entry, now.wall);
        self.has_looked.insert(entry.identity.profile.issuer.clone());
    }

    /// Certificates of an authority that is no longer trusted are renewed within 60 s, also those without a subscriber, because callers
    /// fetch them. If they still settle, they are not published. Answers whose chain led to no known root are verified again.
    pub(super) fn bundle_changed(&mut self) {
        let set = self.parts.trust.borrow_and_update().clone();
        let bundle = set.own.as_ref().map(|bundle| &bundle.roots);
        let now = self.now();
        let settling = |(id, svid): (&Id, &Arc<Svid>)| {
            let current = material::is_current_authority(&svid.authority, &svid.identity.profile.fingerprint(), bundle);
            (!current).then_some(*id)
        };
        for id in self.verified.iter().filter_map(settling).collect::<Vec<_>>() {
            self.verified.remove(&id);
            self.failed(id, None, &bundle_moved_on());
        }
        for (id, entry) in &self.entries {
            let Some(svid) = entry.current() else { continue };
            if !material::is_current_authority(&svid.authority, &entry.identity.profile.fingerprint(), bundle) {
                warn!(target: LOG_TARGET, identity = %entry.identity, "the certificate leads to no root of the new trust bundle; it is renewed early");
                let within = (svid.chain.validity.remaining(now.wall) / 4).min(Duration::from_secs(60));
                let at = now.wall + within.mul_f64(self.planner.draw());
                self.planner.expedite(now, *id, at);
                entry.set_status(|status| status.next_attempt = status.next_attempt.map(|planned| planned.min(at)));
            }
        }
        for (id, issued) in std::mem::take(&mut self.awaiting_anchor) {
            let Some(entry) = self.entries.get(&id) else { continue };
            let verified = verify::verify(&entry.identity, &issued.key, &issued.chain, bundle, now.wall);
            match verified.and_then(|verified| verify::not_revoked(&issued.chain, &set, now.wall).map(|()| verified)) {
                Ok(verified) => {
                    self.orders.abort_all(id);
                    self.issued(id, issued, &verified, None, None);
                }
                Err(_) => drop(self.awaiting_anchor.insert(id, issued)),
            }
        }
        self.look_for_a_chain(self.entries.keys().copied().collect::<Vec<_>>());
    }
}

/// The error for an answer that was verified by an earlier bundle.
pub(super) fn bundle_moved_on() -> Error {
    let why = "the bundle has changed since it was verified".to_owned();
    Error::InvalidCertificate(verify::Error::Path { what: "the chain does not lead to the trust bundle", why })
}
