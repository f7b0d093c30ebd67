//! gRPC framing for calls that carry private keys. Requests are read without a retained buffer ([`request`]); responses are built from
//! shared buffers.
//!
//! tonic's streaming types copy every message again. They also keep a buffer as large as the largest request for the life of the stream;
//! the first request of an Envoy has up to 61 KB. The types of this module do neither.
//!
//! The body of a streaming response owns the future that drives the stream. The stream needs no task and no channel, and a client that does
//! not read blocks only itself.
//!
//! The framing follows [gRPC over HTTP/2](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md). Compressed messages are rejected
//! with UNIMPLEMENTED, because the server offers no compression.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    io::IoSlice,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::{Body as HttpBody, Frame};
use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status};

pub mod client;
pub mod request;
pub mod table;

/// Bytes of the prefix of a message: the compression flag (1 byte) and the length (4 bytes, big-endian).
pub const PREFIX: usize = 5;

/// Returns the prefix of an uncompressed message of `len` bytes.
pub fn prefix(len: usize) -> [u8; PREFIX] {
    // Messages are far below 4 GiB.
    let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    [0, a, b, c, d]
}

/// Several buffers that are read as one: the pieces of a message to send.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl From<VecDeque<Bytes>> for Pieces {
    fn from(pieces: VecDeque<Bytes>) -> Self {
        let len = pieces.iter().map(Bytes::len).sum();
        Self { pieces, len }
    }
}

impl From<Bytes> for Pieces {
    fn from(piece: Bytes) -> Self {
        VecDeque::from([piece]).into()
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        slices.iter_mut().zip(&self.pieces).map(|(slice, piece)| *slice = IoSlice::new(piece)).count()
    }

    fn advance(&mut self, mut count: usize) {
        self.len -= count.min(self.len);
        while let Some(front) = self.pieces.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
    }
}

/// The sending half of a streaming response, for the future that drives it.
#[derive(Debug, Clone)]
pub struct Sender(Arc<Mutex<VecDeque<Bytes>>>);

