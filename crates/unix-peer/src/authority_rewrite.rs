//! Replaces the `:authority` of HTTP/2 requests, because clients of Unix sockets send values that the `h2` crate rejects.
//!
//! Some clients send the path of the socket, or another name that is not a URI authority. The kubelet does so when it registers a plugin
//! (`%2Fvar%2Flib%2Fkubelet%2F…`), and older kubelets also when they call a CSI driver (kubernetes/kubernetes#112597). Several gRPC
//! libraries do so, and an Envoy whose SDS cluster has a `|` or a `/` in its name. `h2` resets the stream of such a request before the
//! server sees it (hyperium/h2#487). On a Unix socket the value has no meaning.
//!
//! [`AuthorityNormalizer`] wraps the server's side of a connection, below `h2`, and replaces the value in each HEADERS frame by `-` (RFC
//! 9113, sections 6.2 and 8.3.1). All other bytes are unchanged, and so is a block that this module cannot parse: `h2` handles it.
//!
//! The HPACK state of both ends stays consistent (RFC 7541). A field keeps its representation and its name, so both ends add the same
//! entries to their dynamic tables. The replacement has the minimal length, so an entry stays in the server's table for at least as long
//! as in the client's. The frame keeps its length: the bytes that the shorter value frees become padding.

use std::{
    io,
    mem::MaybeUninit,
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Length of the client's connection preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
/// Frame type HEADERS.
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Default of `SETTINGS_MAX_FRAME_SIZE`, in bytes. The server has to keep it.
const MAX_FRAME_BYTES: usize = 16_384;
/// Index of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;
/// The name as a literal, which gRPC's C++ library sends.
const NAME_LITERAL: &[u8] = b":authority";
/// The name in the Huffman code of RFC 7541, appendix B.
const NAME_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// The string literal `-`, a valid authority of minimal length: a length of 1 and one byte in the Huffman code of RFC 7541, appendix B.
/// `h2` keeps a value without Huffman code as a slice of its read buffer, so its dynamic table would keep the whole buffer in memory for
/// as long as the connection lives.
const REPLACEMENT: [u8; 2] = [0x81, 0x5b];
/// Bytes that are read at once if the caller's buffer is smaller than the incomplete frame.
const CHUNK: usize = 4096;

/// Wraps the server's side of an HTTP/2 connection and replaces the `:authority` of each request by `-`. Writes pass unchanged.
///
/// It buffers at most one incomplete HEADERS frame (up to 16,384 bytes of payload) and one read. An idle connection has no buffer.
#[derive(Debug)]
pub struct AuthorityNormalizer<S> {
    stream: S,
    frames: Frames,
    /// Beginning of an incomplete frame.
    held: Vec<u8>,
    /// Rewritten bytes that the caller has not read yet.
    ready: Bytes,
    spoke: Arc<AtomicBool>,
}

impl<S> AuthorityNormalizer<S> {
    /// Wraps the server's side of a new connection, from which no byte has been read.
    pub fn new(stream: S) -> Self {
        Self { stream, frames: Frames::default(), held: Vec::new(), ready: Bytes::new(), spoke: Arc::default() }
    }

    /// Returns a flag that becomes true when the client has sent a byte.
    pub fn spoke(&self) -> Arc<AtomicBool> {
        self.spoke.clone()
    }

    /// Moves bytes from `ready` to `buf`.
    fn take(&mut self, buf: &mut ReadBuf<'_>) {
        let some = self.ready.len().min(buf.remaining());
        buf.put_slice(&self.ready.split_to(some));
        if self.ready.is_empty() {
            // Frees the memory: a server has many idle connections.
            self.ready = Bytes::new();
        }
    }
}

impl<S: AsyncRead + Unpin> AuthorityNormalizer<S> {
    /// Reads into `buf` and rewrites frames there. Returns false if `buf` got no bytes, because the frame is still incomplete.
    fn poll_in_place(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = buf.filled().len();
        buf.put_slice(&self.held);
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let came = &mut buf.filled_mut()[before..];
        if !matches!(read, Poll::Ready(Ok(()))) || came.len() == self.held.len() {
            // At the end of the stream an incomplete frame is dropped.
            buf.set_filled(before);
            return read.map_ok(|()| true);
        }
        self.spoke.store(true, Ordering::Relaxed);
        let passed = self.frames.pass(came);
        self.held = came[passed..].to_vec();
        buf.set_filled(before + passed);
        Poll::Ready(Ok(passed > 0))
    }

    /// Reads into a buffer of its own, for a `buf` that is smaller than `held`. Returns false at the end of the stream.
    fn poll_aside(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let mut read = ReadBuf::uninit(&mut chunk);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
        if read.filled().is_empty() {
            return Poll::Ready(Ok(false));
        }
        self.spoke.store(true, Ordering::Relaxed);
        self.held.extend_from_slice(read.filled());
        let passed = self.frames.pass(&mut self.held);
        self.ready = Bytes::copy_from_slice(&self.held[..passed]);
        self.held = self.held[passed..].to_vec();
        Poll::Ready(Ok(true))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorityNormalizer<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.ready.is_empty() && buf.remaining() > 0 {
            if buf.remaining() > this.held.len() {
                if ready!(this.poll_in_place(cx, buf))? {
                    return Poll::Ready(Ok(()));
                }
            } else if !ready!(this.poll_aside(cx))? {
                return Poll::Ready(Ok(()));
            }
        }
        this.take(buf);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorityNormalizer<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Position in the client's frames.
#[derive(Debug)]
struct Frames {
    /// Number of the next bytes that pass unchanged.
    through: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self { through: PREFACE }
    }
}

impl Frames {
    /// Rewrites the complete HEADERS frames in `bytes`, and returns the number of bytes that pass. The rest is the beginning of an
    /// incomplete frame: the next call begins with it.
    fn pass(&mut self, bytes: &mut [u8]) -> usize {
        let mut passed = 0;
        loop {
            let some = self.through.min(bytes.len() - passed);
            self.through -= some;
            passed += some;
            let [a, b, c, kind, _, _, _, _, _, rest @ ..] = &bytes[passed..] else { return passed };
            let len = length([*a, *b, *c]);
            if *kind != HEADERS || len > MAX_FRAME_BYTES {
                self.through = FRAME_HEADER + len;
                continue;
            }
            if rest.len() < len {
                return passed;
            }
            let end = passed + FRAME_HEADER + len;
            rewrite_authority(&mut bytes[passed..end]);
            passed = end;
        }
    }
}

fn length([a, b, c]: [u8; 3]) -> usize {
    usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)
}

/// Replaces the authority in a complete HEADERS frame. A frame without END_HEADERS or with an invalid block stays unchanged. So does a
/// value that is longer than the maximum padding of 255 bytes; the path of a socket has at most 108 bytes.
fn rewrite_authority(frame: &mut [u8]) {
    let flags = frame[4];
    let Some(value) = authority(&frame[FRAME_HEADER..], flags) else { return };
    let (start, end) = (FRAME_HEADER + value.start, FRAME_HEADER + value.end);
    let spare = end - start - REPLACEMENT.len();
    let is_padded = flags & PADDED != 0;
    // In a frame without padding, the Pad Length field takes one of the freed bytes.
    let (shift, padding) = match spare.checked_sub(1) {
        None => (0, None),
        Some(rest) if !is_padded => (1, Some(rest)),
        Some(_) => (0, Some(usize::from(frame[FRAME_HEADER]) + spare)),
    };
    if let Some(padding) = padding {
        let Ok(padding) = u8::try_from(padding) else { return };
        frame.copy_within(FRAME_HEADER..start, FRAME_HEADER + shift);
        frame[FRAME_HEADER] = padding;
        frame[4] |= PADDED;
    }
    let start = start + shift;
    frame[start..start + REPLACEMENT.len()].copy_from_slice(&REPLACEMENT);
    frame.copy_within(end.., start + REPLACEMENT.len());
    let free = frame.len() - (spare - shift);
    frame[free..].fill(0);
}

/// Returns the range of the authority's value in the payload of a HEADERS frame, with its length prefix: at least two bytes.
fn authority(payload: &[u8], flags: u8) -> Option<Range<usize>> {
    if flags & END_HEADERS == 0 {
        return None;
    }
    let padding = if flags & PADDED != 0 { usize::from(*payload.first()?) } else { 0 };
    let before = usize::from(flags & PADDED != 0) + if flags & PRIORITY != 0 { 5 } else { 0 };
    let block = payload.get(before..payload.len().checked_sub(padding)?)?;
    let mut rest = block;
    // RFC 7541, section 6: a block is a sequence of field representations.
    while let Some(first) = rest.first() {
        let (bits, is_literal) = match first.leading_zeros() {
            0 => (7, false),
            1 => (6, true),
            2 => (5, false),
            _ => (4, true),
        };
        let name = integer(&mut rest, bits)?;
        if !is_literal {
            continue;
        }
        let is_authority = match name {
            0 => match string(&mut rest)? {
                Text { short: false, bytes } => bytes == NAME_LITERAL,
                Text { short: true, bytes } => bytes == NAME_HUFFMAN,
            },
            name => name == AUTHORITY,
        };
        let start = block.len() - rest.len();
        let value = string(&mut rest)?;
        if is_authority {
            let end = block.len() - rest.len();
            return (!value.bytes.is_empty()).then_some(before + start..before + end);
        }
    }
    None
}

/// Parses an integer with a prefix of `bits` bits (RFC 7541, section 5.1).
fn integer(rest: &mut &[u8], bits: u32) -> Option<usize> {
    let mask = (1_usize << bits) - 1;
    let mut value = usize::from(next(rest)?) & mask;
    if value < mask {
        return Some(value);
    }
    // Three more bytes encode numbers far above the maximum size of a frame.
    for shift in [0, 7, 14] {
        let byte = next(rest)?;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// An encoded string literal.
struct Text<'a> {
    /// Whether it is in the Huffman code of RFC 7541, appendix B.
    short: bool,
    bytes: &'a [u8],
}

/// Parses a string literal: a length and that number of bytes (RFC 7541, section 5.2).
fn string<'a>(rest: &mut &'a [u8]) -> Option<Text<'a>> {
    let short = rest.first()? & 0x80 != 0;
    let len = integer(rest, 7)?;
    let (bytes, others) = rest.split_at_checked(len)?;
    *rest = others;
    Some(Text { short, bytes })
}

