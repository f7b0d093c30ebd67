//! Serves HTTP/2 on one connection, and reads the requests of its calls.
//!
//! The connection and all its requests are polled by one task. After each batch of received bytes, the task moves what belongs to a request
//! into the buffers of the calls, so that h2 never holds more than one batch. Without this, a call that does not read would leave its
//! request in h2, and a received frame of one byte keeps a buffer of 8 or 16 KiB there.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::Body as HttpBody;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use crate::grpc::request::Intake;

/// Bytes after which the connection reads no further before the requests are moved out of h2. One read may exceed it.
const BATCH_BYTES: usize = 32 << 10;
/// Batches before the task yields.
const MAX_BATCHES_IN_A_ROW: usize = 16;

/// The bytes that were read since the requests were last moved.
#[derive(Debug, Default)]
pub(super) struct Batch(AtomicUsize);

impl Batch {
    /// Begins the next batch. Returns whether the last one was full.
    fn begin(&self) -> bool {
        self.0.swap(0, Ordering::Relaxed) >= BATCH_BYTES
    }
}

/// Limits what is read at once. A read beyond the batch is pending without a wake-up: [`Serving`] polls the connection again.
#[derive(Debug)]
pub(super) struct Batched<S> {
    stream: S,
    batch: Arc<Batch>,
}

impl<S> Batched<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, batch: Arc::default() }
    }

    pub(super) fn batch(&self) -> Arc<Batch> {
        self.batch.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Batched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.batch.0.load(Ordering::Relaxed) >= BATCH_BYTES {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.batch.0.fetch_add(buf.filled().len() - before, Ordering::Relaxed);
        read
    }
}

/// The requests of the calls that have begun since the last poll.
pub(super) type Begun<B> = Mutex<Vec<Intake<B>>>;

/// The requests that are being read.
#[derive(Debug)]
struct Intakes<B> {
    all: Vec<Intake<B>>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> Intakes<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    /// Moves everything that has arrived into the buffers of the calls.
    fn poll(&mut self, cx: &mut Context<'_>) {
        if self.all.is_empty() {
            self.timer = None;
            return;
        }
        let now = Instant::now();
        self.all.retain_mut(|intake| intake.poll(cx, now).is_pending());
        if self.all.capacity() > 8 && self.all.len() < self.all.capacity() / 4 {
            self.all.shrink_to_fit();
        }
        let Some(due) = self.all.iter().filter_map(Intake::due).min() else {
            self.timer = None;
            return;
        };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        if timer.as_mut().poll(cx).is_ready() {
            // Due between `now` and here.
            cx.waker().wake_by_ref();
        }
    }
}

/// The future of a connection and of the requests of its calls.
pub(super) struct Serving<'a, C, B> {
    connection: Pin<&'a mut C>,
    begun: &'a Begun<B>,
    intakes: Intakes<B>,
    batch: Arc<Batch>,
}

impl<'a, C, B> Serving<'a, C, B> {
    /// Serves `connection`, which reads from a stream with this batch. Its calls add their requests to `begun`.
    pub(super) fn new(connection: Pin<&'a mut C>, begun: &'a Begun<B>, batch: Arc<Batch>) -> Self {
        Self { connection, begun, intakes: Intakes { all: Vec::new(), timer: None }, batch }
    }

    /// The connection itself.
    pub(super) fn connection(&mut self) -> Pin<&mut C> {
        self.connection.as_mut()
    }
}

impl<C, B> Future for Serving<'_, C, B>
where
    C: Future,
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let this = &mut *self;
        for _ in 0..MAX_BATCHES_IN_A_ROW {
            if let Poll::Ready(ended) = this.connection.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            this.intakes.all.append(&mut this.begun.lock());
            this.intakes.poll(cx);
            if !this.batch.begin() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_read_beyond_the_batch_waits_for_the_next_batch() {
        const CHUNK: usize = 10_000;
        let (mut client, server) = duplex(4 * BATCH_BYTES);
        let mut server = Batched::new(server);
        let batch = server.batch();
        client.write_all(&vec![7; 2 * BATCH_BYTES + 5]).await.unwrap();
        drop(client);
        let mut sizes = Vec::new();
        loop {
            let mut got = 0;
            let mut chunk = vec![0; CHUNK];
            while let Ok(read) = tokio::time::timeout(Duration::ZERO, server.read(&mut chunk)).await {
                let read = read.unwrap();
                assert!(chunk[..read].iter().all(|byte| *byte == 7));
                got += read;
                if read == 0 {
                    break;
                }
            }
            sizes.push(got);
            if !batch.begin() {
                break;
            }
        }
        assert_eq!(sizes.iter().sum::<usize>(), 2 * BATCH_BYTES + 5);
        assert!(sizes.len() >= 2 && sizes.iter().all(|size| *size < BATCH_BYTES + CHUNK), "{sizes:?}");
    }
}
