//! General names, and name constraints (RFC 5280, sections 4.2.1.6 and 4.2.1.10).

use crate::{
    Fault, Release,
    certificate::Certificate,
    der::{self, Reader},
    extension::sequence,
    name::Name,
};

/// BoringSSL refuses a check of more names than this against constraints.
const MAX_CHECKS: usize = 1 << 20;

/// A general name.
#[derive(Debug, Clone)]
pub enum GeneralName<'a> {
    /// `rfc822Name`.
    Email(&'a [u8]),
    /// `dNSName`.
    Dns(&'a [u8]),
    /// `uniformResourceIdentifier`.
    Uri(&'a [u8]),
    /// `directoryName`.
    Directory(Name<'a>),
    /// Another kind, by its number and its content.
    Other(u32, &'a [u8]),
}

impl<'a> GeneralName<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Fault> {
        let broken = Fault("a general name is broken");
        let element = reader.any().ok_or(broken)?;
        let content = element.content;
        for (number, is_constructed) in
            [(0, true), (1, false), (2, false), (3, true), (4, true), (5, true), (6, false), (7, false), (8, false)]
        {
            let tag = if is_constructed { der::constructed(number) } else { der::context(number) };
            if element.tag != tag {
                continue;
            }
            return match number {
                1 => Ok(Self::Email(content)),
                2 => Ok(Self::Dns(content)),
                4 => {
                    let mut inner = Reader::new(content);
                    Name::read(&mut inner).and_then(|name| if inner.is_empty() { Ok(Self::Directory(name)) } else { Err(broken) })
                }
                6 => Ok(Self::Uri(content)),
                0 => other_name(content).map(|()| Self::Other(number, content)).ok_or(broken),
                5 => party_name(content).map(|()| Self::Other(number, content)).ok_or(broken),
                8 if !der::is_object(content) => Err(broken),
                _ => Ok(Self::Other(number, content)),
            };
        }
        Err(broken)
    }

    fn is_kind_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Other(one, _), Self::Other(other, _)) => one == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

impl PartialEq for GeneralName<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Email(a), Self::Email(b)) | (Self::Dns(a), Self::Dns(b)) | (Self::Uri(a), Self::Uri(b)) => a == b,
            (Self::Directory(a), Self::Directory(b)) => a == b,
            (Self::Other(a, x), Self::Other(b, y)) => (a, x) == (b, y),
            _ => false,
        }
    }
}

/// Checks `OtherName`: an identifier and a value with an explicit tag.
fn other_name(content: &[u8]) -> Option<()> {
    let mut fields = Reader::new(content);
    der::object(&mut fields)?;
    let mut value = fields.inner(der::constructed(0))?;
    let inner = value.any()?;
    der::check_any(&inner).ok()?;
    (value.is_empty() && fields.is_empty()).then_some(())
}

/// Checks `EDIPartyName`: two strings, of which the first is optional.
fn party_name(content: &[u8]) -> Option<()> {
    let mut fields = Reader::new(content);
    if let Some(assigner) = fields.optional(der::constructed(0))? {
        check_directory_string(assigner)?;
    }
    check_directory_string(fields.get(der::constructed(1))?)?;
    fields.is_empty().then_some(())
}

/// Checks a value that is one `DirectoryString`.
fn check_directory_string(content: &[u8]) -> Option<()> {
    let types = [der::PRINTABLE_STRING, der::T61_STRING, der::BMP_STRING, der::UNIVERSAL_STRING, der::UTF8_STRING];
    let mut value = Reader::new(content);
    let text = value.any().filter(|text| types.contains(&text.tag))?;
    der::check_any(&text).ok()?;
    value.is_empty().then_some(())
}

/// A list of general names.
#[derive(Debug, Clone)]
pub struct Names<'a>(Vec<GeneralName<'a>>);

impl<'a> Names<'a> {
    /// Reads the content of a sequence of general names.
    pub(crate) fn read(content: &'a [u8]) -> Result<Self, Fault> {
        let mut reader = Reader::new(content);
        let mut names = Vec::new();
        while !reader.is_empty() {
            names.push(GeneralName::read(&mut reader)?);
        }
        Ok(Self(names))
    }

    /// The names, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &GeneralName<'a>> {
        self.0.iter()
    }

    pub(crate) fn first_directory(&self) -> Option<Name<'a>> {
        self.0.iter().find_map(|name| match name {
            GeneralName::Directory(name) => Some(name.clone()),
            _ => None,
        })
    }

    pub(crate) fn intersects(&self, other: &Self) -> bool {
        self.0.iter().any(|name| other.0.contains(name))
    }
}

