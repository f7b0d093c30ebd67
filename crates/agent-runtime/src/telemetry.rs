//! The log: text on a terminal, JSON lines otherwise. It is written to standard error, and never to a file.
//!
//! Owns the subscriber and its filter, which can be replaced while the agent runs, and the [`writer`], which never blocks. The caller reads
//! [`VARIABLE`], because only the configuration reads the environment. It gives each spawned task a span, and [ends](Log::end) the log
//! before the process ends. No key, token or CSR is passed to a log macro. Other crates log wire data at `trace`, so that level is disabled
//! for them regardless of the filter.

use std::{
    fmt,
    io::{self, IsTerminal, Write},
    panic::{self, PanicHookInfo},
    sync::{Arc, LazyLock},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use tracing::{
    Dispatch, Metadata, Subscriber,
    level_filters::LevelFilter,
    subscriber::{DefaultGuard, NoSubscriber, set_default},
};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, filter_fn},
    fmt::MakeWriter,
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use crate::text;

#[cfg(any(test, feature = "testing"))]
pub mod captured;
pub mod hush;
mod lines;
mod metrics;
pub mod writer;

use lines::Lines;
pub use metrics::Metrics;
use writer::{LogWriter, StandardError};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::telemetry";

/// Environment variable with the filter.
pub const VARIABLE: &str = "SDS_AGENT_LOG";
/// Default filter.
pub const DEFAULT_FILTER: &str = "info";
/// Prefix of the log targets of this project.
const OURS: &str = "sds_agent";
/// Maximum wait for the reader of the log at the end of the process, 1 s.
const FLUSH: Duration = Duration::from_secs(1);

/// Errors of setting up the log and of replacing its filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The filter cannot be read.
    #[error("log filter {filter:?} is not valid: {why}; use a level, such as `debug`, or `sds_agent::rotation=debug,info`")]
    Filter {
        /// Excerpt of the filter.
        filter: String,
        /// Excerpt of the parser's message.
        why: String,
    },
    /// The process has a log already.
    #[error("the log is set up already")]
    SetUp,
    /// The thread that writes cannot be started.
    #[error("the thread that writes the log cannot be started: {0}")]
    Thread(io::ErrorKind),
}

/// Format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Text for a terminal.
    Text,
    /// One JSON object a line.
    Json,
}

impl Format {
    /// Returns text if standard error is a terminal, and JSON otherwise.
    pub fn of_stderr() -> Self {
        if io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// Handle of the filter. Clones refer to the same filter.
#[derive(Clone)]
pub struct Filter {
    current: Arc<Mutex<String>>,
    handle: reload::Handle<EnvFilter, Registry>,
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Filter({})", self.current())
    }
}

impl Filter {
    /// Returns the current directives.
    pub fn current(&self) -> String {
        self.current.lock().clone()
    }

    /// Replaces the directives.
    ///
    /// # Errors
    ///
    /// [`Error::Filter`] if the directives cannot be parsed. The current ones then stay in force.
    pub fn replace(&self, directives: &str) -> Result<(), Error> {
        let filter = parse(directives)?;
        let mut current = self.current.lock();
        self.handle.reload(filter).map_err(|error| refused(directives, &error))?;
        directives.clone_into(&mut current);
        Ok(())
    }
}

/// The process's log. Clones are the same log.
#[derive(Debug, Clone)]
pub struct Log {
    /// Filter of the log.
    pub filter: Filter,
    writer: LogWriter,
}

impl Log {
    /// Writes a line without timestamp, level or filter, for the final message of the process.
    pub fn tell(&self, message: fmt::Arguments<'_>) {
        // The writer does not fail.
        let _ = writeln!(self.writer.clone(), "{message}");
    }

    /// Blocks until the queued lines are written, for at most 1 s. Call it before the process ends.
    pub fn end(&self) {
        self.writer.flush(FLUSH);
    }

