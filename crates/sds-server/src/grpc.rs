//! gRPC framing for the calls that carry keys: requests are decoded without a retained buffer, responses are made of shared buffers.
//!
//! tonic's streaming types copy every message once more and keep a buffer as large as the largest request (an Envoy's first one has
//! 61 KB) for as long as the stream lives. These types do neither. A streaming response is a body that owns the future which drives
//! the stream: no task, no channel, and a client that does not read holds up nobody but itself. Follows the gRPC over HTTP/2 protocol;
//! compressed messages are refused, as no compression is ever offered.

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
use prost::Message;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status};

pub mod client;
pub mod table;

/// A message's prefix: the compression flag and the length.
pub const PREFIX: usize = 5;

/// Writes the prefix of a message of `len` bytes.
pub fn prefix(len: usize) -> [u8; PREFIX] {
    // Messages are far below 4 GiB.
    let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    [0, a, b, c, d]
}

/// Reads the messages of a request.
#[derive(Debug)]
pub struct Incoming<B> {
    body: B,
    pieces: Pieces,
    limit: usize,
}

impl<B> Incoming<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    /// Reads from `body`; a message longer than `limit` bytes is RESOURCE_EXHAUSTED.
    pub fn new(body: B, limit: usize) -> Self {
        Self { body, pieces: Pieces::default(), limit }
    }

    /// The next message; none when the client has said its last. Cancel-safe: what has arrived stays.
    pub async fn next<M: Message + Default>(&mut self) -> Result<Option<M>, Status> {
        loop {
            if let Some(message) = self.decode()? {
                return Ok(Some(message));
            }
            match poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.pieces.push(data);
                    }
                }
                Some(Err(error)) => return Err(Status::cancelled(format!("reading the request: {error}"))),
                None if self.pieces.remaining() == 0 => return Ok(None),
                None => return Err(Status::internal("the request ended within a message")),
            }
        }
    }

    /// The one message of a unary call.
    pub async fn only<M: Message + Default>(&mut self) -> Result<M, Status> {
        let message = self.next().await?.ok_or_else(|| Status::internal("the request has no message"))?;
        match self.next::<M>().await? {
            None => Ok(message),
            Some(_) => Err(Status::internal("the request has more than one message")),
        }
    }

    fn decode<M: Message + Default>(&mut self) -> Result<Option<M>, Status> {
        let Some((flag, len)) = self.pieces.peek_prefix() else { return Ok(None) };
        if flag != 0 {
            return Err(Status::unimplemented("compressed messages are not accepted"));
        }
        if len > self.limit {
            return Err(Status::resource_exhausted(format!(
                "a message of {len} bytes is longer than the {} that are accepted",
                self.limit
            )));
        }
        if self.pieces.remaining() < PREFIX + len {
            return Ok(None);
        }
        self.pieces.advance(PREFIX);
        let rest = self.pieces.remaining() - len;
        let message =
            M::decode((&mut self.pieces).take(len)).map_err(|e| Status::invalid_argument(format!("the message cannot be decoded: {e}")))?;
        // A message ends where its length says.
        let unread = self.pieces.remaining() - rest;
        self.pieces.advance(unread);
        if rest == 0 {
            self.pieces = Pieces::default();
        }
        Ok(Some(message))
    }
}

/// A piece that is smaller is joined to the one before it …
const COALESCE_BELOW_BYTES: usize = 512;
/// … until that is this large.
const MAX_COALESCED_BYTES: usize = 16 << 10;

/// Bytes in several pieces, read as one buffer: received ones as they came, or a message's that is to be sent.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        self.len += piece.len();
        match self.pieces.back_mut() {
            // A message that comes in crumbs costs what it has bytes, and not a buffer's handle for each.
            Some(last) if piece.len() < COALESCE_BELOW_BYTES && last.len() < MAX_COALESCED_BYTES => {
                let mut joined = std::mem::take(last).try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
                joined.extend_from_slice(&piece);
                *last = joined.freeze();
            }
            _ => self.pieces.push_back(piece),
        }
    }

    fn peek_prefix(&self) -> Option<(u8, usize)> {
        let mut head = [0; PREFIX];
        let mut bytes = self.pieces.iter().flat_map(|piece| piece.iter().copied());
        for byte in &mut head {
            *byte = bytes.next()?;
        }
        let [flag, a, b, c, d] = head;
        Some((flag, u32::from_be_bytes([a, b, c, d]) as usize))
    }
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

