//! Encoding of responses: one shared buffer for each (material, variant, name), and a small head for each message.
//!
//! Each buffer is allocated with its exact size and written directly, so that no copy of a private key stays in a buffer that is not wiped.
//! Protobuf allows the fields of a message in any order: the head has version, type and nonce, and the encoded resources follow.

use std::collections::VecDeque;

use agent_runtime::text::hex;
use aws_lc_rs::digest;
use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use zeroize::Zeroizing;

use crate::{
    grpc,
    material::Svid,
    sds::{
        encoded::{self, Variant},
        stream::TYPE_URL,
    },
    trust::Bundle,
};

/// A length-delimited Protobuf field.
enum Field<'a> {
    Bytes(u32, &'a [u8]),
    Message(u32, Vec<Field<'a>>),
}

impl Field<'_> {
    fn body_len(&self) -> usize {
        match self {
            Self::Bytes(_, bytes) => bytes.len(),
            Self::Message(_, fields) => fields.iter().map(Field::len).sum(),
        }
    }

    fn tag(&self) -> u32 {
        match self {
            Self::Bytes(tag, _) | Self::Message(tag, _) => *tag,
        }
    }

    fn len(&self) -> usize {
        let body = self.body_len();
        key_len(self.tag()) + encoded_len_varint(body as u64) + body
    }

    fn write(&self, out: &mut Vec<u8>) {
        encode_key(self.tag(), WireType::LengthDelimited, out);
        encode_varint(self.body_len() as u64, out);
        match self {
            Self::Bytes(_, bytes) => out.extend_from_slice(bytes),
            Self::Message(_, fields) => fields.iter().for_each(|field| field.write(out)),
        }
    }
}

/// Protobuf field numbers, by message.
mod tag {
    pub(super) const DISCOVERY_RESPONSE_VERSION: u32 = 1;
    pub(super) const RESPONSE_RESOURCES: u32 = 2;
    pub(super) const RESPONSE_TYPE_URL: u32 = 4;
    pub(super) const RESPONSE_NONCE: u32 = 5;
    pub(super) const RESPONSE_REMOVED_RESOURCES: u32 = 6;
    pub(super) const RESOURCE_VERSION: u32 = 1;
    pub(super) const RESOURCE_ANY: u32 = 2;
    pub(super) const RESOURCE_NAME: u32 = 3;
    pub(super) const ANY_TYPE_URL: u32 = 1;
    pub(super) const ANY_VALUE: u32 = 2;
    pub(super) const SECRET_NAME: u32 = 1;
    pub(super) const SECRET_TLS_CERTIFICATE: u32 = 2;
    pub(super) const SECRET_VALIDATION_CONTEXT: u32 = 4;
    pub(super) const TLS_CERTIFICATE_CHAIN: u32 = 1;
    pub(super) const TLS_PRIVATE_KEY: u32 = 2;
    pub(super) const VALIDATION_TRUSTED_CA: u32 = 1;
    pub(super) const VALIDATION_CRL: u32 = 7;
    pub(super) const DATA_SOURCE_INLINE_BYTES: u32 = 2;
}

/// Encodes the certificate chain and key of `svid` under `name`, as one entry of `resources` of a response.
pub fn certificate(svid: &Svid, variant: Variant, name: &str) -> Bytes {
    encoded::of(&svid.attached, variant, name, || {
        let (chain, key) = (svid.chain.to_pem(), svid.key.to_pem());
        let certificate = Field::Message(
            tag::SECRET_TLS_CERTIFICATE,
            vec![
                Field::Message(tag::TLS_CERTIFICATE_CHAIN, vec![Field::Bytes(tag::DATA_SOURCE_INLINE_BYTES, &chain)]),
                Field::Message(tag::TLS_PRIVATE_KEY, vec![Field::Bytes(tag::DATA_SOURCE_INLINE_BYTES, &key)]),
            ],
        );
        resource(variant, name, svid.version(), certificate)
    })
}

/// Encodes the roots and revocation lists of `bundle` under `name`. The validation context has no SAN matchers: a client would merge them
/// into its own and so weaken its check.
pub fn bundle(bundle: &Bundle, variant: Variant, name: &str) -> Bytes {
    encoded::of(&bundle.attached, variant, name, || {
        let (roots, crls) = (bundle.roots.to_pem(), bundle.crls_pem());
        let inline = |tag, pem| Field::Message(tag, vec![Field::Bytes(tag::DATA_SOURCE_INLINE_BYTES, pem)]);
        let trusted = inline(tag::VALIDATION_TRUSTED_CA, &roots);
        let context = [trusted].into_iter().chain(crls.as_deref().map(|pem| inline(tag::VALIDATION_CRL, pem)));
        resource(variant, name, bundle.version(), Field::Message(tag::SECRET_VALIDATION_CONTEXT, context.collect()))
    })
}