/// One constraint.
#[derive(Debug, Clone)]
struct Subtree<'a> {
    base: GeneralName<'a>,
    /// Whether it has a minimum or a maximum, which RFC 5280 does not allow.
    has_limits: bool,
}

/// The name constraints of an authority.
#[derive(Debug, Clone)]
pub(crate) struct NameConstraints<'a> {
    permitted: Vec<Subtree<'a>>,
    excluded: Vec<Subtree<'a>>,
}

/// Why names are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Violation {
    /// No permitted subtree has the name.
    NotPermitted(&'static str),
    /// An excluded subtree has the name.
    Excluded(&'static str),
    /// A name or constraint cannot be compared.
    Unusable(&'static str),
}

/// The result of one comparison.
type Match = Result<bool, Violation>;

impl<'a> NameConstraints<'a> {
    pub(crate) fn read(value: &'a [u8]) -> Result<Self, Fault> {
        let broken = Fault("its name constraints are broken");
        let mut fields = sequence(value, broken)?;
        let mut subtrees = |number| {
            let list = fields.optional(der::constructed(number)).ok_or(broken)?;
            list.map_or(Ok(Vec::new()), |list| subtrees(list).ok_or(broken))
        };
        let (permitted, excluded) = (subtrees(0)?, subtrees(1)?);
        if fields.is_empty() { Ok(Self { permitted, excluded }) } else { Err(broken) }
    }

    /// Checks all names of `certificate` as this release of Envoy does.
    pub(crate) fn check(&self, certificate: &Certificate<'_>, release: Release) -> Result<(), Violation> {
        let subject = &certificate.subject;
        let names = certificate.extensions().ok().and_then(|own| own.names.as_ref()).map_or(&[][..], |names| &names.0);
        if (subject.attributes() + names.len()).saturating_mul(self.permitted.len() + self.excluded.len()) > MAX_CHECKS {
            return Err(Violation::Unusable("it has too many names"));
        }
        if !subject.is_empty() {
            self.check_one(&GeneralName::Directory(subject.clone()), release)?;
        }
        for email in subject.emails() {
            if email.tag != der::IA5_STRING {
                return Err(Violation::Unusable("the type of an email address in its subject is not IA5String"));
            }
            self.check_one(&GeneralName::Email(email.content), release)?;
        }
        names.iter().try_for_each(|name| self.check_one(name, release))
    }

    fn check_one(&self, name: &GeneralName<'_>, release: Release) -> Result<(), Violation> {
        let kind = kind(name);
        let of_kind = |subtree: &&Subtree<'_>| name.is_kind_of(&subtree.base);
        let mut permitted = None;
        for subtree in self.permitted.iter().filter(of_kind) {
            subtree.check_limits()?;
            if permitted != Some(true) {
                permitted = Some(matches(name, &subtree.base, false, release)?);
            }
        }
        if permitted == Some(false) {
            return Err(Violation::NotPermitted(kind));
        }
        for subtree in self.excluded.iter().filter(of_kind) {
            subtree.check_limits()?;
            if matches(name, &subtree.base, true, release)? {
                return Err(Violation::Excluded(kind));
            }
        }
        Ok(())
    }
}

impl Subtree<'_> {
    fn check_limits(&self) -> Result<(), Violation> {
        if self.has_limits { Err(Violation::Unusable("a constraint has a minimum or a maximum")) } else { Ok(()) }
    }
}

fn subtrees(content: &[u8]) -> Option<Vec<Subtree<'_>>> {
    let mut list = Reader::new(content);
    let mut subtrees = Vec::new();
    while !list.is_empty() {
        let mut fields = list.inner(der::SEQUENCE)?;
        let base = GeneralName::read(&mut fields).ok()?;
        let (minimum, maximum) = (fields.optional(der::context(0))?, fields.optional(der::context(1))?);
        if !fields.is_empty() || [minimum, maximum].into_iter().flatten().any(|limit| !der::is_integer(limit)) {
            return None;
        }
        subtrees.push(Subtree { base, has_limits: minimum.is_some() || maximum.is_some() });
    }
    Some(subtrees)
}

