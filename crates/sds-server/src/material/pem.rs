//! Certificates and revocation lists in PEM (RFC 7468).
//!
//! The reader accepts text around the blocks, as RFC 7468 allows, a byte order mark, indentation, and several markers on one line. It loses
//! nothing in silence: each BEGIN marker of a certificate or a revocation list is read, or the text is rejected with the marker's line. Keys
//! and other known blocks are ignored.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use envoy_x509::Certificate;

use super::{Error, MAX_CERTIFICATES, MAX_PEM_BYTES};

/// Maximum length of the label of a block, in bytes.
const MAX_LABEL_BYTES: usize = 64;
const BEGIN: &[u8] = b"BEGIN";
const END: &[u8] = b"-----END ";
const DASHES: &[u8] = b"-----";

/// A fault in a PEM text, and its place. It has no content of the text, which may hold a private key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BrokenPem {
    /// The fault.
    pub fault: PemFault,
    /// The certificates and revocation lists before the fault.
    pub after: usize,
    /// The line of the marker, from 1.
    pub line: usize,
}

/// The kinds of faults in a PEM text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PemFault {
    /// A line that looks like a BEGIN marker and is none.
    Begin,
    /// A BEGIN marker without a matching END marker before the next BEGIN marker.
    End,
    /// An END marker without a BEGIN marker.
    LoneEnd,
    /// A block with text that is not base64.
    Base64,
    /// A block of a kind that holds certificates in another format, or that is unknown.
    Kind,
    /// A trusted certificate that rejects uses, or whose trust settings are broken.
    Trust,
    /// The text is UTF-16.
    Encoding,
}

impl fmt::Display for BrokenPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.fault {
            PemFault::Begin => "a BEGIN marker is damaged; write -----BEGIN CERTIFICATE-----",
            PemFault::End => "a BEGIN marker has no matching END marker",
            PemFault::LoneEnd => "an END marker has no BEGIN marker",
            PemFault::Base64 => "a block is not base64",
            PemFault::Kind => "a block is of an unknown kind; convert PKCS #7 with openssl pkcs7 -print_certs",
            PemFault::Trust => "a trusted certificate has broken trust settings, or rejects uses; write it as CERTIFICATE",
            PemFault::Encoding => "the text is UTF-16; write UTF-8",
        })?;
        write!(f, " (line {}, after {} valid blocks)", self.line, self.after)
    }
}

/// The kind of an [`Object`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Certificate,
    RevocationList,
}

/// A certificate or a revocation list.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) kind: Kind,
    pub(crate) der: Vec<u8>,
}

/// Reads all certificates and revocation lists of `text`, in their order. The result may be empty.
pub(crate) fn read(text: &[u8]) -> Result<Vec<Object>, Error> {
    if text.len() > MAX_PEM_BYTES {
        return Err(Error::TooLarge(text.len()));
    }
    let mut reader = Reader { text, at: 0, objects: Vec::new() };
    reader.check_encoding()?;
    while let Some((from, label)) = reader.next_marker()? {
        reader.block(from, label)?;
    }
    Ok(reader.objects)
}

struct Reader<'a> {
    text: &'a [u8],
    /// The place up to which the text is read.
    at: usize,
    objects: Vec<Object>,
}

impl<'a> Reader<'a> {
    fn broken(&self, fault: PemFault, at: usize) -> Error {
        Error::Pem(BrokenPem { fault, after: self.objects.len(), line: self.line(at) })
    }

    fn line(&self, at: usize) -> usize {
        1 + self.text[..at].iter().filter(|byte| **byte == b'\n').count()
    }

    fn check_encoding(&self) -> Result<(), Error> {
        for wide in [&b"B\0E\0G\0I\0N"[..], b"\0B\0E\0G\0I"] {
            if let Some(at) = find(self.text, wide, 0) {
                return Err(self.broken(PemFault::Encoding, at));
            }
        }
        Ok(())
    }

    /// Finds the next BEGIN marker. Returns its place and its label, and moves behind it.
    fn next_marker(&mut self) -> Result<Option<(usize, &'a [u8])>, Error> {
        loop {
            let rest = &self.text[self.at..];
            let word = rest.windows(BEGIN.len()).position(|window| window.eq_ignore_ascii_case(BEGIN)).map(|place| self.at + place);
            // An END marker before the next BEGIN marker has lost its own.
            let between = &self.text[self.at..word.unwrap_or(self.text.len())];
            let ends = between.windows(END.len()).enumerate().filter(|(_, window)| *window == END);
            if let Some((place, _)) = ends.into_iter().find(|(place, _)| names_objects(&between[*place..])) {
                return Err(self.broken(PemFault::LoneEnd, self.at + place));
            }
            let Some(word) = word else { return Ok(None) };
            self.at = word + BEGIN.len();
            if let Some(label) = self.label_at(word) {
                self.at += 1 + label.len() + DASHES.len();
                return Ok(Some((word, label)));
            }
            if self.is_damaged(word) {
                return Err(self.broken(PemFault::Begin, word));
            }
        }
    }