fn resource(variant: Variant, name: &str, version: &str, secret: Field<'_>) -> Zeroizing<Vec<u8>> {
    let secret = Field::Message(tag::ANY_VALUE, vec![Field::Bytes(tag::SECRET_NAME, name.as_bytes()), secret]);
    let any = vec![Field::Bytes(tag::ANY_TYPE_URL, TYPE_URL.as_bytes()), secret];
    let resource = match variant {
        Variant::Sotw => Field::Message(tag::RESPONSE_RESOURCES, any),
        Variant::Delta => Field::Message(
            tag::RESPONSE_RESOURCES,
            vec![
                Field::Bytes(tag::RESOURCE_VERSION, version.as_bytes()),
                Field::Message(tag::RESOURCE_ANY, any),
                Field::Bytes(tag::RESOURCE_NAME, name.as_bytes()),
            ],
        ),
    };
    let mut out = Zeroizing::new(Vec::with_capacity(resource.len()));
    resource.write(&mut out);
    out
}

/// Returns a whole message: prefix, head and resources. `version` is the version of a SotW response; delta ignores it. `nonce` is empty for
/// a unary response. `removed` are the names of `removed_resources`; SotW has none.
pub fn response(
    variant: Variant,
    version: &str,
    nonce: &str,
    resources: impl IntoIterator<Item = Bytes>,
    removed: &[Box<str>],
) -> VecDeque<Bytes> {
    let mut pieces: VecDeque<Bytes> = resources.into_iter().collect();
    let mut head = Vec::with_capacity(160);
    if variant == Variant::Sotw {
        Field::Bytes(tag::DISCOVERY_RESPONSE_VERSION, version.as_bytes()).write(&mut head);
    }
    Field::Bytes(tag::RESPONSE_TYPE_URL, TYPE_URL.as_bytes()).write(&mut head);
    if !nonce.is_empty() {
        Field::Bytes(tag::RESPONSE_NONCE, nonce.as_bytes()).write(&mut head);
    }
    for name in removed {
        Field::Bytes(tag::RESPONSE_REMOVED_RESOURCES, name.as_bytes()).write(&mut head);
    }
    let rest = pieces.iter().map(Bytes::len).sum();
    pieces.push_front(grpc::head(&head, rest));
    pieces
}

