//! The log's writer: events go into a bounded queue, and a thread of its own writes that queue to standard error.
//!
//! A log reader may stall: a node's disk hangs, a container runtime is away, a pipe is full. `write(2)` then blocks for as long as the
//! reader stalls. Only this module's thread may block there. The queue is bounded in bytes and in lines; lines that do not fit are dropped
//! and counted, and one line in the log tells how many once the reader is back. The caller owes a [`flush`](LogWriter::flush), which is
//! bounded in time, before the process ends.
//!
//! `tracing-appender` was considered. Its queue is bounded in lines only, its count of dropped lines does not reach the log, and it brings
//! two more dependencies.

use std::{
    fmt,
    io::{self, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::{Condvar, Mutex, MutexGuard};
use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::fmt::MakeWriter;

use super::Format;

/// The most bytes that wait for the reader. As many again are being written.
const MAX_QUEUED_BYTES: usize = 512 << 10;
/// The most lines that wait for the reader.
const MAX_QUEUED_LINES: usize = 4096;
/// A buffer that has grown beyond this many bytes is given back once it is empty.
const MAX_IDLE_BYTES: usize = 16 << 10;
/// The stack of the writing thread, in bytes. Locked memory counts it.
const STACK_BYTES: usize = 128 << 10;
/// The target of the line about dropped lines.
const TARGET: &str = "sds_agent::telemetry::writer";
/// The message of that line.
const DROPPED: &str = "log lines were dropped: the reader of the log was too slow";

/// Takes lines without blocking. Clones write to the same queue.
#[derive(Clone)]
pub struct LogWriter(Arc<Shared>);

impl fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogWriter")
    }
}

struct Shared {
    queue: Mutex<Queue>,
    /// Signalled when there is something to write.
    filled: Condvar,
    /// Signalled when everything has been written.
    emptied: Condvar,
    dropped: Counter,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    lines: usize,
    /// Lines dropped since the last line about them.
    dropped: u64,
    is_writing: bool,
}

impl LogWriter {
    /// Starts the thread that writes to `out`; `dropped` counts the lines that were not written.
    pub fn start(out: impl Write + Send + 'static, format: Format, dropped: Counter) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), filled: Condvar::new(), emptied: Condvar::new(), dropped });
        let writing = shared.clone();
        // It ends with the process: events may come until then.
        thread::Builder::new().name("log".to_owned()).stack_size(STACK_BYTES).spawn(move || writing.write(out, format))?;
        Ok(Self(shared))
    }

    /// Waits until every line that was queued before has been written, for at most `within`. Returns whether they were.
    pub fn flush(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut queue = self.0.queue();
        while queue.is_writing || !queue.bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.0.emptied.wait_for(&mut queue, left);
        }
        true
    }

    fn push(&self, line: &[u8]) {
        let mut queue = self.0.queue();
        if queue.lines >= MAX_QUEUED_LINES || queue.bytes.len() + line.len() > MAX_QUEUED_BYTES {
            queue.dropped += 1;
            self.0.dropped.inc();
            return;
        }
        queue.bytes.extend_from_slice(line);
        queue.lines += 1;
        drop(queue);
        self.0.filled.notify_one();
    }
}

/// Each call is one line, as the formatting layer writes them. It never fails: there is no other place to report to.
impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    /// The writing thread.
    fn write(&self, mut out: impl Write, format: Format) {
        let mut batch = Vec::new();
        loop {
            // Lines were dropped because the batch was full: they belong after it.
            let dropped = self.next(&mut batch);
            let lost = write_lines(&mut out, &batch);
            self.dropped.inc_by(lost);
            let unreported = dropped + lost;
            if unreported > 0 && out.write_all(about(unreported, format, SystemTime::now()).as_bytes()).is_err() {
                self.queue().dropped += unreported;
            }
        }
    }

    /// Waits for lines, swaps them with the empty `batch`, and returns how many were dropped after them.
    fn next(&self, batch: &mut Vec<u8>) -> u64 {
        batch.clear();
        if batch.capacity() > MAX_IDLE_BYTES {
            *batch = Vec::new();
        }
        let mut queue = self.queue();
        queue.is_writing = false;
        self.emptied.notify_all();
        while queue.bytes.is_empty() {
            self.filled.wait(&mut queue);
        }
        std::mem::swap(&mut queue.bytes, batch);
        queue.lines = 0;
        queue.is_writing = true;
        std::mem::take(&mut queue.dropped)
    }
}

