//! A pod that fetches all the time, and helpers for the processes of pods.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use test_harness::{cgroups::PodCgroup, child::Child};

use super::client;

/// Set for the child processes, so that `--include-ignored` starts none.
const SOCKET: &str = "SDS_AGENT_TEST_SOCKET";
/// Fetches for each reported median.
const BATCH: usize = 50;

/// Starts this program as a process of a pod.
pub fn child(test: &str, cgroup: &PodCgroup, socket: &Path) -> Child {
    let mut command = cgroup.command(&std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(SOCKET, socket);
    Child::spawn(test, &mut command)
}

/// The numbers behind a word in the lines.
pub fn told(lines: &[String], what: &str) -> Vec<f64> {
    lines.iter().filter_map(|line| line.split_once(what)?.1.split(' ').next()?.parse().ok()).collect()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The socket for a child process; `None` in any other process.
pub fn socket() -> Option<Arc<Path>> {
    std::env::var_os(SOCKET).map(|socket| PathBuf::from(socket).into())
}

#[tokio::test]
#[ignore = "a process of a pod"]
async fn child_that_works() {
    let Some(socket) = socket() else { return };
    let mut client = client::connect(&socket).await;
    loop {
        let mut times = Vec::with_capacity(BATCH);
        for _ in 0..BATCH {
            let start = Instant::now();
            client::unary(&mut client, client::FETCH, client::Ask::small("default")).await;
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        println!("median {:.1} ", median(times));
    }
}
