//! Framing of messages that arrive in pieces of any size, and the bodies of responses.

use std::convert::Infallible;

use http_body_util::{BodyExt, StreamBody};

use super::*;
use crate::proto::envoy::service::discovery::v3::DiscoveryRequest;

fn frames(bytes: impl AsRef<[u8]>, size: usize) -> impl HttpBody<Data = Bytes, Error = Infallible> + Unpin {
    let pieces: Vec<_> = bytes.as_ref().chunks(size).map(|c| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(c)))).collect();
    StreamBody::new(futures::stream::iter(pieces))
}

fn message(name: &str) -> (DiscoveryRequest, Vec<u8>) {
    let message = DiscoveryRequest { resource_names: vec![name.to_owned()], ..Default::default() };
    let bytes = [&prefix(message.encoded_len())[..], &message.encode_to_vec()].concat();
    (message, bytes)
}

#[tokio::test]
async fn messages_are_read_however_they_are_cut() {
    let (a, first) = message("default");
    let (b, second) = message(&"x".repeat(300));
    for size in [1, 2, 3, 4, 5, 6, 7, 100, 10_000] {
        let mut incoming = Incoming::new(frames([first.clone(), second.clone()].concat(), size), 1000);
        assert_eq!(incoming.next::<DiscoveryRequest>().await.unwrap(), Some(a.clone()), "pieces of {size}");
        assert_eq!(incoming.next::<DiscoveryRequest>().await.unwrap(), Some(b.clone()));
        assert_eq!(incoming.next::<DiscoveryRequest>().await.unwrap(), None);
    }
}

#[test]
fn a_message_in_crumbs_is_kept_in_few_pieces() {
    let bytes: Vec<u8> = (0..=250).cycle().take(300_000).collect();
    let mut pieces = Pieces::default();
    let shared = Bytes::from(bytes.clone());
    for at in 0..shared.len() {
        pieces.push(shared.slice(at..=at));
    }
    assert!(pieces.pieces.len() <= bytes.len() / MAX_COALESCED_BYTES + 1, "{} pieces", pieces.pieces.len());
    let mut read = vec![0; bytes.len()];
    pieces.copy_to_slice(&mut read);
    assert_eq!(read, bytes);
}

#[tokio::test]
async fn an_unknown_field_as_large_as_an_envoys_node_is_skipped() {
    let mut bytes = vec![0x12, 0x80, 0xe0, 0x03];
    bytes.extend(vec![7; 61_440]);
    bytes.extend(message("default").1.split_off(PREFIX));
    let bytes = [&prefix(bytes.len())[..], &bytes].concat();
    let mut incoming = Incoming::new(frames(bytes, 16_384), 512 << 10);
    assert_eq!(incoming.only::<DiscoveryRequest>().await.unwrap(), message("default").0);
}

#[tokio::test]
async fn what_is_no_message_has_a_status_of_its_own() {
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
        let error = Incoming::new(frames(bytes, 64), 1000).only::<DiscoveryRequest>().await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
}

#[tokio::test]
async fn a_driven_body_sends_what_its_driver_sends_and_then_the_status() {
    let response = streaming(|mut sender| async move {
        for _ in 0..3 {
            sender.send([Bytes::from_static(b"ab"), Bytes::from_static(b"c")]).await;
        }
        Status::unavailable("closing")
    });
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "14");
    assert_eq!(collected.to_bytes(), "abcabcabc");
}

#[tokio::test]
async fn a_driver_waits_until_the_transport_has_taken_its_message() {
    let sent = Arc::new(Mutex::new(0));
    let count = sent.clone();
    let mut body = streaming(|mut sender| async move {
        loop {
            sender.send([Bytes::from_static(b"a"), Bytes::from_static(b"b")]).await;
            *count.lock() += 1;
        }
    })
    .into_body();
    for expected in [0, 0, 1, 1, 2] {
        body.frame().await.unwrap().unwrap();
        assert_eq!(*sent.lock(), expected);
    }
}

#[test]
fn deadlines_are_read_in_every_unit_and_nonsense_is_none() {
    let read = |text: &str| timeout(&HeaderMap::from_iter([(http::HeaderName::from_static("grpc-timeout"), text.parse().unwrap())]));
    assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
    assert_eq!(read("3M"), Some(Duration::from_secs(180)));
    assert_eq!(read("4S"), Some(Duration::from_secs(4)));
    assert_eq!(read("5m"), Some(Duration::from_millis(5)));
    assert_eq!(read("6u"), Some(Duration::from_micros(6)));
    assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
    for bad in ["", "S", "1", "123456789S", "-1S", "+1S", "1s", "1.5S"] {
        assert_eq!(read(bad), None, "{bad}");
    }
}

#[tokio::test]
async fn a_unary_answer_is_one_frame_of_its_pieces_and_then_the_status() {
    let mut body = unary(Ok(["a", "bc"].map(Bytes::from).into())).into_body();
    let message = body.frame().await.unwrap().unwrap().into_data().unwrap();
    let mut slices = [IoSlice::new(&[]); 4];
    assert_eq!(message.chunks_vectored(&mut slices), 2, "the pieces are not copied and can be written with one system call");
    assert_eq!((message.remaining(), &*slices[0], &*slices[1]), (3, &b"a"[..], &b"bc"[..]));
    assert_eq!(body.frame().await.unwrap().unwrap().trailers_ref().unwrap()["grpc-status"], "0");
    assert!(body.is_end_stream());
}
