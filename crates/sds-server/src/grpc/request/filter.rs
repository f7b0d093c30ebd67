//! Reads gRPC messages as they arrive and keeps only what the service uses.
//!
//! The first request of an Envoy has up to 61 KB, of which `node` is all but a few hundred bytes. The service does not use it, so it is
//! discarded byte by byte and never buffered. The result of the filter is a shorter message of the same type. The framing is that of [gRPC
//! over HTTP/2](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), the fields are those of [Protocol
//! Buffers](https://protobuf.dev/programming-guides/encoding/).

use prost::encoding::encode_varint;
use tonic::Status;

use crate::grpc::{PREFIX, prefix};

/// Maximum length of a resource name: the longest SPIFFE ID (SPIFFE-ID, section 2.3), and a prefix of 64 bytes.
pub(super) const MAX_NAME_BYTES: usize = 2048 + 64;
/// Maximum length of a version. The agent's own are shorter.
const MAX_VERSION_BYTES: usize = 1024;
/// Maximum length of a nonce. The agent's own have at most 20 bytes.
const MAX_NONCE_BYTES: usize = 64;
/// Maximum length of a type URL.
const MAX_TYPE_URL_BYTES: usize = 256;
/// Maximum length of the error in a NACK.
const MAX_ERROR_BYTES: usize = 8 << 10;
/// Maximum length of a message of another service. Those of health and reflection have a few bytes.
const MAX_OTHER_BYTES: usize = 16 << 10;
/// Names in one request, for each name that a stream may have: a delta request can unsubscribe as many, and report versions of as many.
const NAMES_FACTOR: usize = 4;
/// Bytes of a variable-length integer of 64 bits.
const MAX_VARINT_BYTES: u32 = 10;

/// A field that is kept.
#[derive(Debug, Clone, Copy)]
struct Field {
    number: u64,
    name: &'static str,
    max: usize,
    /// The treatment of a longer value.
    longer: Longer,
    /// Whether the field is a resource name or belongs to one.
    is_name: bool,
}

/// The treatment of a value that is longer than the maximum of its field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Longer {
    /// The request is refused.
    Refuse,
    /// The value is left out, as if the client had not set the field.
    Drop,
    /// The field is kept without its value.
    Empty,
}

const fn field(number: u64, name: &'static str, max: usize, longer: Longer) -> Field {
    Field { number, name, max, longer, is_name: false }
}

const fn name(number: u64, name: &'static str, max: usize, longer: Longer) -> Field {
    Field { number, name, max, longer, is_name: true }
}

/// `envoy.service.discovery.v3.DiscoveryRequest`. Without the error of a NACK, the request would be an ACK.
const SOTW: &[Field] = &[
    field(1, "version_info", MAX_VERSION_BYTES, Longer::Drop),
    name(3, "resource_names", MAX_NAME_BYTES, Longer::Refuse),
    field(4, "type_url", MAX_TYPE_URL_BYTES, Longer::Refuse),
    field(5, "response_nonce", MAX_NONCE_BYTES, Longer::Refuse),
    field(6, "error_detail", MAX_ERROR_BYTES, Longer::Empty),
];

/// `envoy.service.discovery.v3.DeltaDiscoveryRequest`.
const DELTA: &[Field] = &[
    field(2, "type_url", MAX_TYPE_URL_BYTES, Longer::Refuse),
    name(3, "resource_names_subscribe", MAX_NAME_BYTES, Longer::Refuse),
    name(4, "resource_names_unsubscribe", MAX_NAME_BYTES, Longer::Refuse),
    name(5, "initial_resource_versions", MAX_NAME_BYTES + MAX_VERSION_BYTES, Longer::Drop),
    field(6, "response_nonce", MAX_NONCE_BYTES, Longer::Refuse),
    field(7, "error_detail", MAX_ERROR_BYTES, Longer::Empty),
];

/// The messages of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// `DiscoveryRequest`.
    Sotw,
    /// `DeltaDiscoveryRequest`.
    Delta,
    /// Messages of another service, which are kept whole.
    Other,
}

/// Limits for the messages of one call.
#[derive(Debug, Clone, Copy)]
pub struct MessageLimits {
    /// Bytes of a message before it is filtered.
    pub bytes: usize,
    /// Names that a stream may have.
    pub names: usize,
}

