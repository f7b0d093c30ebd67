//! Properties of any request body. An input is the kind of its messages, a limit for names, the size of the pieces, and the body.

use prost::{
    Message,
    encoding::{DecodeContext, decode_key, skip_field},
};
use sds_server::{
    grpc::request::{MessageKind, MessageLimits, filter_messages},
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
};
use tonic::Code;

/// Bytes of the prefix of a message: a flag and a length.
const PREFIX: usize = 5;
/// No value of a kept field is left out below this length.
const SHORT: usize = 1000;
const MAX_BYTES: usize = 32 << 10;

/// Panics if the pieces matter, or if a kept message differs from the received one.
pub fn check(data: &[u8]) {
    let [kind, names, size, body @ ..] = data else { return };
    let kind = [MessageKind::Sotw, MessageKind::Delta, MessageKind::Other][usize::from(*kind) % 3];
    let limits = MessageLimits { bytes: MAX_BYTES, names: usize::from(*names) };
    let (messages, end) = filter_messages(kind, limits, [body]);
    for size in [1, usize::from(*size) + 1] {
        let (others, other_end) = filter_messages(kind, limits, body.chunks(size));
        assert_eq!(messages, others, "pieces of {size} bytes");
        let told = |end: &Result<bool, tonic::Status>| end.as_ref().map_err(|status| (status.code(), status.message().to_owned())).copied();
        assert_eq!(told(&end), told(&other_end), "pieces of {size} bytes");
    }

    let mut rest = body;
    for message in &messages {
        let received = next(&mut rest).expect("a message that was received");
        let kept = next(&mut &message[..]).expect("a message with its prefix");
        assert_eq!(kept.len() + PREFIX, message.len(), "the length in the prefix");
        assert!(kept.len() <= received.len());
        match kind {
            MessageKind::Other => assert_eq!(kept, received),
            MessageKind::Sotw => same::<DiscoveryRequest>(received, kept, 2),
            MessageKind::Delta => same::<DeltaDiscoveryRequest>(received, kept, 1),
        }
    }
    match end {
        Ok(is_within) => assert_eq!(is_within, !rest.is_empty(), "{} bytes are left", rest.len()),
        Err(status) => {
            let expected = [Code::Unimplemented, Code::ResourceExhausted, Code::InvalidArgument];
            assert!(expected.contains(&status.code()) && status.message().len() < 200, "{status}");
        }
    }
}

/// Splits the next message off.
fn next<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (prefix, others) = rest.split_at_checked(PREFIX)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?);
    let (message, others) = others.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = others;
    Some(message)
}

/// If `received` is valid, `kept` is the same message apart from the field with the number `node`, unless the service does not use a value because of its length.
fn same<M: Message + Default + PartialEq + std::fmt::Debug>(received: &[u8], kept: &[u8], node: u32) {
    let Ok(message) = M::decode(received) else { return };
    let kept = M::decode(kept).expect("what is kept of a valid message is valid");
    if longest_value(received, node) < SHORT {
        assert_eq!(message, kept);
    }
}

/// The length of the longest value, apart from that of `node`, which is left out.
fn longest_value(mut message: &[u8], node: u32) -> usize {
    let mut longest = 0;
    while let Ok((field, wire_type)) = decode_key(&mut message) {
        let before = message.len();
        if skip_field(wire_type, field, &mut message, DecodeContext::default()).is_err() {
            break;
        }
        if field != node {
            longest = longest.max(before - message.len());
        }
    }
    longest
}
