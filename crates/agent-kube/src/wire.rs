//! The API server of [`super::fake`] behind HTTP/1.1 on in-memory pipes, with scripted faults in the bytes.
//!
//! The client is the real one, with its connections, chunks and time-outs. Only its socket is a pipe, so it works under a paused
//! clock. The server reads and writes bytes itself, because an HTTP library would not send broken responses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "for tests alone")]

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Uri};
use http_body_util::BodyExt;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use kube::{Client, Config, client::Body};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    time::Instant,
};

use crate::{
    Metrics, RequestRate,
    fake::{FakeApi, Script},
};

/// A fault in one response.
#[derive(Debug, Clone)]
pub enum Fault {
    /// These bytes are sent instead; the request has no effect.
    Bytes(String),
    /// The request has no effect and no response.
    Hang,
    /// The request has its effect; the connection closes without a byte.
    Swallow,
    /// The request has its effect; the connection closes after half of the response body.
    Half,
    /// The request has its effect; only the response headers are sent.
    HeadAndHang,
    /// For a watch: after this number of events and half of the next one, the connection closes in the middle of the chunk.
    CutEvent(usize),
    /// For a watch: after this number of events, the next two are sent in reverse order.
    Swap(usize),
    /// For a watch: every event is sent twice.
    Twice,
}

/// A request that the server has received.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Time of arrival.
    pub at: Instant,
    /// Verb, such as `create` or `list`.
    pub verb: &'static str,
    /// Plural of the resource.
    pub plural: String,
    /// Path and query.
    pub target: String,
}

/// The server. Clones share its state.
#[derive(Clone)]
pub struct Wire {
    /// The API server that carries out the requests.
    pub api: FakeApi,
    script: Arc<Mutex<Script<Fault>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Wire {
    /// Creates a server in front of `api`.
    pub fn new(api: FakeApi) -> Self {
        Self { api, script: Arc::default(), seen: Arc::default() }
    }

    /// Returns a client that is real except for its socket.
    pub fn client(&self, metrics: &Metrics, rate: RequestRate) -> Client {
        let config = Config::new(Uri::from_static("http://api.test"));
        super::client(config, Pipes(self.clone()), metrics, rate).unwrap()
    }

    /// The next `times` requests of this verb and plural meet `fault`.
    pub fn fail(&self, verb: &'static str, plural: &'static str, fault: Fault, times: usize) {
        self.script.lock().unwrap().plan(verb, plural, fault, times);
    }

    /// Returns whether every planned fault has occurred.
    pub fn is_done(&self) -> bool {
        self.script.lock().unwrap().is_done()
    }

    /// Returns the requests of this verb and plural so far.
    pub fn seen(&self, verb: &str, plural: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|seen| seen.verb == verb && seen.plural == plural).cloned().collect()
    }

    fn meet(&self, seen: Seen) -> Option<Fault> {
        let fault = self.script.lock().unwrap().meet(seen.verb, &seen.plural);
        self.seen.lock().unwrap().push(seen);
        fault
    }

    /// Serves one connection, request by request. Returning closes it.
    async fn serve(self, mut stream: DuplexStream) -> io::Result<()> {
        let mut buffer = Vec::new();
        while let Some(request) = read(&mut stream, &mut buffer).await? {
            let (verb, plural) = FakeApi::kind(&request);
            let target = request.uri().to_string();
            let fault = self.meet(Seen { at: Instant::now(), verb, plural, target });
            match &fault {
                Some(Fault::Bytes(bytes)) => {
                    stream.write_all(bytes.as_bytes()).await?;
                    continue;
                }
                Some(Fault::Hang) => std::future::pending().await,
                _ => {}
            }
            let Ok(answer) = self.api.clone().respond(request).await else { return Ok(()) };
            let (parts, mut body) = answer.into_parts();
            let head = format!("HTTP/1.1 {} x\r\ncontent-type: application/json\r\n", parts.status.as_u16());
            if verb == "watch" && parts.status.is_success() {
                stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).await?;
                if matches!(fault, Some(Fault::HeadAndHang)) {
                    std::future::pending::<()>().await;
                }
                if !events(&mut stream, &mut body, fault).await? {
                    return Ok(());
                }
                continue;
            }
            let Ok(body) = body.collect().await else { return Ok(()) };
            let body = body.to_bytes();
            let head = format!("{head}content-length: {}\r\n\r\n", body.len());
            match fault {
                Some(Fault::Swallow) => return Ok(()),
                Some(Fault::Half) => {
                    stream.write_all(head.as_bytes()).await?;
                    return stream.write_all(&body[..body.len() / 2]).await;
                }
                Some(Fault::HeadAndHang) => {
                    stream.write_all(head.as_bytes()).await?;
                    std::future::pending::<()>().await;
                }
                _ => {
                    stream.write_all(head.as_bytes()).await?;
                    stream.write_all(&body).await?;
                }
            }
        }
        Ok(())
    }
}

