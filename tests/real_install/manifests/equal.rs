//! The chart and kustomize render the same objects; the chart's values change them.

use std::{collections::BTreeMap, fs, time::Duration};

use serde_json::{Value, json};
use test_harness::{
    child,
    manifests::{self, MODES, NAMESPACE, container, helm, named, rendered, rendered_with, try_helm, up_from},
    tools,
};

/// The objects by kind, namespace and name. The configuration is parsed, so that its notation does not matter.
fn by_name(objects: Vec<Value>) -> BTreeMap<String, Value> {
    let count = objects.len();
    let named = objects.into_iter().map(|mut object| {
        if object["kind"] == "ConfigMap" && object["data"]["config.yaml"].is_string() {
            object["data"]["config.yaml"] = configuration(&object);
        }
        let metadata = &object["metadata"];
        (format!("{} {}/{}", object["kind"], metadata["namespace"], metadata["name"]), object)
    });
    let named: BTreeMap<_, _> = named.collect();
    assert_eq!(named.len(), count, "an object is there twice");
    named
}

fn configuration(map: &Value) -> Value {
    serde_saphyr::from_str(map["data"]["config.yaml"].as_str().unwrap()).unwrap()
}

fn assert_same(helm: Vec<Value>, kustomize: Vec<Value>, what: &str) {
    let (helm, kustomize) = (by_name(helm), by_name(kustomize));
    assert_eq!(helm.keys().collect::<Vec<_>>(), kustomize.keys().collect::<Vec<_>>(), "{what}");
    for (name, object) in helm {
        assert_eq!(object, kustomize[&name], "{what}: {name}, by helm and by kustomize");
    }
}

#[tokio::test]
async fn helm_and_kustomize_give_the_same_objects() {
    for (folder, mode) in MODES {
        let objects = rendered(folder).await;
        println!("figure: {folder}: {} objects, the same by helm and by kustomize", objects.len());
        assert!(objects.len() > 15, "{folder}: {}", objects.len());
        assert_same(helm(NAMESPACE, &["--set", &format!("mode={mode}")]).await, objects, folder);
    }
    let monitored = rendered_with("shared", &["monitoring"]).await;
    assert_same(helm(NAMESPACE, &["--set", "monitoring.enabled=true"]).await, monitored, "with monitoring");
    let closed = rendered_with("shared", &["network-policy"]).await;
    assert_same(helm(NAMESPACE, &["--set", "networkPolicy.enabled=true"]).await, closed, "with a network policy");
    let workload = ["--set", "config.issuer.certManager.namespace=workload"];
    let mut objects = rendered_with("shared", &["workload-requests"]).await;
    let map = objects.iter_mut().find(|object| object["kind"] == "ConfigMap").unwrap();
    let mut config = configuration(map);
    config["issuer"]["certManager"]["namespace"] = json!("workload");
    map["data"]["config.yaml"] = json!(config.to_string());
    assert_same(helm(NAMESPACE, &workload).await, objects, "requests in the pods' namespaces");
    let sources = json!({
        "sources": [{"clusterTrustBundle": {"name": "a"}}],
        "federated": {"b.example": {"clusterTrustBundle": {"signerName": "b.example/c", "labelSelector": {"matchLabels": {"d": "e"}}}}},
    });
    for trust in [json!({"sources": sources["sources"]}), json!({"federated": sources["federated"]}), sources] {
        let mut objects = rendered_with("shared", &["cluster-trust-bundles"]).await;
        let map = objects.iter_mut().find(|object| object["kind"] == "ConfigMap").unwrap();
        let mut config = configuration(map);
        trust.as_object().unwrap().iter().for_each(|(key, value)| config["trust"][key] = value.clone());
        map["data"]["config.yaml"] = json!(config.to_string());
        let values = format!("config.trust={trust}");
        assert_same(helm(NAMESPACE, &["--set-json", &values]).await, objects, "ClusterTrustBundles");
    }
}

