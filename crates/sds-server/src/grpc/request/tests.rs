//! Requests that arrive in pieces of any size, late, or never completely.

use std::convert::Infallible;

use futures::{FutureExt as _, channel::mpsc, future::poll_fn};
use http_body_util::StreamBody;
use tonic::Code;

use super::*;
use crate::{
    attest::origin::Origin,
    grpc::prefix,
    limits::Limits,
    proto::envoy::service::discovery::v3::DiscoveryRequest,
    session::quotas::{ConnectionSlot, Quotas},
};

const LIMITS: RequestLimits = RequestLimits { message: MessageLimits { bytes: 1000, names: 64 }, patience: Duration::from_secs(10) };
/// Bytes that the caller may hold besides its connection.
const OWN: usize = 4096;

type Frames = mpsc::UnboundedSender<Result<Frame<Bytes>, Infallible>>;

/// A caller with a connection.
fn caller() -> (Quotas, ConnectionSlot) {
    let reserved = crate::session::quotas::CONNECTION_BYTES;
    let quotas = Quotas::new(&Limits { memory_bytes_per_pod: reserved + OWN, ..Limits::default() });
    let mut slot = quotas.admit(&Origin::User(1), Instant::now()).unwrap();
    slot.reserve().unwrap();
    (quotas, slot)
}

fn open(
    slot: &ConnectionSlot,
    kind: MessageKind,
) -> (Frames, Intake<impl HttpBody<Data = Bytes, Error = Infallible> + Unpin + use<>>, Inbox, RequestGuard) {
    let (sender, frames) = mpsc::unbounded();
    let (intake, inbox, call) = channel(StreamBody::new(frames), kind, LIMITS, slot.charge(), Instant::now());
    (sender, intake, inbox, call)
}

fn send(frames: &Frames, bytes: &[u8], size: usize) {
    for piece in bytes.chunks(size) {
        frames.unbounded_send(Ok(Frame::data(Bytes::copy_from_slice(piece)))).unwrap();
    }
}

fn message(name: &str) -> (DiscoveryRequest, Vec<u8>) {
    let message = DiscoveryRequest { resource_names: vec![name.to_owned()], ..Default::default() };
    let bytes = [&prefix(message.encoded_len())[..], &message.encode_to_vec()].concat();
    (message, bytes)
}

/// Polls the intake once, as the task of a connection does.
async fn step<B>(intake: &mut Intake<B>) -> Poll<()>
where
    B: HttpBody<Data = Bytes, Error = Infallible> + Unpin,
{
    poll_fn(|cx| Poll::Ready(intake.poll(cx, Instant::now()))).await
}

#[tokio::test]
async fn messages_are_read_however_they_are_cut() {
    let (_quotas, slot) = caller();
    let ((a, first), (b, second)) = (message("default"), message(&"x".repeat(300)));
    for kind in [MessageKind::Sotw, MessageKind::Other] {
        for size in [1, 2, 3, 4, 5, 6, 7, 100, 10_000] {
            let (frames, mut intake, mut inbox, _call) = open(&slot, kind);
            send(&frames, &[first.clone(), second.clone()].concat(), size);
            drop(frames);
            assert!(step(&mut intake).await.is_ready());
            assert_eq!(inbox.next::<DiscoveryRequest>().await.unwrap(), Some(a.clone()), "pieces of {size}");
            assert_eq!(inbox.next::<DiscoveryRequest>().await.unwrap(), Some(b.clone()));
            assert_eq!(inbox.next::<DiscoveryRequest>().await.unwrap(), None);
        }
    }
}

