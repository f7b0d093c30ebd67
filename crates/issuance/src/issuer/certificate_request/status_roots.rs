//! The roots that an issuer reports with signed requests (`status.ca`), as a source of the trust bundle.
//!
//! A reported root counts only if the issued chain leads to it. Roots are collected: a pool of authorities, or one that is being replaced,
//! reports another root with each answer. A root is dropped when it was not reported for the lifetime of a certificate. The set is never empty
//! again.

use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use sds_server::{
    material::{CertificateChain, TrustBundle},
    trust::Source,
};

use crate::issuer::verify;

/// Maximum number of roots of one issuer. Further ones are reported and ignored.
const MAX_ROOTS: usize = 32;

/// The roots of one issuer.
pub(super) struct StatusRoots {
    source: Source,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Each with the time until which certificates that lead to it may live, on any node.
    roots: Vec<(CertificateDer<'static>, SystemTime)>,
    /// The last reported fault, so that each is reported once.
    fault: Option<String>,
}

impl StatusRoots {
    /// Offers to `source`.
    pub(super) fn new(source: Source) -> Self {
        source.comes_with_chains();
        Self { source, state: Mutex::default() }
    }

    /// Handles one answer: `ca` is the PEM of `status.ca`, `None` if it is absent or not base64.
    pub(super) fn answered(&self, ca: Option<&[u8]>, chain: &CertificateChain, now: SystemTime) {
        let mut state = self.state.lock();
        match self.add(&mut state, ca, chain, now) {
            Ok(()) => state.fault = None,
            Err(fault) if state.fault.as_ref() == Some(&fault) => {}
            Err(fault) => {
                self.source.missing(&fault);
                state.fault = Some(fault);
            }
        }
    }

    fn add(&self, state: &mut State, ca: Option<&[u8]>, chain: &CertificateChain, now: SystemTime) -> Result<(), String> {
        let ca = ca.filter(|ca| !ca.is_empty()).ok_or("the issuer reports no root (status.ca is empty): name its root in trust.sources")?;
        let reported = TrustBundle::from_pem(ca).map_err(|error| format!("status.ca {error}"))?;
        let roots = verify::roots_of(chain, &reported, now)
            .map_err(|error| format!("the issued chain does not lead to status.ca, which is ignored: {error}"))?;
        let mut next = state.roots.clone();
        // Other nodes may have got certificates of this root until now.
        let end = chain.validity.not_after.max(now + chain.validity.lifetime());
        for root in roots {
            match next.iter_mut().find(|(known, _)| *known == root) {
                Some((_, until)) => *until = end.max(*until),
                None => next.push((root, end)),
            }
        }
        next.retain(|(_, until)| now < *until);
        if next.len() > MAX_ROOTS {
            return Err(format!("the issuer reports more than {MAX_ROOTS} different roots"));
        }
        let bundle = TrustBundle::from_certificates(next.iter().map(|(root, _)| root.clone()).collect());
        bundle.and_then(|bundle| self.source.take(bundle)).map_err(|error| format!("status.ca {error}"))?;
        state.roots = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    use sds_server::trust::{Bundle, Metrics, Trust};

    use super::*;

    struct Ca {
        pem: String,
        signer: Issuer<'static, KeyPair>,
    }

    impl Ca {
        fn new(name: &str) -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            Self { pem: params.self_signed(&key).unwrap().pem(), signer: Issuer::new(params, key) }
        }

        /// A chain of a lone leaf that ends at `until`.
        fn leaf(&self, until: SystemTime) -> CertificateChain {
            let mut params = CertificateParams::default();
            params.use_authority_key_identifier_extension = true;
            (params.not_before, params.not_after) = ((until - Duration::from_secs(86_400)).into(), until.into());
            CertificateChain::from_pem(params.signed_by(&KeyPair::generate().unwrap(), &self.signer).unwrap().pem().as_bytes()).unwrap()
        }
    }

    #[test]
    fn reported_roots_are_collected_while_their_certificates_live() {
        let trust = Trust::new(Metrics::default());
        let roots = StatusRoots::new(trust.source(None, "status.ca"));
        let own = || trust.subscribe().borrow().own.clone();
        assert!(trust.subscribe().borrow().wants_chain, "a chain brings the first root");
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
        let (a, b, other) = (Ca::new("a"), Ca::new("b"), Ca::new("other"));
        for _ in 0..3 {
            roots.answered(Some(a.pem.as_bytes()), &a.leaf(now + hour), now);
            roots.answered(Some(b.pem.as_bytes()), &b.leaf(now + 2 * hour), now);
        }
        let both = own().unwrap();
        assert_eq!(both.roots.roots().len(), 2);
        assert!(!trust.subscribe().borrow().wants_chain);
        // Faults change nothing.
        for ca in [None, Some(&b""[..]), Some(b"garbage"), Some(other.pem.as_bytes())] {
            roots.answered(ca, &a.leaf(now + hour), now);
            assert!(Arc::<Bundle>::ptr_eq(&own().unwrap(), &both));
        }
        roots.answered(Some(b.pem.as_bytes()), &b.leaf(now + 30 * hour), now + 23 * hour);
        assert_eq!(own().unwrap().roots.roots().len(), 2, "other nodes may have certificates of a");
        roots.answered(Some(b.pem.as_bytes()), &b.leaf(now + 30 * hour), now + 25 * hour);
        assert_eq!(own().unwrap().roots.to_pem(), TrustBundle::from_pem(b.pem.as_bytes()).unwrap().to_pem(), "that of a has ended");
    }

    #[test]
    fn the_number_of_reported_roots_has_a_limit() {
        let trust = Trust::new(Metrics::default());
        let roots = StatusRoots::new(trust.source(None, "status.ca"));
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
        for number in 0..MAX_ROOTS + 3 {
            let ca = Ca::new(&format!("{number}"));
            roots.answered(Some(ca.pem.as_bytes()), &ca.leaf(now + hour), now);
        }
        assert_eq!(trust.subscribe().borrow().own.as_ref().unwrap().roots.roots().len(), MAX_ROOTS);
    }
}