    /// Returns a guard that ends the log when it is dropped, also when a panic unwinds.
    pub fn until_dropped(&self) -> impl Drop {
        struct End(Log);
        impl Drop for End {
            fn drop(&mut self) {
                self.0.end();
            }
        }
        End(self.clone())
    }
}

/// Sets up the process's log on standard error. `directives` is the value of [`VARIABLE`], if it is set; the default is [`DEFAULT_FILTER`].
/// Panics are logged from now on: the default hook would write to standard error itself and wait for its reader.
///
/// # Errors
///
/// [`Error::Thread`] if the writing thread cannot be started, [`Error::Filter`] if the directives cannot be parsed, [`Error::SetUp`] if the
/// process already has a log.
pub fn init(directives: Option<&str>, metrics: &Metrics) -> Result<Log, Error> {
    let format = Format::of_stderr();
    let writer = LogWriter::start(StandardError, format, metrics.lines_dropped.clone()).map_err(|error| Error::Thread(error.kind()))?;
    let (subscriber, filter) = subscriber(directives.unwrap_or(DEFAULT_FILTER), format, writer.clone())?;
    subscriber.try_init().map_err(|_| Error::SetUp)?;
    panic::set_hook(Box::new(log_panic));
    Ok(Log { filter, writer })
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    // A panic message may quote untrusted input.
    let cause = panic.payload_as_str().map(|cause| text::excerpt(cause, text::MAX_MESSAGE_CHARS));
    tracing::error!(target: LOG_TARGET, thread = thread.name(), location = panic.location().map(tracing::field::display), cause, "a thread has panicked");
}

/// Logs to `writer` on this thread until the guard is dropped, for tests that read the log.
///
/// # Errors
///
/// [`Error::Filter`] if the directives cannot be parsed.
pub fn capture<W>(directives: &str, format: Format, writer: W) -> Result<(DefaultGuard, Filter), Error>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // With a single subscriber, `tracing` computes the interest of a callsite on the thread that reaches it first (tokio-rs/tracing#3611).
    // If that thread belongs to another test and has no subscriber, this one never receives the event. A second subscriber avoids that.
    static ANOTHER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::default()));
    LazyLock::force(&ANOTHER);
    let (subscriber, filter) = subscriber(directives, format, writer)?;
    Ok((set_default(subscriber), filter))
}

fn subscriber<W>(directives: &str, format: Format, writer: W) -> Result<(impl Subscriber + Send + Sync, Filter), Error>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (env_filter, handle) = reload::Layer::new(parse(directives)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(Lines::new(writer, format));
    let lines = match format {
        Format::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    };
    let subscriber = Registry::default().with(lines.with_filter(env_filter.and(filter_fn(no_wire_dump))));
    Ok((subscriber, Filter { current: Arc::new(Mutex::new(directives.to_owned())), handle }))
}

fn parse(directives: &str) -> Result<EnvFilter, Error> {
    // No default directive: `off` must mean off.
    EnvFilter::builder().with_default_directive(LevelFilter::OFF.into()).parse(directives).map_err(|error| refused(directives, &error))
}

fn refused(directives: &str, error: &dyn fmt::Display) -> Error {
    let shown = |text: &str| text::excerpt(text, text::MAX_NAME_CHARS);
    Error::Filter { filter: shown(directives), why: shown(&error.to_string()) }
}

/// Excludes wire data: other crates log it at `trace`, and kube's crates log complete responses, including CSRs, that they cannot parse.
/// The agent's own watches report the failures of the latter.
fn no_wire_dump(metadata: &Metadata<'_>) -> bool {
    is_ours(metadata) || (*metadata.level() <= LevelFilter::DEBUG && !is_of(metadata, "kube_client") && !is_of(metadata, "kube_runtime"))
}

/// Returns whether the line has a target of this project.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    is_of(metadata, OURS)
}