type Events = http_body_util::combinators::UnsyncBoxBody<Bytes, tower::BoxError>;

/// Sends the events of a watch, one chunk each. Returns whether the connection stays open.
async fn events(stream: &mut DuplexStream, body: &mut Events, fault: Option<Fault>) -> io::Result<bool> {
    let mut told = 0;
    let mut withheld: Option<Bytes> = None;
    while let Some(frame) = body.frame().await {
        let Ok(event) = frame.map(|frame| frame.into_data().unwrap_or_default()) else { return Ok(false) };
        match fault {
            Some(Fault::CutEvent(after)) if told == after => {
                let begun = format!("{:x}\r\n", event.len());
                stream.write_all(begun.as_bytes()).await?;
                stream.write_all(&event[..event.len() / 2]).await?;
                return Ok(false);
            }
            Some(Fault::Swap(after)) if told == after && withheld.is_none() => {
                withheld = Some(event);
                continue;
            }
            Some(Fault::Twice) => chunk(stream, &event).await?,
            _ => {}
        }
        chunk(stream, &event).await?;
        told += 1;
        if let Some(earlier) = withheld.take() {
            chunk(stream, &earlier).await?;
            told += 1;
        }
    }
    stream.write_all(b"0\r\n\r\n").await?;
    Ok(true)
}

async fn chunk(stream: &mut DuplexStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes()).await?;
    stream.write_all(bytes).await?;
    stream.write_all(b"\r\n").await
}

/// Reads the next request; `None` if the client has closed the connection.
async fn read(stream: &mut DuplexStream, buffer: &mut Vec<u8>) -> io::Result<Option<Request<Body>>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8(buffer[..end].to_vec()).unwrap();
            let mut lines = head.lines();
            let (method, target) = lines.next().unwrap().trim_end_matches(" HTTP/1.1").split_once(' ').unwrap();
            let length = lines.filter_map(|line| line.split_once(": ")).find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            let length = length.map_or(0, |(_, value)| value.parse().unwrap());
            if buffer.len() >= end + 4 + length {
                let body = buffer[end + 4..end + 4 + length].to_vec();
                buffer.drain(..end + 4 + length);
                return Ok(Some(Request::builder().method(method).uri(target).body(Body::from(body)).unwrap()));
            }
        }
        let mut more = [0; 4096];
        match stream.read(&mut more).await? {
            0 => return Ok(None),
            n => buffer.extend_from_slice(&more[..n]),
        }
    }
}

/// Connector that opens in-memory connections to the server.
#[derive(Clone)]
struct Pipes(Wire);

impl tower::Service<Uri> for Pipes {
    type Response = Pipe;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Pipe>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let wire = self.0.clone();
        Box::pin(async move {
            let (client, server) = tokio::io::duplex(64 << 10);
            tokio::spawn(wire.serve(server));
            Ok(Pipe(TokioIo::new(client)))
        })
    }
}

/// The client's end of a connection.
struct Pipe(TokioIo<DuplexStream>);

impl Connection for Pipe {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl Write for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Returns a response as bytes.
pub fn http(status: u16, headers: &[&str], body: &str) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("HTTP/1.1 {status} x\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}