fn kind(name: &GeneralName<'_>) -> &'static str {
    match name {
        GeneralName::Email(_) => "an email address",
        GeneralName::Dns(_) => "a DNS name",
        GeneralName::Uri(_) => "a URI",
        GeneralName::Directory(_) => "the subject",
        GeneralName::Other(..) => "a name of another kind",
    }
}

/// Whether `name` is below `base`, which is of the same kind.
fn matches(name: &GeneralName<'_>, base: &GeneralName<'_>, is_excluding: bool, release: Release) -> Match {
    match (name, base) {
        (GeneralName::Directory(name), GeneralName::Directory(base)) => Ok(name.canonical().starts_with(base.canonical())),
        (GeneralName::Dns(name), GeneralName::Dns(base)) => Ok(match release {
            Release::V1_36 => is_dns_below(name, base),
            Release::V1_40 => is_dns_below_strict(name, base, is_excluding),
        }),
        (GeneralName::Email(name), GeneralName::Email(base)) => match release {
            Release::V1_36 => is_email_below(name, base),
            Release::V1_40 => is_email_below_strict(name, base),
        },
        (GeneralName::Uri(name), GeneralName::Uri(base)) => match release {
            Release::V1_36 => is_uri_below(name, base),
            Release::V1_40 => is_uri_below_strict(name, base),
        },
        _ => Err(Violation::Unusable("a constraint is for names of a kind that Envoy does not compare")),
    }
}

fn has_suffix(text: &[u8], suffix: &[u8]) -> bool {
    text.len() >= suffix.len() && text[text.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

fn is_dns_below(name: &[u8], base: &[u8]) -> bool {
    if base.is_empty() {
        return true;
    }
    let is_whole_label =
        base[0] == b'.' || name.len() == base.len() || name.len() > base.len() && name[name.len() - base.len() - 1] == b'.';
    is_whole_label && has_suffix(name, base)
}

fn is_dns_below_strict(name: &[u8], base: &[u8], is_excluding: bool) -> bool {
    if base.is_empty() {
        return true;
    }
    let (name, base) = (without_last_dot(name), without_last_dot(base));
    if base.is_empty() {
        return name.is_empty() || name.ends_with(b".");
    }
    // `*.bar.com` may stand for the excluded `foo.bar.com`.
    if let Some(parent) = name.strip_prefix(b"*.").filter(|_| is_excluding) {
        let parent_of_base = base.iter().position(|byte| *byte == b'.').map(|dot| &base[dot + 1..]);
        if parent_of_base.is_some_and(|base| base.eq_ignore_ascii_case(parent)) {
            return true;
        }
    }
    is_dns_below(name, base)
}

fn without_last_dot(text: &[u8]) -> &[u8] {
    text.strip_suffix(b".").unwrap_or(text)
}

const EMAIL: Violation = Violation::Unusable("an email address cannot be compared with a constraint");

/// Splits at the first `@`.
fn split(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|byte| *byte == b'@')?;
    Some((&text[..at], &text[at + 1..]))
}

fn is_email_below(name: &[u8], base: &[u8]) -> Match {
    let (local, domain) = split(name).ok_or(EMAIL)?;
    match split(base) {
        None if base.first() == Some(&b'.') => Ok(has_suffix(&name[local.len()..], base)),
        None => Ok(domain.eq_ignore_ascii_case(base)),
        Some((base_local, base_domain)) => Ok((base_local.is_empty() || base_local == local) && domain.eq_ignore_ascii_case(base_domain)),
    }
}

fn is_email_below_strict(name: &[u8], base: &[u8]) -> Match {
    let is_local =
        |text: &[u8]| !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.".contains(byte));
    let is_domain = |text: &[u8]| !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(byte));
    let (local, domain) = split(name).filter(|(local, domain)| is_local(local) && is_domain(domain)).ok_or(EMAIL)?;
    match split(base) {
        Some((base_local, base_domain)) => {
            if !is_local(base_local) || !is_domain(base_domain) {
                return Err(EMAIL);
            }
            Ok(base_local == local && domain.eq_ignore_ascii_case(base_domain))
        }
        None if !is_domain(base) => Err(EMAIL),
        None if base.first() == Some(&b'.') => Ok(has_suffix(domain, base)),
        None => Ok(domain.eq_ignore_ascii_case(base)),
    }
}

const URI: Violation = Violation::Unusable("a URI has no host name that can be compared with a constraint");

fn is_uri_below(name: &[u8], base: &[u8]) -> Match {
    let colon = name.iter().position(|byte| *byte == b':').ok_or(URI)?;
    let rest = name[colon + 1..].strip_prefix(b"//").ok_or(URI)?;
    let end = rest.iter().position(|byte| *byte == b':').or_else(|| rest.iter().position(|byte| *byte == b'/'));
    let host = &rest[..end.unwrap_or(rest.len())];
    if host.is_empty() {
        return Err(URI);
    }
    Ok(if base.first() == Some(&b'.') { has_suffix(host, base) } else { host.eq_ignore_ascii_case(base) })
}

fn is_uri_below_strict(name: &[u8], base: &[u8]) -> Match {
    let host = host_of(name).ok_or(URI)?;
    let base = without_last_dot(base);
    let domain = base.strip_prefix(b".").unwrap_or(base);
    if !is_host_name(domain) {
        return Err(Violation::Unusable("a constraint of URIs is not a host name of letters, digits, hyphens and dots"));
    }
    Ok(if domain.len() < base.len() { has_suffix(host, base) } else { host.eq_ignore_ascii_case(base) })
}

fn host_of(uri: &[u8]) -> Option<&[u8]> {
    let colon = uri.iter().position(|byte| *byte == b':')?;
    let (scheme, rest) = (&uri[..colon], uri[colon + 1..].strip_prefix(b"//")?);
    let is_scheme = scheme.first().is_some_and(u8::is_ascii_alphabetic)
        && scheme.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte));
    let end = rest.iter().position(|byte| b"/?#".contains(byte)).unwrap_or(rest.len());
    let mut host = &rest[..end];
    if let Some(colon) = host.iter().position(|byte| *byte == b':') {
        if !host[colon + 1..].iter().all(u8::is_ascii_digit) {
            return None;
        }
        host = &host[..colon];
    }
    let host = without_last_dot(host);
    (is_scheme && is_host_name(host)).then_some(host)
}

