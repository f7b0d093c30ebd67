//! A resource of the server: a certificate or a bundle, parsed and checked. Keys are never printed.

use std::fmt;

use bytes::Bytes;
use prost::Message;
use prost_types::Any;
use sds_server::{
    material::{self, CertificateChain, TrustBundle},
    proto::envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{Secret, secret::Type},
    },
    trust::{Bundle, crl},
};

use crate::cli::output::printable;

/// The only type of resource that SDS has.
pub(super) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// One resource in one version.
#[derive(Debug)]
pub(super) struct Resource {
    /// Its name in the request.
    pub name: String,
    /// The server's version.
    pub version: String,
    /// Its content.
    pub material: Material,
}

/// The content of a secret.
#[derive(Debug)]
pub(super) enum Material {
    /// A certificate, with its key if the server sends one.
    Certificate {
        /// Leaf first.
        chain: Box<CertificateChain>,
        /// PEM.
        key: Option<Key>,
    },
    /// Roots, and revocation lists if the server sends any.
    Bundle(Bundle),
}

/// A private key in PEM, as received.
pub(super) struct Key(Bytes);

impl Key {
    /// A key from its PEM.
    pub(super) fn new(pem: Bytes) -> Self {
        Self(pem)
    }

    /// The PEM.
    pub(super) fn pem(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(redacted)")
    }
}

/// The reason why a resource cannot be shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Error {
    /// The resource is not a secret.
    #[error("the server sent a resource of type {}, which is not a secret", printable(.0))]
    Type(String),
    /// The secret is not valid protobuf.
    #[error("the server sent a secret that cannot be read: {0}")]
    Encoding(String),
    /// A kind without a chain or roots, such as session ticket keys.
    #[error("{}: a kind of secret that cannot be shown here", printable(.0))]
    Kind(String),
    /// The certificate or bundle is invalid.
    #[error("{}: the {what} {cause}", printable(.name))]
    Material {
        /// The resource's name.
        name: String,
        /// `certificate chain` or `trust bundle`.
        what: &'static str,
        /// The error of the parser.
        cause: material::Error,
    },
}

impl Error {
    /// Whether an Envoy would reject the resource too. A kind that only this command cannot show is not an error of the server.
    pub(super) fn is_refusal(&self) -> bool {
        !matches!(self, Self::Kind(_))
    }
}

/// Parses one resource of a response with `version`.
pub(super) fn read(any: &Any, version: &str) -> Result<Resource, Error> {
    if any.type_url != TYPE_URL {
        return Err(Error::Type(any.type_url.clone()));
    }
    let secret = Secret::decode(any.value.as_slice()).map_err(|error| Error::Encoding(error.to_string()))?;
    let name = secret.name;
    let wrong = |what| {
        let name = name.clone();
        move |cause| Error::Material { name, what, cause }
    };
    let material = match secret.r#type {
        Some(Type::TlsCertificate(certificate)) => {
            let pem = inline(certificate.certificate_chain).ok_or_else(|| Error::Kind(name.clone()))?;
            let chain = CertificateChain::from_pem(&pem).map_err(wrong("certificate chain"))?;
            Material::Certificate { chain: Box::new(chain), key: inline(certificate.private_key).map(Key::new) }
        }
        Some(Type::ValidationContext(context)) => {
            let pem = inline(context.trusted_ca).ok_or_else(|| Error::Kind(name.clone()))?;
            let roots = TrustBundle::from_pem(&pem).map_err(wrong("trust bundle"))?;
            let crls = inline(context.crl).map_or_else(|| Ok(Vec::new()), |pem| crl::from_pem(&pem)).map_err(wrong("revocation list"))?;
            Material::Bundle(Bundle::new(roots, crls))
        }
        None => return Err(Error::Kind(name)),
    };
    Ok(Resource { name, version: version.to_owned(), material })
}

fn inline(source: Option<DataSource>) -> Option<Bytes> {
    let Specifier::InlineBytes(bytes) = source?.specifier?;
    Some(bytes)
}