/// Returns the version of a SotW response. A response with one resource has the version of that resource. A response with several has a
/// digest of all versions, after the first three parts of the certificate's version. `prefix` has these parts, of the certificate in the
/// response or of the one that the client keeps.
pub fn response_version(prefix: Option<&str>, resources: &[(&str, &str)]) -> String {
    // A response without the certificate must keep the prefix: the client reports the version when it reconnects.
    if let [(_, only)] = resources
        && prefix.is_none_or(|prefix| only.starts_with(prefix))
    {
        return (*only).to_owned();
    }
    let mut hash = digest::Context::new(&digest::SHA256);
    for part in resources.iter().flat_map(|(name, version)| [name, version]) {
        hash.update(&(part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    let content = hex(&hash.finish().as_ref()[..8]);
    prefix.map_or_else(|| format!("b-{content}"), |prefix| format!("{prefix}-{content}"))
}

#[cfg(test)]
mod tests {

    use prost::Message;
    use workload_identity::samples::identity;

    use super::*;
    use crate::{
        material::samples,
        proto::envoy::{
            config::core::v3::data_source::Specifier,
            extensions::transport_sockets::tls::v3::{Secret, secret::Type},
            service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse},
        },
        trust::crl::{self, samples::Authority},
    };

    fn material() -> (Svid, Bundle) {
        let (svid, roots) = samples::svid(identity("a"));
        (svid, Bundle::new(roots, Vec::new()))
    }

    fn join(pieces: VecDeque<Bytes>) -> Bytes {
        let joined: Vec<u8> = pieces.into_iter().flatten().collect();
        assert_eq!(joined[..grpc::PREFIX], grpc::prefix(joined.len() - grpc::PREFIX));
        Bytes::from(joined).slice(grpc::PREFIX..)
    }

    fn secret(any: &prost_types::Any) -> Secret {
        assert_eq!(any.type_url, TYPE_URL);
        Secret::decode(&any.value[..]).unwrap()
    }

    #[test]
    fn the_written_bytes_are_the_messages_that_a_client_reads() {
        let (svid, roots) = material();
        for variant in [Variant::Sotw, Variant::Delta] {
            let resources = [certificate(&svid, variant, "default"), bundle(&roots, variant, "ROOTCA")];
            let removed: &[Box<str>] = if variant == Variant::Delta { &["spiffe://td".into()] } else { &[] };
            let message = join(response(variant, "v7", "12", resources, removed));
            let secrets = match variant {
                Variant::Sotw => {
                    let response = DiscoveryResponse::decode(message).unwrap();
                    assert_eq!((&*response.version_info, &*response.nonce, &*response.type_url), ("v7", "12", TYPE_URL));
                    response.resources.iter().map(secret).collect::<Vec<_>>()
                }
                Variant::Delta => {
                    let response = DeltaDiscoveryResponse::decode(message).unwrap();
                    assert_eq!((&*response.nonce, &*response.type_url), ("12", TYPE_URL));
                    assert_eq!(response.removed_resources, ["spiffe://td"]);
                    let versions: Vec<_> = response.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
                    assert_eq!(
                        versions,
                        [("default".to_owned(), svid.version().to_owned()), ("ROOTCA".to_owned(), roots.version().to_owned())]
                    );
                    response.resources.iter().map(|r| secret(r.resource.as_ref().unwrap())).collect()
                }
            };
            let Some(Type::TlsCertificate(certificate)) = &secrets[0].r#type else { panic!("{secrets:?}") };
            let inline = |source: &Option<crate::proto::envoy::config::core::v3::DataSource>| match &source.as_ref().unwrap().specifier {
                Some(Specifier::InlineBytes(bytes)) => bytes.to_vec(),
                None => panic!("not inline"),
            };
            assert_eq!(inline(&certificate.certificate_chain), svid.chain.to_pem());
            assert_eq!(inline(&certificate.private_key), **svid.key.to_pem());
            let Some(Type::ValidationContext(context)) = &secrets[1].r#type else { panic!("{secrets:?}") };
            assert_eq!(inline(&context.trusted_ca), roots.roots.to_pem());
            assert_eq!((&*secrets[0].name, &*secrets[1].name), ("default", "ROOTCA"));
        }
    }

    #[test]
    fn revocation_lists_go_beside_the_roots() {
        let authority = Authority::new("a");
        let roots = crate::material::TrustBundle::from_pem(authority.certificate.pem().as_bytes()).unwrap();
        let crls = crl::from_pem(authority.list(2, 0).as_bytes()).unwrap();
        let served = Bundle::new(roots, crls);
        let message = join(response(Variant::Sotw, "v7", "12", [bundle(&served, Variant::Sotw, "ROOTCA")], &[]));
        let secret = secret(&DiscoveryResponse::decode(message).unwrap().resources[0]);
        let Some(Type::ValidationContext(context)) = secret.r#type else { panic!("{secret:?}") };
        let Some(Specifier::InlineBytes(pem)) = context.crl.unwrap().specifier else { panic!("not inline") };
        assert_eq!(crl::from_pem(&pem).unwrap(), served.crls());
    }

    #[test]
    fn equal_requests_share_one_buffer() {
        let (svid, _) = material();
        let first = certificate(&svid, Variant::Delta, "default");
        assert_eq!(first.as_ptr(), certificate(&svid, Variant::Delta, "default").as_ptr());
        assert_ne!(first.as_ptr(), certificate(&svid, Variant::Delta, "spiffe://td/a").as_ptr());
    }

    #[test]
    fn a_response_has_its_only_resources_version_or_a_digest_of_all() {
        let cert = "200-100-0123456789abcdef-fedcba9876543210";
        let prefix = "200-100-0123456789abcdef";
        assert_eq!(response_version(Some(prefix), &[("default", cert)]), cert);
        assert_eq!(response_version(None, &[("ROOTCA", "b-1")]), "b-1");
        let both = response_version(Some(prefix), &[("default", cert), ("ROOTCA", "b-1")]);
        assert!(both.starts_with(prefix) && both != cert);
        assert_ne!(both, response_version(Some(prefix), &[("default", cert), ("ROOTCA", "b-2")]));
        let kept = response_version(Some(prefix), &[("ROOTCA", "b-1")]);
        assert!(kept.starts_with(prefix), "the client keeps its certificate and reports its prefix: {kept}");
    }
}