#[tokio::test]
async fn the_chart_without_an_approver_is_the_same_without_its_objects() {
    let names = |files: &[&str]| {
        let of = |file: &&str| by_name(manifests::documents(&manifests::read(&format!("approver/{file}.yaml")))).into_keys();
        files.iter().flat_map(of).collect::<Vec<_>>()
    };
    let without = async |own: &[String]| {
        let mut objects = rendered("shared").await;
        objects.retain(|object| !by_name(vec![object.clone()]).keys().all(|name| own.contains(name)));
        objects
    };
    // Then cert-manager's own approver decides, and the policy allows it.
    let mut made = helm(NAMESPACE, &["--set", "approver.enabled=false"]).await;
    assert_eq!(approvals(&mut made), ["system:serviceaccount:cert-manager:cert-manager"]);
    assert_same(made, without(&names(&["namespace", "rbac", "deployment"])).await, "without approver");
    // The values can name another approver.
    let named = r#"policy.approvers=["system:serviceaccount:approvers:policy","jane"]"#;
    let mut made = helm(NAMESPACE, &["--set", "approver.enabled=false", "--set-json", named]).await;
    assert_eq!(approvals(&mut made), ["system:serviceaccount:approvers:policy", "jane"]);
    let mut made = helm(NAMESPACE, &["--set-json", named]).await;
    assert_eq!(approvals(&mut made), ["system:serviceaccount:approvers:policy", "jane"]);
    assert_same(made, rendered("shared").await, "with more approvers");

    // Without the policies, the approver gets no right to delete, which only they limit.
    let mut expected = without(&names(&["policy"])).await;
    let role = expected.iter_mut().find(|object| object["kind"] == "ClusterRole" && object["metadata"]["name"] == "sds-agent-approver");
    for rule in role.unwrap()["rules"].as_array_mut().unwrap() {
        rule["verbs"].as_array_mut().unwrap().retain(|verb| verb != "delete" && verb != "remove");
    }
    assert_same(helm(NAMESPACE, &["--set", "policy.enabled=false"]).await, expected, "without policies");
}

/// The names of the accounts that can approve besides the approver. Removes the objects that grant this.
fn approvals(objects: &mut Vec<Value>) -> Vec<String> {
    let binding = named(objects, "ClusterRoleBinding", "sds-agent-approvals");
    let users = binding["subjects"].as_array().unwrap().iter();
    let users = users.inspect(|user| assert_eq!(user["kind"], "User")).map(|user| user["name"].as_str().unwrap().to_owned()).collect();
    let role = named(objects, "ClusterRole", "sds-agent-approvals");
    assert_eq!(role["rules"], json!([{"apiGroups": ["sds-agent.io"], "resources": ["guardedissuers"], "verbs": ["approve"]}]));
    objects.retain(|object| object["metadata"]["name"] != "sds-agent-approvals");
    users
}

/// The test fails if `derive.py` was not run after a change.
#[tokio::test]
async fn the_chart_is_as_derived_and_says_the_same_version_everywhere() {
    let script = manifests::folder().join("derive.py");
    let python = tools::system("python3", "python3");
    child::succeed(&python, &[script.to_str().unwrap(), "--check"], Duration::from_secs(30)).await;
    let chart: Value = serde_saphyr::from_str(&manifests::read("chart/Chart.yaml")).unwrap();
    for key in ["version", "appVersion"] {
        assert_eq!(chart[key], env!("CARGO_PKG_VERSION"), "{key} of Chart.yaml");
    }
    for (folder, _) in MODES {
        for object in rendered(folder).await {
            for container in object["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten() {
                assert_eq!(container["image"], concat!("sds-agent:", env!("CARGO_PKG_VERSION")), "{folder}");
            }
        }
    }
}

#[tokio::test]
async fn modes_differ_in_sockets_and_privileges_alone() {
    let mut configurations = Vec::new();
    for (folder, _) in MODES {
        let objects = rendered(folder).await;
        let mut config = configuration(named(&objects, "ConfigMap", "sds-agent"));
        config.as_object_mut().unwrap().remove("sockets");
        configurations.push(config);
        let pod = &named(&objects, "DaemonSet", "sds-agent")["spec"]["template"]["spec"];
        assert_eq!(pod["hostPID"] == true, folder != "per-pod", "{folder}");
        let context = json!({
            "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
        });
        assert_eq!(container(pod, "sds-agent")["securityContext"], context, "{folder}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{folder}");
        let containers = pod["containers"].as_array().unwrap();
        let helpers: Vec<_> = containers.iter().filter(|other| other["name"] != "sds-agent").collect();
        assert_eq!(helpers.len(), usize::from(folder != "shared"), "{folder}");
        for helper in helpers {
            assert_eq!(helper["securityContext"], json!({"privileged": true, "readOnlyRootFilesystem": true}), "{folder}");
            // The token and the keys are with the agent alone, and the kubelet's directory with the helper alone.
            let mounted = |container: &Value, path: &str| container["volumeMounts"].to_string().contains(path);
            for (container, has_token) in [(helper, false), (container(pod, "sds-agent"), true)] {
                assert_eq!(mounted(container, "/var/run/secrets"), has_token, "{folder}");
                assert_eq!(mounted(container, "/var/lib/kubelet"), !has_token, "{folder}");
            }
        }
        assert!(pod["hostNetwork"].is_null(), "{folder}");
        assert!(containers.iter().all(|container| container["resources"]["limits"]["cpu"].is_null()), "{folder}");
        assert_eq!(objects.iter().any(|object| object["kind"] == "CSIDriver"), folder != "shared", "{folder}");
    }
    assert_eq!(configurations[0], configurations[1]);
    assert_eq!(configurations[0], configurations[2]);
}