/// Filters the messages of one call.
#[derive(Debug)]
pub(super) struct Filter {
    kind: MessageKind,
    limits: MessageLimits,
    state: State,
    /// The message so far, with room for its prefix.
    kept: Vec<u8>,
    /// Names in this message.
    names: usize,
}

#[derive(Debug)]
enum State {
    /// Bytes of the prefix.
    Prefix([u8; PREFIX], usize),
    /// A message with this many bytes left.
    Message { left: usize, at: At },
}

/// The place within a message.
#[derive(Debug, Clone, Copy)]
enum At {
    /// Everything up to the end is kept.
    Whole,
    /// A tag, as far as it has arrived.
    Tag(Varint),
    /// A variable-length integer as the value of a field.
    Value { varint: Varint, field: Option<Field>, tag: u64 },
    /// The length of a field.
    Length { varint: Varint, field: Option<Field>, tag: u64 },
    /// Bytes that are kept or discarded.
    Bytes { left: usize, is_kept: bool },
}

#[derive(Debug, Clone, Copy, Default)]
struct Varint {
    value: u64,
    bytes: u32,
}

impl Varint {
    /// Returns the value when `byte` is its last byte.
    fn push(&mut self, byte: u8) -> Result<Option<u64>, Status> {
        if self.bytes >= MAX_VARINT_BYTES {
            return Err(malformed("an integer has more than ten bytes"));
        }
        self.value |= u64::from(byte & 0x7f).checked_shl(7 * self.bytes).unwrap_or(0);
        self.bytes += 1;
        Ok((byte & 0x80 == 0).then_some(self.value))
    }
}

/// A value of a fixed length in a message with `left` bytes. No kept field is one.
fn fixed(length: usize, left: usize) -> Result<At, Status> {
    if length > left { Err(malformed("a field ends after the message")) } else { Ok(At::Bytes { left: length, is_kept: false }) }
}

fn malformed(what: &str) -> Status {
    Status::invalid_argument(format!("the message cannot be decoded: {what}"))
}

impl Filter {
    pub(super) fn new(kind: MessageKind, limits: MessageLimits) -> Self {
        let most = if kind == MessageKind::Other { MAX_OTHER_BYTES } else { usize::MAX };
        let limits = MessageLimits { bytes: limits.bytes.min(most), ..limits };
        Self { kind, limits, state: State::Prefix([0; PREFIX], 0), kept: Vec::new(), names: 0 }
    }

    /// Whether a message has begun and is not complete.
    pub(super) fn is_within_message(&self) -> bool {
        !matches!(self.state, State::Prefix(_, 0))
    }

    /// Bytes that the filter holds.
    pub(super) fn held(&self) -> usize {
        self.kept.capacity()
    }

    /// Reads `data` up to the end of a message, and advances it. Returns the message with its prefix, or `None` if it is not complete.
    ///
    /// # Errors
    ///
    /// - UNIMPLEMENTED: the message is compressed.
    /// - RESOURCE_EXHAUSTED: the message is longer than the limit, or has too many names.
    /// - INVALID_ARGUMENT: the message is not valid Protobuf, or a value is too long.
    pub(super) fn next(&mut self, data: &mut &[u8]) -> Result<Option<Vec<u8>>, Status> {
        loop {
            if let State::Message { left: 0, at } = self.state {
                return self.end(at).map(Some);
            }
            let Some((&byte, rest)) = data.split_first() else { return Ok(None) };
            match &mut self.state {
                State::Prefix(bytes, count) => {
                    bytes[*count] = byte;
                    *count += 1;
                    *data = rest;
                    if *count == PREFIX {
                        let [flag, length @ ..] = *bytes;
                        self.begin(flag, u32::from_be_bytes(length) as usize)?;
                    }
                }
                State::Message { left, at: At::Whole } => {
                    let (now, later) = data.split_at(data.len().min(*left));
                    *left -= now.len();
                    self.kept.extend_from_slice(now);
                    *data = later;
                }
                State::Message { left, at: At::Bytes { left: of_field, is_kept } } => {
                    let (now, later) = data.split_at(data.len().min(*of_field));
                    *left -= now.len();
                    *of_field -= now.len();
                    if *is_kept {
                        self.kept.extend_from_slice(now);
                    }
                    *data = later;
                    if *of_field == 0 {
                        self.at(At::Tag(Varint::default()));
                    }
                }
                State::Message { left, .. } => {
                    *left -= 1;
                    *data = rest;
                    self.byte(byte)?;
                }
            }
        }
    }

