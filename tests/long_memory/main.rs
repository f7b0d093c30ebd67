//! Callers that make the agent hold all the memory that it allows them, under the memory limit of the manifests: `make test-long
//! GROUP=memory`.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files for other programs, wait for those, and fail loudly"
)]

#[path = "../../benches/support/client.rs"]
#[allow(dead_code, missing_docs, reason = "the tests use a part of it")]
mod client;
#[path = "../flood/hoarders.rs"]
mod hoarders;
#[path = "../flood/worker.rs"]
mod worker;

use hoarders::{Siege, default_limit};
use test_harness::{hoard::WAYS, memory, turn};

/// Pods that together exceed the limit of all callers.
const PODS: usize = 20;
/// Share of the limit of all callers that the attackers reach, because the last eighth is for other pods.
const REACHED: f64 = 0.8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pods_that_hoard_memory_leave_the_agent_below_its_limit() {
    let _turn = turn().await;
    let siege = Siege::begin().await;
    let all = default_limit(|limits| limits.memory_bytes);
    let mut highest: f64 = 0.0;
    for way in WAYS {
        siege.until_all_is_given_back().await;
        let before = memory::measure_again(siege.process());
        let charged = siege.attack(way, PODS).await;
        println!("figure: {way:?}: {} MiB resident before, {:.0} MiB charged at most", before >> 20, charged / f64::from(1 << 20));
        siege.assert_it_stands(&format!("{way:?}"));
        assert!(charged <= all as f64, "{way:?}: {charged} bytes");
        highest = highest.max(charged);
    }
    let refused = siege.metric("sds_agent_streams_rejected_total").await + siege.metric("sds_agent_connections_rejected_total").await;
    println!("figure: {refused} streams and connections were refused");
    assert!(highest >= REACHED * all as f64, "{highest} of {all} bytes: the limit was not reached");
}
