//! Strict parser for the CSR of a CertificateRequest, as the approver reads it.
//!
//! cert-manager copies the subject alternative names and other extensions of a CSR into the certificate. The parser therefore skips
//! nothing: each byte of the CSR is part of a returned value, or is fixed by the format. An element that no agent sends is an error
//! that names the element. The module does no I/O, and its input is untrusted.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use workload_identity::KeyType;

mod der;
mod key;

use der::{Element, Malformed, Reader, tag};

/// Maximum size of a CSR in PEM: 16 KiB. The largest CSR of an agent, with a key of 3,072 bits and some hundred names, is smaller.
pub const MAX_BYTES: usize = 16 << 10;

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE REQUEST-----\n";
const END: &[u8] = b"-----END CERTIFICATE REQUEST-----";

/// `extensionRequest`, 1.2.840.113549.1.9.14 (RFC 2985, section 5.4.2).
const EXTENSION_REQUEST: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e];
/// `subjectAltName`, 2.5.29.17 (RFC 5280, section 4.2.1.6).
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// Content of a valid CSR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Type of the public key. The holder of its private key has signed the CSR.
    pub key: KeyType,
    /// The only URI name. The parser does not check that it is a SPIFFE ID.
    pub uri: String,
    /// DNS names in the order of the CSR, without duplicates.
    pub dns_names: Vec<String>,
}

