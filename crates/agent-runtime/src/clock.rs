//! The wall clock, and waits until a time of it.
//!
//! Owns the only reads of the real time. A waiter wakes at its time, when the clock is stepped, or after one minute, whichever is first,
//! and then reads the time again. It therefore notices suspended machines and NTP steps. Policy takes `now` as an argument.

use std::{
    fmt, io,
    os::fd::OwnedFd,
    sync::{Arc, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::future::BoxFuture;
use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};
use parking_lot::Mutex;
use tokio::{
    io::unix::AsyncFd,
    runtime::{self, Handle},
    sync::watch,
    time::Instant,
};
use unix_peer::fd;

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::clock";

/// Maximum length of a sleep, 60 s, so that a step that the kernel does not report is still noticed.
pub const MAX_SLEEP: Duration = Duration::from_secs(60);

/// A source of wall-clock time, and waits for it.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the wall clock's time.
    fn now(&self) -> SystemTime;

    /// Returns at `until`, when the clock is stepped, or after [`MAX_SLEEP`]. The caller reads [`Clock::now`] again.
    ///
    /// # Cancel safety
    ///
    /// A dropped future only stops waiting.
    fn sleep_until(&self, until: SystemTime) -> BoxFuture<'_, ()>;
}

/// Returns the seconds since the epoch; 0 for times before it.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Returns the time `seconds` after the epoch, limited to the years 1970 to 9999.
pub fn from_unix_seconds(seconds: i64) -> SystemTime {
    const END_OF_9999: u64 = 253_402_300_799;
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(END_OF_9999))
}

/// Formats a time as RFC 3339 in UTC, to the second.
pub fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Returns the time since an RFC 3339 time, as far as `now` is later. `None` if the text is no such time.
pub fn since_rfc3339(text: &str, now: SystemTime) -> Option<Duration> {
    Some(now.duration_since(humantime::parse_rfc3339(text).ok()?).unwrap_or_default())
}

/// The machine's clock. All waits of the process share one `timerfd`, which the kernel cancels when the clock is set.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep_until(&self, until: SystemTime) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let wait = until.duration_since(self.now()).unwrap_or_default();
            if wait.is_zero() {
                return;
            }
            let bound = tokio::time::sleep(wait.min(MAX_SLEEP));
            tokio::select! {
                () = bound => {}
                result = stepped() => if let Err(error) = result {
                    // Without a timer, this sleep still wakes the waiter.
                    tracing::warn!(target: LOG_TARGET, %error, "cannot watch the clock for steps; checking the time once a minute instead");
                    tokio::time::sleep(wait.min(MAX_SLEEP)).await;
                },
            }
        })
    }
}

/// A timer that the kernel cancels when the clock is set. It never fires otherwise.
#[derive(Debug)]
struct StepTimer {
    timer: AsyncFd<OwnedFd>,
    /// The runtime whose driver watches the timer. It is of no use to another one, because it ends with its runtime.
    runtime: runtime::Id,
}

/// The timer that the sleepers share, because each costs a descriptor. It ends with the last of them, or with a step of the clock.
static STEP_TIMER: Mutex<Weak<StepTimer>> = Mutex::new(Weak::new());

impl StepTimer {
    fn new() -> io::Result<Self> {
        // The year 2106: the latest time that every kernel accepts.
        const NEVER: Duration = Duration::from_secs(u32::MAX as u64);
        let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        let set = || timer.set(Expiration::OneShot(TimeSpec::from_duration(NEVER)), flags);
        // ECANCELED: the clock was set in this moment.
        match set() {
            Err(Errno::ECANCELED) => set()?,
            result => result?,
        }
        Ok(Self { timer: fd::watched(OwnedFd::from(timer))?, runtime: Handle::current().id() })
    }

    fn shared() -> io::Result<Arc<Self>> {
        let mut current = STEP_TIMER.lock();
        if let Some(timer) = current.upgrade()
            && timer.runtime == Handle::current().id()
        {
            return Ok(timer);
        }
        let timer = Arc::new(Self::new()?);
        *current = Arc::downgrade(&timer);
        Ok(timer)
    }

    /// The next sleeper makes another timer.
    fn retire(self: &Arc<Self>) {
        let mut current = STEP_TIMER.lock();
        if current.ptr_eq(&Arc::downgrade(self)) {
            *current = Weak::new();
        }
    }
}

