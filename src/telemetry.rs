//! The log: text on a terminal, JSON lines otherwise, always to standard error and never to a file.
//!
//! Owns the subscriber and its filter, which can be replaced while the agent runs. The caller reads [`VARIABLE`] (the configuration is the
//! only reader of the environment) and owes every spawned task a span. No key, token or CSR is ever passed to a log macro; and because
//! other crates print what crosses the wire at `trace`, that level is cut off for them whatever the filter says.

use std::{
    fmt,
    io::{self, IsTerminal},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

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

#[cfg(test)]
pub(crate) mod captured;
pub mod hush;

/// The environment variable of the filter.
pub const VARIABLE: &str = "SDS_AGENT_LOG";
/// The filter where there is none.
pub const DEFAULT_FILTER: &str = "info";
/// This crate's targets begin with it.
const OURS: &str = "sds_agent";

/// Why there is no log, or no other filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The filter cannot be read.
    #[error("log filter {filter:?} is not valid: {why}; use a level, such as `debug`, or `sds_agent::rotation=debug,info`")]
    Filter {
        /// What was given.
        filter: String,
        /// The parser's words.
        why: String,
    },
    /// The process has a log already.
    #[error("the log is set up already")]
    SetUp,
}

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Format {
    /// Text where standard error is a terminal.
    pub fn of_stderr() -> Self {
        if io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// The handle on the filter. Clones are the same handle.
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
    /// The directives in force.
    pub fn current(&self) -> String {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces them; what cannot be read changes nothing.
    pub fn replace(&self, directives: &str) -> Result<(), Error> {
        let filter = parse(directives)?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        self.handle.reload(filter).map_err(|e| Error::Filter { filter: directives.to_owned(), why: e.to_string() })?;
        directives.clone_into(&mut current);
        Ok(())
    }
}

/// Sets up the process's log on standard error; `directives` is the value of [`VARIABLE`], where it is set.
pub fn init(directives: Option<&str>) -> Result<Filter, Error> {
    let (subscriber, filter) = subscriber(directives.unwrap_or(DEFAULT_FILTER), Format::of_stderr(), io::stderr)?;
    subscriber.try_init().map_err(|_| Error::SetUp)?;
    Ok(filter)
}

/// Logs to `writer` on this thread for as long as the guard lives: for tests that look at the log.
pub fn capture<W>(directives: &str, format: Format, writer: W) -> Result<(DefaultGuard, Filter), Error>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // While there is one subscriber alone, `tracing` asks only the thread that reaches an event first whether it is wanted: where that is
    // another test's thread, without a subscriber, this one would never get the event.
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
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match format {
        Format::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    };
    let subscriber = Registry::default().with(lines.with_filter(env_filter.and(filter_fn(no_wire_dump))));
    Ok((subscriber, Filter { current: Arc::new(Mutex::new(directives.to_owned())), handle }))
}

fn parse(directives: &str) -> Result<EnvFilter, Error> {
    // No default directive: `off` must mean off.
    EnvFilter::builder()
        .with_default_directive(LevelFilter::OFF.into())
        .parse(directives)
        .map_err(|e| Error::Filter { filter: directives.to_owned(), why: e.to_string() })
}

/// What other crates print at `trace` crosses the wire; and kube's print whole answers, with CSRs in them, when they cannot be read. What
/// matters of the latter is told by our own watches.
fn no_wire_dump(metadata: &Metadata<'_>) -> bool {
    let of = |name: &str| metadata.target().strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    of(OURS) || (*metadata.level() <= LevelFilter::DEBUG && !of("kube_client") && !of("kube_runtime"))
}

#[cfg(test)]
mod tests {
    use super::{captured::Captured, *};

    /// Whoever alerts on a line relies on its words.
    #[test]
    fn the_documentation_tells_of_lines_that_there_are() {
        fn read(directory: &std::path::Path, out: &mut String) {
            for entry in std::fs::read_dir(directory).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    read(&path, out);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    *out += &std::fs::read_to_string(path).unwrap();
                }
            }
        }
        let mut source = String::new();
        read(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut source);
        let rows = include_str!("../docs/logs.md").lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let messages: Vec<&str> = rows.map(|(message, _)| message).collect();
        assert!(messages.len() > 15);
        let unknown: Vec<_> = messages.into_iter().filter(|message| !source.contains(&format!("\"{message}"))).collect();
        assert!(unknown.is_empty(), "docs/logs.md tells of {unknown:?}");
    }

    #[test]
    fn a_json_line_has_the_fields_the_target_and_the_span() {
        let lines = Captured::default();
        let (_guard, _filter) = capture("info", Format::Json, lines.clone()).unwrap();
        let span = tracing::info_span!("issue", identity = "spiffe://a/b");
        span.in_scope(|| tracing::info!(serial = "0a", "published"));
        let line: serde_json::Value = serde_json::from_str(&lines.take()).unwrap();
        assert_eq!(line["message"], "published");
        assert_eq!(line["serial"], "0a");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["target"], "sds_agent::telemetry::tests");
        assert_eq!(line["span"]["identity"], "spiffe://a/b");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn the_filter_is_replaced_while_running_and_garbage_changes_nothing() {
        let lines = Captured::default();
        let (_guard, filter) = capture("info", Format::Text, lines.clone()).unwrap();
        tracing::debug!("one");
        assert_eq!(lines.take(), "");
        filter.replace("sds_agent=debug").unwrap();
        tracing::debug!("two");
        assert!(lines.take().contains("two"));

        let error = filter.replace("sds_agent=loud").unwrap_err();
        assert!(error.to_string().contains("sds_agent=loud"), "{error}");
        assert_eq!(filter.current(), "sds_agent=debug");
        tracing::debug!("three");
        assert!(lines.take().contains("three"));
        filter.replace("off").unwrap();
        tracing::error!("four");
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
        tracing::trace!("ours");
        assert_eq!(lines.take().lines().count(), 2);
    }
}
