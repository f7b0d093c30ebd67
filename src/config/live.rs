//! The table of fields that can change while the agent runs. The agent and the reference use it.

use super::Config;

/// A field or section, and when a change of it takes effect.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Path in the file.
    pub path: &'static str,
    /// Whether a change takes effect while the agent runs; otherwise it takes effect at the next start.
    pub is_live: bool,
    differs: fn(&Config, &Config) -> bool,
}

impl Field {
    /// When a change takes effect, in words.
    pub fn when(&self) -> &'static str {
        if self.is_live { "at once" } else { "at the next start" }
    }
}

macro_rules! fields {
    ($($path:literal: $kind:ident |$c:ident| $value:expr;)*) => {
        &[$(Field {
            path: $path,
            is_live: fields!($kind),
            differs: |one, other| {
                fn value($c: &Config) -> impl PartialEq + '_ { $value }
                value(one) != value(other)
            },
        }),*]
    };
    (live) => { true };
    (restart) => { false };
}

/// All fields. A field that is not live is used by parts that the agent creates once, at the start.
pub const FIELDS: &[Field] = fields! {
    "trustDomain": restart |c| &c.trust_domain;
    "attestation": restart |c| c.attestation;
    "attestationPolicy": restart |c| &c.attestation_policy;
    "sockets.shared": restart |c| &c.shared_socket;
    "sockets.perPod": restart |c| &c.per_pod;
    "identity": live |c| (&c.default_profile.spiffe_id, &c.default_profile.dns_names);
    "certificate": live |c| {
        let p = &c.default_profile;
        (p.key, p.lifetime, p.renew_at, p.jitter, p.per_pod)
    };
    "authorityEpoch": live |c| c.default_profile.epoch;
    "reissueOver": live |c| c.reissue_over;
    "issuer": live |c| c.issuers.get(&c.default_profile.issuer);
    "profiles": live |c| {
        c.profiles.iter().map(|rule| (rule, c.issuers.get(&rule.profile.issuer))).collect::<Vec<_>>()
    };
    "trust.sources": restart |c| &c.trust_sources;
    "trust.federated": restart |c| &c.federated;
    "names": restart |c| &c.names;
    "keys": restart |c| c.lock_memory;
    "confinement": restart |c| c.confinement;
    "limits": restart |c| &c.limits;
    "kubernetes": restart |c| c.kubernetes;
    "approver": live |c| &c.approver;
    "events": restart |c| c.events;
    "warmUp": restart |c| &c.warm_up;
    "retention": live |c| c.retention;
    "drain": restart |c| c.drain;
    "admin": restart |c| c.admin;
    "metrics": restart |c| (c.metrics, c.metrics_per_workload);
    "probes": restart |c| c.probes;
    "mountHelper": restart |c| c.mount_helper;
    "workerThreads": restart |c| c.worker_threads;
};

/// The fields in which two configurations differ.
pub fn differences(one: &Config, other: &Config) -> Vec<&'static Field> {
    FIELDS.iter().filter(|field| (field.differs)(one, other)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Config {
        let env = |name: &str| (name == "NODE_NAME").then(|| "n1".to_owned());
        let issuer = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n";
        let issuer = if text.contains("issuer:") { "" } else { issuer };
        Config::parse(&format!("{issuer}{text}\n"), &env).unwrap().config
    }

    /// For two different configurations the table returns the fields that differ, and none for equal ones.
    #[test]
    fn every_change_is_found_under_its_name() {
        let base = parse("");
        assert!(differences(&base, &base).is_empty());
        for (text, expected, live) in [
            ("trustDomain: mesh.example", "trustDomain", false),
            ("attestationPolicy: { uids: [1] }", "attestationPolicy", false),
            ("sockets: { shared: { path: /a/b.sock } }", "sockets.shared", false),
            ("sockets: { perPod: { enabled: true } }", "sockets.perPod", false),
            ("identity: { dnsNames: [a.example] }", "identity", true),
            ("certificate: { renewAt: 0.4 }", "certificate", true),
            ("certificate: { lifetime: 2h }", "certificate", true),
            ("authorityEpoch: 1", "authorityEpoch", true),
            ("reissueOver: 1m", "reissueOver", true),
            ("issuer: { certManager: { issuerRef: { name: other-ca, kind: ClusterIssuer } } }", "issuer", true),
            ("issuer: { certManager: { namespace: other, issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }", "issuer", true),
            ("profiles: [ { name: a, match: {} } ]", "profiles", true),
            ("trust: { sources: [ { file: /a.pem } ] }", "trust.sources", false),
            ("trust: { federated: { a.example: { file: /a.pem } } }", "trust.federated", false),
            ("names: { bundle: roots }", "names", false),
            ("keys: { lockMemory: never }", "keys", false),
            ("confinement: never", "confinement", false),
            ("limits: { idle: 2h }", "limits", false),
            ("kubernetes: { burst: 50 }", "kubernetes", false),
            // Agents do not use it, and the approver reloads its file itself.
            ("approver: { agents: ['system:serviceaccount:a:b'] }", "approver", true),
            ("events: false", "events", false),
            ("warmUp: { enabled: true }", "warmUp", false),
            ("retention: 1h", "retention", true),
            ("drain: 1s", "drain", false),
            ("admin: { address: '127.0.0.1:1' }", "admin", false),
            ("metrics: { address: '127.0.0.1:2' }", "metrics", false),
            ("probes: { address: '127.0.0.1:2' }", "probes", false),
            ("mountHelper: { metricsAddress: '127.0.0.1:2' }", "mountHelper", false),
            ("workerThreads: 3", "workerThreads", false),
        ] {
            let changed = parse(text);
            assert_ne!(changed, base, "{text}");
            let found: Vec<_> = differences(&base, &changed).into_iter().map(|field| (field.path, field.is_live)).collect();
            // The default templates contain placeholders, so a change of the trust domain does not change `identity`.
            assert_eq!(found, [(expected, live)], "{text}");
        }
        let of_profile = |text: &str| parse(&format!("profiles: [ {{ name: a, match: {{}}, {text} }} ]"));
        let other = of_profile("namespace: other");
        assert_eq!(differences(&of_profile("namespace: more"), &other).iter().map(|f| f.path).collect::<Vec<_>>(), ["profiles"]);
    }

    /// Without an entry in the table, a change of a new field would have no effect and would not be reported.
    #[test]
    fn no_field_is_left_out() {
        let Config {
            trust_domain: _,
            shared_socket: _,
            per_pod: _,
            attestation: _,
            attestation_policy: _,
            default_profile: _,
            profiles: _,
            issuers: _,
            trust_sources: _,
            federated: _,
            names: _,
            lock_memory: _,
            confinement: _,
            limits: _,
            kubernetes: _,
            approver: _,
            events: _,
            warm_up: _,
            reissue_over: _,
            retention: _,
            drain: _,
            admin: _,
            metrics: _,
            metrics_per_workload: _,
            probes: _,
            mount_helper: _,
            worker_threads: _,
            // The environment does not change while a process runs.
            node: _,
        } = parse("");
        let unix = parse("attestation: unix\nissuer: { embedded: {} }");
        let paths: Vec<_> = differences(&parse(""), &unix).iter().map(|field| field.path).collect();
        assert_eq!(paths, ["attestation", "identity", "issuer"]);
    }
}
