//! The end of the process: a drain that guards can extend up to a deadline, and an abort.
//!
//! The first SIGTERM or SIGINT begins the drain: [`Shutdown::drain`] is cancelled, and no task accepts new work. A task with unfinished
//! work holds a [`Guard`]. The drain ends when the last guard is dropped or at its deadline. A second signal ends the process at once with
//! exit code 1. Each task selects on the token, and holds a guard for as long as it has work to finish.

use std::{
    fmt, io,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::shutdown";

/// Exit code of an aborted process.
pub const EXIT_ABORTED: i32 = 1;

/// The shutdown of the process. Clones are the same shutdown.
#[derive(Debug, Clone)]
pub struct Shutdown {
    /// Cancelled when the drain begins.
    pub drain: CancellationToken,
    /// Cancelled when the drain is aborted: no task may wait any longer.
    pub abort: CancellationToken,
    holders: TaskTracker,
    deadline: Duration,
}

/// Delays the end of the drain until it is dropped.
#[must_use = "a guard that is dropped at once delays nothing"]
pub struct Guard {
    _holder: TaskTrackerToken,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

/// Result of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// All guards were dropped.
    Complete,
    /// The deadline passed while guards were held.
    TimedOut {
        /// Number of guards.
        holders: usize,
    },
    /// A second signal arrived.
    Aborted,
}

impl Shutdown {
    /// Creates a shutdown whose drain takes at most `deadline`. Without [`follow_signals`](Self::follow_signals), only
    /// [`begin`](Self::begin) starts it.
    pub fn new(deadline: Duration) -> Self {
        Self { drain: CancellationToken::new(), abort: CancellationToken::new(), holders: TaskTracker::new(), deadline }
    }

    /// Returns a shutdown for a part that may end earlier. Cancelling its tokens ends only that part; its guards delay the whole.
    pub fn part(&self) -> Self {
        Self { drain: self.drain.child_token(), abort: self.abort.child_token(), ..self.clone() }
    }

    /// Begins the drain. Further calls have no effect.
    pub fn begin(&self) {
        self.drain.cancel();
    }

    /// Returns a guard, which delays the end of the drain until it is dropped. A guard that is taken during a drain counts too.
    pub fn guard(&self) -> Guard {
        Guard { _holder: self.holders.token() }
    }

    /// Waits until the drain has begun and then ended.
    ///
    /// # Cancel safety
    ///
    /// A dropped future loses nothing. A new call during the drain starts the deadline again.
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

    /// Handles SIGTERM and SIGINT from now on. The first signal begins the drain. The second one calls `before_exit`, which must be bounded
    /// in time, and ends the process with [`EXIT_ABORTED`].
    ///
    /// Call it inside the runtime, before any socket is bound. Before this call a signal kills the process, as is the default.
    ///
    /// # Errors
    ///
    /// The error of registering the signal handlers.
    pub fn follow_signals(&self, before_exit: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        tokio::spawn(async move {
            let name = either(&mut terminate, &mut interrupt).await;
            let begun = Instant::now();
            // The drain begins before the signal is logged, so that a blocked log cannot delay it.
            shutdown.begin();
            tracing::info!(target: LOG_TARGET, signal = name, deadline_seconds = shutdown.deadline.as_secs_f64(), "draining; a second signal aborts");

            let name = either(&mut terminate, &mut interrupt).await;
            let (holders, after) = (shutdown.holders.len(), begun.elapsed().as_secs_f64());
            tracing::warn!(target: LOG_TARGET, signal = name, holders, seconds_after_the_first = after, "aborting");
            shutdown.abort.cancel();
            before_exit();
            // The process exits here and not in `main`, because the second signal must work even if `main` hangs.
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
    /// Set for the child process, so that `--include-ignored` does not end the test process.
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
    #[ignore = "runs in a separate process"]
    async fn child_is_signalled_twice() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        // A failed assertion gives exit code 101.
        let shutdown = Shutdown::new(DEADLINE);
        let _held = shutdown.guard();
        // The drain has begun before the first log line is written.
        let has_begun = shutdown.drain.clone();
        let written = move || {
            assert!(has_begun.is_cancelled(), "the signal is logged before the drain begins");
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
