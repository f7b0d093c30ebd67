//! The containers and users of a pod that can fetch.

use serde_json::json;
use test_harness::{
    cgroups::{PodCgroup, container_id},
    tools,
};
use tokio::process::Command;

use super::scene::{LONG, Scene, caller};

/// A user ID that no process of the tests has.
const USER: u32 = 31_337;

#[tokio::test]
async fn only_the_named_containers_and_the_given_users_fetch() {
    let _turn = test_harness::turn().await;
    let policy = format!("certificate: {{ lifetime: 1h }}\nattestationPolicy: {{ containers: [proxy, debugger], uids: [{USER}] }}");
    let scene = Scene::start(&policy).await;
    let uid = &scene.a.pod.uid;
    let cgroups = [0, 1, 2].map(|index| PodCgroup::container(uid, &container_id(uid, index)));
    let [main, proxy, debugger] = &cgroups;

    // The kubelet reports the containers while the caller waits.
    let (proxys, told) = tokio::join!(scene.ask_by(as_user(proxy, USER), "FetchSecrets", LONG, &["default"]), async {
        let status = |name: &str, index| {
            json!({
                "name": name, "image": "none", "imageID": "none", "ready": true, "restartCount": 0, "state": {"running": {}},
                "containerID": format!("containerd://{}", container_id(uid, index)),
            })
        };
        let ephemeral = json!({"spec": {"ephemeralContainers": [{"name": "debugger", "image": "none"}]}});
        scene.cluster.patch(&format!("{}/ephemeralcontainers", scene.a.path()), &ephemeral).await;
        let told = json!({"status": {
            "containerStatuses": [status("main", 0), status("proxy", 1)],
            "ephemeralContainerStatuses": [status("debugger", 2)],
        }});
        scene.cluster.patch(&format!("{}/status", scene.a.path()), &told).await
    });
    assert_eq!(told["status"]["containerStatuses"][1]["name"], "proxy", "{told}");
    assert!(proxys.ids == [scene.a.pod.spiffe_id()], "{proxys:?}");
    let debuggers = scene.ask_by(as_user(debugger, USER), "FetchSecrets", LONG, &["default"]).await;
    assert!(debuggers.ids == [scene.a.pod.spiffe_id()], "{debuggers:?}");

    for (command, reason) in [
        (as_user(main, USER), "container_not_allowed"),
        // A cgroup that a container creates below its own is not another container.
        (as_user(&main.below(&container_id(uid, 1)), USER), "container_not_allowed"),
        (as_user(proxy, USER + 1), "uid_not_allowed"),
        (proxy.command(caller()), "uid_not_allowed"),
    ] {
        let before = scene.refused(reason).await;
        let answer = scene.ask_by(command, "FetchSecrets", LONG, &["default"]).await;
        assert!(answer.is_refusal(), "{reason}: {answer:?}");
        assert_eq!(scene.refused(reason).await, before + 1.0, "{reason}");
    }
}

fn as_user(cgroup: &PodCgroup, user: u32) -> Command {
    let mut command = cgroup.command(&tools::setpriv());
    command.args(["--reuid", &user.to_string(), "--clear-groups"]).arg(caller());
    command
}
