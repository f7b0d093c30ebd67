//! Distinguished names, and their form for comparisons.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use crate::{
    Fault,
    der::{self, Element, Reader},
};

/// The identifier of the attribute `emailAddress` (PKCS #9).
const EMAIL_ADDRESS: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x01];
/// The largest name that BoringSSL reads, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// A distinguished name.
#[derive(Debug, Clone)]
pub struct Name<'a> {
    /// With tag and length.
    der: &'a [u8],
    /// BoringSSL compares this form: text as UTF-8, in lower case, with single blanks, and each set in the order of DER.
    canonical: Vec<u8>,
    emails: Vec<Element<'a>>,
    /// The identifier of each attribute, and its value if that is text.
    attributes: Vec<(&'a [u8], Option<String>)>,
}

impl<'a> Name<'a> {
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Self, Fault> {
        let whole = reader.next(der::SEQUENCE).ok_or(Fault("a name is not a sequence"))?;
        Self::of(whole.whole, whole.content)
    }

    /// Reads the content of the sequence `der`.
    fn of(der: &'a [u8], content: &'a [u8]) -> Result<Self, Fault> {
        if content.len() > MAX_BYTES {
            return Err(Fault("a name is too long"));
        }
        let mut name = Self { der, canonical: Vec::new(), emails: Vec::new(), attributes: Vec::new() };
        let mut sets = Reader::new(content);
        while !sets.is_empty() {
            let mut set = sets.inner(der::SET).ok_or(Fault("a name has a broken set"))?;
            if set.is_empty() {
                return Err(Fault("a name has an empty set (Envoy 1.40 rejects it)"));
            }
            let mut parts = Vec::new();
            while !set.is_empty() {
                parts.push(name.attribute(&mut set)?);
            }
            parts.sort_unstable();
            push(0x31, &parts.concat(), &mut name.canonical);
        }
        Ok(name)
    }

    /// Checks the attributes of a name that is relative to another one.
    pub(crate) fn check_relative(content: &'a [u8]) -> Result<(), Fault> {
        let mut name = Self { der: &[], canonical: Vec::new(), emails: Vec::new(), attributes: Vec::new() };
        let mut attributes = Reader::new(content);
        while !attributes.is_empty() {
            name.attribute(&mut attributes)?;
        }
        Ok(())
    }

    /// Reads one attribute and returns its form for comparisons.
    fn attribute(&mut self, set: &mut Reader<'a>) -> Result<Vec<u8>, Fault> {
        let broken = Fault("an attribute of a name is broken");
        let mut attribute = set.inner(der::SEQUENCE).ok_or(broken)?;
        let kind = attribute.next(der::OBJECT).filter(|kind| der::is_object(kind.content)).ok_or(broken)?;
        let value = attribute.any().ok_or(broken)?;
        if !attribute.is_empty() {
            return Err(broken);
        }
        der::check_any(&value).map_err(|_| Fault("an attribute of a name has characters that its type does not have"))?;
        if kind.content == EMAIL_ADDRESS {
            self.emails.push(value);
        }
        let mut content = kind.whole.to_vec();
        let text = characters(&value);
        match &text {
            Some(text) => push(0x0c, fold(text).as_bytes(), &mut content),
            None => content.extend_from_slice(value.whole),
        }
        self.attributes.push((kind.content, text));
        let mut out = Vec::new();
        push(0x30, &content, &mut out);
        Ok(out)
    }

    /// The name in DER.
    pub fn der(&self) -> &'a [u8] {
        self.der
    }

    /// Whether the name has no attribute.
    pub fn is_empty(&self) -> bool {
        self.attributes.is_empty()
    }

    pub(crate) fn attributes(&self) -> usize {
        self.attributes.len()
    }

    /// The values of the attribute `emailAddress`.
    pub(crate) fn emails(&self) -> &[Element<'a>] {
        &self.emails
    }

    /// The form for comparisons. A name below another one has its form as a prefix.
    pub(crate) fn canonical(&self) -> &[u8] {
        &self.canonical
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (id, text)) in self.attributes.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            let label = match id {
                [0x55, 0x04, 3] => "CN",
                [0x55, 0x04, 6] => "C",
                [0x55, 0x04, 7] => "L",
                [0x55, 0x04, 8] => "ST",
                [0x55, 0x04, 10] => "O",
                [0x55, 0x04, 11] => "OU",
                [0x09, 0x92, .., 0x19] => "DC",
                _ => "other",
            };
            write!(f, "{separator}{label}={}", text.as_deref().unwrap_or("?"))?;
        }
        if self.attributes.is_empty() { f.write_str("an empty name") } else { Ok(()) }
    }
}

impl PartialEq for Name<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl Eq for Name<'_> {}

impl Hash for Name<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.canonical.hash(state);
    }
}

/// The text of a string type that BoringSSL compares as text. `None` for another type, and for characters that the type does not have.
pub(crate) fn characters(element: &Element<'_>) -> Option<String> {
    let content = element.content;
    match element.tag {
        der::UTF8_STRING => std::str::from_utf8(content).ok().filter(|text| text.chars().all(is_character)).map(str::to_owned),
        der::BMP_STRING => {
            let (units, []) = content.as_chunks::<2>() else { return None };
            units.iter().map(|unit| char::from_u32(u32::from(u16::from_be_bytes(*unit)))).map(|c| c.filter(|c| is_character(*c))).collect()
        }
        der::UNIVERSAL_STRING => {
            let (units, []) = content.as_chunks::<4>() else { return None };
            units.iter().map(|unit| char::from_u32(u32::from_be_bytes(*unit))).map(|c| c.filter(|c| is_character(*c))).collect()
        }
        der::PRINTABLE_STRING | der::T61_STRING | der::IA5_STRING | der::VISIBLE_STRING => {
            Some(content.iter().copied().map(char::from).collect())
        }
        _ => None,
    }
}

/// Whether Unicode assigns a character to the code point: BoringSSL rejects the others.
fn is_character(c: char) -> bool {
    let code = u32::from(c);
    !(0xfdd0..=0xfdef).contains(&code) && code & 0xfffe != 0xfffe
}

/// The form of a text for comparisons.
fn fold(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut blank = false;
    for c in text.chars() {
        if matches!(c, '\t'..='\r' | ' ') {
            blank = !out.is_empty();
        } else {
            if std::mem::take(&mut blank) {
                out.push(' ');
            }
            out.push(c.to_ascii_lowercase());
        }
    }
    out
}

/// Appends an element: tag, length, content.
fn push(tag: u8, content: &[u8], out: &mut Vec<u8>) {
    out.push(tag);
    let len = content.len();
    // Forms are compared with forms alone, so that a length needs no shortest encoding.
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(content);
}