/// Writes whole `lines`, and returns how many could not be written.
fn write_lines(out: &mut impl Write, lines: &[u8]) -> u64 {
    let mut rest = lines;
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) => break,
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    rest.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The line about `lines` that were dropped.
fn about(lines: u64, format: Format, now: SystemTime) -> String {
    let timestamp = humantime::format_rfc3339_micros(now);
    match format {
        Format::Text => format!("{timestamp}  WARN {TARGET}: {DROPPED} lines={lines}\n"),
        Format::Json => {
            format!(r#"{{"timestamp":"{timestamp}","level":"WARN","message":"{DROPPED}","lines":{lines},"target":"{TARGET}"}}"#) + "\n"
        }
    }
}

/// Standard error without the lock and the buffer of [`io::Stderr`]: another writer, such as the one of a panic, must not wait for it.
#[derive(Debug)]
pub struct StandardError;

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(io::stderr(), bytes) {
                // Another process that has the same pipe may have made it non-blocking.
                Err(nix::Error::EAGAIN) => {
                    let stderr = io::stderr();
                    let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&stderr), PollFlags::POLLOUT)];
                    match poll(&mut fds, PollTimeout::NONE) {
                        Ok(_) | Err(nix::Error::EINTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, PipeReader, Read, pipe},
        sync::mpsc,
    };

    use super::*;

    /// A machine that is this slow fails every other test, too.
    const PATIENCE: Duration = Duration::from_secs(60);
    /// As long as a full line of the log.
    const LINE: [u8; 1024] = {
        let mut line = [b'x'; 1024];
        line[1023] = b'\n';
        line
    };

    fn started(format: Format) -> (LogWriter, PipeReader, Counter) {
        let (reader, writer) = pipe().unwrap();
        let dropped = Counter::default();
        (LogWriter::start(writer, format, dropped.clone()).unwrap(), reader, dropped)
    }

    /// Reads lines on a thread of its own, so that the test can wait with a bound.
    fn lines(reader: PipeReader) -> mpsc::Receiver<String> {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || BufReader::new(reader).lines().try_for_each(|line| tell.send(line.unwrap())));
        told
    }

    /// Awaits what the writing thread brings about.
    fn until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "it did not come");
            thread::yield_now();
        }
    }

    #[test]
    fn lines_dropped_on_a_stalled_reader_are_reported_in_the_log() {
        let (mut writer, reader, dropped) = started(Format::Json);
        let all = 3 * MAX_QUEUED_BYTES / LINE.len();
        // Nothing is read, and the pipe is full long before the end.
        for _ in 0..all {
            writer.write_all(&LINE).unwrap();
        }
        assert!(dropped.get() > 0);
        assert!(!LogWriter::flush(&writer, Duration::ZERO), "they are not written");
        let told = lines(reader);
        let (mut whole, mut reported) = (0, 0);
        while whole + reported < all {
            let line = told.recv_timeout(PATIENCE).unwrap();
            if line.starts_with('x') {
                whole += 1;
                continue;
            }
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!((&line["message"], &line["level"]), (&DROPPED.into(), &"WARN".into()));
            reported += usize::try_from(line["lines"].as_u64().unwrap()).unwrap();
        }
        assert_eq!(whole + reported, all, "each line is written or reported");
        assert_eq!(u64::try_from(reported).unwrap(), dropped.get());
        writer.write_all(b"and on\n").unwrap();
        assert!(LogWriter::flush(&writer, PATIENCE));
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), "and on");
    }

    #[test]
    fn short_lines_are_bounded_by_their_number() {
        let (mut writer, _reader, dropped) = started(Format::Text);
        // More than a pipe holds: the thread takes it, and is busy with it from then on.
        writer.write_all(&[b'x'; MAX_QUEUED_BYTES]).unwrap();
        until(|| writer.0.queue().bytes.is_empty());
        for _ in 0..MAX_QUEUED_LINES + 10 {
            writer.write_all(b"\n").unwrap();
        }
        assert_eq!((writer.0.queue().lines, dropped.get()), (MAX_QUEUED_LINES, 10));
    }

    #[test]
    fn a_flush_waits_for_the_lines_and_not_longer_than_it_may() {
        let (mut writer, mut reader, _) = started(Format::Text);
        assert!(LogWriter::flush(&writer, Duration::ZERO), "there is nothing to wait for");
        writer.write_all(b"one\n").unwrap();
        assert!(LogWriter::flush(&writer, PATIENCE));
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"one\n");
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        let (mut writer, reader, dropped) = started(Format::Text);
        drop(reader);
        writer.write_all(b"one\n").unwrap();
        until(|| writer.0.queue().dropped == 1);
        assert_eq!(dropped.get(), 1);
        assert!(LogWriter::flush(&writer, PATIENCE), "there is nothing left to wait for");
    }

    #[test]
    fn the_line_about_dropped_lines_has_the_form_of_the_others() {
        let now = SystemTime::UNIX_EPOCH;
        let json: serde_json::Value = serde_json::from_str(&about(3, Format::Json, now)).unwrap();
        assert_eq!(json["lines"], 3);
        assert_eq!(json["timestamp"], "1970-01-01T00:00:00.000000Z");
        assert!(about(3, Format::Text, now).ends_with("lines=3\n"));
    }
}
