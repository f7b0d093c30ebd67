//! Properties of any bytes that a client sends on a connection. An input is the size of the pieces, and frames of HTTP/2.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use http::{HeaderMap, Method, Uri};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use unix_peer::authority_rewrite::AuthorityNormalizer;

/// The preface of a client, and empty SETTINGS.
const START: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Panics if the pieces matter, or if h2 reads another request than without the normalizer.
pub fn check(data: &[u8]) {
    let Some((size, frames)) = data.split_first() else { return };
    let size = usize::from(*size) + 1;
    let bytes = [START, frames].concat();
    let normalized = output(&bytes, bytes.len());
    assert_eq!(normalized, output(&bytes, size), "pieces of {size} bytes");
    assert!(normalized.len() <= bytes.len());

    let (before, after) = (requests(&bytes), requests(&normalized));
    let mut has_others = false;
    let mut next = after.iter();
    for request in &before {
        // h2 resets a stream with an invalid authority, so without the normalizer there are fewer.
        has_others |= next.next().is_some_and(|other| other.stream != request.stream);
        match after.iter().find(|other| other.stream == request.stream) {
            Some(other) => assert!(
                request.method == other.method
                    && request.headers == other.headers
                    && request.uri.path_and_query() == other.uri.path_and_query()
                    && request.uri.scheme() == other.uri.scheme(),
                "{request:?} became {other:?}"
            ),
            // A stream that only the normalizer has made valid may break a rule, and end the connection.
            None => assert!(has_others, "{request:?} is lost"),
        }
    }
}

/// A connection of which only the client's bytes matter.
struct Input<'a> {
    bytes: &'a [u8],
    size: usize,
}

impl AsyncRead for Input<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let some = self.bytes.len().min(self.size).min(buf.remaining());
        let (now, later) = self.bytes.split_at(some);
        buf.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Input<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Reads everything from the normalizer, as a server does.
fn output(bytes: &[u8], size: usize) -> Vec<u8> {
    let mut normalizer = AuthorityNormalizer::new(Input { bytes, size });
    let (mut out, mut buffer) = (Vec::new(), vec![0; 16 << 10]);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        // Small buffers take another path.
        let most = if out.len() % 2 == 0 { buffer.len() } else { 7 };
        let mut read = ReadBuf::new(&mut buffer[..most]);
        assert!(Pin::new(&mut normalizer).poll_read(&mut cx, &mut read).is_ready());
        if read.filled().is_empty() {
            return out;
        }
        out.extend_from_slice(read.filled());
    }
}

#[derive(Debug)]
struct Request {
    stream: u32,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

/// The requests that h2 accepts.
fn requests(bytes: &[u8]) -> Vec<Request> {
    let mut cx = Context::from_waker(Waker::noop());
    let mut requests = Vec::new();
    let mut handshake = Box::pin(h2::server::handshake(Input { bytes, size: bytes.len() }));
    let Poll::Ready(Ok(mut connection)) = handshake.as_mut().poll(&mut cx) else { return requests };
    let mut open = Vec::new();
    while let Poll::Ready(Some(Ok((request, response)))) = connection.poll_accept(&mut cx) {
        let (parts, body) = request.into_parts();
        requests.push(Request { stream: response.stream_id().as_u32(), method: parts.method, uri: parts.uri, headers: parts.headers });
        open.push((body, response));
    }
    requests
}
