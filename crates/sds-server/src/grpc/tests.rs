//! The bodies of responses, and deadlines.

use http_body_util::BodyExt;

use super::*;

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