fn is_of(metadata: &Metadata<'_>, name: &str) -> bool {
    metadata.target().strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[cfg(test)]
mod tests {
    use super::{captured::Captured, *};

    #[test]
    fn a_json_line_has_the_fields_the_target_and_the_span() {
        let lines = Captured::default();
        let (_guard, _filter) = capture("info", Format::Json, lines.clone()).unwrap();
        let span = tracing::info_span!(target: LOG_TARGET, "issue", identity = "spiffe://a/b");
        span.in_scope(|| tracing::info!(target: LOG_TARGET, serial = "0a", "published"));
        let line: serde_json::Value = serde_json::from_str(&lines.take()).unwrap();
        assert_eq!(line["message"], "published");
        assert_eq!(line["serial"], "0a");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["target"], "sds_agent::telemetry");
        assert_eq!(line["span"]["identity"], "spiffe://a/b");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn the_filter_is_replaced_while_running_and_garbage_changes_nothing() {
        let lines = Captured::default();
        let (_guard, filter) = capture("info", Format::Text, lines.clone()).unwrap();
        tracing::debug!(target: LOG_TARGET, "one");
        assert_eq!(lines.take(), "");
        filter.replace("sds_agent=debug").unwrap();
        tracing::debug!(target: LOG_TARGET, "two");
        assert!(lines.take().contains("two"));

        let error = filter.replace("sds_agent=loud").unwrap_err();
        assert!(error.to_string().contains("sds_agent=loud"), "{error}");
        assert_eq!(filter.current(), "sds_agent=debug");
        tracing::debug!(target: LOG_TARGET, "three");
        assert!(lines.take().contains("three"));
        filter.replace("off").unwrap();
        tracing::error!(target: LOG_TARGET, "four");
        assert_eq!(lines.take(), "");
    }

    #[test]
    fn other_crates_never_log_what_crosses_the_wire() {
        let lines = Captured::default();
        let (_guard, _filter) = capture("trace", Format::Text, lines.clone()).unwrap();
        tracing::trace!(target: "h2::codec", "a frame");
        tracing::trace!(target: "sds_agent_impostor", "a frame");
        tracing::error!(target: "kube_client::client", "a whole answer");
        assert_eq!(lines.take(), "");
        tracing::debug!(target: "h2::codec", "about a frame");
        tracing::trace!(target: LOG_TARGET, "ours");
        assert_eq!(lines.take().lines().count(), 2);
    }

    /// Set for the child process, so that `--include-ignored` does not replace the log of the test process.
    const CHILD: &str = "SDS_AGENT_TEST_CHILD";

    #[test]
    fn a_panic_does_not_wait_for_the_reader_of_the_log() {
        let (_reader, writer) = io::pipe().unwrap();
        // The pipe is full.
        (&writer)
            .write_all(&vec![b'\n'; nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap().try_into().unwrap()])
            .unwrap();
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "telemetry::tests::child_panics", "--ignored", "--nocapture"]).env(CHILD, "1");
        let mut child = command.stdout(std::process::Stdio::null()).stderr(writer).spawn().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        thread::spawn(move || tell.send(child.wait().unwrap()));
        let status = told.recv_timeout(Duration::from_secs(60));
        if status.is_err() {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        assert!(status.expect("the child hangs").success());
    }

    #[test]
    #[ignore = "runs in a separate process"]
    fn child_panics() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let log = init(None, &Metrics::default()).unwrap();
        for _ in 0..1000 {
            thread::spawn(|| panic!("as a part of the agent might")).join().unwrap_err();
        }
        log.tell(format_args!("sds-agent: final message"));
        log.end();
    }

    #[test]
    fn a_panic_is_a_line_of_the_log() {
        let lines = Captured::default();
        let (_guard, _filter) = capture("info", Format::Json, lines.clone()).unwrap();
        let hook = panic::take_hook();
        panic::set_hook(Box::new(log_panic));
        let caught = panic::catch_unwind(|| panic!("as a part of the agent might"));
        panic::set_hook(hook);
        caught.unwrap_err();
        assert!(lines.lines("a thread has panicked").iter().any(|line| line["cause"] == "as a part of the agent might"));
    }
}
