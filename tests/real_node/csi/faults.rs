//! Agents and mount helpers that are killed within a publish or unpublish call, at each of their steps.
//!
//! A step is a system call. `strace` kills the process when it makes the call for the n-th time, for every n that occurs. The tracer is a
//! grandchild (`-D`): the process that is started is the program itself.

use std::{collections::BTreeMap, time::Duration};

use test_harness::{agent::Agent, cluster::Pod, eventually, tools};

use super::{Node, PATIENCE, certificate};

/// The system calls that make and remove directories, mounts and sockets.
const OF_HELPER: [&str; 7] = ["mkdirat", "fchmod", "connect", "open_tree", "move_mount", "umount2", "unlinkat"];
const OF_AGENT: [&str; 4] = ["bind", "listen", "renameat2,rename,renameat", "unlinkat,unlink"];
/// More than any of these calls occur.
const MOST: usize = 40;
/// Time until the end of a killed process is visible.
const SOON: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(20);

/// The words before a program that is killed at the `n`-th of these system calls.
fn killed_at(calls: &str, n: usize) -> Vec<String> {
    let strace = tools::system("strace", "strace").display().to_string();
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:signal=KILL:when={n}"));
    vec![strace, "-D".into(), "-f".into(), "-qqq".into(), "-o".into(), "/dev/null".into(), "-e".into(), trace, "-e".into(), inject]
}

impl Node {
    /// Publishes and unpublishes as soon as `process` serves; both may fail. Returns whether the process has ended.
    async fn is_killed(&self, pod: &Pod, process: &mut Agent) -> bool {
        while !process.process().output().contains("serving metrics and probes") {
            if process.has_ended() {
                return true;
            }
            tokio::time::sleep(LOOK).await;
        }
        let _ = self.kubelet.call_publish(self.kubelet.request(pod, "sds", &[])).await;
        let _ = self.kubelet.unpublish_quietly(&pod.uid, "sds").await;
        tokio::time::sleep(SOON).await;
        process.has_ended()
    }

    /// A volume can be published, its socket is served, and it can be unpublished without a trace.
    async fn assert_whole(&self, pod: &Pod) {
        let target = self.kubelet.publish(pod, "sds").await;
        self.assert_served(pod, &target).await;
        self.kubelet.unpublish(&pod.uid, "sds").await;
        eventually("no server listens", PATIENCE, async || if self.listening() == 0 { Ok(()) } else { Err("one does".into()) }).await;
        self.assert_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_helper_that_is_killed_at_any_step_leaves_nothing_half_made() {
    let node = Node::new(&certificate("1h")).await;
    let _agent = node.start().await;
    let pod = node.pod("cart").await;
    let mut killed = BTreeMap::new();
    for call in OF_HELPER {
        for n in 1..=MOST {
            node.take_helper().kill().await;
            let mut helper = node.helper_launch.clone().under(killed_at(call, n)).spawn();
            let is_killed = node.is_killed(&pod, &mut helper).await;
            if is_killed {
                *killed.entry(call).or_insert(0) += 1;
            } else {
                helper.kill().await;
            }
            node.start_helper().await;
            node.assert_whole(&pod).await;
            if !is_killed {
                break;
            }
        }
    }
    println!("figure: the mount helper was killed at {killed:?}");
    assert!(OF_HELPER.iter().all(|call| killed.contains_key(call)), "{killed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_at_any_step_leaves_nothing_half_made() {
    let node = Node::new(&certificate("1h")).await;
    node.start_helper().await;
    let pod = node.pod("cart").await;
    let mut killed = BTreeMap::new();
    for call in OF_AGENT {
        for n in 1..=MOST {
            let mut agent = node.launch.clone().under(killed_at(call, n)).spawn();
            let is_killed = node.is_killed(&pod, &mut agent).await;
            if is_killed {
                *killed.entry(call).or_insert(0) += 1;
            } else {
                agent.kill().await;
            }
            let agent = node.launch.start().await;
            node.assert_whole(&pod).await;
            agent.kill().await;
            if !is_killed {
                break;
            }
        }
    }
    println!("figure: the agent was killed at {killed:?}");
    assert!(OF_AGENT.iter().all(|call| killed.contains_key(call)), "{killed:?}");
}
