//! Identification of callers: processes in real cgroups, and their attempts to get another identity.

use std::{path::Path, time::Duration};

use test_harness::{cgroups::PodCgroup, child, eventually};
use tokio::process::Command;

use self::scene::{LONG, Scene, WHILE, again, caller};

mod agent;
mod impostor;
mod policy;
mod reuse;
mod scene;

const METHODS: [&str; 3] = ["StreamSecrets", "DeltaSecrets", "FetchSecrets"];
/// Streams end at once; the limit is for a busy machine.
const PROMPT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_pod_never_gets_anothers_secret_by_any_name_or_call() {
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 1h }").await;
    let (a, b) = (scene.a.pod.spiffe_id(), scene.b.pod.spiffe_id());
    assert!(a != b && a.ends_with("/sa/a"));
    // Names that could be mistaken for B's: none of them gives B's secret.
    let (upper, slash, dot) = (b.to_uppercase(), format!("{b}/"), b.replace("/sa/", "/sa/./"));
    let (domain, bare) = (b.replace("cluster.local", "CLUSTER.LOCAL"), b.trim_start_matches("spiffe://").to_owned());
    let up = format!("{a}/../b");
    let names = [&*b, &*upper, &*slash, &*dot, &*domain, &*bare, &*up, "b", "*", "ALL", "", "ROOTCA"];
    for method in METHODS {
        let own = scene.ask(&scene.a.cgroup, method, WHILE, &["default"]).await;
        assert!(own.has_key && own.ids == [&*a], "{method}: {own:?}");
        let others = scene.ask(&scene.a.cgroup, method, WHILE, &names).await;
        assert!(others.messages > 0, "{method}: the roots at least");
        assert!(others.ids.iter().all(|id| *id == a), "{method}: {others:?}");
        let only = scene.ask(&scene.a.cgroup, method, WHILE, &[&b]).await;
        assert!(only.ids.is_empty() && !only.has_key, "{method}: {only:?}");
        // The name is valid: B itself gets its secret by it.
        let by_b = scene.ask(&scene.b.cgroup, method, WHILE, &[&b]).await;
        assert!(by_b.has_key && by_b.ids == [&*b], "{method}: {by_b:?}");
    }
}

#[tokio::test]
async fn a_process_outside_of_any_pod_is_refused() {
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 1h }").await;
    for (count, method) in (1..).zip(METHODS) {
        let answer = scene.ask_by(Command::new(caller()), method, LONG, &["default", "ROOTCA", "ALL"]).await;
        assert!(answer.is_refusal(), "{method}: {answer:?}");
        assert_eq!(scene.refused("not_in_pod").await, f64::from(count));
    }
    let arguments = ["fetch", "--socket", scene.agent.socket().to_str().unwrap()];
    let output = child::run(test_harness::agent::program(), &arguments, scene::PATIENCE).await;
    assert_eq!(output.status.code(), Some(77), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn streams_and_keys_go_with_the_pod_and_not_while_it_drains() {
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 10s }\nretention: 1h").await;
    let a = scene.a.pod.spiffe_id();
    let stream = scene.stream(&scene.a.cgroup, "watch", &["default"]);
    let sibling = scene.stream(&scene.b.cgroup, "watch", &["default"]);
    sibling.messages(1).await;
    let seen = stream.messages(1).await;

    // A pod that drains after a deletion still gets renewals.
    scene.cluster.delete(&scene.a.path()).await;
    let pod = scene.cluster.get(&scene.a.path()).await;
    assert!(pod["metadata"]["deletionTimestamp"].is_string(), "{}", pod["metadata"]);
    let later = stream.messages(seen.messages + 2).await;
    assert!(later.ids.iter().all(|id| *id == a));

    scene.cluster.delete_now(&scene.a.path()).await;
    let last = tokio::time::timeout(PROMPT, stream.closed()).await.expect("the stream ends with its pod");
    assert!(last.ended);
    eventually("its key is deleted, an hour before the retention's end", PROMPT, async || {
        scene.agent.certificate(&a).await.map_or(Ok(()), |held| Err(held.to_string()))
    })
    .await;
    assert!(sibling.is_open() && scene.agent.certificate(&scene.b.pod.spiffe_id()).await.is_some());

    // Containers can outlive their pod, and another pod with the same name is another pod.
    let outlived = scene.ask(&scene.a.cgroup, "FetchSecrets", LONG, &["default"]).await;
    assert!(outlived.is_refusal(), "{outlived:?}");
    let second = again(&scene.cluster, &scene.a.pod.namespace, "a", &scene.node).await;
    let renewed = scene.ask(&second.cgroup, "FetchSecrets", LONG, &["default"]).await;
    assert!(renewed.has_key && renewed.ids == [&*a]);
    let outlived = scene.ask(&scene.a.cgroup, "FetchSecrets", LONG, &["default"]).await;
    assert!(outlived.is_refusal(), "{outlived:?}");

    // A pod in a terminal phase has ended too, although its object still exists.
    scene.cluster.patch(&format!("{}/status", scene.b.path()), &serde_json::json!({"status": {"phase": "Succeeded"}})).await;
    tokio::time::timeout(PROMPT, sibling.closed()).await.expect("its pod has ended");
}

