use agent_kube::{Metrics, fake::FakeApi};
use cert_manager::IssuerRef;
use serde_json::json;

use super::*;
use crate::cli::doctor::report::Outcome;

fn settings() -> Settings {
    Settings {
        issuer_ref: IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: GROUP.into() },
        namespace: RequestNamespace::Fixed("sds-agent".into()),
        trust_status_ca: false,
    }
}

fn cluster() -> FakeApi {
    let api = FakeApi::new();
    api.put("clusterissuers", json!({"metadata": {"name": "mesh-ca"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
    api.put("clusterissuers", json!({"metadata": {"name": "public"}, "spec": {"acme": {}}}));
    let labels = json!({"app.kubernetes.io/name": "cert-manager"});
    api.put(
        "deployments",
        json!({
            "metadata": {"namespace": "pki", "name": "cert-manager", "labels": labels},
            "spec": {"selector": {}, "template": {"spec": {"serviceAccountName": "controller", "containers": [
                {"name": "controller", "args": ["--v=2", "--cluster-resource-namespace=$(POD_NAMESPACE)"]},
            ]}}},
        }),
    );
    let variable = json!({"name": "maySign", "expression": "request.userInfo.username in [\"system:serviceaccount:pki:controller\"]"});
    api.put("validatingadmissionpolicies", json!({"metadata": {"name": POLICY}, "spec": {"variables": [variable]}}));
    api
}

async fn look_at(api: &FakeApi) -> Vec<Step> {
    look(&api.client(&Metrics::default()), &[&settings()]).await
}

fn step<'a>(steps: &'a [Step], name: &str) -> &'a Step {
    steps.iter().find(|step| step.name == name).unwrap_or_else(|| panic!("no {name}: {steps:?}"))
}

fn bind(api: &FakeApi, kind: &str, name: &str, rule: &Value, namespace: Option<&str>) {
    let mut binding = json!({
        "metadata": {"name": name}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
        "subjects": [{"kind": "User", "name": format!("user-of-{name}")}],
    });
    let mut role = json!({"metadata": {"name": name}, "rules": [rule]});
    if let Some(namespace) = namespace {
        binding["metadata"]["namespace"] = json!(namespace);
        if kind == "Role" {
            role["metadata"]["namespace"] = json!(namespace);
        }
    }
    api.put(if kind == "Role" { "roles" } else { "clusterroles" }, role);
    api.put(if namespace.is_some() { "rolebindings" } else { "clusterrolebindings" }, binding);
}

#[tokio::test(start_paused = true)]
async fn a_cluster_without_other_ways_shows_none() {
    let steps = look_at(&cluster()).await;
    let found: Vec<_> = steps.iter().map(|step| (step.name, step.result)).collect();
    let (ok, warning) = (Outcome::Ok, Outcome::Warning);
    assert_eq!(found, [("signer", ok), ("other issuers", ok), ("certificates", ok), ("signing requests", ok), ("secret", warning)]);
    assert!(step(&steps, "other issuers").detail.contains("Secret pki/mesh-ca; no other issuer uses it"), "{steps:?}");
}

#[tokio::test(start_paused = true)]
async fn other_issuers_with_the_same_key_are_named() {
    let api = cluster();
    api.put("clusterissuers", json!({"metadata": {"name": "second"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
    api.put("issuers", json!({"metadata": {"namespace": "pki", "name": "third"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
    // A Secret of this name in another namespace is another key.
    api.put("issuers", json!({"metadata": {"namespace": "shop", "name": "own"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
    let steps = look_at(&api).await;
    let step = step(&steps, "other issuers");
    assert_eq!((step.result, step.detail.ends_with("is also used by\nClusterIssuer second\nIssuer pki/third")), (Outcome::Warning, true));
}

#[tokio::test(start_paused = true)]
async fn issuers_of_one_mount_of_vault_share_its_key() {
    let api = cluster();
    let vault = |path: &str| json!({"vault": {"server": "https://vault:8200/", "path": path}});
    for (name, path) in [("mesh-ca", "pki/mesh/sign/mesh"), ("second", "pki/mesh/issue/other"), ("third", "pki/other/sign/mesh")] {
        api.put("clusterissuers", json!({"metadata": {"name": name}, "spec": vault(path)}));
    }
    let steps = look_at(&api).await;
    let detail = &step(&steps, "other issuers").detail;
    assert!(detail.ends_with("mount pki/mesh of Vault at https://vault:8200 is also used by\nClusterIssuer second"), "{detail}");
    assert!(steps.iter().all(|step| step.name != "secret"));
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_the_policy_does_not_name_fails() {
    let api = cluster();
    api.change("deployments", "pki", "cert-manager", |deployment| {
        deployment["spec"]["template"]["spec"]["serviceAccountName"] = json!("cm-cert-manager");
    });
    let steps = look_at(&api).await;
    let step = step(&steps, "signer");
    assert_eq!(step.result, Outcome::Failed);
    assert!(step.detail.contains("rejects certificates of system:serviceaccount:pki:cm-cert-manager"), "{}", step.detail);
}

#[tokio::test(start_paused = true)]
async fn flags_have_two_forms_and_a_file_is_not_taken_for_off() {
    for (arguments, is_known_off) in [
        (json!(["--feature-gates", format!("{CSR_GATE}=true")]), false),
        (json!(["--feature-gates", "X=true"]), true),
        (json!(["--config=/etc/cert-manager/config.yaml"]), false),
    ] {
        let api = cluster();
        api.change("deployments", "pki", "cert-manager", |deployment| {
            deployment["spec"]["template"]["spec"]["containers"][0]["args"] = arguments.clone();
        });
        let steps = look_at(&api).await;
        assert_eq!(step(&steps, "signing requests").result == Outcome::Ok, is_known_off, "{arguments}");
    }
}

#[tokio::test(start_paused = true)]
async fn certificates_and_signing_requests_are_named() {
    let api = cluster();
    let certificate = |name: &str, kind: &str, is_ca: bool| {
        let reference = json!({"name": "mesh-ca", "kind": kind});
        api.put("certificates", json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"issuerRef": reference, "isCA": is_ca}}));
    };
    certificate("intermediate", "ClusterIssuer", true);
    certificate("of-another", "Issuer", true);
    api.change("deployments", "pki", "cert-manager", |deployment| {
        deployment["spec"]["template"]["spec"]["containers"][0]["args"] = json!([format!("--feature-gates=X=false,{CSR_GATE}=true")]);
    });
    let approve = |names: Value| json!({"apiGroups": ["certificates.k8s.io"], "resources": ["signers"], "verbs": ["approve"], "resourceNames": names});
    bind(&api, "ClusterRole", "exact", &approve(json!(["clusterissuers.cert-manager.io/mesh-ca"])), None);
    bind(&api, "ClusterRole", "all-issuers", &approve(json!(["clusterissuers.cert-manager.io/*"])), None);
    bind(&api, "ClusterRole", "another", &approve(json!(["clusterissuers.cert-manager.io/public"])), None);
    let steps = look_at(&api).await;
    let detail = &step(&steps, "certificates").detail;
    assert!(detail.ends_with("named by\nCertificate shop/intermediate, a CA: its key signs names of the mesh too"), "{detail}");
    let detail = &step(&steps, "signing requests").detail;
    assert!(
        detail.ends_with("one:\nUser user-of-all-issuers by ClusterRole all-issuers\nUser user-of-exact by ClusterRole exact"),
        "{detail}"
    );
}

#[tokio::test(start_paused = true)]
async fn accounts_that_can_read_the_secret_are_named() {
    let api = cluster();
    let secrets = |names: Value, verb: &str| json!({"apiGroups": [""], "resources": ["secrets"], "verbs": [verb], "resourceNames": names});
    bind(&api, "ClusterRole", "everywhere", &secrets(json!([]), "list"), None);
    bind(&api, "ClusterRole", "wildcards", &json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}), None);
    bind(&api, "Role", "named", &secrets(json!(["mesh-ca"]), "get"), Some("pki"));
    bind(&api, "Role", "another-secret", &secrets(json!(["other"]), "get"), Some("pki"));
    bind(&api, "Role", "another-namespace", &secrets(json!(["mesh-ca"]), "get"), Some("shop"));
    bind(&api, "Role", "writer", &secrets(json!(["mesh-ca"]), "create"), Some("pki"));
    bind(&api, "ClusterRole", "editor", &json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}), Some("pki"));
    let steps = look_at(&api).await;
    let detail = &step(&steps, "secret").detail;
    let expected = "can obtain the key of ClusterIssuer mesh-ca\n\
                    User user-of-editor by ClusterRole editor, by a pod that mounts it\n\
                    User user-of-everywhere by ClusterRole everywhere\n\
                    User user-of-named by Role named\n\
                    User user-of-wildcards by ClusterRole wildcards";
    assert!(detail.ends_with(expected), "{detail}");
}

#[tokio::test(start_paused = true)]
async fn a_missing_access_is_unknown_and_a_missing_issuer_fails() {
    let api = FakeApi::new();
    assert_eq!(look_at(&api).await[0].result, Outcome::Failed);
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot list resource"});
    api.fail("list", "deployments", agent_kube::fake::Fault::Status(403, forbidden), 1);
    let steps = look_at(&api).await;
    assert_eq!((steps.len(), steps[0].result), (1, Outcome::Unknown), "{steps:?}");
}