    fn begin(&mut self, flag: u8, length: usize) -> Result<(), Status> {
        if flag != 0 {
            return Err(Status::unimplemented("compressed messages are not accepted"));
        }
        if length > self.limits.bytes {
            let limit = self.limits.bytes;
            return Err(Status::resource_exhausted(format!("a message of {length} bytes exceeds the limit of {limit} bytes")));
        }
        let at = if self.kind == MessageKind::Other { At::Whole } else { At::Tag(Varint::default()) };
        self.state = State::Message { left: length, at };
        self.kept.clear();
        self.kept.extend_from_slice(&[0; PREFIX]);
        self.names = 0;
        Ok(())
    }

    fn end(&mut self, at: At) -> Result<Vec<u8>, Status> {
        if !matches!(at, At::Whole | At::Tag(Varint { bytes: 0, .. })) {
            return Err(malformed("a field ends after the message"));
        }
        self.state = State::Prefix([0; PREFIX], 0);
        let mut message = std::mem::take(&mut self.kept);
        let length = message.len() - PREFIX;
        message[..PREFIX].copy_from_slice(&prefix(length));
        Ok(message)
    }

    fn at(&mut self, next: At) {
        if let State::Message { at, .. } = &mut self.state {
            *at = next;
        }
    }

    /// The field of the message with this number, if it is kept.
    fn field(&self, number: u64) -> Option<Field> {
        let fields = if self.kind == MessageKind::Delta { DELTA } else { SOTW };
        fields.iter().find(|field| field.number == number).copied()
    }

    /// Takes a byte of a tag, an integer or a length.
    fn byte(&mut self, byte: u8) -> Result<(), Status> {
        let State::Message { left, at } = self.state else { return Ok(()) };
        let next = match at {
            At::Tag(mut varint) => match varint.push(byte)? {
                None => At::Tag(varint),
                Some(tag) => {
                    let (field, varint) = (self.field(tag >> 3), Varint::default());
                    match tag & 7 {
                        0 => At::Value { varint, field, tag },
                        2 => At::Length { varint, field, tag },
                        1 => fixed(8, left)?,
                        5 => fixed(4, left)?,
                        _ => return Err(malformed("a group")),
                    }
                }
            },
            At::Value { mut varint, field, tag } => match varint.push(byte)? {
                None => At::Value { varint, field, tag },
                // No kept field is an integer.
                Some(_) if field.is_some() => return Err(malformed("a text is an integer")),
                Some(_) => At::Tag(Varint::default()),
            },
            At::Length { mut varint, field, tag } => match varint.push(byte)? {
                None => At::Length { varint, field, tag },
                Some(length) => self.content(field, tag, length, left)?,
            },
            At::Whole | At::Bytes { .. } => at,
        };
        self.at(next);
        Ok(())
    }

    /// Begins the content of a field with a length.
    fn content(&mut self, field: Option<Field>, tag: u64, length: u64, left: usize) -> Result<At, Status> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > left {
            return Err(malformed("a field ends after the message"));
        }
        let after = |is_kept| if length == 0 { At::Tag(Varint::default()) } else { At::Bytes { left: length, is_kept } };
        let Some(field) = field else { return Ok(after(false)) };
        if field.is_name {
            self.names += 1;
            if self.names > self.limits.names.saturating_mul(NAMES_FACTOR) {
                return Err(Status::resource_exhausted(format!("more than {} resource names on one stream", self.limits.names)));
            }
        }
        if length <= field.max {
            encode_varint(tag, &mut self.kept);
            encode_varint(length as u64, &mut self.kept);
            return Ok(after(true));
        }
        match field.longer {
            Longer::Refuse => Err(Status::invalid_argument(format!("{} has {length} bytes, and the maximum is {}", field.name, field.max))),
            Longer::Drop => Ok(after(false)),
            Longer::Empty => {
                encode_varint(tag, &mut self.kept);
                encode_varint(0, &mut self.kept);
                Ok(after(false))
            }
        }
    }
}

