//! Checks of the tests themselves.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::support::load::Load;

/// So slow that a load of a fixed time would have next to no requests.
const SLOW: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_load_passes_its_phases_however_slow_its_target_is() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = [0; 1024];
                assert_ne!(stream.read(&mut request).await.unwrap(), 0);
                tokio::time::sleep(SLOW).await;
                // The last phase meets failures.
                let (status, body) = if number < 60 { ("200 OK", "well") } else { ("503 Unavailable", "ill") };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
                // A load that was stopped does not read.
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    let load = Load::start(target, "well");
    load.passes("one").await;
    load.passes("two").await;
    let tally = load.stop().await;
    assert!(tally.requests >= 104, "{tally:?}");
    assert!(matches!(&tally.phases[..], [one, two] if one.starts_with("one: 5") && two.starts_with("two: 5")), "{tally:?}");
    assert!(tally.failed > 0 && tally.failures[0].contains("503"), "{tally:?}");
}