/// Waits until the clock is set.
async fn stepped() -> io::Result<()> {
    let timer = StepTimer::shared()?;
    // The timer stays readable, so that every sleeper wakes.
    let result = timer.timer.readable().await.map(|mut ready| ready.retain_ready());
    timer.retire();
    result
}

/// A clock for tests: a base, plus tokio's elapsed (pausable) time, plus an offset that a test may step.
#[derive(Debug, Clone)]
pub struct TestClock {
    base: SystemTime,
    start: Instant,
    offset: Arc<Mutex<i64>>,
    steps: watch::Sender<()>,
}

impl TestClock {
    /// Creates a clock that starts at `base`. Call it inside a runtime.
    pub fn new(base: SystemTime) -> Self {
        Self { base, start: Instant::now(), offset: Arc::default(), steps: watch::Sender::new(()) }
    }

    /// Steps the clock by `seconds` and wakes every waiter, as the kernel does.
    pub fn step(&self, seconds: i64) {
        *self.offset.lock() += seconds;
        self.steps.send_replace(());
    }
}

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        let offset = *self.offset.lock();
        let time = self.base + self.start.elapsed();
        let by = Duration::from_secs(offset.unsigned_abs());
        if offset < 0 { time - by } else { time + by }
    }

    fn sleep_until(&self, until: SystemTime) -> BoxFuture<'_, ()> {
        let wait = until.duration_since(self.now()).unwrap_or_default().min(MAX_SLEEP);
        let mut steps = self.steps.subscribe();
        Box::pin(async move {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = steps.changed() => {}
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_system_clock_wakes_at_its_moment() {
        let clock = SystemClock;
        let until = clock.now() + Duration::from_millis(50);
        clock.sleep_until(until).await;
        assert!(clock.now() >= until - Duration::from_millis(2));
    }

    #[tokio::test]
    async fn all_sleepers_share_one_timer() {
        let far = SystemClock.now() + Duration::from_secs(3600);
        let timers = || {
            let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
            let links = descriptors.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
            links.filter(|link| link.to_string_lossy().contains("timerfd")).count()
        };
        let mut sleepers: Vec<_> = (0..200).map(|_| SystemClock.sleep_until(far)).collect();
        for sleeper in &mut sleepers {
            assert!(futures::poll!(sleeper).is_pending());
        }
        // Other tests of this process may sleep too. Each has a runtime of its own, and a timer for it.
        assert!((1..=50).contains(&timers()), "{} timers", timers());
        drop(sleepers);

        // A timer that has reported a step is used no longer.
        let before = StepTimer::shared().unwrap();
        before.retire();
        assert!(!Arc::ptr_eq(&before, &StepTimer::shared().unwrap()));
    }

    #[test]
    fn the_end_of_another_runtime_ends_no_sleep() {
        let [ending, lasting] = [(); 2].map(|()| runtime::Builder::new_current_thread().enable_all().build().unwrap());
        let far = SystemClock.now() + Duration::from_secs(3600);
        let mut first = SystemClock.sleep_until(far);
        assert!(ending.block_on(async { futures::poll!(&mut first) }).is_pending());
        let error = lasting.block_on(async {
            let stepped = tokio::spawn(stepped());
            tokio::task::yield_now().await;
            ending.shutdown_background();
            tokio::time::timeout(Duration::from_millis(100), stepped).await
        });
        assert!(error.is_err(), "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_sleep_ends_on_a_clock_step_or_after_a_minute() {
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_000_000));
        let far = clock.now() + Duration::from_secs(86_400);
        let before = Instant::now();
        clock.sleep_until(far).await;
        assert_eq!(before.elapsed(), MAX_SLEEP);

        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep_until(far).await }
        });
        tokio::task::yield_now().await;
        let before = Instant::now();
        clock.step(-3600);
        sleeper.await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[test]
    fn seconds_convert_both_ways_and_nonsense_is_bounded() {
        assert_eq!(unix_seconds(from_unix_seconds(1_700_000_000)), 1_700_000_000);
        assert_eq!(from_unix_seconds(-5), UNIX_EPOCH);
        assert_eq!(rfc3339(from_unix_seconds(i64::MAX)), "9999-12-31T23:59:59Z");
    }
}