fn next(rest: &mut &[u8]) -> Option<u8> {
    let (first, others) = rest.split_first()?;
    *rest = others;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PRI: &[u8; PREFACE] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[a, b, c, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// A HEADERS frame with a block and `padding` bytes of padding.
    fn padded(flags: u8, block: &[u8], padding: u8) -> Vec<u8> {
        frame(HEADERS, flags | PADDED, &[&[padding], block, &vec![0; padding.into()]].concat())
    }

    /// The output for `bytes` that arrive in pieces.
    fn passed(bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut frames, mut held, mut all) = (Frames::default(), Vec::new(), Vec::new());
        for bytes in bytes.chunks(piece) {
            held.extend_from_slice(bytes);
            let passed = frames.pass(&mut held);
            all.extend(held.drain(..passed));
        }
        all
    }

    /// A block of `:method POST`, `:scheme http`, a path and an authority. `kind` is the representation of the authority.
    fn block(authority: &[u8], kind: u8) -> Vec<u8> {
        block_with(&[kind | 1], authority)
    }

    fn block_with(name: &[u8], authority: &[u8]) -> Vec<u8> {
        block_of(name, &text(authority))
    }

    /// The same block with the replaced authority.
    fn named(kind: u8) -> Vec<u8> {
        block_of(&[kind | 1], &REPLACEMENT)
    }

    fn block_of(name: &[u8], authority: &[u8]) -> Vec<u8> {
        let path = [&[0x83, 0x86, 0x44][..], &text(b"/a.B/C")].concat();
        [&*path, name, authority, &[0x40], &text(b"te"), &text(b"trailers")].concat()
    }

    fn text(text: &[u8]) -> Vec<u8> {
        [&[u8::try_from(text.len()).unwrap()], text].concat()
    }

    /// The beginning of a literal field with a literal name.
    fn spelled(kind: u8, short: bool) -> Vec<u8> {
        let mut name = text(if short { NAME_HUFFMAN } else { NAME_LITERAL });
        name[0] |= u8::from(short) << 7;
        [&[kind], &*name].concat()
    }

    #[test]
    fn the_authority_is_replaced_and_nothing_else_is_touched() {
        for kind in [0x40, 0x00, 0x10] {
            let path = b"%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fcsi.sds-agent.io-reg.sock";
            let settings = frame(4, 0, &[]);
            let data = frame(0, 1, b"\0\0\0\0\0");
            let came = [PRI, &*settings, &frame(HEADERS, END_HEADERS, &block(path, kind)), &data].concat();
            let headers = padded(END_HEADERS, &named(kind), u8::try_from(path.len()).unwrap() - 2);
            let meant = [PRI, &*settings, &headers, &data].concat();
            for piece in [1, 2, 7, came.len()] {
                assert_eq!(passed(&came, piece), meant);
            }
        }
    }

    #[test]
    fn a_name_that_is_spelled_out_is_known() {
        for (kind, short) in [(0x40, false), (0x00, false), (0x10, true), (0x40, true)] {
            let block = |value: &[u8]| block_with(&spelled(kind, short), value);
            let came = [PRI, &*frame(HEADERS, END_HEADERS, &block(b"/run/a.sock"))].concat();
            assert_eq!(passed(&came, 3), [PRI, &*padded(END_HEADERS, &block_of(&spelled(kind, short), &REPLACEMENT), 9)].concat());
        }
        // Another name of the same length is not rewritten.
        let other = [&[0x40], &*text(b":authoritx")].concat();
        let came = [&PRI[..], &frame(HEADERS, END_HEADERS, &block_with(&other, b"/run/a.sock"))].concat();
        assert_eq!(passed(&came, 3), came);
    }

    #[test]
    fn what_becomes_free_is_padding() {
        let priority = [0x80, 0, 0, 0, 9];
        let named = named(0x40);
        let with = |block: &[u8]| [&priority, block].concat();
        let there = END_HEADERS | PRIORITY;
        for (came, meant) in [
            (padded(there, &with(&block(b"/a/b", 0x40)), 3), padded(there, &with(&named), 6)),
            (padded(there, &with(&block(b"a", 0x40)), 3), padded(there, &with(&named), 3)),
            (frame(HEADERS, there, &with(&block(b"/a/b", 0x40))), padded(there, &with(&named), 2)),
            (frame(HEADERS, END_HEADERS, &block(b"/a", 0x40)), padded(END_HEADERS, &named, 0)),
            (frame(HEADERS, END_HEADERS, &block(b"a", 0x40)), frame(HEADERS, END_HEADERS, &named)),
        ] {
            let (came, meant) = ([PRI, &*came].concat(), [PRI, &*meant].concat());
            assert_eq!(passed(&came, came.len()), meant);
        }
        // The padding would be longer than 255 bytes.
        let came = [PRI, &*padded(there, &with(&block(b"/a/b", 0x40)), 253)].concat();
        assert_eq!(passed(&came, came.len()), came);
    }

    #[test]
    fn what_cannot_be_read_passes_as_it_came() {
        let whole = block(b"/a/b", 0x40);
        for (flags, payload) in [
            (0, &*whole),
            (END_HEADERS, &whole[..14]),
            (END_HEADERS, &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff, 0x01]),
            (END_HEADERS | PADDED, &[200, 0x83]),
            (END_HEADERS | PADDED, &[]),
            (END_HEADERS | PRIORITY, &[0, 0]),
        ] {
            let came = [&PRI[..], &frame(HEADERS, flags, payload)].concat();
            assert_eq!(passed(&came, 3), came, "{flags} {payload:?}");
        }
    }

    /// If this test fails, `h2` accepts such values, and this module can be removed.
    #[tokio::test]
    async fn without_it_the_library_resets_the_stream() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let mut connection = h2::server::handshake(server);
        let mut settings = frame(4, 0, &[]);
        settings[8] = 0;
        let path = b"%2Fvar%2Flib";
        client.write_all(&[&PRI[..], &settings, &frame(HEADERS, END_HEADERS | 1, &block(path, 0x40))].concat()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut connection = (&mut connection).await.unwrap();
        let accepted = tokio::time::timeout(Duration::from_secs(20), connection.accept()).await.unwrap();
        assert!(accepted.is_none_or(|request| request.is_err()));
    }

    /// `h2` accepts the requests behind the filter.
    #[tokio::test]
    async fn the_library_takes_it_twice_on_one_connection() {
        for name in [vec![0x41], spelled(0x40, false), spelled(0x40, true)] {
            taken_twice(&name).await;
        }
    }

    async fn taken_twice(name: &[u8]) {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let serving = tokio::spawn(async move {
            let mut seen = Vec::new();
            let mut connection = h2::server::handshake(AuthorityNormalizer::new(server)).await.unwrap();
            while let Some(request) = connection.accept().await {
                let (request, mut respond) = request.unwrap();
                seen.push(request.uri().to_string());
                respond.send_response(http::Response::new(()), true).unwrap();
            }
            seen
        });
        let mut second = frame(HEADERS, END_HEADERS | 1, &[0x83, 0x86, 0xbf, 0xbe]);
        second[8] = 3;
        // The second request refers to the entries that the first one added to the dynamic table: the path and the authority.
        let first = [&[0x83, 0x86, 0x44, 0x06][..], b"/a.B/C", name, &[0x04], b"/a/b"].concat();
        let mut settings = frame(4, 0, &[]);
        settings[8] = 0;
        let all = [&PRI[..], &settings, &frame(HEADERS, END_HEADERS | 1, &first), &second].concat();
        client.write_all(&all).await.unwrap();
        let mut answer = [0; 9];
        tokio::time::timeout(Duration::from_secs(20), client.read_exact(&mut answer)).await.unwrap().unwrap();
        client.shutdown().await.unwrap();
        let seen = tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap();
        assert_eq!(seen, ["http://-/a.B/C", "http://-/a.B/C"]);
    }

    /// Reads into buffers larger than all frames, smaller than the incomplete frame, and of a few bytes.
    #[tokio::test]
    async fn the_inside_of_a_large_frame_keeps_its_place() {
        let bytes: Vec<u8> = (0..=250).cycle().take(MAX_FRAME_BYTES).collect();
        let around = |headers: &[u8]| [PRI, headers, &frame(0, 0, &bytes), headers, &frame(0, 0, &bytes[..CHUNK - 1]), headers].concat();
        let came = around(&frame(HEADERS, END_HEADERS, &block(b"/a/b", 0x40)));
        let meant = around(&padded(END_HEADERS, &named(0x40), 2));
        for (pipe, room) in [(1 << 16, 1 << 16), (1 << 16, 5000), (6000, 1 << 16), (700, CHUNK), (1 << 16, 100), (300, 7), (1 << 16, 1)] {
            let (mut client, server) = tokio::io::duplex(pipe);
            let sent = came.clone();
            let sending = tokio::spawn(async move { client.write_all(&sent).await });
            let (mut server, mut seen, mut buffer) = (AuthorityNormalizer::new(server), Vec::new(), vec![0; room]);
            loop {
                let some = tokio::time::timeout(Duration::from_secs(20), server.read(&mut buffer)).await.unwrap().unwrap();
                if some == 0 {
                    break;
                }
                seen.extend_from_slice(&buffer[..some]);
            }
            sending.await.unwrap().unwrap();
            assert!(seen == meant, "through {pipe} into {room}");
            assert!(server.spoke().load(Ordering::Relaxed));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_pass_in_any_pieces_alike(bytes in prop::collection::vec(any::<u8>(), 0..400), piece in 1_usize..50) {
            let bytes = [&PRI[..], &bytes].concat();
            prop_assert_eq!(passed(&bytes, piece), passed(&bytes, bytes.len()));
        }

        #[test]
        fn any_block_is_read_without_a_panic(block in prop::collection::vec(any::<u8>(), 0..60), flags in any::<u8>()) {
            let came = [&PRI[..], &frame(HEADERS, flags, &block)].concat();
            prop_assert_eq!(passed(&came, 5), passed(&came, came.len()));
        }
    }
}
