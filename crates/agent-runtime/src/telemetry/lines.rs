//! The last step of every log line: a limit of its length, a limit of repeated lines from other crates, and a check for PEM.
//!
//! Lines of this project that a caller can cause are limited where they are logged, by caller and cause ([`hush`](super::hush)). Lines of
//! other crates cannot be changed there, and bytes from a client cause some of them: `h2` warns of each unsolicited PING acknowledgement.
//! Each line of another crate is written once a minute, with `left_out` as the number of lines that were not written.

use std::{
    borrow::Cow,
    io::{self, Write},
    sync::Arc,
};

use serde_json::{Map, Value};
use tokio::time::Instant;
use tracing::{Level, Metadata, callsite::Identifier};
use tracing_subscriber::fmt::MakeWriter;

use super::{Format, hush::LogLimiter, is_ours};
use crate::text;

/// Maximum size of a line in bytes, including its line end. A write of this size to a pipe is atomic (`PIPE_BUF`).
const MAX_LINE_BYTES: usize = 4096;
/// Maximum bytes of one text in a line that is too long. If the line is still too long, the limit is halved, repeatedly.
const MAX_TEXT_BYTES: usize = 1024;
/// Marks the end of a text that was truncated.
const MARK: &str = "… [cut]";

/// Creates a writer for each event. It receives the complete line of the event at once.
#[derive(Debug, Clone)]
pub(super) struct Lines<W> {
    out: W,
    format: Format,
    repeated: Arc<LogLimiter<Identifier>>,
}

impl<W> Lines<W> {
    pub(super) fn new(out: W, format: Format) -> Self {
        Self { out, format, repeated: Arc::default() }
    }
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Lines<W> {
    type Writer = Line<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Line { out: Some(self.out.make_writer()), format: self.format, left_out: 0 }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
        if is_ours(metadata) || *metadata.level() > Level::INFO {
            return self.make_writer();
        }
        match self.repeated.permit(metadata.callsite(), Instant::now()) {
            Some(left_out) => Line { left_out, ..self.make_writer() },
            None => Line { out: None, ..self.make_writer() },
        }
    }
}

/// Writes one line, or discards it.
#[derive(Debug)]
pub(super) struct Line<W> {
    out: Option<W>,
    format: Format,
    left_out: u64,
}

impl<W: Write> Write for Line<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(out) = &mut self.out {
            out.write_all(&bounded(line, self.format, self.left_out))?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.as_mut().map_or(Ok(()), Write::flush)
    }
}

/// Returns the line within its limits, with the number of lines that were left out.
fn bounded(line: &[u8], format: Format, left_out: u64) -> Cow<'_, [u8]> {
    let body = line.strip_suffix(b"\n").unwrap_or(line);
    let has_pem = str::from_utf8(body).is_ok_and(text::has_pem);
    if line.len() <= MAX_LINE_BYTES && left_out == 0 && !has_pem && !body.contains(&b'\n') {
        return Cow::Borrowed(line);
    }
    // One event is one line, so that text from a client cannot look like another event.
    let text = String::from_utf8_lossy(body).replace('\n', "\\n");
    let fields = match format {
        Format::Json => serde_json::from_str::<Map<String, Value>>(&text).ok(),
        Format::Text => None,
    };
    let bounded = match fields {
        Some(mut fields) => {
            if has_pem {
                fields.values_mut().for_each(|value| each_text(value, &|text| *text = text::redact(text).into_owned()));
            }
            bounded_json(fields, line.len(), left_out)
        }
        None if has_pem => bounded_text(&text::redact(&text), left_out),
        None => bounded_text(&text, left_out),
    };
    Cow::Owned((bounded + "\n").into_bytes())
}

