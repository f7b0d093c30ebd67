//! The attack by a recycled pid, in a PID namespace that the agent shares with attacker and victim. A server that trusts pids is deceived
//! at every attempt, which shows that the attack works.

use std::path::Path;

use test_harness::{cgroups::PodCgroup, child::Child, tools};
use tokio::process::Command;

use super::scene::{LONG, Scene, caller};

const TRIES: usize = 1000;
/// Number of attempts that may miss the victim, because the agent's own threads take pids too.
const MISSED: usize = 10;
/// Limit for a thousand processes, one after the other.
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
    // With a quota, the agent would reject most of the attempts before attestation.
    let unlimited = "certificate: { lifetime: 1h }\nlimits: { newConnectionsPerSecondPerPod: 1000000, newConnectionsBurstPerPod: 1000000 }";
    let scene = Scene::launched(unlimited, |_, launch| {
        // The first process of the namespace reaps orphans.
        launch.under(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", "\"$0\" \"$@\" & wait"])
    })
    .await;
    // Both certificates exist, so a caller that is taken for the victim is answered at once.
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
        assert!(outcome.recycled >= TRIES / 5 - MISSED && outcome.fooled >= outcome.recycled, "the attack does not work: {outcome:?}");
    }

    for server in ["-", "run"] {
        let before = ended(&scene).await;
        let outcome = attack(&scene, scene.agent.socket(), server, TRIES).await;
        eprintln!("figure: pid reuse against the agent ({server}): {outcome:?} of {TRIES}");
        assert!(outcome.recycled >= TRIES - MISSED, "the attack does not work: {outcome:?}");
        assert_eq!((outcome.fooled, outcome.messages), (0, 0), "{outcome:?}");
        let refused = ended(&scene).await - before;
        assert!(refused >= outcome.recycled as f64, "{refused} were rejected as ended, of {outcome:?}");
    }
    let now = scene.agent.metric_of("sds_agent_attestations_total", &["result=\"ok\""]).await;
    assert_eq!(ok, now, "a caller got another identity");
}

/// The attempts that were rejected because the process had ended, before or during attestation.
async fn ended(scene: &Scene) -> f64 {
    scene.refused("process_gone").await + scene.agent.metric_of("sds_agent_connections_rejected_total", &["reason=\"caller_ended\""]).await
}

/// Runs the attack of pod A on pod B.
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

/// A caller in `cgroup` and in the PID namespace of the agent.
fn inside(scene: &Scene, cgroup: &PodCgroup) -> Command {
    let namespaces = format!("/proc/{}/ns", scene.agent.process().pid());
    let mut command = Command::new(tools::system("nsenter", "util-linux"));
    command.arg(format!("--pid={namespaces}/pid_for_children")).arg(format!("--mount={namespaces}/mnt"));
    let inner = cgroup.command(caller());
    command.arg(inner.as_std().get_program()).args(inner.as_std().get_args());
    command
}