/// Feeds `pieces` to a filter. Returns the complete messages with their prefixes, and whether another one has begun, or the error that ends
/// the request.
#[cfg(any(test, feature = "testing"))]
pub fn filter<'a>(
    kind: MessageKind,
    limits: MessageLimits,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Vec<u8>>, Result<bool, Status>) {
    let (mut filter, mut messages) = (Filter::new(kind, limits), Vec::new());
    for mut data in pieces {
        loop {
            match filter.next(&mut data) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(status) => return (messages, Err(status)),
            }
        }
    }
    (messages, Ok(filter.is_within_message()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::proto::{
        envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
        google::rpc,
    };

    const LIMITS: MessageLimits = MessageLimits { bytes: 512 << 10, names: 64 };

    fn framed(message: &impl Message) -> Vec<u8> {
        framed_bytes(&message.encode_to_vec())
    }

    fn framed_bytes(bytes: &[u8]) -> Vec<u8> {
        [&prefix(bytes.len())[..], bytes].concat()
    }

    /// The request of an Envoy: the types of this crate have no `node`, which is the field with this number.
    fn with_node(message: &impl Message, number: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode_varint(number << 3 | 2, &mut bytes);
        encode_varint(60_000, &mut bytes);
        bytes.resize(bytes.len() + 60_000, b'n');
        bytes.extend_from_slice(&message.encode_to_vec());
        framed_bytes(&bytes)
    }

    /// Feeds the bytes in pieces of this size.
    fn filtered(kind: MessageKind, limits: MessageLimits, bytes: &[u8], piece: usize) -> Result<Vec<Vec<u8>>, Status> {
        let (messages, end) = filter(kind, limits, bytes.chunks(piece));
        assert!(!end?, "a message is incomplete");
        Ok(messages)
    }

    fn decoded<M: Message + Default>(message: &[u8]) -> M {
        assert_eq!(message[..PREFIX], prefix(message.len() - PREFIX));
        M::decode(&message[PREFIX..]).unwrap()
    }

    fn error(message: &str) -> rpc::Status {
        rpc::Status { code: 3, message: message.to_owned() }
    }

    fn sotw() -> DiscoveryRequest {
        DiscoveryRequest {
            version_info: "v1".into(),
            resource_names: vec!["default".into(), String::new(), "ROOTCA".into()],
            type_url: "t".into(),
            response_nonce: "7".into(),
            error_detail: Some(error("bad")),
        }
    }

    #[test]
    fn a_request_keeps_all_but_its_node_in_pieces_of_any_size() {
        let request = sotw();
        for piece in [1, 2, 3, 7, 16_384, 1 << 20] {
            let bytes = [with_node(&request, 2), framed(&DiscoveryRequest::default()), with_node(&request, 2)].concat();
            let out = filtered(MessageKind::Sotw, LIMITS, &bytes, piece).unwrap();
            let all: Vec<DiscoveryRequest> = out.iter().map(|message| decoded(message)).collect();
            assert_eq!(all, [request.clone(), DiscoveryRequest::default(), request.clone()], "{piece}");
            assert!(out[0].len() < 60, "{} bytes are kept", out[0].len());
        }
        let delta = DeltaDiscoveryRequest {
            resource_names_subscribe: vec!["a".into()],
            resource_names_unsubscribe: vec!["b".into()],
            initial_resource_versions: [("a".to_owned(), "v".to_owned())].into(),
            response_nonce: "1".into(),
            ..DeltaDiscoveryRequest::default()
        };
        let out = filtered(MessageKind::Delta, LIMITS, &with_node(&delta, 1), 5).unwrap();
        assert_eq!(decoded::<DeltaDiscoveryRequest>(&out[0]), delta);
    }

    #[test]
    fn messages_of_other_services_are_kept_whole_and_small() {
        let bytes = framed(&sotw());
        assert_eq!(filtered(MessageKind::Other, LIMITS, &bytes, 3).unwrap(), [bytes]);
        let refused = filtered(MessageKind::Other, LIMITS, &with_node(&sotw(), 2), 1000).unwrap_err();
        assert!(refused.message().ends_with("exceeds the limit of 16384 bytes"), "{refused:?}");
    }

    #[test]
    fn a_long_value_is_refused_left_out_or_emptied() {
        let with = |change: &dyn Fn(&mut DiscoveryRequest)| {
            let mut request = sotw();
            change(&mut request);
            filtered(MessageKind::Sotw, LIMITS, &framed(&request), 100).map(|out| decoded::<DiscoveryRequest>(&out[0]))
        };
        let refused = with(&|request| request.resource_names.push("x".repeat(MAX_NAME_BYTES + 1))).unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (tonic::Code::InvalidArgument, "resource_names has 2113 bytes, and the maximum is 2112")
        );
        with(&|request| request.resource_names.push("x".repeat(MAX_NAME_BYTES))).unwrap();
        assert_eq!(with(&|request| request.version_info = "v".repeat(520 << 10 >> 1)).unwrap().version_info, "");
        // Without any error, the request would accept what it rejects.
        assert_eq!(
            with(&|request| request.error_detail = Some(error(&"e".repeat(100_000)))).unwrap().error_detail,
            Some(rpc::Status::default())
        );
        with(&|request| request.response_nonce = "1".repeat(65)).unwrap_err();
        with(&|request| request.type_url = "t".repeat(257)).unwrap_err();
    }

    #[test]
    fn the_number_of_names_and_the_length_are_bounded() {
        let names = |count: usize| DiscoveryRequest { resource_names: vec![String::new(); count], ..DiscoveryRequest::default() };
        filtered(MessageKind::Sotw, LIMITS, &framed(&names(256)), 100).unwrap();
        let refused = filtered(MessageKind::Sotw, LIMITS, &framed(&names(257)), 100).unwrap_err();
        assert_eq!((refused.code(), refused.message()), (tonic::Code::ResourceExhausted, "more than 64 resource names on one stream"));
        let limits = MessageLimits { bytes: 100, names: 64 };
        let refused = filtered(MessageKind::Sotw, limits, &with_node(&sotw(), 2), 5).unwrap_err();
        assert!(refused.message().ends_with("exceeds the limit of 100 bytes"), "{refused:?}");
        let mut compressed = framed(&sotw());
        compressed[0] = 1;
        assert_eq!(filtered(MessageKind::Other, LIMITS, &compressed, 5).unwrap_err().code(), tonic::Code::Unimplemented);
    }

    #[test]
    fn what_is_not_protobuf_is_refused() {
        for bad in [
            &[0x0a, 5, 1][..],    // longer than the message
            &[0x0a][..],          // no length
            &[0x0b, 1][..],       // a group
            &[0x08, 1][..],       // version_info as an integer
            &[0xff; 11][..],      // an endless tag
            &[0x09, 1, 2, 3][..], // a fixed value that ends after the message
            &[0x0d, 1, 2][..],
        ] {
            let bytes = [&prefix(bad.len())[..], bad].concat();
            // Nor is it completed by what follows the message.
            for bytes in [bytes.clone(), [bytes, framed(&sotw())].concat()] {
                let error = filtered(MessageKind::Sotw, LIMITS, &bytes, 3).unwrap_err();
                assert_eq!(error.code(), tonic::Code::InvalidArgument, "{bad:?}");
            }
        }
        // Unknown fields of every type are discarded.
        let good = [0x78, 0xff, 0x01, 0x79, 1, 2, 3, 4, 5, 6, 7, 8, 0x7d, 1, 2, 3, 4, 0x7a, 2, 9, 9];
        let bytes = [&prefix(good.len())[..], &good].concat();
        assert_eq!(filtered(MessageKind::Sotw, LIMITS, &bytes, 2).unwrap(), [prefix(0).to_vec()]);
    }

    proptest! {
        /// Where the decoder of the whole message accepts it, the filter gives the same fields.
        #[test]
        fn any_bytes_give_what_the_whole_message_gives_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), piece in 1_usize..50) {
            let framed = [&prefix(bytes.len())[..], &bytes].concat();
            let whole = DiscoveryRequest::decode(&bytes[..]);
            let filter = filtered(MessageKind::Sotw, LIMITS, &framed, piece).map(|out| DiscoveryRequest::decode(&out[0][PREFIX..]));
            if let (Ok(whole), Ok(Ok(filtered))) = (whole, filter) {
                prop_assert_eq!(whole, filtered);
            }
        }
    }
}
