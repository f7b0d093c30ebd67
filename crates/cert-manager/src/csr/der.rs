//! DER, as little of it as a CSR needs: definite, shortest lengths and single-byte tags, so that no value has two encodings.

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
    /// `[0]`, constructed: a CSR's attributes.
    pub(crate) const CONTEXT_0: u8 = 0xa0;
    /// `[2]`, primitive: a general name's dNSName.
    pub(crate) const DNS_NAME: u8 = 0x82;
    /// `[6]`, primitive: a general name's uniformResourceIdentifier.
    pub(crate) const URI: u8 = 0x86;
}

/// What is wrong, and with which part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    part: &'static str,
    why: &'static str,
}

impl Malformed {
    /// A part whose content has another form than it must have.
    pub(super) fn form(part: &'static str) -> Self {
        Self { part, why: "has not the form that it must have" }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.part, self.why)
    }
}

impl std::error::Error for Malformed {}

/// One value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Element<'a> {
    pub tag: u8,
    /// With tag and length.
    pub whole: &'a [u8],
    pub content: &'a [u8],
}

/// Values, one after the other.
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

    /// The next value, whatever it is.
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
            _ => return Err(length_is("has a length that is endless or too large")),
        };
        let (content, rest) = rest.split_at_checked(length).ok_or(short)?;
        let whole = &self.0[..self.0.len() - rest.len()];
        self.0 = rest;
        Ok(Element { tag, whole, content })
    }

    /// The next value, which must be of this kind.
    pub(super) fn take(&mut self, tag: u8, part: &'static str) -> Result<Element<'a>, Malformed> {
        match self.next_tag() {
            Some(found) if found != tag => Err(Malformed { part, why: "is of another kind than it must be" }),
            _ => self.any(part),
        }
    }

    /// That nothing follows `part`.
    pub(super) fn end(&self, part: &'static str) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed { part, why: "is followed by something else" }) }
    }
}

/// A bit string without a broken last byte.
pub(super) fn whole_bytes<'a>(bits: &Element<'a>, part: &'static str) -> Result<&'a [u8], Malformed> {
    match bits.content {
        [0, bytes @ ..] => Ok(bytes),
        _ => Err(Malformed::form(part)),
    }
}

/// A positive integer's bytes without the sign's zero, which stands only where it must.
pub(super) fn positive<'a>(integer: &Element<'a>, part: &'static str) -> Result<&'a [u8], Malformed> {
    match integer.content {
        [0, rest @ ..] if rest.first().is_some_and(|first| *first >= 0x80) => Ok(rest),
        bytes @ [1..=0x7f, ..] => Ok(bytes),
        _ => Err(Malformed::form(part)),
    }
}