/// Whether the text is a fully qualified host name, and not an IPv4 address in any of its forms.
fn is_host_name(text: &[u8]) -> bool {
    let is_label = |label: &[u8]| {
        let ends = [label.first(), label.last()];
        label.len() <= 63
            && ends.iter().all(|end| end.is_some_and(u8::is_ascii_alphanumeric))
            && label.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
    };
    let mut last: &[u8] = b"";
    for label in text.split(|byte| *byte == b'.') {
        if !is_label(label) {
            return false;
        }
        last = label;
    }
    match last {
        [b'0', b'x' | b'X', digits @ ..] => !digits.iter().all(u8::is_ascii_hexdigit),
        label => !label.iter().all(u8::is_ascii_digit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_compared_by_their_host() {
        let strict = |name: &str, base: &str| is_uri_below_strict(name.as_bytes(), base.as_bytes()).ok();
        let lax = |name: &str, base: &str| is_uri_below(name.as_bytes(), base.as_bytes()).ok();
        for (name, base, newer, older) in [
            ("spiffe://mesh.example/ns/a", "mesh.example", Some(true), Some(true)),
            ("spiffe://MESH.example/ns/a", "mesh.example", Some(true), Some(true)),
            ("spiffe://other.example/ns/a", "mesh.example", Some(false), Some(false)),
            ("spiffe://a.mesh.example/ns/a", "mesh.example", Some(false), Some(false)),
            ("spiffe://a.mesh.example/ns/a", ".mesh.example", Some(true), Some(true)),
            ("spiffe://mesh.example/ns/a", ".mesh.example", Some(false), Some(false)),
            ("spiffe://my_mesh/ns/a", "my_mesh", None, Some(true)),
            ("spiffe://mesh.example/ns/a", "", None, Some(false)),
            ("spiffe://mesh.example./a", "mesh.example", Some(true), Some(false)),
            ("spiffe://10.0.0.1/a", "mesh.example", None, Some(false)),
            ("urn:a", "mesh.example", None, None),
        ] {
            assert_eq!((strict(name, base), lax(name, base)), (newer, older), "{name} {base}");
        }
    }

    #[test]
    fn dns_names_are_compared_by_whole_labels() {
        for (name, base, is_below) in
            [("a.b.example", "b.example", true), ("ab.example", "b.example", false), ("b.example", ".b.example", false), ("x", "", true)]
        {
            assert_eq!(is_dns_below(name.as_bytes(), base.as_bytes()), is_below, "{name} {base}");
            assert_eq!(is_dns_below_strict(name.as_bytes(), base.as_bytes(), false), is_below, "{name} {base}");
        }
        assert!(is_dns_below_strict(b"*.b.example", b"a.b.example", true) && !is_dns_below(b"*.b.example", b"a.b.example"));
    }
}