/// The speed of a rollout is a value; the strategy that a mode requires is fixed.
#[tokio::test]
async fn the_speed_of_a_rollout_is_a_value() {
    let strategy = async |mode: &str, more: &[&str]| {
        let objects = helm(NAMESPACE, &[&["--set", mode], more].concat()).await;
        named(&objects, "DaemonSet", "sds-agent")["spec"]["updateStrategy"].clone()
    };
    for (mode, key, other) in
        [("shared", "maxSurge", "maxUnavailable"), ("perPod", "maxUnavailable", "maxSurge"), ("both", "maxUnavailable", "maxSurge")]
    {
        let mode = format!("mode={mode}");
        let limits = |nodes: Value| json!({"type": "RollingUpdate", "rollingUpdate": {key: nodes, other: 0}});
        assert_eq!(strategy(&mode, &[]).await, limits(json!(1)), "{mode}");
        assert_eq!(strategy(&mode, &["--set", "updateStrategy.nodesAtOnce=10%"]).await, limits(json!("10%")), "{mode}");
        assert_eq!(strategy(&mode, &["--set", "updateStrategy.nodesAtOnce=25"]).await, limits(json!(25)), "{mode}");
        assert_eq!(strategy(&mode, &["--set", "updateStrategy.type=OnDelete"]).await, json!({"type": "OnDelete"}), "{mode}");
    }
}

/// An overlay that changes the list of guarded issuers, with the block from daemonset/README.md, equals the chart with the same list.
#[tokio::test]
async fn the_guarded_issuers_stand_in_the_policies() {
    let list = "ClusterIssuer/mesh-ca\nIssuer/authority/own-ca\n";
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let component: Value = serde_saphyr::from_str(&manifests::read("approver/kustomization.yaml")).unwrap();
    let patch = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "sds-agent", "namespace": NAMESPACE}, "data": {"issuers": list}});
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [format!("{}/daemonset/shared", up_from(folder.path()))],
        "patches": [{"patch": patch.to_string()}], "replacements": component["replacements"],
    });
    fs::write(folder.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    let overlay = manifests::kustomize(folder.path()).await;
    let profile = r#"config.profiles=[{"name":"own","match":{"namespaces":["own"]},"namespace":"authority","issuerRef":{"name":"own-ca","kind":"Issuer"}}]"#;
    let chart = helm(NAMESPACE, &["--set-json", profile]).await;
    for objects in [&overlay, &chart] {
        assert_eq!(named(objects, "ConfigMap", "sds-agent")["data"]["issuers"], list);
    }
    for policy in ["sds-agent-requests", "sds-agent-limits"] {
        let [overlay, chart] = [&overlay, &chart].map(|objects| named(objects, "ValidatingAdmissionPolicy", policy)["spec"].clone());
        assert!(
            overlay.to_string().contains(&serde_json::to_string(&format!("\"\"\"{list}\"\"\"")).unwrap().trim_matches('"').to_owned()),
            "{overlay}"
        );
        assert_eq!(overlay, chart, "{policy}");
    }
}