/// The driver's end of a streaming response.
#[derive(Debug, Clone)]
pub struct Sender(Arc<Mutex<VecDeque<Bytes>>>);

impl Sender {
    /// Sends the pieces of one message (its prefix included) and returns when the transport has taken them.
    pub async fn send(&mut self, pieces: impl IntoIterator<Item = Bytes>) {
        self.queue(|queue| queue.extend(pieces));
        // Nobody needs to be woken: the body that polls this future empties the queue before it polls again.
        poll_fn(|_| if self.queue(|queue| queue.is_empty()) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// Takes back what the transport has not taken of the last message. The stream cannot go on after it.
    pub fn take_back(&mut self) {
        self.queue(VecDeque::clear);
    }

    fn queue<T>(&self, work: impl FnOnce(&mut VecDeque<Bytes>) -> T) -> T {
        work(&mut self.0.lock())
    }
}

type Driver = Pin<Box<dyn Future<Output = Status> + Send>>;

/// A response's body: shared buffers, then the status as trailers.
pub struct Body {
    kind: Kind,
    /// Dropped with the body; never looked at.
    until_end: Option<Box<dyn Send>>,
}

enum Kind {
    /// A stream, driven by its own future; the future's result is the status.
    Driven { driver: Option<Driver>, queue: Sender, status: Option<Status> },
    /// One message that is there already, or none. It is one frame of the transport, whatever the number of its pieces.
    Fixed { message: Option<Pieces>, status: Option<Status> },
    /// A tonic service's, until `end`.
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

/// Keeps something for as long as a response is on its way.
pub trait UntilEnd {
    /// Drops `guard` with the response's body.
    fn until_end(self, guard: impl Send + 'static) -> Self;
}

impl UntilEnd for Response<Body> {
    fn until_end(mut self, guard: impl Send + 'static) -> Self {
        self.body_mut().until_end = Some(Box::new(guard));
        self
    }
}

impl Body {
    /// A tonic service's body. It does not outlast `end`: a watch of the health would go on for as long as its client likes.
    pub fn tonic(body: tonic::body::Body, end: CancellationToken) -> Self {
        Self::of(Kind::Tonic { body, end: Box::pin(end.cancelled_owned()) })
    }
}

/// What who is still there is told when the agent goes.
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
                // Before each piece: the driver may take back what the transport has not taken.
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

/// A streaming response, driven by the future that `drive` makes around its sender.
pub fn streaming<F>(drive: impl FnOnce(Sender) -> F) -> Response<Body>
where
    F: Future<Output = Status> + Send + 'static,
{
    let queue = Sender(Arc::default());
    let driver: Driver = Box::pin(drive(queue.clone()));
    respond(Body::of(Kind::Driven { driver: Some(driver), queue, status: None }))
}

/// The answer of a unary call: the pieces of one message (its prefix included), or an error.
pub fn unary(result: Result<VecDeque<Bytes>, Status>) -> Response<Body> {
    match result {
        Ok(pieces) => respond(Body::of(Kind::Fixed { message: Some(pieces.into()), status: Some(Status::ok("")) })),
        Err(status) => {
            // Trailers-only: the status is in the head.
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

/// The caller's deadline: `grpc-timeout`, at most eight digits and a unit. What cannot be read counts as absent.
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

/// A protobuf message that is made of a small head and shared pieces: the prefix and the head's fields in one buffer.
pub fn head(fields: &[u8], pieces: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(PREFIX + fields.len());
    out.extend_from_slice(&prefix(fields.len() + pieces));
    out.extend_from_slice(fields);
    out.freeze()
}

#[cfg(test)]
mod tests;
