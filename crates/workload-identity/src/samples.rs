//! Values for tests.
#![allow(clippy::unwrap_used, reason = "for tests alone")]

use std::{sync::Arc, time::Duration};

use crate::{Identity, IssuerName, KeyType, Labels, PodRef, Profile, Resolver, TrustDomain, Workload};

/// The identity of a pod with this service account under [`ISTIO`].
pub fn identity(service_account: &str) -> Arc<Identity> {
    let resolver = Resolver::single(TrustDomain::new("cluster.local").unwrap(), Arc::new(profile(ISTIO)));
    Arc::new(resolver.resolve(&pod(Some(service_account), "u1")).unwrap())
}

/// A profile with `template` for the SPIFFE ID.
pub fn profile(template: &str) -> Profile {
    Profile {
        name: "default".into(),
        issuer: IssuerName("mesh".into()),
        authority: "ClusterIssuer mesh-ca of cert-manager.io".into(),
        key: KeyType::EcdsaP256,
        lifetime: Duration::from_secs(3600),
        renew_at: 0.5,
        jitter: 0.1,
        spiffe_id: template.into(),
        dns_names: vec!["{serviceAccount}.{namespace}.svc".into()],
        per_pod: false,
        epoch: 0,
    }
}

/// The pod `shop/cart-1` with this service account and UID.
pub fn pod(service_account: Option<&str>, uid: &str) -> Workload {
    Workload::Pod {
        pod: PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: uid.into() },
        service_account: service_account.map(Into::into),
        labels: Labels::default(),
        picked: None,
    }
}

/// Template of the SPIFFE IDs that Istio expects.
pub const ISTIO: &str = "spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}";