    /// The label of the marker whose word BEGIN is at `word`.
    fn label_at(&self, word: usize) -> Option<&'a [u8]> {
        let after = self.text[word..].strip_prefix(b"BEGIN ")?;
        let end = find(&after[..after.len().min(MAX_LABEL_BYTES + DASHES.len())], DASHES, 0)?;
        let label = &after[..end];
        let is_label = label.iter().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b' ');
        (self.text[..word].ends_with(DASHES) && is_label && label.trim_ascii() == label).then_some(label)
    }

    /// Whether the word at `word` is of a marker of a certificate or a revocation list, and not of a comment.
    fn is_damaged(&self, word: usize) -> bool {
        let (before, after) = (&self.text[..word], &self.text[word + BEGIN.len()..]);
        if before.ends_with(b"----") {
            return true;
        }
        if !names_objects(after) || after.first().is_some_and(u8::is_ascii_alphanumeric) {
            return false;
        }
        let starts_line = before.iter().rev().find(|byte| !matches!(byte, b' ' | b'\t' | b'\r')).is_none_or(|byte| *byte == b'\n');
        // A hyphen, or one of the dashes that word processors write: U+2010 to U+2015, U+2212.
        let before = before.trim_ascii_end();
        let after_dash = before.ends_with(b"-") || matches!(before, [.., 0xe2, 0x80, 0x90..=0x95] | [.., 0xe2, 0x88, 0x92]);
        after_dash || starts_line && self.text[word..].starts_with(BEGIN)
    }

    /// Reads the block whose marker is at `from`, and moves behind its END marker.
    fn block(&mut self, from: usize, label: &[u8]) -> Result<(), Error> {
        let end_marker = [END, label, DASHES].concat();
        let end = find(self.text, &end_marker, self.at).ok_or_else(|| self.broken(PemFault::End, from))?;
        let body = &self.text[self.at..end];
        if find(body, b"-----BEGIN", 0).is_some() {
            return Err(self.broken(PemFault::End, from));
        }
        self.at = end + end_marker.len();
        let kind = match label {
            b"CERTIFICATE" | b"X509 CERTIFICATE" | b"TRUSTED CERTIFICATE" => Kind::Certificate,
            b"X509 CRL" => Kind::RevocationList,
            // A damaged marker within the block would be lost with it.
            _ if is_ignored(label) => return if names_object_anywhere(body) { Err(self.broken(PemFault::End, from)) } else { Ok(()) },
            _ => return Err(self.broken(PemFault::Kind, from)),
        };
        if self.objects.iter().filter(|object| object.kind == kind).count() == MAX_CERTIFICATES {
            return Err(Error::TooMany);
        }
        let base64: Vec<u8> = body.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let mut der = STANDARD.decode(base64).ok().filter(|der| !der.is_empty()).ok_or_else(|| self.broken(PemFault::Base64, from))?;
        if label == b"TRUSTED CERTIFICATE" {
            let certificate = Certificate::without_trust_settings(&der).map(<[u8]>::len);
            der.truncate(certificate.map_err(|_| self.broken(PemFault::Trust, from))?);
        }
        self.objects.push(Object { kind, der });
        Ok(())
    }
}

/// Blocks that may lie beside certificates and hold none, such as keys.
fn is_ignored(label: &[u8]) -> bool {
    let holds = [&b"CERTIFICATE"[..], b"CRL", b"PKCS7", b"CMS"].iter().any(|kind| contains(label, kind));
    !holds || label.ends_with(b"CERTIFICATE REQUEST")
}

/// Whether the rest of a line names a certificate or a revocation list, as a marker does.
fn names_objects(rest: &[u8]) -> bool {
    let line = &rest[..rest.len().min(MAX_LABEL_BYTES)];
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    names_object_anywhere(line) || contains(line, b"CRL")
}

fn names_object_anywhere(text: &[u8]) -> bool {
    contains(text, b"CERTIFICATE")
}

fn contains(text: &[u8], what: &[u8]) -> bool {
    text.windows(what.len()).any(|window| window.eq_ignore_ascii_case(what))
}

