//! A reader of DER (X.690), as strict as BoringSSL's.

use crate::Fault;

/// A tag: class and kind in the upper three bits, the number in the others.
pub(crate) type Tag = u32;

const CLASS_SHIFT: u32 = 24;
const CONSTRUCTED: Tag = 0x20 << CLASS_SHIFT;
const CONTEXT: Tag = 0x80 << CLASS_SHIFT;
const CLASS_MASK: Tag = 0xc0 << CLASS_SHIFT;

pub(crate) const BOOLEAN: Tag = 1;
pub(crate) const INTEGER: Tag = 2;
pub(crate) const BIT_STRING: Tag = 3;
pub(crate) const OCTET_STRING: Tag = 4;
pub(crate) const NULL: Tag = 5;
pub(crate) const OBJECT: Tag = 6;
pub(crate) const ENUMERATED: Tag = 10;
pub(crate) const UTF8_STRING: Tag = 12;
pub(crate) const PRINTABLE_STRING: Tag = 19;
pub(crate) const T61_STRING: Tag = 20;
pub(crate) const IA5_STRING: Tag = 22;
pub(crate) const UTC_TIME: Tag = 23;
pub(crate) const GENERALIZED_TIME: Tag = 24;
pub(crate) const VISIBLE_STRING: Tag = 26;
pub(crate) const UNIVERSAL_STRING: Tag = 28;
pub(crate) const BMP_STRING: Tag = 30;
pub(crate) const SEQUENCE: Tag = CONSTRUCTED | 16;
pub(crate) const SET: Tag = CONSTRUCTED | 17;

/// A primitive element with this context-specific number.
pub(crate) const fn context(number: Tag) -> Tag {
    CONTEXT | number
}

/// A constructed element with this context-specific number.
pub(crate) const fn constructed(number: Tag) -> Tag {
    CONTEXT | CONSTRUCTED | number
}

/// One element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Element<'a> {
    pub(crate) tag: Tag,
    /// With tag and length.
    pub(crate) whole: &'a [u8],
    pub(crate) content: &'a [u8],
}

/// Whether lengths have to be the shortest possible.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lengths {
    Minimal,
    Any,
}

/// The rest of an input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next element, of any kind.
    pub(crate) fn any(&mut self) -> Option<Element<'a>> {
        self.element(Lengths::Minimal)
    }

    /// The content of the next element, which has to have this tag.
    pub(crate) fn get(&mut self, tag: Tag) -> Option<&'a [u8]> {
        self.next(tag).map(|element| element.content)
    }

    /// The next element, which has to have this tag.
    pub(crate) fn next(&mut self, tag: Tag) -> Option<Element<'a>> {
        let mut ahead = *self;
        let element = ahead.any().filter(|element| element.tag == tag)?;
        *self = ahead;
        Some(element)
    }

    /// Like [`get`](Self::get), with a length that need not be the shortest. BoringSSL accepts that for the signature of a certificate.
    pub(crate) fn get_with_any_length(&mut self, tag: Tag) -> Option<&'a [u8]> {
        self.element(Lengths::Any).filter(|element| element.tag == tag).map(|element| element.content)
    }

    /// The elements that an element with this tag has.
    pub(crate) fn inner(&mut self, tag: Tag) -> Option<Reader<'a>> {
        self.get(tag).map(Reader)
    }

    /// Whether the next element has this tag.
    pub(crate) fn is_next(&self, tag: Tag) -> bool {
        Self(self.0).any_tag() == Some(tag)
    }

    /// The content of the next element if that has this tag.
    pub(crate) fn optional(&mut self, tag: Tag) -> Option<Option<&'a [u8]>> {
        if self.is_next(tag) { self.get(tag).map(Some) } else { Some(None) }
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn any_tag(mut self) -> Option<Tag> {
        self.tag()
    }

    fn tag(&mut self) -> Option<Tag> {
        let first = self.byte()?;
        let class = Tag::from(first & 0xe0) << CLASS_SHIFT;
        let mut number = Tag::from(first & 0x1f);
        if number == 0x1f {
            number = 0;
            loop {
                let next = self.byte()?;
                if number == 0 && next == 0x80 {
                    return None;
                }
                number = number << 7 | Tag::from(next & 0x7f);
                if number >= 1 << CLASS_SHIFT {
                    return None;
                }
                if next & 0x80 == 0 {
                    break;
                }
            }
            if number < 0x1f {
                return None;
            }
        }
        // Number 0 of the universal class is reserved.
        if class & !CONSTRUCTED == 0 && number == 0 { None } else { Some(class | number) }
    }

    fn element(&mut self, lengths: Lengths) -> Option<Element<'a>> {
        let start = self.0;
        let mut rest = *self;
        let tag = rest.tag()?;
        let first = rest.byte()?;
        let len = if first & 0x80 == 0 {
            usize::from(first)
        } else {
            let bytes = usize::from(first & 0x7f);
            if bytes == 0 || bytes > 4 {
                return None;
            }
            let mut len = 0usize;
            for _ in 0..bytes {
                len = len << 8 | usize::from(rest.byte()?);
            }
            if lengths == Lengths::Minimal && (len < 0x80 || len >> (8 * (bytes - 1)) == 0) {
                return None;
            }
            len
        };
        let content = rest.0.get(..len)?;
        let whole = start.get(..start.len() - rest.0.len() + len)?;
        self.0 = rest.0.get(len..)?;
        Some(Element { tag, whole, content })
    }
}

/// The one element of an input that has nothing else.
pub(crate) fn only(input: &[u8], tag: Tag) -> Option<&[u8]> {
    let mut reader = Reader::new(input);
    reader.get(tag).filter(|_| reader.is_empty())
}

