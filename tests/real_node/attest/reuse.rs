//! The attack on a pid, in a PID namespace that the agent shares with attacker and victim. Beside it, a server that trusts pids falls for
//! every try: so the attack is one.

use std::path::Path;

use test_harness::{cgroups::PodCgroup, child::Child, tools};
use tokio::process::Command;

use super::scene::{LONG, Scene, caller};

const TRIES: usize = 1000;
/// Of these, how many may miss the victim: the agent's own threads take pids, too.
const MISSED: usize = 10;
/// A thousand processes, each in its turn.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(300);

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    recycled: usize,
    fooled: usize,
    messages: usize,
}

#[tokio::test]
async fn a_recycled_pid_is_never_taken_for_its_owner() {
    let _turn = test_harness::turn().await;
    // A quota would turn most of the attack away before anybody is asked who it is.
    let unlimited = "certificate: { lifetime: 1h }\nlimits: { newConnectionsPerSecondPerPod: 1000000, newConnectionsBurstPerPod: 1000000 }";
    let scene = Scene::launched(unlimited, |_, launch| {
        // Its first process reaps what others leave behind.
        launch.under(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", "\"$0\" \"$@\" & wait"])
    })
    .await;
    // Both certificates are there: whoever is taken for the victim is answered at once.
    for member in [&scene.a, &scene.b] {
        let answer = scene.ask_by(inside(&scene, &member.cgroup), "FetchSecrets", LONG, &["default"]).await;
        assert!(answer.has_key && answer.ids == [member.pod.spiffe_id()], "{answer:?}");
    }
    let ok = scene.agent.metric_of("sds_agent_attestations_total", &["result=\"ok\""]).await;

    let path = scene.dir.path().join("naive.sock");
    let mut command = inside(&scene, &scene.a.cgroup);
    let naive = Child::spawn("a naive server", command.arg("naive").arg(&path));
    naive.stdout().until("the naive server", LIMIT, |lines| (!lines.is_empty()).then_some(())).await;
    for server in ["-", "naive"] {
        let outcome = attack(&scene, &path, server, TRIES / 5).await;
        eprintln!("figure: pid reuse against a naive server ({server}): {outcome:?} of {}", TRIES / 5);
        assert!(outcome.recycled >= TRIES / 5 - MISSED && outcome.fooled >= outcome.recycled, "the attack is none: {outcome:?}");
    }

    for server in ["-", "run"] {
        let before = scene.refused("process_gone").await;
        let outcome = attack(&scene, scene.agent.socket(), server, TRIES).await;
        eprintln!("figure: pid reuse against the agent ({server}): {outcome:?} of {TRIES}");
        assert!(outcome.recycled >= TRIES - MISSED, "the attack is none: {outcome:?}");
        assert_eq!((outcome.fooled, outcome.messages), (0, 0), "{outcome:?}");
        let refused = scene.refused("process_gone").await - before;
        assert!(refused >= outcome.recycled as f64, "{refused} were refused as gone of {outcome:?}");
    }
    let now = scene.agent.metric_of("sds_agent_attestations_total", &["result=\"ok\""]).await;
    assert_eq!(ok, now, "nobody was taken for anybody");
}

/// The attack from pod A on pod B.
async fn attack(scene: &Scene, socket: &Path, server: &str, tries: usize) -> Outcome {
    let breeder = scene.b.cgroup.command(caller());
    let breeder = breeder.as_std();
    let mut command = inside(scene, &scene.a.cgroup);
    command.arg("reuse").arg(socket).arg(server).arg(tries.to_string()).arg(&scene.b.pod.uid);
    command.arg(breeder.get_program()).args(breeder.get_args()).arg("breed");
    let mut child = Child::spawn("the attack", &mut command);
    let status = child.exit(LIMIT).await;
    assert!(status.success(), "{status}");
    let text = child.stdout().text();
    let last = text.lines().last().unwrap_or_default();
    let number = |name: &str| last.split_once(&format!("{name} ")).and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let [recycled, fooled, messages] = ["recycled", "fooled", "messages"].map(|name| number(name).unwrap_or_else(|| panic!("{text}")));
    Outcome { recycled, fooled, messages }
}

/// A caller in `cgroup` and in the agent's PID namespace.
fn inside(scene: &Scene, cgroup: &PodCgroup) -> Command {
    let namespaces = format!("/proc/{}/ns", scene.agent.process().pid());
    let mut command = Command::new(tools::system("nsenter", "util-linux"));
    command.arg(format!("--pid={namespaces}/pid_for_children")).arg(format!("--mount={namespaces}/mnt"));
    let inner = cgroup.command(caller());
    command.arg(inner.as_std().get_program()).args(inner.as_std().get_args());
    command
}