/// Why a CSR must not be signed. Each text completes the sentence "the CSR …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The PEM text is larger than [`MAX_BYTES`].
    #[error("has {0} bytes, more than {MAX_BYTES}")]
    Size(usize),
    /// The input is not exactly one PEM block.
    #[error("is not exactly one PEM block CERTIFICATE REQUEST: {0}")]
    Pem(&'static str),
    /// The content is not DER, or has not the structure of PKCS#10 (RFC 2986).
    #[error("is not a PKCS#10 request in DER: {0}")]
    Der(#[from] Malformed),
    /// The version is not 1, which has the value 0 (RFC 2986, section 4.1).
    #[error("is not of version 1")]
    Version,
    /// The subject is not empty.
    #[error("has a subject, which has to be empty")]
    Subject,
    /// The CSR has an attribute other than one extension request, such as a challenge password.
    #[error("has the attribute {0}; only an extension request is allowed, once")]
    Attribute(Oid),
    /// The CSR has no extension request, or no subject alternative names in it.
    #[error("has no extension request, and so no name")]
    NoExtensions,
    /// The CSR requests an extension other than one `subjectAltName`, such as basic constraints or key usage.
    #[error("asks for the extension {0}; only subject alternative names are allowed, once")]
    Extension(Oid),
    /// The CSR requests a name that is neither a URI nor a DNS name.
    #[error("asks for a name of the kind {0}; only one URI and DNS names are allowed")]
    NameKind(&'static str),
    /// A name is empty, or has characters other than printable ASCII.
    #[error("asks for a {0} name that is empty or not printable ASCII")]
    NameText(&'static str),
    /// The CSR has no URI name, or several.
    #[error("asks for {0} URI names, not for one")]
    Uris(usize),
    /// A DNS name occurs twice. Case is ignored.
    #[error("asks for the DNS name {0:?} twice")]
    Duplicate(String),
    /// The key is malformed, or of a type that no profile allows.
    #[error("has a key that no profile allows: {0}")]
    Key(&'static str),
    /// The signature algorithm does not match the type of the key.
    #[error("is signed by an algorithm that does not belong to its key")]
    Algorithm,
    /// The signature does not verify: the requester has not proven possession of the private key.
    #[error("has a signature that its key does not verify")]
    Signature,
}

/// An object identifier, shown in dotted decimal notation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Oid(Vec<u8>);

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut arc: u64 = 0;
        let mut first = true;
        // The value is untrusted: at most 32 bytes of it are shown.
        for byte in self.0.iter().take(32) {
            arc = arc << 7 | u64::from(byte & 0x7f);
            if byte & 0x80 != 0 {
                if arc > 1 << 48 {
                    return f.write_str("…");
                }
                continue;
            }
            match first {
                true => write!(f, "{}.{}", (arc / 40).min(2), arc - (arc / 40).min(2) * 40)?,
                false => write!(f, ".{arc}")?,
            }
            (first, arc) = (false, 0);
        }
        Ok(())
    }
}

/// Parses a CSR in PEM, as a CertificateRequest carries it, and verifies its signature.
///
/// # Errors
///
/// Returns the first [`Error`] found: the input is larger than [`MAX_BYTES`], is not exactly one PEM block, is not PKCS#10 in DER, has an
/// element that no agent sends, or has a signature that does not verify.
pub fn read(pem: &[u8]) -> Result<Asked, Error> {
    if pem.len() > MAX_BYTES {
        return Err(Error::Size(pem.len()));
    }
    read_der(&unwrapped(pem)?)
}

/// Decodes the PEM block. Text around it, headers and a second block are rejected, because another parser may read them differently.
fn unwrapped(pem: &[u8]) -> Result<Vec<u8>, Error> {
    let body = pem.strip_prefix(BEGIN).ok_or(Error::Pem("it does not begin with a BEGIN line"))?;
    let body = body.strip_suffix(b"\n").unwrap_or(body);
    let body = body.strip_suffix(END).ok_or(Error::Pem("it does not end with an END line"))?;
    let body = body.strip_suffix(b"\n").ok_or(Error::Pem("no line break precedes its END line"))?;
    let base64: Vec<u8> = body.iter().copied().filter(|byte| *byte != b'\n').collect();
    STANDARD.decode(base64).map_err(|_| Error::Pem("its content is not base64"))
}

fn read_der(der: &[u8]) -> Result<Asked, Error> {
    let mut file = Reader::new(der);
    let mut request = Reader::new(file.take(tag::SEQUENCE, "the request")?.content);
    file.end("the request")?;
    let info = request.take(tag::SEQUENCE, "the request's information")?;
    let algorithm = request.take(tag::SEQUENCE, "the signature's algorithm")?;
    let signature = request.take(tag::BIT_STRING, "the signature")?;
    request.end("the signature")?;

    let (key, names) = read_info(&info)?;
    let signature = der::whole_bytes(&signature, "the signature")?;
    key.verify(algorithm.content, info.whole, signature)?;
    let (uri, dns_names) = names;
    Ok(Asked { key: key.kind, uri, dns_names })
}

type Names = (String, Vec<String>);

fn read_info<'a>(info: &Element<'a>) -> Result<(key::PublicKey<'a>, Names), Error> {
    let mut info = Reader::new(info.content);
    if info.take(tag::INTEGER, "the version")?.content != [0] {
        return Err(Error::Version);
    }
    if !info.take(tag::SEQUENCE, "the subject")?.content.is_empty() {
        return Err(Error::Subject);
    }
    let key = key::PublicKey::read(&info.take(tag::SEQUENCE, "the public key")?)?;
    let attributes = info.take(tag::CONTEXT_0, "the attributes")?;
    info.end("the attributes")?;
    Ok((key, read_attributes(attributes.content)?))
}

fn read_attributes(content: &[u8]) -> Result<Names, Error> {
    let mut attributes = Reader::new(content);
    let mut names = None;
    while !attributes.is_empty() {
        let mut attribute = Reader::new(attributes.take(tag::SEQUENCE, "an attribute")?.content);
        let kind = attribute.take(tag::OID, "an attribute's type")?.content;
        if kind != EXTENSION_REQUEST || names.is_some() {
            return Err(Error::Attribute(Oid(kind.to_vec())));
        }
        let mut values = Reader::new(attribute.take(tag::SET, "the extension request")?.content);
        attribute.end("the extension request")?;
        let extensions = values.take(tag::SEQUENCE, "the extensions")?;
        values.end("the extensions")?;
        names = Some(read_extensions(extensions.content)?);
    }
    names.ok_or(Error::NoExtensions)
}

fn read_extensions(content: &[u8]) -> Result<Names, Error> {
    let mut extensions = Reader::new(content);
    let mut names = None;
    while !extensions.is_empty() {
        let mut extension = Reader::new(extensions.take(tag::SEQUENCE, "an extension")?.content);
        let kind = extension.take(tag::OID, "an extension's type")?.content;
        if kind != SUBJECT_ALT_NAME || names.is_some() {
            return Err(Error::Extension(Oid(kind.to_vec())));
        }
        if extension.next_tag() == Some(tag::BOOLEAN) {
            // DER omits FALSE, because it is the default.
            let critical = extension.take(tag::BOOLEAN, "an extension's criticality")?;
            if critical.content != [0xff] {
                return Err(Malformed::form("an extension's criticality").into());
            }
        }
        let mut value = Reader::new(extension.take(tag::OCTET_STRING, "the names")?.content);
        extension.end("the names")?;
        let list = value.take(tag::SEQUENCE, "the list of names")?;
        value.end("the list of names")?;
        names = Some(read_names(list.content)?);
    }
    names.ok_or(Error::NoExtensions)
}

fn read_names(content: &[u8]) -> Result<Names, Error> {
    let mut list = Reader::new(content);
    let (mut uris, mut dns_names) = (Vec::new(), Vec::<String>::new());
    while !list.is_empty() {
        let name = list.any("a name")?;
        match name.tag {
            tag::URI => uris.push(text(name.content, "URI")?),
            tag::DNS_NAME => {
                let name = text(name.content, "DNS")?;
                if dns_names.iter().any(|known| known.eq_ignore_ascii_case(&name)) {
                    return Err(Error::Duplicate(name));
                }
                dns_names.push(name);
            }
            other => return Err(Error::NameKind(kind_of_name(other))),
        }
    }
    match <[String; 1]>::try_from(uris) {
        Ok([uri]) => Ok((uri, dns_names)),
        Err(uris) => Err(Error::Uris(uris.len())),
    }
}

fn text(content: &[u8], kind: &'static str) -> Result<String, Error> {
    let fine = !content.is_empty() && content.iter().all(u8::is_ascii_graphic);
    let text = std::str::from_utf8(content).ok().filter(|_| fine);
    text.map(str::to_owned).ok_or(Error::NameText(kind))
}

/// Name of a GeneralName choice by its tag (RFC 5280, section 4.2.1.6).
fn kind_of_name(tag: u8) -> &'static str {
    match tag {
        0xa0 => "otherName",
        0x81 => "rfc822Name (an email address)",
        0xa3 => "x400Address",
        0xa4 => "directoryName",
        0xa5 => "ediPartyName",
        0x87 => "iPAddress",
        0x88 => "registeredID",
        _ => "unknown to RFC 5280",
    }
}

#[cfg(test)]
mod tests;
