//! A DER reader for CSRs. It accepts only definite, shortest lengths and tags of one byte, so that no value has two encodings.

use std::fmt;

/// Tags (X.690): class, constructed bit and number in one byte.
pub(super) mod tag {
    pub(crate) const BOOLEAN: u8 = 0x01;
    pub(crate) const INTEGER: u8 = 0x02;
    pub(crate) const BIT_STRING: u8 = 0x03;
    pub(crate) const OCTET_STRING: u8 = 0x04;
    pub(crate) const OID: u8 = 0x06;
    pub(crate) const SEQUENCE: u8 = 0x30;
    pub(crate) const SET: u8 = 0x31;
    /// `[0]`, constructed: the attributes of a CSR.
    pub(crate) const CONTEXT_0: u8 = 0xa0;
    /// `[2]`, primitive: `dNSName` of a GeneralName.
    pub(crate) const DNS_NAME: u8 = 0x82;
    /// `[6]`, primitive: `uniformResourceIdentifier` of a GeneralName.
    pub(crate) const URI: u8 = 0x86;
}

/// An error in the DER encoding, with the name of the element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    part: &'static str,
    why: &'static str,
}

impl Malformed {
    /// The content of `part` is malformed.
    pub(super) fn form(part: &'static str) -> Self {
        Self { part, why: "is malformed" }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.part, self.why)
    }
}

impl std::error::Error for Malformed {}

/// One DER value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Element<'a> {
    pub tag: u8,
    /// Tag, length and content.
    pub whole: &'a [u8],
    pub content: &'a [u8],
}

/// Reads consecutive DER values.
#[derive(Debug, Clone)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn next_tag(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// Reads the next value, which may have any tag.
    pub(super) fn any(&mut self, part: &'static str) -> Result<Element<'a>, Malformed> {
        let short = Malformed { part, why: "is cut short" };
        let length_is = |why| Malformed { part, why };
        let (&tag, rest) = self.0.split_first().ok_or(Malformed { part, why: "is missing" })?;
        if tag & 0x1f == 0x1f {
            return Err(length_is("has a tag of more than one byte"));
        }
        let (&first, rest) = rest.split_first().ok_or_else(|| short.clone())?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81 => match rest {
                [one @ 0x80..=0xff, rest @ ..] => (usize::from(*one), rest),
                _ => return Err(length_is("has a length that is not in its shortest form")),
            },
            0x82 => match rest {
                [high @ 1..=0xff, low, rest @ ..] => (usize::from(*high) << 8 | usize::from(*low), rest),
                _ => return Err(length_is("has a length that is not in its shortest form")),
            },
            _ => return Err(length_is("has a length that is indefinite or too large")),
        };
        let (content, rest) = rest.split_at_checked(length).ok_or(short)?;
        let whole = &self.0[..self.0.len() - rest.len()];
        self.0 = rest;
        Ok(Element { tag, whole, content })
    }

    /// Reads the next value, which must have the tag `tag`.
    pub(super) fn take(&mut self, tag: u8, part: &'static str) -> Result<Element<'a>, Malformed> {
        match self.next_tag() {
            Some(found) if found != tag => Err(Malformed { part, why: "has an unexpected tag" }),
            _ => self.any(part),
        }
    }

    /// Checks that no data follows `part`.
    pub(super) fn end(&self, part: &'static str) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed { part, why: "is followed by other data" }) }
    }
}

/// Returns the content of a bit string, which must have no unused bits.
pub(super) fn whole_bytes<'a>(bits: &Element<'a>, part: &'static str) -> Result<&'a [u8], Malformed> {
    match bits.content {
        [0, bytes @ ..] => Ok(bytes),
        _ => Err(Malformed::form(part)),
    }
}

/// Returns the bytes of a positive integer, without the leading zero of the sign. That zero is accepted only where DER requires it.
pub(super) fn positive<'a>(integer: &Element<'a>, part: &'static str) -> Result<&'a [u8], Malformed> {
    match integer.content {
        [0, rest @ ..] if rest.first().is_some_and(|first| *first >= 0x80) => Ok(rest),
        bytes @ [1..=0x7f, ..] => Ok(bytes),
        _ => Err(Malformed::form(part)),
    }
}
