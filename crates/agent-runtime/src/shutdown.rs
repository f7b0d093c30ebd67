//! The end of the process: a drain that holders can block for a bounded time, and an abort.
//!
//! The first SIGTERM or SIGINT begins the drain: [`Shutdown::drain`] is cancelled, nobody takes on new work, and whoever still has some
//! holds a [`Guard`]. The drain is over when the last guard is dropped, at its deadline, or at a second signal, which ends the process
//! with exit code 1. A task owes two things: to select on the token, and to hold a guard for as long as it has something to finish.

use std::{
    fmt, io,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::shutdown";

/// The exit code of an aborted process.
pub const EXIT_ABORTED: i32 = 1;

/// The process's end, shared by all that must know. Clones are the same shutdown.
#[derive(Debug, Clone)]
pub struct Shutdown {
    /// Cancelled when the drain begins.
    pub drain: CancellationToken,
    /// Cancelled when nothing may be waited for any more.
    pub abort: CancellationToken,
    holders: TaskTracker,
    deadline: Duration,
}

/// Blocks the end of the drain until it is dropped.
#[must_use = "dropped at once, it holds nothing"]
pub struct Guard {
    _holder: TaskTrackerToken,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Everybody has finished.
    Complete,
    /// The deadline passed with so many guards still held.
    TimedOut {
        /// How many.
        holders: usize,
    },
    /// A second signal came.
    Aborted,
}

impl Shutdown {
    /// A shutdown whose drain may take `deadline`. Without [`follow_signals`](Self::follow_signals) only [`begin`](Self::begin) starts it.
    pub fn new(deadline: Duration) -> Self {
        Self { drain: CancellationToken::new(), abort: CancellationToken::new(), holders: TaskTracker::new(), deadline }
    }

    /// The same shutdown for a part that may end before the whole: what is cancelled of it ends that part alone.
    pub fn part(&self) -> Self {
        Self { drain: self.drain.child_token(), abort: self.abort.child_token(), ..self.clone() }
    }

    /// Begins the drain; again is no change.
    pub fn begin(&self) {
        self.drain.cancel();
    }

    /// Blocks the end of the drain for as long as the guard lives. During a drain it still counts.
    pub fn guard(&self) -> Guard {
        Guard { _holder: self.holders.token() }
    }

    /// Waits for the drain to begin and then to end.
    pub async fn drained(&self) -> Drained {
        self.drain.cancelled().await;
        self.holders.close();
        tokio::select! {
            biased;
            () = self.abort.cancelled() => Drained::Aborted,
            () = self.holders.wait() => Drained::Complete,
            () = tokio::time::sleep(self.deadline) => Drained::TimedOut { holders: self.holders.len() },
        }
    }

    /// Takes over SIGTERM and SIGINT from here on: the first begins the drain, the second ends the process with [`EXIT_ABORTED`], after
    /// `before_exit`, which must be bounded in time.
    ///
    /// Call it inside the runtime, before anything is bound: until then a signal kills the process as usual.
    pub fn follow_signals(&self, before_exit: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        tokio::spawn(async move {
            let name = either(&mut terminate, &mut interrupt).await;
            let begun = Instant::now();
            // Before anything is logged about it: nothing may stand between a signal and its effect.
            shutdown.begin();
            tracing::info!(target: LOG_TARGET, signal = name, deadline_seconds = shutdown.deadline.as_secs_f64(), "draining; a second signal aborts");

            let name = either(&mut terminate, &mut interrupt).await;
            let (holders, after) = (shutdown.holders.len(), begun.elapsed().as_secs_f64());
            tracing::warn!(target: LOG_TARGET, signal = name, holders, seconds_after_the_first = after, "aborting");
            shutdown.abort.cancel();
            before_exit();
            // From here, and not from `main`: whatever hangs there is what the second signal is against.
            std::process::exit(EXIT_ABORTED);
        });
        Ok(())
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sys::signal::{Signal, raise};
    use tokio::time::Instant;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);
    /// Set for the child, so that `--include-ignored` does not end everybody's process.
    const CHILD: &str = "SDS_AGENT_TEST_CHILD";

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_its_last_guard() {
        let shutdown = Shutdown::new(DEADLINE);
        let (first, second) = (shutdown.guard(), shutdown.guard());
        let begun = Instant::now();
        let drained = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.drained().await }
        });
        shutdown.begin();
        shutdown.begin();
        assert!(shutdown.drain.is_cancelled());
        let late = shutdown.guard();
        drop((first, second));
        tokio::time::sleep(Duration::from_secs(3)).await;
        drop(late);
        assert_eq!(drained.await.unwrap(), Drained::Complete);
        assert_eq!(begun.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_at_its_deadline_whoever_holds() {
        let shutdown = Shutdown::new(DEADLINE);
        let _held = shutdown.guard();
        shutdown.begin();
        let begun = Instant::now();
        assert_eq!(shutdown.drained().await, Drained::TimedOut { holders: 1 });
        assert_eq!(begun.elapsed(), DEADLINE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_ends_alone_or_with_the_whole_and_holds_it_up() {
        let shutdown = Shutdown::new(DEADLINE);
        let (one, other) = (shutdown.part(), shutdown.part());
        one.drain.cancel();
        assert!(!shutdown.drain.is_cancelled() && !other.drain.is_cancelled());
        let _held = other.guard();
        shutdown.begin();
        assert!(other.drain.is_cancelled());
        assert_eq!(shutdown.drained().await, Drained::TimedOut { holders: 1 });
    }

    #[tokio::test(start_paused = true)]
    async fn an_abort_ends_a_drain_at_once() {
        let shutdown = Shutdown::new(DEADLINE);
        let _held = shutdown.guard();
        shutdown.begin();
        shutdown.abort.cancel();
        assert_eq!(shutdown.drained().await, Drained::Aborted);
    }

    #[tokio::test(start_paused = true)]
    async fn guards_alone_begin_nothing() {
        let shutdown = Shutdown::new(DEADLINE);
        drop(shutdown.guard());
        let waited = tokio::time::timeout(Duration::from_secs(3600), shutdown.drained()).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    #[test]
    fn the_first_signal_drains_and_the_second_exits_with_1() {
        let name = "shutdown::tests::child_is_signalled_twice";
        let mut command = Command::new(std::env::current_exe().unwrap());
        let status = command.args(["--exact", name, "--ignored"]).env(CHILD, "1").output().unwrap().status;
        assert_eq!(status.code(), Some(EXIT_ABORTED));
    }

    #[tokio::test]
    #[ignore = "runs in a process of its own"]
    async fn child_is_signalled_twice() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        // A failed assertion makes the test binary's exit code 101.
        let shutdown = Shutdown::new(DEADLINE);
        let _held = shutdown.guard();
        // Whatever a line of the log costs, the drain has begun before it.
        let has_begun = shutdown.drain.clone();
        let written = move || {
            assert!(has_begun.is_cancelled(), "a signal is logged before it has an effect");
            std::io::sink()
        };
        let (_guard, _filter) = crate::telemetry::capture("info", crate::telemetry::Format::Json, written).unwrap();
        shutdown.follow_signals(|| {}).unwrap();
        raise(Signal::SIGTERM).unwrap();
        tokio::time::timeout(DEADLINE, shutdown.drain.cancelled()).await.unwrap();
        raise(Signal::SIGINT).unwrap();
        shutdown.drained().await;
        panic!("the process should have ended");
    }
}
