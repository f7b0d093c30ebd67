//! The log's writer: events enter a bounded queue, and a separate thread writes that queue to standard error.
//!
//! The reader of the log may stall: the node's disk hangs, the container runtime does not respond, or the pipe is full. `write(2)` then
//! blocks, and only this module's thread may block there. The queue is limited to 512 KiB and 4,096 lines. Lines that do not fit are
//! dropped and counted, and a log line reports their number when the reader resumes. The caller calls [`flush`](LogWriter::flush), which is
//! bounded in time, before the process ends.
//!
//! `tracing-appender` was considered. Its queue is limited in lines only, its count of dropped lines does not reach the log, and it adds
//! two dependencies.

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

/// Maximum bytes in the queue. The thread may be writing as many again.
const MAX_QUEUED_BYTES: usize = 512 << 10;
/// Maximum lines in the queue.
const MAX_QUEUED_LINES: usize = 4096;
/// An empty buffer with a larger capacity than this, in bytes, is freed.
const MAX_IDLE_BYTES: usize = 16 << 10;
/// Stack size of the writing thread in bytes. It counts as locked memory.
const STACK_BYTES: usize = 128 << 10;
/// Target of the line about dropped lines.
const TARGET: &str = "sds_agent::telemetry::writer";
/// Message of that line.
const DROPPED: &str = "log lines were dropped: the reader of the log was too slow";

/// Queues lines without blocking. Clones share one queue.
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
    /// Starts the thread that writes to `out`. `dropped` counts the lines that were not written. The thread runs until the process ends.
    ///
    /// # Errors
    ///
    /// The error of starting the thread.
    pub fn start(out: impl Write + Send + 'static, format: Format, dropped: Counter) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), filled: Condvar::new(), emptied: Condvar::new(), dropped });
        let writing = shared.clone();
        // The thread is not joined, because events may arrive until the process ends.
        thread::Builder::new().name("log".to_owned()).stack_size(STACK_BYTES).spawn(move || writing.write(out, format))?;
        Ok(Self(shared))
    }

    /// Blocks until all queued lines have been written, for at most `within`. Returns whether they have been written.
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

/// Each call writes one line, as the formatting layer does. It returns no error, because there is no other place to report one.
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

    /// Runs the writing thread.
    fn write(&self, mut out: impl Write, format: Format) {
        let mut batch = Vec::new();
        loop {
            // Lines were dropped because the queue was full, so their number is reported after this batch.
            let dropped = self.next(&mut batch);
            let lost = write_lines(&mut out, &batch);
            self.dropped.inc_by(lost);
            let unreported = dropped + lost;
            if unreported > 0 && out.write_all(about(unreported, format, SystemTime::now()).as_bytes()).is_err() {
                self.queue().dropped += unreported;
            }
        }
    }

    /// Waits for lines, swaps them into the empty `batch`, and returns the number of lines that were dropped after them.
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

/// Writes `lines`, and returns the number of lines that could not be written.
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

/// Returns the log line that reports `lines` dropped lines.
fn about(lines: u64, format: Format, now: SystemTime) -> String {
    let timestamp = humantime::format_rfc3339_micros(now);
    match format {
        Format::Text => format!("{timestamp}  WARN {TARGET}: {DROPPED} lines={lines}\n"),
        Format::Json => {
            format!(r#"{{"timestamp":"{timestamp}","level":"WARN","message":"{DROPPED}","lines":{lines},"target":"{TARGET}"}}"#) + "\n"
        }
    }
}

/// Standard error without the lock of [`io::Stderr`], so that no other writer, such as a panic, waits for a write that blocks.
#[derive(Debug)]
pub struct StandardError;

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(io::stderr(), bytes) {
                // Another process with the same pipe may have set it to non-blocking mode.
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

    /// A generous time-out: a slower machine fails every other test too.
    const PATIENCE: Duration = Duration::from_secs(60);
    /// A line of 1 KiB.
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

    /// Reads lines on a separate thread, so that the test can wait with a time-out.
    fn lines(reader: PipeReader) -> mpsc::Receiver<String> {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || BufReader::new(reader).lines().try_for_each(|line| tell.send(line.unwrap())));
        told
    }

    /// Waits until the writing thread has made `condition` true.
    fn until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "the condition did not become true");
            thread::yield_now();
        }
    }

    #[test]
    fn lines_dropped_on_a_stalled_reader_are_reported_in_the_log() {
        let (mut writer, reader, dropped) = started(Format::Json);
        let all = 3 * MAX_QUEUED_BYTES / LINE.len();
        // The pipe is not read, and is full long before the end.
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
        // This line exceeds the capacity of the pipe: the thread takes it from the queue and blocks.
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