/// Truncates the texts of a JSON line, which stays valid JSON. `line_bytes` is its original size.
fn bounded_json(mut fields: Map<String, Value>, line_bytes: usize, left_out: u64) -> String {
    if left_out > 0 {
        fields.insert("left_out".to_owned(), left_out.into());
    }
    if line_bytes > MAX_LINE_BYTES {
        fields.insert("line_bytes".to_owned(), line_bytes.into());
    }
    let mut most = MAX_TEXT_BYTES;
    loop {
        let line = Value::Object(fields.clone()).to_string();
        if line.len() < MAX_LINE_BYTES {
            return line;
        }
        if most < MARK.len() {
            // With this number of fields, the line is too long even without their texts.
            fields.retain(|name, _| ["timestamp", "level", "target", "message", "line_bytes"].contains(&name.as_str()));
            return Value::Object(fields).to_string();
        }
        fields.values_mut().for_each(|value| {
            each_text(value, &|text| {
                if text.len() > most {
                    *text = cut(text, most);
                }
            });
        });
        most /= 2;
    }
}

fn each_text(value: &mut Value, change: &impl Fn(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(values) => values.iter_mut().for_each(|value| each_text(value, change)),
        Value::Object(fields) => fields.values_mut().for_each(|value| each_text(value, change)),
        _ => {}
    }
}

fn bounded_text(line: &str, left_out: u64) -> String {
    let suffix = if left_out > 0 { format!(" left_out={left_out}") } else { String::new() };
    let most = MAX_LINE_BYTES - 1 - suffix.len();
    if line.len() <= most { line.to_owned() + &suffix } else { cut(line, most) + &suffix }
}

/// Returns at most `most` bytes of `text`, including the mark.
fn cut(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most.saturating_sub(MARK.len()))].to_owned() + MARK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{capture, captured::Captured};

    #[test]
    fn a_line_is_bounded_whatever_its_fields_hold_and_json_stays_json() {
        for format in [Format::Json, Format::Text] {
            let lines = Captured::default();
            let (_guard, _filter) = capture("info", format, lines.clone()).unwrap();
            for unit in ["x", "\n", "ü", "\u{1b}", "\\\""] {
                let huge = unit.repeat(1 << 16);
                tracing::info!(target: "sds_agent", cause = huge, other = ?huge, n = 7, "huge {huge}");
            }
            // Many long fields.
            let long = "y".repeat(500);
            tracing::info!(target: "sds_agent", a = long, b = long, c = long, d = long, e = long, f = long, g = long, h = long, i = long, "many");
            let text = lines.take();
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines.len(), 6, "{format:?}");
            for line in lines {
                assert!(line.len() < MAX_LINE_BYTES, "{format:?}: {} bytes", line.len());
                assert!(line.contains(MARK), "{line}");
                if format == Format::Json {
                    let line: Value = serde_json::from_str(line).unwrap();
                    assert!(line["line_bytes"].as_u64().unwrap() > 4096);
                    assert_eq!(line["level"], "INFO");
                }
            }
        }
    }

    #[test]
    fn a_line_within_the_bound_is_left_alone() {
        for format in [Format::Json, Format::Text] {
            assert_eq!(bounded(b"{\"a\": 1}\n", format, 0), Cow::Borrowed(b"{\"a\": 1}\n"));
        }
        assert_eq!(&*bounded(b"one\ntwo\n", Format::Text, 0), b"one\\ntwo\n", "one event is one line");
        let long = "z".repeat(MAX_LINE_BYTES - 1) + "\n";
        assert_eq!(&*bounded(long.as_bytes(), Format::Text, 0), long.as_bytes());
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_lines_of_other_crates_are_limited_to_one_a_minute() {
        for format in [Format::Json, Format::Text] {
            let lines = Captured::default();
            let (_guard, _filter) = capture("debug", format, lines.clone()).unwrap();
            let flood = || {
                for number in 0..1000 {
                    tracing::warn!(target: "h2::proto::ping_pong", number, "recv PING ack that we never sent");
                }
            };
            flood();
            tracing::warn!(target: "h2::proto::ping_pong", "another line");
            assert_eq!(lines.take().lines().count(), 2);
            tokio::time::advance(std::time::Duration::from_secs(60)).await;
            flood();
            let text = lines.take();
            assert_eq!(text.lines().count(), 1);
            let told = if format == Format::Json { "\"left_out\":999" } else { "left_out=999" };
            assert!(text.contains(told), "{text}");
            for _ in 0..3 {
                tracing::debug!(target: "h2::proto::ping_pong", "for an operator who asks");
                tracing::info!(target: "sds_agent", "ours");
            }
            assert_eq!(lines.take().lines().count(), 6);
        }
    }
}
