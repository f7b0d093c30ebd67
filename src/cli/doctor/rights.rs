//! The permissions that the configuration requires for the agent's account. The API server checks each (SelfSubjectAccessReview).

use agent_kube::{Call, Failure, cluster_trust_bundle};
use cert_manager::{GROUP, RequestNamespace};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};

use super::{cluster::failed, report::Step};
use crate::{
    cli::Exit,
    config::{Attestation, BundleSelection, Config, IssuerConfig, TrustSource},
};

/// Required verbs on one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    verbs: &'static [&'static str],
    group: &'static str,
    resource: &'static str,
    namespace: Option<String>,
    name: Option<String>,
    /// The effect of a missing optional permission; `None` if the agent does not work without it.
    without: Option<&'static str>,
}

impl Need {
    /// `pods in the whole cluster`
    fn place(&self) -> String {
        let group = if self.group.is_empty() { String::new() } else { format!(".{}", self.group) };
        let name = self.name.as_ref().map_or_else(String::new, |name| format!(" {name}"));
        match &self.namespace {
            Some(namespace) => format!("{}{group}{name} in namespace {namespace}", self.resource),
            None => format!("{}{group}{name} in the whole cluster", self.resource),
        }
    }
}

/// All permissions that an agent with this configuration needs.
pub(super) fn needs(config: &Config) -> Vec<Need> {
    let mut out: Vec<Need> = Vec::new();
    let mut add = |need: Need| {
        if !out.contains(&need) {
            out.push(need);
        }
    };
    if config.attestation == Attestation::Kubernetes {
        add(Need { verbs: &["list", "watch"], group: "", resource: "pods", namespace: None, name: None, without: None });
    }
    for issuer in config.issuers.values() {
        let IssuerConfig::CertManager(issuer) = issuer else { continue };
        let namespace = match &issuer.namespace {
            RequestNamespace::Fixed(namespace) => Some(namespace.clone()),
            RequestNamespace::Workload => None,
        };
        let verbs = &["create", "get", "list", "watch", "delete"];
        let (resource, reference) = ("certificaterequests", &issuer.issuer_ref);
        add(Need { verbs, group: GROUP, resource, namespace: namespace.clone(), name: None, without: None });
        if reference.group.is_empty() || reference.group == GROUP {
            let (verbs, without) = (&["get"], Some("the issuer cannot be checked before requests wait for it"));
            let (name, group) = (Some(reference.name.clone()), GROUP);
            match reference.kind.as_str() {
                "ClusterIssuer" => add(Need { verbs, group, resource: "clusterissuers", namespace: None, name, without }),
                _ if namespace.is_some() => add(Need { verbs, group, resource: "issuers", namespace, name, without }),
                // Each workload's namespace has its own issuer, and these are not checked.
                _ => {}
            }
        }
    }
    for source in config.trust_sources.iter().chain(config.federated.values()) {
        let verbs = &["list", "watch"];
        match source {
            TrustSource::ConfigMap { namespace, name, .. } => {
                let (namespace, name) = (Some(namespace.clone()), Some(name.clone()));
                add(Need { verbs, group: "", resource: "configmaps", namespace, name, without: None });
            }
            TrustSource::ClusterTrustBundle(selection) => {
                let name = match selection {
                    BundleSelection::Name(name) => Some(name.clone()),
                    BundleSelection::Signer { .. } => None,
                };
                let (group, resource) = (cluster_trust_bundle::GROUP, cluster_trust_bundle::PLURAL);
                add(Need { verbs, group, resource, namespace: None, name, without: None });
            }
            TrustSource::File { .. } | TrustSource::Inline { .. } => {}
        }
    }
    if config.events && config.attestation == Attestation::Kubernetes {
        let without = Some("no Events report problems with the certificates of pods; `events: false` disables them");
        add(Need { verbs: &["create"], group: "events.k8s.io", resource: "events", namespace: None, name: None, without });
    }
    out
}

