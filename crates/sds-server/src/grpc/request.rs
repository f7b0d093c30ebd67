//! The request of a call: from the body that h2 fills to the messages that the call reads.
//!
//! A client decides when it sends and whether it reads. So a call must not decide when its request is read: what it left unread would stay
//! in h2, where a few bytes can keep a whole read buffer in memory, and where they are charged to no caller. The task of the connection
//! reads all requests of its calls through an `Intake` for each. The intake copies what the service uses into a buffer of its own,
//! charges the buffer to the caller, and drops each received piece before it asks for the next. The call reads complete messages from its
//! [`Inbox`].
//!
//! An intake lives as long as its call, which holds a `RequestGuard`. h2 keeps the trailers of a request until its stream ends, even if
//! the body was dropped. So what follows an error, and what a call does not read, is received and dropped.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame};
use parking_lot::{Mutex, MutexGuard};
use prost::Message;
use tokio::time::Instant;
use tonic::Status;

use self::filter::Filter;
use super::PREFIX;
use crate::session::quotas::{Charge, Exceeded};

mod filter;

#[cfg(any(test, feature = "testing"))]
pub use filter::filter as filter_messages;
pub use filter::{MessageKind, MessageLimits};

/// How a call reads its request.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// Limits for each message.
    pub message: MessageLimits,
    /// Time for the first message to arrive, and for each message from its first byte.
    pub patience: Duration,
}

/// The messages of one request, as its call reads them.
#[derive(Debug)]
pub struct Inbox(Arc<Mutex<Shared>>);

/// Belongs to a call, and ends the reading of its request when dropped.
#[derive(Debug)]
pub(crate) struct RequestGuard(Arc<Mutex<Shared>>);

/// Fills an [`Inbox`] from a body.
#[derive(Debug)]
pub(crate) struct Intake<B> {
    body: B,
    filter: Filter,
    limits: RequestLimits,
    /// The time by which the message in progress, or the first one, has to be complete.
    due: Option<Instant>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    /// Complete messages with their prefixes.
    messages: VecDeque<Bytes>,
    /// Bytes of `messages`.
    bytes: usize,
    /// Bytes of the incomplete message.
    incomplete: usize,
    charge: Charge,
    /// The end of the request, after the messages.
    end: Option<Result<(), Status>>,
    reader: Option<Waker>,
    /// Whether the call reads no further message.
    is_abandoned: bool,
    /// Whether the call has ended.
    is_over: bool,
    intake: Option<Waker>,
}

impl Shared {
    fn recharge(&mut self) -> Result<(), Exceeded> {
        self.charge.set(self.bytes + self.incomplete)
    }

    fn end(&mut self, end: Result<(), Status>) {
        self.incomplete = 0;
        // A smaller charge does not fail.
        let _ = self.recharge();
        self.end.get_or_insert(end);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// The next message, the end of the request, or its error.
    fn poll_next(&mut self, cx: &Context<'_>) -> Poll<Option<Result<Bytes, Status>>> {
        if let Some(message) = self.messages.pop_front() {
            self.bytes -= message.len();
            let _ = self.recharge();
            return Poll::Ready(Some(Ok(message)));
        }
        match &self.end {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(status)) => Poll::Ready(Some(Err(status.clone()))),
            None => {
                self.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Returns the two ends of a request, and the guard for its call. The bytes that they hold are charged to `charge`.
pub(crate) fn channel<B>(
    body: B,
    kind: MessageKind,
    limits: RequestLimits,
    charge: Charge,
    now: Instant,
) -> (Intake<B>, Inbox, RequestGuard) {
    let shared = Arc::new(Mutex::new(Shared {
        messages: VecDeque::new(),
        bytes: 0,
        incomplete: 0,
        charge,
        end: None,
        reader: None,
        is_abandoned: false,
        is_over: false,
        intake: None,
    }));
    let due = Some(now + limits.patience);
    let intake = Intake { body, filter: Filter::new(kind, limits.message), limits, due, shared: shared.clone() };
    (intake, Inbox(shared.clone()), RequestGuard(shared))
}

impl<B> Intake<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    /// Moves everything that has arrived into the inbox. After an error, and if the call reads no further message, drops it instead. Ready
    /// at the end of the request or of its call.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
        loop {
            let Some(is_read) = self.is_read(cx) else { return Poll::Ready(()) };
            if !is_read {
                self.due = None;
            }
            let end = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending if self.due.is_some_and(|due| due <= now) => {
                    Err(Status::deadline_exceeded("a message of the request did not arrive completely in time"))
                }
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if is_read => match self.take(&data, now) {
                        Ok(()) => continue,
                        Err(status) => Err(status),
                    },
                    Ok(_) | Err(_) => continue,
                },
                Poll::Ready(Some(Err(error))) => return self.end(Err(Status::cancelled(format!("reading the request: {error}")))),
                Poll::Ready(None) if self.filter.is_within_message() => {
                    return self.end(Err(Status::internal("the request ended within a message")));
                }
                Poll::Ready(None) => return self.end(Ok(())),
            };
            self.shared.lock().end(end);
        }
    }