fn find(text: &[u8], what: &[u8], from: usize) -> Option<usize> {
    text.get(from..)?.windows(what.len()).position(|window| window == what).map(|place| from + place)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block with this label, and three bytes of content.
    fn block(label: &str) -> String {
        format!("-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n")
    }

    fn kinds(text: &str) -> Result<Vec<Kind>, Error> {
        Ok(read(text.as_bytes())?.iter().map(|object| object.kind).collect())
    }

    fn fault(text: &str) -> (PemFault, usize) {
        match read(text.as_bytes()) {
            Err(Error::Pem(broken)) => (broken.fault, broken.line),
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn blocks_are_read_in_all_places() {
        let (a, list) = (block("CERTIFICATE"), block("X509 CRL"));
        let one = [Kind::Certificate];
        for text in [
            a.clone(),
            format!("\u{feff}{a}"),
            a.replace('\n', "\r\n"),
            a.replace('\n', " "),
            a.replace('\n', ""),
            a.lines().map(|line| format!("    {line}\n")).collect(),
            format!("# the beginning of all certificates\nBag Attributes: <No Attributes>\n{a} trailing\0"),
            format!("# BEGIN ANSIBLE MANAGED BLOCK corporate certificates\n{a}# END ANSIBLE MANAGED BLOCK\n# BEGINNING of certificates\n"),
            format!("{}{a}", block("PGP PUBLIC KEY BLOCK")),
            block("X509 CERTIFICATE"),
            format!("{}{a}{}{}", block("RSA PRIVATE KEY"), block("EC PARAMETERS"), block("CERTIFICATE REQUEST")),
            a.trim_end().to_owned(),
        ] {
            assert_eq!(kinds(&text), Ok(one.to_vec()), "{text:?}");
        }
        assert_eq!(kinds(&a.trim_end().repeat(3)), Ok(vec![Kind::Certificate; 3]));
        assert_eq!(kinds(&format!("{a}{list}{a}")), Ok(vec![Kind::Certificate, Kind::RevocationList, Kind::Certificate]));
        assert_eq!(kinds("no PEM here"), Ok(Vec::new()));
    }

    #[test]
    fn a_marker_that_is_not_read_is_rejected_with_its_line() {
        let a = block("CERTIFICATE");
        for damaged in [
            "----BEGIN CERTIFICATE-----",
            "-----BEGIN CERTIFICATE----",
            "-----BEGIN CERTIFICATE",
            "BEGIN CERTIFICATE",
            "BEGIN CERTIFICATE-----",
            "---- BEGIN CERTIFICATE ----",
            "-----BEGIN  CERTIFICATE-----",
            "-----BEGIN\tCERTIFICATE-----",
            "-----BEGIN CERTIFICATE -----",
            "-----BEGIN\u{a0}CERTIFICATE-----",
            "-----Begin Certificate-----",
            "-----begin certificate-----",
            "\u{2014}\u{2014}BEGIN CERTIFICATE-----",
            "----- BEGIN CERTIFICATE-----",
            "----BEGIN X509 CRL-----",
            "-----BEGIN\nCERTIFICATE-----",
            &format!("-----BEGIN{:80}CERTIFICATE-----", ""),
        ] {
            let text = format!("{a}{}", a.replace("-----BEGIN CERTIFICATE-----", damaged));
            assert_eq!(fault(&text), (PemFault::Begin, 4), "{damaged:?}");
        }
        assert_eq!(fault(&format!("{a}{}", a.replace("BEGIN", "BEGN"))), (PemFault::LoneEnd, 6));
        assert_eq!(fault(&format!("{a}-----BEGIN CERTIFICATE-----\nAAAA\n{a}")), (PemFault::End, 4));
        assert_eq!(fault(&format!("{a}-----BEGIN CERTIFICATE-----\nAAAA\n----END CERTIFICATE-----\n")), (PemFault::End, 4));
        assert_eq!(fault(&format!("{a}{}", block("PKCS7"))), (PemFault::Kind, 4));
        for body in ["A*AA", "AAAAA", "", "a: b\nAAAA", "AAAA\\nAAAA"] {
            assert_eq!(fault(&format!("{a}{}", a.replace("AAAA", body))), (PemFault::Base64, 4), "{body:?}");
        }
        let lost = block("PRIVATE KEY").replace("AAAA", "AAAA\n----BEGIN CERTIFICATE-----\nAAAA\n----END CERTIFICATE-----");
        assert_eq!(fault(&format!("{a}{lost}")), (PemFault::End, 4));
        assert_eq!(fault(&format!("{a}{}", block("CERTIFICATE PARAMETERS"))), (PemFault::Kind, 4));
        let wide: Vec<u8> = a.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(matches!(read(&wide), Err(Error::Pem(BrokenPem { fault: PemFault::Encoding, .. }))));
    }

    /// The time is linear in the length: a text of many markers that are none costs no more than others.
    #[test]
    fn a_megabyte_of_words_is_read_at_once() {
        for word in ["BEGIN ", "begin ", "-----END X ", "BEGIN certificat ", "-", "-----BEGIN A-----\n-----END A-----\n"] {
            let text = word.repeat(MAX_PEM_BYTES / word.len());
            let begun = std::time::Instant::now();
            let _ = read(text.as_bytes());
            // Quadratic time is more than a thousand seconds.
            assert!(begun.elapsed().as_secs() < 60, "{word:?}: {:?}", begun.elapsed());
        }
    }
}
