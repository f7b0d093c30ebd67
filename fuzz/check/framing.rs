//! Properties of any request body. An input is the kind of its messages, a limit for names, the size of the pieces, and the body.

use prost::Message;
use sds_server::{
    grpc::request::{MessageKind, MessageLimits, filter_messages},
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
};
use tonic::Code;

/// Bytes of the prefix of a message: a flag and a length.
const PREFIX: usize = 5;
/// No value of a kept field is shortened below this length.
const SHORT: usize = 64;
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
            MessageKind::Sotw => same::<DiscoveryRequest>(received, kept, |request| {
                let texts = [&request.version_info, &request.type_url, &request.response_nonce];
                let error = request.error_detail.iter().map(|error| &error.message);
                texts.into_iter().chain(&request.resource_names).chain(error).all(|text| text.len() < SHORT)
            }),
            MessageKind::Delta => same::<DeltaDiscoveryRequest>(received, kept, |request| {
                let texts = [&request.type_url, &request.response_nonce];
                let lists = request.resource_names_subscribe.iter().chain(&request.resource_names_unsubscribe);
                let versions = request.initial_resource_versions.iter().flat_map(|(name, version)| [name, version]);
                let error = request.error_detail.iter().map(|error| &error.message);
                texts.into_iter().chain(lists).chain(versions).chain(error).all(|text| text.len() < SHORT)
            }),
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

/// If `received` is valid, `kept` is the same message, unless the service does not use a value because of its length.
fn same<M: Message + Default + PartialEq + std::fmt::Debug>(received: &[u8], kept: &[u8], is_short: impl Fn(&M) -> bool) {
    let Ok(received) = M::decode(received) else { return };
    let kept = M::decode(kept).expect("what is kept of a valid message is valid");
    if is_short(&received) {
        assert_eq!(received, kept);
    }
}
