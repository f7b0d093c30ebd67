//! The part of HTTP/2, gRPC and SDS that one call needs, as bytes. So one process can prepare a call that another one makes.

use std::{fmt, io::Read};

/// The stream ID of the call.
const STREAM: u32 = 1;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The bytes of a whole connection: preface, settings, and one call for `names`.
pub(crate) fn request(method: &str, names: &[&str]) -> Vec<u8> {
    let path = format!("/envoy.service.secret.v3.SecretDiscoveryService/{method}");
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", &path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let mut block = Vec::new();
    for (name, value) in headers {
        // Literals without indexing; all of them are shorter than 127 bytes.
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend(text.as_bytes());
        }
    }
    let message = discovery_request(method, names);
    let mut data = vec![0];
    data.extend(u32::try_from(message.len()).expect("short").to_be_bytes());
    data.extend(message);
    let last = if method == "FetchSecrets" { END_STREAM } else { 0 };
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(SETTINGS, 0, 0, &[]),
        frame(HEADERS, END_HEADERS, STREAM, &block),
        frame(DATA, last, STREAM, &data),
    ]
    .concat()
}

/// `DiscoveryRequest` (names 3, type 4) or `DeltaDiscoveryRequest` (type 2, names 3).
fn discovery_request(method: &str, names: &[&str]) -> Vec<u8> {
    const TYPE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    let type_field = if method == "DeltaSecrets" { 2 } else { 4 };
    let mut out = Vec::new();
    for (field, text) in names.iter().map(|name| (3, *name)).chain([(type_field, TYPE)]) {
        out.push(field << 3 | 2);
        let mut length = text.len();
        while length >= 0x80 {
            out.push(u8::try_from(length & 0x7f).expect("seven bits") | 0x80);
            length >>= 7;
        }
        out.push(u8::try_from(length).expect("seven bits"));
        out.extend(text.as_bytes());
    }
    out
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// An event of the call.
pub(crate) enum Event {
    /// A complete gRPC message.
    Message(Vec<u8>),
    /// The end of the call: its trailers, or a reset.
    End,
    /// GOAWAY: the server accepts no new calls.
    Leaving,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(bytes) => {
                f.write_str("message ")?;
                bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
            Self::End => f.write_str("end"),
            Self::Leaving => f.write_str("leaving"),
        }
    }
}

/// Reads frames and assembles messages.
#[derive(Default)]
pub(crate) struct Reader {
    data: Vec<u8>,
}

impl Reader {
    /// Returns the next event, or `None` when the connection is closed.
    pub(crate) fn next(&mut self, from: &mut impl Read) -> Option<Event> {
        loop {
            if let Some(length) = self.data.get(1..5) {
                let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
                if self.data.len() >= 5 + length {
                    let message = self.data.drain(..5 + length).skip(5).collect();
                    return Some(Event::Message(message));
                }
            }
            let mut head = [0; 9];
            from.read_exact(&mut head).ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            from.read_exact(&mut payload).ok()?;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            match (head[3], stream) {
                (DATA, STREAM) => self.data.extend(payload),
                (HEADERS, STREAM) if head[4] & END_STREAM != 0 => return Some(Event::End),
                (RST_STREAM, STREAM) => return Some(Event::End),
                (GOAWAY, _) => return Some(Event::Leaving),
                _ => {}
            }
        }
    }
}