/// A single value sets every place that depends on it, and the program accepts the configuration.
#[tokio::test]
async fn values_reach_all_that_has_to_know_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let values = json!({
        "mode": "both", "maxDuration": "48h", "issuer": {"name": "fleet", "kind": "Issuer"}, "seLinuxOptions": {"type": "spc_t"},
        "image": {"repository": "registry.example/sds-agent", "tag": "1"}, "imagePullSecrets": [{"name": "pull"}],
        "trust": {"configMap": {"namespace": "roots", "name": "fleet", "key": "bundle.pem"}},
        "config": {
            "certificate": {"lifetime": "48h"},
            "profiles": [
                {"name": "pay", "match": {"namespaces": ["pay"]}, "issuerRef": {"name": "pay-ca", "kind": "ClusterIssuer"}},
                {"name": "own", "match": {"namespaces": ["own"]}, "namespace": "authority", "issuerRef": {"name": "own-ca", "kind": "Issuer"}},
            ],
        },
    });
    let file = dir.path().join("values.yaml");
    fs::write(&file, values.to_string()).unwrap();
    let objects = helm("mesh", &["--values", file.to_str().unwrap()]).await;

    let text: Vec<_> = objects.iter().map(Value::to_string).collect();
    assert!(!text.iter().any(|text| text.contains("\"namespace\":\"sds-agent\"")), "the release's namespace is another one");
    assert!(!text.iter().any(|text| text.contains("sds-agent/sds-agent")), "the notes name the namespace of the release");
    let map = named(&objects, "ConfigMap", "sds-agent");
    assert_eq!(map["data"]["agentUsernames"], "system:serviceaccount:mesh:sds-agent\n");
    assert_eq!(map["data"]["issuers"], "Issuer/mesh/fleet\nClusterIssuer/pay-ca\nIssuer/authority/own-ca\n");
    assert_eq!(map["data"]["maxDuration"], "48h");
    let signers = named(&objects, "ClusterRole", "sds-agent-approver")["rules"].as_array().unwrap().iter();
    let mut signers = signers.filter(|rule| rule["resources"][0] == "signers");
    let expected =
        json!(["issuers.cert-manager.io/mesh.fleet", "clusterissuers.cert-manager.io/pay-ca", "issuers.cert-manager.io/authority.own-ca"]);
    assert_eq!(signers.next().unwrap()["resourceNames"], expected);
    let roots = named(&objects, "Role", "sds-agent-roots");
    assert_eq!((&roots["metadata"]["namespace"], &roots["rules"][0]["resourceNames"]), (&json!("roots"), &json!(["fleet"])));
    let agent = &named(&objects, "DaemonSet", "sds-agent")["spec"]["template"]["spec"];
    assert_eq!(agent["securityContext"]["seLinuxOptions"]["type"], "spc_t");
    assert_eq!(
        (&agent["containers"][0]["image"], &agent["imagePullSecrets"][0]["name"]),
        (&json!("registry.example/sds-agent:1"), &json!("pull"))
    );

    // The program checks the configuration, as agent and as approver.
    let config = dir.path().join("config.yaml");
    fs::write(&config, map["data"]["config.yaml"].as_str().unwrap()).unwrap();
    let env = |name: &str| matches!(name, "NODE_NAME" | "POD_NAMESPACE" | "POD_NAME" | "POD_UID").then(|| "mesh".to_owned());
    let loaded = sds_agent::config::Config::load(&config, &env).unwrap();
    assert_eq!(loaded.warnings, []);
    let rules = sds_agent::app::approver::settings::rules(&loaded.config).unwrap();
    assert_eq!(rules.agents.iter().collect::<Vec<_>>(), ["system:serviceaccount:mesh:sds-agent"]);
    assert_eq!(rules.issuers.len(), 3);
}

#[tokio::test]
async fn values_that_nobody_knows_are_refused_by_name() {
    for (set, said) in [
        ("mod=shared", "mod"),
        ("mode=csi", "mode"),
        ("config.certficate.lifetime=1h", "certficate"),
        ("config.certificate.lifetme=1h", "lifetme"),
        ("config.certificate.renewAt=2", "renewAt"),
        ("config.limits.connections=many", "connections"),
        ("config.attestation=unix", "attestation"),
        ("approver.replicas=0", "replicas"),
        ("updateStrategy.nodesAtOnce=0", "nodesAtOnce"),
        ("updateStrategy.nodesAtOnce=0%", "nodesAtOnce"),
        ("policy.approver=jane", "approver"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("networkPolicy.metricsFrom[0].namespace=monitoring", "namespace"),
        ("issuer.group=example.com", "approver.signers"),
    ] {
        let output = try_helm(NAMESPACE, &["--set", set]).await;
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && words.contains(said), "{set}: {words}");
    }
    let (signers, accounts) =
        (r#"approver.signers=["clusterissuers.example.com/mesh-ca"]"#, r#"policy.signers=["system:serviceaccount:a:b"]"#);
    let external = ["--set", "issuer.group=example.com", "--set-json", signers, "--set-json", accounts];
    let objects = helm(NAMESPACE, &external).await;
    assert_eq!(named(&objects, "ConfigMap", "sds-agent")["data"]["issuers"], "ClusterIssuer.example.com/mesh-ca\n");
}