#[tokio::test]
async fn a_connection_kept_by_a_child_closes_when_the_parent_exits() {
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 10s }").await;
    let handed_over = scene.stream(&scene.a.cgroup, "hand-over", &["default"]);
    let parents = handed_over.messages(1).await;
    let child = tokio::time::timeout(PROMPT, handed_over.closed()).await.expect("the process that connected has ended");
    assert!(parents.has_key && child.ended);
    assert_eq!(child.messages, parents.messages, "the child has received further messages");
    // A stream whose process still runs gets renewals, so the child would have received one.
    let kept = scene.stream(&scene.a.cgroup, "watch", &["default"]);
    kept.messages(3).await;
    kept.kill();
}

#[tokio::test]
async fn a_child_that_keeps_the_connection_loses_it_with_the_pod() {
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 1h }").await;
    // The shell stays as the parent, and only its child process has the connection.
    let mut command = scene.a.cgroup.command(Path::new("sh"));
    let words = "\"$0\" watch \"$1\" default & wait";
    let child = child::Child::spawn("a shell", command.arg("-c").arg(words).arg(caller()).arg(scene.agent.socket()));
    let message = |lines: &[String]| lines.iter().any(|line| line.starts_with("message ")).then_some(());
    child.stdout().until("a secret", scene::PATIENCE, message).await;
    scene.cluster.delete_now(&scene.a.path()).await;
    let closed = |lines: &[String]| lines.iter().any(|line| line == "closed").then_some(());
    child.stdout().until("the end of the stream", PROMPT, closed).await;
}

#[tokio::test]
async fn a_victims_path_below_ones_own_cgroup_gains_nothing() {
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 1h }").await;
    nothing_is_gained(&scene).await;
}

/// Cgroups that a container with a writable cgroup file system can create, and the results.
async fn nothing_is_gained(scene: &Scene) {
    let (a, b) = (&scene.a, &scene.b);
    let victims = format!("kubepods/burstable/pod{}/{}", b.pod.uid, test_harness::cgroups::container_id(&b.pod.uid, 0));
    let systemd = format!(
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-containerd-{}.scope",
        b.pod.uid.replace('-', "_"),
        test_harness::cgroups::container_id(&b.pod.uid, 0)
    );
    for path in [&victims, &systemd] {
        let nested = a.cgroup.below(path);
        let answer = scene.ask(&nested, "FetchSecrets", LONG, &["default"]).await;
        assert!(answer.ids == [a.pod.spiffe_id()], "{path}: {answer:?}");
    }
    let refused = scene.refused("not_in_pod").await;
    let outside = PodCgroup::at(&format!("sds-test-elsewhere/kubepods/pod{}/x", b.pod.uid));
    let answer = scene.ask(&outside, "FetchSecrets", LONG, &["default"]).await;
    assert!(answer.is_refusal(), "{answer:?}");
    assert_eq!(scene.refused("not_in_pod").await, refused + 1.0);

    // In a hierarchy that gives a container write access to its root, the container can create any path; the other hierarchies still name
    // its pod.
    if a.cgroup.hierarchies() > 1 {
        let mixed = a.cgroup.command_mixed_with(&b.cgroup, caller());
        let answer = scene.ask_by(mixed, "FetchSecrets", LONG, &["default"]).await;
        assert!(answer.is_refusal(), "{answer:?}");
        assert_eq!(scene.refused("conflicting_cgroups").await, 1.0);
    }
    // The victim's path is valid: the victim itself gets its certificate by it.
    let answer = scene.ask(&b.cgroup, "FetchSecrets", LONG, &["default"]).await;
    assert!(answer.ids == [b.pod.spiffe_id()], "{answer:?}");
}