/// A Boolean of an element's content.
pub(crate) fn boolean(content: &[u8]) -> Option<bool> {
    match content {
        [0] => Some(false),
        [0xff] => Some(true),
        _ => None,
    }
}

/// A Boolean of an element's content, in a field of an extension, where BoringSSL takes each value but 0 for true.
pub(crate) fn flag(content: &[u8]) -> Option<bool> {
    match content {
        [value] => Some(*value != 0),
        _ => None,
    }
}

/// Whether an element's content is an integer in its shortest form.
pub(crate) fn is_integer(content: &[u8]) -> bool {
    match content {
        [] => false,
        [_] => true,
        [0, second, ..] => second & 0x80 != 0,
        [0xff, second, ..] => second & 0x80 == 0,
        _ => true,
    }
}

/// An integer of an element's content. `Some(None)` if it is larger than `u64`.
pub(crate) fn unsigned(content: &[u8]) -> Option<Option<u64>> {
    if !is_integer(content) || content.first().is_some_and(|first| first & 0x80 != 0) {
        return None;
    }
    let digits = content.strip_prefix(&[0]).filter(|digits| !digits.is_empty()).unwrap_or(content);
    if digits.len() > 8 {
        return Some(None);
    }
    Some(Some(digits.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))))
}

/// The bytes of a bit string, and the number of unused bits at its end.
pub(crate) fn bits(content: &[u8]) -> Option<(&[u8], u8)> {
    let (unused, bits) = content.split_first()?;
    let is_padded = match bits.last() {
        None => *unused == 0,
        Some(last) => *unused < 8 && last & ((1u16 << unused) - 1).to_be_bytes()[1] == 0,
    };
    is_padded.then_some((bits, *unused))
}

/// Whether an element's content is an object identifier.
pub(crate) fn is_object(content: &[u8]) -> bool {
    let mut starts = true;
    for byte in content {
        if starts && *byte == 0x80 {
            return false;
        }
        starts = byte & 0x80 == 0;
    }
    starts && !content.is_empty()
}

/// An object identifier.
pub(crate) fn object<'a>(reader: &mut Reader<'a>) -> Option<&'a [u8]> {
    reader.get(OBJECT).filter(|content| is_object(content))
}

/// Checks an element of the type ANY. `value` has the characters of a string type.
pub(crate) fn check_any(element: &Element<'_>) -> Result<(), Fault> {
    let (tag, content) = (element.tag, element.content);
    let (class, number, is_constructed) = (tag & CLASS_MASK, tag & !(CLASS_MASK | CONSTRUCTED), tag & CONSTRUCTED != 0);
    if class == 0 {
        // EXTERNAL, EMBEDDED PDV, SEQUENCE, SET, CHARACTER STRING.
        let has_parts = matches!(number, 8 | 11 | 16 | 17 | 29);
        if number <= 36 && number != 15 && has_parts != is_constructed || number > 0xff {
            return Err(Fault("a value has a type of ASN.1 that does not exist"));
        }
    }
    let is_valid = match tag {
        OBJECT => is_object(content),
        NULL => content.is_empty(),
        BOOLEAN => boolean(content).is_some(),
        INTEGER | ENUMERATED => is_integer(content),
        BIT_STRING => bits(content).is_some(),
        UTC_TIME | GENERALIZED_TIME => crate::time::parse(element).is_some(),
        UTF8_STRING | BMP_STRING | UNIVERSAL_STRING => crate::name::characters(element).is_some(),
        _ => true,
    };
    if is_valid { Ok(()) } else { Err(Fault("a value is not encoded as its type demands")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_shortest_lengths_are_read() {
        let read = |input: &[u8]| Reader::new(input).any().map(|element| (element.tag, element.content.len()));
        assert_eq!(read(&[0x04, 0x01, 0xaa]), Some((OCTET_STRING, 1)));
        assert_eq!(read(&[0x04, 0x81, 0x01, 0xaa]), None);
        assert_eq!(read(&[0x04, 0x80, 0xaa, 0, 0]), None, "an indefinite length");
        assert_eq!(read(&[0x04, 0x02, 0xaa]), None, "truncated");
        let long = [&[0x04, 0x82, 0x00, 0x80][..], &[0; 128]].concat();
        assert_eq!(read(&long), None);
        assert_eq!(Reader::new(&long).get_with_any_length(OCTET_STRING).map(<[u8]>::len), Some(128));
        assert_eq!(read(&[0x1f, 0x1e, 0x00]), None, "a small number in the long form");
        assert_eq!(read(&[0x00, 0x00]), None);
    }

    #[test]
    fn integers_booleans_and_bits_have_one_form() {
        assert_eq!((unsigned(&[0]), unsigned(&[0, 0x80]), unsigned(&[1, 0])), (Some(Some(0)), Some(Some(128)), Some(Some(256))));
        assert_eq!((unsigned(&[0, 1]), unsigned(&[0x80]), unsigned(&[])), (None, None, None));
        assert_eq!(unsigned(&[1; 9]), Some(None));
        assert!(is_integer(&[0xff]) && is_integer(&[0xff, 0x00]) && !is_integer(&[0xff, 0x80]));
        assert_eq!((boolean(&[0xff]), boolean(&[0]), boolean(&[1])), (Some(true), Some(false), None));
        assert_eq!((bits(&[3, 0xf8]), bits(&[3, 0xf9]), bits(&[1]), bits(&[8, 0])), (Some((&[0xf8][..], 3)), None, None, None));
        assert!(is_object(&[0x2a, 0x86, 0x48]) && !is_object(&[0x2a, 0x80, 0x01]) && !is_object(&[0x2a, 0x86]) && !is_object(&[]));
    }
}