    /// Whether the call reads what arrives, or `None` after the end of the call. `cx` is woken at that end.
    fn is_read(&self, cx: &Context<'_>) -> Option<bool> {
        let mut shared = self.shared.lock();
        if shared.is_over {
            return None;
        }
        if !shared.intake.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            shared.intake = Some(cx.waker().clone());
        }
        Some(!shared.is_abandoned && shared.end.is_none())
    }

    /// Ends the request at the end of its body.
    fn end(&self, end: Result<(), Status>) -> Poll<()> {
        let mut shared = self.shared.lock();
        shared.end(end);
        shared.intake = None;
        Poll::Ready(())
    }

    /// The time by which [`poll`](Self::poll) has to be called again, if nothing arrives.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    fn take(&mut self, mut data: &[u8], now: Instant) -> Result<(), Status> {
        let mut shared = self.shared.lock();
        while let Some(message) = self.filter.next(&mut data)? {
            self.due = None;
            shared.bytes += message.len();
            shared.messages.push_back(message.into());
        }
        if self.filter.is_within_message() {
            self.due.get_or_insert(now + self.limits.patience);
        }
        if shared.bytes > self.limits.message.bytes + PREFIX {
            return Err(Status::resource_exhausted("the client sends requests and does not read the responses"));
        }
        shared.incomplete = self.filter.held();
        shared.recharge().map_err(over_memory)?;
        if !shared.messages.is_empty()
            && let Some(reader) = shared.reader.take()
        {
            reader.wake();
        }
        Ok(())
    }
}

/// A call whose connection has ended must not wait for its request.
impl<B> Drop for Intake<B> {
    fn drop(&mut self) {
        self.shared.lock().end(Err(Status::cancelled("the connection has ended")));
    }
}

/// The status of a call that may not hold more.
pub(crate) fn over_memory(exceeded: Exceeded) -> Status {
    let (_, limit) = exceeded.of_memory();
    Status::resource_exhausted(format!("the agent may not hold more memory for this caller ({limit})"))
}

impl Inbox {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.lock()
    }

    /// The request in `body`, read by a task of its own, without quotas and deadlines.
    #[cfg(any(test, feature = "testing"))]
    pub fn of_body<B>(body: B, kind: MessageKind) -> Self
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let limits = crate::limits::Limits::default();
        let quotas = crate::session::quotas::Quotas::new(&limits.clone().undivided());
        let now = Instant::now();
        let message = MessageLimits { bytes: limits.message_bytes, names: limits.names_per_stream };
        let limits = RequestLimits { message, patience: Duration::from_secs(1 << 30) };
        let (mut intake, inbox, guard) = channel(body, kind, limits, quotas.charge(), now);
        tokio::spawn(async move {
            let _guard = guard;
            std::future::poll_fn(|cx| intake.poll(cx, now)).await;
        });
        inbox
    }

    /// A charge to the caller, for what its call holds.
    pub fn charge(&self) -> Charge {
        self.shared().charge.another()
    }

    /// Returns the next message, or `None` after the end of the request.
    ///
    /// # Errors
    ///
    /// - CANCELLED: the body cannot be read.
    /// - DEADLINE_EXCEEDED: a message did not arrive completely in time.
    /// - UNIMPLEMENTED: the message is compressed.
    /// - RESOURCE_EXHAUSTED: the message is longer than the limit or has too many names, or the agent may not hold more for this caller.
    /// - INVALID_ARGUMENT: the message is not valid Protobuf.
    /// - INTERNAL: the request ends within a message.
    ///
    /// # Cancel safety
    ///
    /// No message is lost if the future is dropped.
    pub async fn next<M: Message + Default>(&mut self) -> Result<Option<M>, Status> {
        let Some(message) = std::future::poll_fn(|cx| self.shared().poll_next(cx)).await.transpose()? else { return Ok(None) };
        M::decode(message.get(PREFIX..).unwrap_or_default())
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("the message cannot be decoded: {error}")))
    }

    /// Returns the only message of a unary call.
    ///
    /// # Errors
    ///
    /// Those of [`next`](Self::next), and INTERNAL if the request has no message or more than one.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: a message that was already read is lost if the future is dropped.
    pub async fn only<M: Message + Default>(&mut self) -> Result<M, Status> {
        let message = self.next().await?.ok_or_else(|| Status::internal("the request has no message"))?;
        match self.next::<M>().await? {
            None => Ok(message),
            Some(_) => Err(Status::internal("the request has more than one message")),
        }
    }
}

/// For services of tonic.
impl HttpBody for Inbox {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let next = ready!(self.shared().poll_next(cx));
        Poll::Ready(next.map(|message| message.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.shared();
        shared.messages.is_empty() && matches!(shared.end, Some(Ok(())))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let mut shared = self.0.lock();
        shared.is_over = true;
        if let Some(intake) = shared.intake.take() {
            intake.wake();
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut shared = self.shared();
        shared.is_abandoned = true;
        shared.messages.clear();
        (shared.bytes, shared.incomplete) = (0, 0);
        let _ = shared.recharge();
    }
}

#[cfg(test)]
mod tests;