#[tokio::test]
async fn what_is_no_message_has_a_status_of_its_own() {
    let (_quotas, slot) = caller();
    let (_, good) = message("default");
    let mut compressed = good.clone();
    compressed[0] = 1;
    let garbage = [&prefix(3)[..], &[0xff, 0xff, 0xff]].concat();
    for (bytes, code) in [
        (compressed, Code::Unimplemented),
        (prefix(1001).to_vec(), Code::ResourceExhausted),
        (good[..7].to_vec(), Code::Internal),
        (garbage, Code::InvalidArgument),
        (Vec::new(), Code::Internal),
        ([good.clone(), good].concat(), Code::Internal),
    ] {
        let (frames, mut intake, mut inbox, _call) = open(&slot, MessageKind::Sotw);
        send(&frames, &bytes, 64);
        drop(frames);
        assert!(step(&mut intake).await.is_ready());
        let error = inbox.only::<DiscoveryRequest>().await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
}

#[tokio::test]
async fn a_received_piece_is_not_kept() {
    let (_quotas, slot) = caller();
    let (frames, mut intake, _inbox, _call) = open(&slot, MessageKind::Other);
    // A slice of one byte would keep the whole buffer.
    let buffer = Bytes::from([&prefix(100)[..], &[0; 100]].concat());
    frames.unbounded_send(Ok(Frame::data(buffer.slice(..50)))).unwrap();
    assert!(step(&mut intake).await.is_pending());
    assert!(buffer.is_unique(), "the piece is still referenced");
}

#[tokio::test(start_paused = true)]
async fn the_first_message_and_each_begun_one_have_a_deadline() {
    let (_quotas, slot) = caller();
    let (_, good) = message("default");
    let late = async |frames: &Frames, intake: &mut Intake<_>, inbox: &mut Inbox| {
        let _open = frames;
        assert!(step(intake).await.is_pending());
        tokio::time::advance(LIMITS.patience - Duration::from_millis(1)).await;
        assert!(step(intake).await.is_pending());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(step(intake).await.is_pending());
        let ended = inbox.next::<DiscoveryRequest>().now_or_never().expect("the request has ended");
        assert_eq!(ended.unwrap_err().code(), Code::DeadlineExceeded);
        assert_eq!(intake.due(), None, "what follows has no deadline");
    };
    let (frames, mut intake, mut inbox, _call) = open(&slot, MessageKind::Sotw);
    late(&frames, &mut intake, &mut inbox).await;

    let (frames, mut intake, mut inbox, _call) = open(&slot, MessageKind::Sotw);
    send(&frames, &good, 100);
    assert!(step(&mut intake).await.is_pending());
    inbox.next::<DiscoveryRequest>().await.unwrap().unwrap();
    assert_eq!(intake.due(), None, "between two messages a client may wait");
    tokio::time::advance(100 * LIMITS.patience).await;
    send(&frames, &good[..good.len() - 1], 1);
    late(&frames, &mut intake, &mut inbox).await;
}

#[tokio::test]
async fn what_a_call_holds_is_charged_until_it_is_read_or_dropped() {
    let (quotas, slot) = caller();
    let idle = quotas.memory();
    let (_, big) = message(&"x".repeat(900));
    let (frames, mut intake, mut inbox, _call) = open(&slot, MessageKind::Sotw);
    send(&frames, &big[..800], 100);
    assert!(step(&mut intake).await.is_pending());
    let held = quotas.memory() - idle;
    assert!((800..2400).contains(&held), "{held}");
    send(&frames, &big[800..], 100);
    assert!(step(&mut intake).await.is_pending());
    inbox.next::<DiscoveryRequest>().await.unwrap().unwrap();
    assert_eq!(quotas.memory(), idle);

    // Other calls of the same caller share its limit. A rejected call gives back what it held.
    let mut others: Vec<_> = (0..10).map(|_| open(&slot, MessageKind::Sotw)).collect();
    let mut codes = Vec::new();
    for (frames, intake, inbox, _call) in &mut others {
        send(frames, &big[..900], 100);
        assert!(step(intake).await.is_pending());
        if let Some(Err(error)) = inbox.next::<DiscoveryRequest>().now_or_never() {
            codes.push(error.code());
        }
        assert!(quotas.memory() <= idle + OWN, "{}", quotas.memory());
    }
    assert!(!codes.is_empty() && codes.iter().all(|code| *code == Code::ResourceExhausted), "{codes:?}");
    drop(others);
    assert_eq!(quotas.memory(), idle);
}

#[tokio::test]
async fn messages_that_the_call_does_not_read_are_bounded() {
    let (_quotas, slot) = caller();
    let (frames, mut intake, mut inbox, _call) = open(&slot, MessageKind::Sotw);
    let (_, small) = message("default");
    for _ in 0..100 {
        send(&frames, &small, 100);
    }
    assert!(step(&mut intake).await.is_pending());
    let mut read = 0;
    let error = loop {
        match inbox.next::<DiscoveryRequest>().now_or_never().expect("messages, and then an error") {
            Ok(message) => read += usize::from(message.is_some()),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(read * small.len() <= 1000 + PREFIX + small.len(), "{read}");
}

#[tokio::test]
async fn a_call_does_not_outlive_its_connection() {
    let (quotas, slot) = caller();
    let idle = quotas.memory();
    let (frames, mut intake, mut inbox, _call) = open(&slot, MessageKind::Other);
    send(&frames, &message("default").1[..9], 100);
    assert!(step(&mut intake).await.is_pending());
    let reading = tokio::spawn(async move { inbox.next::<DiscoveryRequest>().await });
    tokio::task::yield_now().await;
    drop(intake);
    assert_eq!(reading.await.unwrap().unwrap_err().code(), Code::Cancelled);
    assert_eq!(quotas.memory(), idle);
}

/// A call that reads nothing more may go on, such as a fetch that waits for its certificate. h2 would keep what arrives.
#[tokio::test]
async fn what_a_call_does_not_read_is_received_and_dropped() {
    let (quotas, slot) = caller();
    let idle = quotas.memory();
    let over_limit = prefix(1001).to_vec();
    for ends in [None, Some(over_limit)] {
        let (frames, mut intake, inbox, _call) = open(&slot, MessageKind::Other);
        let mut inbox = Some(inbox);
        match ends {
            None => inbox = None,
            Some(bytes) => send(&frames, &bytes, 100),
        }
        assert!(step(&mut intake).await.is_pending());
        let late = Bytes::from(vec![0; 5000]);
        frames.unbounded_send(Ok(Frame::data(late.clone()))).unwrap();
        assert!(step(&mut intake).await.is_pending());
        assert!(late.is_unique(), "the piece is still referenced");
        let mut trailers = http::HeaderMap::new();
        trailers.insert("x-late", http::HeaderValue::from_static("late"));
        frames.unbounded_send(Ok(Frame::trailers(trailers))).unwrap();
        drop(frames);
        assert!(step(&mut intake).await.is_ready(), "nothing follows the trailers");
        assert_eq!(quotas.memory(), idle);
        if let Some(mut inbox) = inbox {
            assert_eq!(inbox.next::<DiscoveryRequest>().await.unwrap_err().code(), Code::ResourceExhausted);
        }
    }
}

#[tokio::test]
async fn a_call_that_has_ended_is_read_no_further() {
    let (_quotas, slot) = caller();
    let (_frames, mut intake, _inbox, call) = open(&slot, MessageKind::Other);
    let reading = tokio::spawn(poll_fn(move |cx| intake.poll(cx, Instant::now())));
    tokio::task::yield_now().await;
    drop(call);
    tokio::time::timeout(Duration::from_secs(10), reading).await.expect("the end of the call wakes the intake").unwrap();
}