impl Sender {
    /// Sends the pieces of one message, prefix included. Returns when the transport has taken all of them.
    ///
    /// # Cancel safety
    ///
    /// The pieces are queued at the first poll. They stay queued and are sent if the future is dropped after that. To discard them, call
    /// [`take_back`](Self::take_back).
    pub async fn send(&mut self, pieces: impl IntoIterator<Item = Bytes>) {
        self.queue(|queue| queue.extend(pieces));
        // No wake-up is needed: the body that polls this future empties the queue before it polls again.
        poll_fn(|_| if self.queue(|queue| queue.is_empty()) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// Discards the pieces that the transport has not taken. The stream must end afterwards, because the last message may be incomplete.
    pub fn take_back(&mut self) {
        self.queue(VecDeque::clear);
    }

    fn queue<T>(&self, work: impl FnOnce(&mut VecDeque<Bytes>) -> T) -> T {
        work(&mut self.0.lock())
    }
}

type Driver = Pin<Box<dyn Future<Output = Status> + Send>>;

/// The body of a response: shared buffers, then the status as trailers.
pub struct Body {
    kind: Kind,
    /// Dropped with the body, and otherwise unused.
    until_end: Option<Box<dyn Send>>,
}

enum Kind {
    /// A stream, driven by its own future. The result of the future is the status.
    Driven { driver: Option<Driver>, queue: Sender, status: Option<Status> },
    /// One complete message, or no message. All pieces of the message are one body frame.
    Fixed { message: Option<Pieces>, status: Option<Status> },
    /// The body of a tonic service. It ends with [`closing`] when `end` completes.
    Tonic { body: tonic::body::Body, end: Pin<Box<WaitForCancellationFutureOwned>> },
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Body")
    }
}

impl Body {
    fn of(kind: Kind) -> Self {
        Self { kind, until_end: None }
    }
}

/// Attaches a value to a response.
pub trait UntilEnd {
    /// Keeps `guard` until the body of the response is dropped.
    fn until_end(self, guard: impl Send + 'static) -> Self;
}

impl UntilEnd for Response<Body> {
    fn until_end(mut self, guard: impl Send + 'static) -> Self {
        self.body_mut().until_end = Some(Box::new(guard));
        self
    }
}

impl Body {
    /// Wraps the body of a tonic service. The body ends with [`closing`] when `end` is cancelled. Otherwise a health watch would stay open
    /// for as long as its client does.
    pub fn tonic(body: tonic::body::Body, end: CancellationToken) -> Self {
        Self::of(Kind::Tonic { body, end: Box::pin(end.cancelled_owned()) })
    }
}

/// Status for streams and calls that are open at shutdown: UNAVAILABLE.
pub fn closing() -> Status {
    Status::unavailable("the agent is shutting down")
}

impl HttpBody for Body {
    type Data = Pieces;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Pieces>, Status>>> {
        match &mut self.kind {
            Kind::Tonic { body, end } => {
                let frame = Pin::new(body).poll_frame(cx).map_ok(|frame| frame.map_data(Pieces::from));
                if frame.is_pending() && end.as_mut().poll(cx).is_ready() {
                    self.kind = Kind::Fixed { message: None, status: None };
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers(&closing())))));
                }
                frame
            }
            Kind::Fixed { message, status } => Poll::Ready(match message.take() {
                Some(message) => Some(Ok(Frame::data(message))),
                None => status.take().map(|status| Ok(Frame::trailers(trailers(&status)))),
            }),
            Kind::Driven { driver, queue, status } => {
                // The driver is polled before each piece, because it may take back pieces that the transport has not taken.
                if let Some(Poll::Ready(end)) = driver.as_mut().map(|future| future.as_mut().poll(cx)) {
                    *driver = None;
                    *status = Some(end);
                }
                if let Some(piece) = queue.queue(VecDeque::pop_front) {
                    return Poll::Ready(Some(Ok(Frame::data(piece.into()))));
                }
                match status.take() {
                    Some(status) => Poll::Ready(Some(Ok(Frame::trailers(trailers(&status))))),
                    None if driver.is_some() => Poll::Pending,
                    None => Poll::Ready(None),
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Tonic { body, .. } => body.is_end_stream(),
            Kind::Fixed { message, status } => message.is_none() && status.is_none(),
            Kind::Driven { .. } => false,
        }
    }
}

/// Returns a streaming response. `drive` receives the [`Sender`] and returns the future that drives the stream; the result of the future is
/// the status.
pub fn streaming<F>(drive: impl FnOnce(Sender) -> F) -> Response<Body>
where
    F: Future<Output = Status> + Send + 'static,
{
    let queue = Sender(Arc::default());
    let driver: Driver = Box::pin(drive(queue.clone()));
    respond(Body::of(Kind::Driven { driver: Some(driver), queue, status: None }))
}

/// Returns the response of a unary call: the pieces of one message, prefix included, or an error.
pub fn unary(result: Result<VecDeque<Bytes>, Status>) -> Response<Body> {
    match result {
        Ok(pieces) => respond(Body::of(Kind::Fixed { message: Some(pieces.into()), status: Some(Status::ok("")) })),
        Err(status) => {
            // A Trailers-Only response: the status is in the headers.
            let mut response = respond(Body::of(Kind::Fixed { message: None, status: None }));
            response.headers_mut().extend(trailers(&status));
            response
        }
    }
}

fn respond(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn trailers(status: &Status) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(2);
    if status.add_header(&mut map).is_err() {
        map.insert("grpc-status", HeaderValue::from(Code::Internal as i32));
    }
    map
}

/// Returns the deadline of the client from `grpc-timeout`: at most eight digits and a unit. An invalid value counts as absent.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// Returns the first buffer of a message: the prefix and the encoded `fields`. `pieces` is the number of bytes that follow in shared
/// buffers.
pub fn head(fields: &[u8], pieces: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(PREFIX + fields.len());
    out.extend_from_slice(&prefix(fields.len() + pieces));
    out.extend_from_slice(fields);
    out.freeze()
}

#[cfg(test)]
mod tests;