/// Checks each permission. The step names each missing verb with its resource and namespace.
pub(super) async fn look(client: &Client, needs: &[Need]) -> Step {
    let mut missing: Vec<(&Need, Vec<&'static str>)> = Vec::new();
    for need in needs {
        let mut verbs = Vec::new();
        for verb in need.verbs {
            match may(client, need, verb).await {
                Ok(true) => {}
                Ok(false) => verbs.push(*verb),
                Err(step) => return step,
            }
        }
        if !verbs.is_empty() {
            missing.push((need, verbs));
        }
    }
    judge(needs, &missing)
}

fn judge(needs: &[Need], missing: &[(&Need, Vec<&'static str>)]) -> Step {
    let name = "rights";
    if missing.is_empty() {
        let all: Vec<String> = needs.iter().map(|need| format!("this account may {} {}", need.verbs.join(", "), need.place())).collect();
        return Step::ok(name, all.join("\n"));
    }
    let line = |(need, verbs): &(&Need, Vec<&str>)| {
        let without = need.without.map_or_else(String::new, |without| format!(": {without}"));
        format!("this account may not {} {}{without}", verbs.join(", "), need.place())
    };
    // Required permissions come before optional ones.
    let (optional, required): (Vec<_>, Vec<_>) = missing.iter().partition(|(need, _)| need.without.is_some());
    let detail = required.iter().chain(&optional).map(|one| line(one)).collect::<Vec<_>>().join("\n");
    let grants: Vec<String> = missing.iter().map(|(need, verbs)| format!("{} on {}", verbs.join(", "), need.place())).collect();
    let remedy = format!("bind the agent's service account to a role with {}", grants.join("; "));
    if required.is_empty() { Step::warning(name, detail, remedy) } else { Step::failed(name, Exit::NotPermitted, detail, remedy) }
}

async fn may(client: &Client, need: &Need, verb: &str) -> Result<bool, Step> {
    let attributes = ResourceAttributes {
        verb: Some(verb.into()),
        group: Some(need.group.into()),
        resource: Some(need.resource.into()),
        namespace: need.namespace.clone(),
        name: need.name.clone(),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
    let review = SelfSubjectAccessReview { spec, ..Default::default() };
    let call = Call { verb: "create", resource: "selfsubjectaccessreviews.authorization.k8s.io", name: None, namespace: None };
    let answer = Api::all(client.clone()).create(&PostParams::default(), &review).await;
    let answer: SelfSubjectAccessReview = answer.map_err(|error| failed("rights", &Failure::of(&error, &call)))?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::doctor::report::Outcome, config};

    fn config(text: &str) -> Config {
        let env = |name: &str| (name == "NODE_NAME").then(|| "n1".to_owned());
        Config::parse(text, &env).unwrap().config
    }

    const TEXT: &str = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer }, namespace: agents } }\n\
                        trust: { sources: [ { configMap: { namespace: cert-manager, name: roots } }, { file: /a.pem } ] }\n";

    #[test]
    fn what_is_needed_follows_from_the_configuration() {
        let places =
            |config: &Config| needs(config).iter().map(|need| format!("{} {}", need.verbs.join(","), need.place())).collect::<Vec<_>>();
        let all = [
            "list,watch pods in the whole cluster",
            "create,get,list,watch,delete certificaterequests.cert-manager.io in namespace agents",
            "get clusterissuers.cert-manager.io mesh-ca in the whole cluster",
            "list,watch configmaps roots in namespace cert-manager",
            "create events.events.k8s.io in the whole cluster",
        ];
        assert_eq!(places(&config(TEXT)), all);
        assert_eq!(places(&config(&format!("{TEXT}events: false\n"))), all[..4]);
        let bundles = "{ file: /a.pem } ], federated: { a.example: { clusterTrustBundle: { name: a } }, \
                       b.example: { clusterTrustBundle: { signerName: b.example/c, labelSelector: {} } } } }";
        let with_bundles = places(&config(&TEXT.replace("{ file: /a.pem } ] }", bundles)));
        let expected = [
            "list,watch clustertrustbundles.certificates.k8s.io a in the whole cluster",
            "list,watch clustertrustbundles.certificates.k8s.io in the whole cluster",
        ];
        assert_eq!(with_bundles[4..6], expected);
        let profiles = "profiles: [ { name: a, match: {}, issuerRef: { name: own, kind: Issuer }, namespace: workload } ]\n";
        assert_eq!(places(&config(&format!("{TEXT}{profiles}"))).len(), 6, "the requests of all namespaces, and no single issuer");
        assert!(needs(&config::dev(config::Dev::default(), &|_| None).unwrap()).is_empty());
    }

    #[test]
    fn a_missing_required_verb_fails_and_an_optional_one_warns() {
        let needs = needs(&config(TEXT));
        assert_eq!(judge(&needs, &[]).result, Outcome::Ok);
        let step = judge(&needs, &[(&needs[4], vec!["create"])]);
        assert!(
            step.result == Outcome::Warning && step.detail.contains("may not create events.events.k8s.io in the whole cluster: no Events")
        );
        let step = judge(&needs, &[(&needs[2], vec!["get"]), (&needs[1], vec!["watch", "delete"])]);
        let words = "this account may not watch, delete certificaterequests.cert-manager.io in namespace agents\n";
        assert!(step.result == Outcome::Failed && step.detail.starts_with(words), "{step:?}");
        assert!(step.remedy.unwrap().contains("watch, delete on certificaterequests.cert-manager.io in namespace agents"));
    }
}
