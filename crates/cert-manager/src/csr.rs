//! A CSR as the approver reads it: strictly, so that what is signed is what was judged.
//!
//! cert-manager copies the names of a CSR into the certificate as they stand there, and other extensions with them. So nothing is
//! skipped here: every byte of the request is either one of the values returned, or has the one form that it can have. Whatever an
//! agent would not send is an error that says where it stands. Pure; the input may be anybody's.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use workload_identity::KeyType;

mod der;
mod key;

use der::{Element, Malformed, Reader, tag};

/// More than the largest request that an agent makes: a key of 3,072 bits and some hundred names.
pub const MAX_BYTES: usize = 16 << 10;

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE REQUEST-----\n";
const END: &[u8] = b"-----END CERTIFICATE REQUEST-----";

/// 1.2.840.113549.1.9.14, the extensions that are asked for (RFC 2985, 5.4.2).
const EXTENSION_REQUEST: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e];
/// 2.5.29.17 (RFC 5280, 4.2.1.6).
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The kind of the public key, whose holder has signed the request.
    pub key: KeyType,
    /// The one URI name.
    pub uri: String,
    /// The DNS names, in the request's order, without duplicates.
    pub dns_names: Vec<String>,
}

/// Why a CSR is not to be signed. The texts complete the sentence "the CSR …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Larger than [`MAX_BYTES`].
    #[error("has {0} bytes, more than {MAX_BYTES}")]
    Size(usize),
    /// Not one PEM block and nothing else.
    #[error("is not exactly one PEM block CERTIFICATE REQUEST: {0}")]
    Pem(&'static str),
    /// Not DER, or not of the form that PKCS#10 has.
    #[error("is not a PKCS#10 request in DER: {0}")]
    Der(#[from] Malformed),
    /// A version other than the one that there is.
    #[error("is not of version 1")]
    Version,
    /// Names of another kind.
    #[error("has a subject, which has to be empty")]
    Subject,
    /// An attribute other than the extension request, such as a challenge password.
    #[error("has the attribute {0}; only an extension request is allowed, once")]
    Attribute(Oid),
    /// Nothing is asked for.
    #[error("has no extension request, and so no name")]
    NoExtensions,
    /// An extension other than the names: constraints, usages.
    #[error("asks for the extension {0}; only subject alternative names are allowed, once")]
    Extension(Oid),
    /// A kind of name that no profile gives.
    #[error("asks for a name of the kind {0}; only one URI and DNS names are allowed")]
    NameKind(&'static str),
    /// A name that is no ASCII text.
    #[error("asks for a {0} name that is empty or not printable ASCII")]
    NameText(&'static str),
    /// None, or several.
    #[error("asks for {0} URI names, not for one")]
    Uris(usize),
    /// A name that stands twice.
    #[error("asks for the DNS name {0:?} twice")]
    Duplicate(String),
    /// A key that no profile has, or that is none.
    #[error("has a key that no profile allows: {0}")]
    Key(&'static str),
    /// Another algorithm than the one that belongs to the key.
    #[error("is signed by an algorithm that does not belong to its key")]
    Algorithm,
    /// Whoever made the request does not hold the key.
    #[error("has a signature that is not its key's")]
    Signature,
}

/// An object identifier's content, shown in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Oid(Vec<u8>);

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut arc: u64 = 0;
        let mut first = true;
        // Long ones are cut: they come from anybody.
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

/// Reads a request in PEM, as a CertificateRequest carries it.
pub fn read(pem: &[u8]) -> Result<Asked, Error> {
    if pem.len() > MAX_BYTES {
        return Err(Error::Size(pem.len()));
    }
    read_der(&unwrapped(pem)?)
}

/// The one block's content. Text around it, headers and a second block are what another reader may see differently.
fn unwrapped(pem: &[u8]) -> Result<Vec<u8>, Error> {
    let body = pem.strip_prefix(BEGIN).ok_or(Error::Pem("it does not begin with its first line"))?;
    let body = body.strip_suffix(b"\n").unwrap_or(body);
    let body = body.strip_suffix(END).ok_or(Error::Pem("it does not end with its last line"))?;
    let body = body.strip_suffix(b"\n").ok_or(Error::Pem("its last line does not stand alone"))?;
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
            // False is the default, which DER leaves out.
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

/// RFC 5280, GeneralName.
fn kind_of_name(tag: u8) -> &'static str {
    match tag {
        0xa0 => "otherName",
        0x81 => "rfc822Name (an email address)",
        0xa3 => "x400Address",
        0xa4 => "directoryName",
        0xa5 => "ediPartyName",
        0x87 => "iPAddress",
        0x88 => "registeredID",
        _ => "that nobody knows",
    }
}

#[cfg(test)]
mod tests;
