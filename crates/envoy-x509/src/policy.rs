//! Certificate policies (RFC 5280, sections 4.2.1.4, 4.2.1.5, 4.2.1.11 and 4.2.1.14; RFC 9618).
//!
//! Envoy demands no policy. Policies decide about a path only if an authority demands one, with `requireExplicitPolicy`, or if an extension
//! of policies is broken.

use std::collections::BTreeSet;

use crate::{
    Fault,
    der::{self, Element, Reader},
    extension::sequence,
};

const ANY: &[u8] = &[0x55, 0x1d, 0x20, 0x00];
/// The qualifier with the address of a statement.
const STATEMENT: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x02, 1];
/// The qualifier with a text for users.
const USER_NOTICE: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x02, 2];
const BROKEN: Fault = Fault("its certificate policies are broken");

/// A policy of the issuer, and the policy of the subject that equals it.
type Mapping<'a> = (&'a [u8], &'a [u8]);

/// The extensions of policies of one certificate.
#[derive(Debug, Clone)]
pub(crate) struct Policies<'a> {
    /// `None` without the extension.
    policies: Option<BTreeSet<&'a [u8]>>,
    /// Those of a leaf are not evaluated, even if they are broken.
    mappings: Result<Vec<Mapping<'a>>, Fault>,
    require_explicit: Option<u64>,
    inhibit_mapping: Option<u64>,
    inhibit_any: Option<u64>,
}

impl<'a> Policies<'a> {
    pub(crate) fn read(
        policies: Option<&'a [u8]>,
        mappings: Result<Option<&'a [u8]>, Fault>,
        constraints: Option<&'a [u8]>,
        inhibit_any: Option<&'a [u8]>,
    ) -> Result<Self, Fault> {
        let (require_explicit, inhibit_mapping) = constraints.map_or(Ok((None, None)), read_constraints)?;
        Ok(Self {
            policies: policies.map(read_policies).transpose()?,
            mappings: mappings.and_then(|value| value.map_or(Ok(Vec::new()), read_mappings)),
            require_explicit,
            inhibit_mapping,
            inhibit_any: inhibit_any.map(|value| der::only(value, der::INTEGER).ok_or(BROKEN).and_then(skip)).transpose()?,
        })
    }
}

/// A number of certificates. One that is larger than `u64` is larger than each path.
fn skip(content: &[u8]) -> Result<u64, Fault> {
    der::unsigned(content).map(|count| count.unwrap_or(u64::MAX)).ok_or(BROKEN)
}

fn read_policies(value: &[u8]) -> Result<BTreeSet<&[u8]>, Fault> {
    let mut list = sequence(value, BROKEN)?;
    let mut policies = BTreeSet::new();
    while !list.is_empty() {
        let mut fields = list.inner(der::SEQUENCE).ok_or(BROKEN)?;
        let id = der::object(&mut fields).ok_or(BROKEN)?;
        if !fields.is_empty() {
            let qualifiers = fields.inner(der::SEQUENCE).ok_or(BROKEN)?;
            check_qualifiers(qualifiers).ok_or(BROKEN)?;
        }
        if !fields.is_empty() || !policies.insert(id) {
            return Err(BROKEN);
        }
    }
    if policies.is_empty() { Err(BROKEN) } else { Ok(policies) }
}

fn check_qualifiers(mut qualifiers: Reader<'_>) -> Option<()> {
    while !qualifiers.is_empty() {
        let mut fields = qualifiers.inner(der::SEQUENCE)?;
        let id = der::object(&mut fields)?;
        let value = fields.any()?;
        match id {
            STATEMENT => (value.tag == der::IA5_STRING).then_some(())?,
            USER_NOTICE => check_notice(&value)?,
            _ => der::check_any(&value).ok()?,
        }
        fields.is_empty().then_some(())?;
    }
    Some(())
}

fn check_notice(value: &Element<'_>) -> Option<()> {
    let mut fields = Reader::new((value.tag == der::SEQUENCE).then_some(value.content)?);
    if let Some(reference) = fields.optional(der::SEQUENCE)? {
        let mut reference = Reader::new(reference);
        check_text(&mut reference)?;
        let mut numbers = reference.inner(der::SEQUENCE)?;
        while !numbers.is_empty() {
            numbers.get(der::INTEGER).filter(|number| der::is_integer(number))?;
        }
        reference.is_empty().then_some(())?;
    }
    if !fields.is_empty() {
        check_text(&mut fields)?;
    }
    fields.is_empty().then_some(())
}

/// Checks the next element, a `DisplayText`.
fn check_text(reader: &mut Reader<'_>) -> Option<()> {
    let types = [der::IA5_STRING, der::VISIBLE_STRING, der::BMP_STRING, der::UTF8_STRING];
    let text = reader.any().filter(|text| types.contains(&text.tag))?;
    der::check_any(&text).ok()
}

fn read_mappings(value: &[u8]) -> Result<Vec<Mapping<'_>>, Fault> {
    let mut list = sequence(value, BROKEN)?;
    let mut mappings = Vec::new();
    while !list.is_empty() {
        let mut fields = list.inner(der::SEQUENCE).ok_or(BROKEN)?;
        let pair = der::object(&mut fields).zip(der::object(&mut fields)).filter(|(from, to)| *from != ANY && *to != ANY);
        mappings.push(pair.filter(|_| fields.is_empty()).ok_or(BROKEN)?);
    }
    if mappings.is_empty() { Err(BROKEN) } else { Ok(mappings) }
}

fn read_constraints(value: &[u8]) -> Result<(Option<u64>, Option<u64>), Fault> {
    let mut fields = sequence(value, BROKEN)?;
    let mut next = |number| fields.optional(der::context(number)).ok_or(BROKEN)?.map(skip).transpose();
    let both = (next(0)?, next(1)?);
    if !fields.is_empty() || both == (None, None) { Err(BROKEN) } else { Ok(both) }
}

/// Why the policies of a path are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The extensions of the certificate at this position of the path, from 0.
    Broken(usize, Fault),
    /// An authority demands a policy, and the path has none.
    None,
}

/// The valid policies at one depth of the path.
#[derive(Default)]
struct Level<'a> {
    has_any: bool,
    policies: BTreeSet<&'a [u8]>,
}

impl Level<'_> {
    fn is_empty(&self) -> bool {
        !self.has_any && self.policies.is_empty()
    }
}

/// Checks the policies of a path, without its trust anchor: from the leaf upwards, each with whether it is self-issued.
pub(crate) fn check<'a>(path: &[(&'a Result<Policies<'a>, Fault>, bool)]) -> Result<(), Refused> {
    let longer = path.len() as u64 + 2;
    let (mut require_explicit, mut inhibit_mapping, mut inhibit_any) = (longer, longer, longer);
    let mut level = Level { has_any: true, ..Level::default() };
    for (index, (policies, is_self_issued)) in path.iter().enumerate().rev() {
        let policies = policies.as_ref().map_err(|fault| Refused::Broken(index, *fault))?;
        level = restrict(level, policies, inhibit_any > 0 || index > 0 && *is_self_issued);
        if require_explicit == 0 && level.is_empty() {
            return Err(Refused::None);
        }
        if index > 0 {
            let mappings = policies.mappings.as_ref().map_err(|fault| Refused::Broken(index, *fault))?;
            level = mapped(&level, mappings, inhibit_mapping > 0);
        }
        if index == 0 || !is_self_issued {
            for count in [&mut require_explicit, &mut inhibit_mapping, &mut inhibit_any] {
                *count = count.saturating_sub(1);
            }
        }
        let lower = |count: &mut u64, to: Option<u64>| *count = to.map_or(*count, |to| to.min(*count));
        lower(&mut require_explicit, policies.require_explicit);
        lower(&mut inhibit_mapping, policies.inhibit_mapping);
        lower(&mut inhibit_any, policies.inhibit_any);
        if index == 0 && require_explicit == 0 && level.is_empty() {
            return Err(Refused::None);
        }
    }
    Ok(())
}

/// Keeps the policies that the certificate has (RFC 5280, section 6.1.3, steps d and e).
fn restrict<'a>(mut level: Level<'a>, certificate: &Policies<'a>, any_is_allowed: bool) -> Level<'a> {
    let Some(own) = &certificate.policies else { return Level::default() };
    let had_any = level.has_any;
    if !own.contains(ANY) || !any_is_allowed {
        level.policies.retain(|policy| own.contains(policy));
        level.has_any = false;
    }
    if had_any {
        level.policies.extend(own.iter().copied().filter(|policy| *policy != ANY));
    }
    level
}

/// Replaces the policies of the issuer by those of the subject (RFC 5280, section 6.1.4, steps a and b).
fn mapped<'a>(level: &Level<'a>, mappings: &[Mapping<'a>], is_allowed: bool) -> Level<'a> {
    let is_mapped = |policy: &&[u8]| mappings.iter().any(|(from, _)| from == policy);
    let mut next: BTreeSet<&[u8]> = level.policies.iter().copied().filter(|policy| !is_mapped(policy)).collect();
    if is_allowed {
        next.extend(mappings.iter().filter(|(from, _)| level.has_any || level.policies.contains(from)).map(|(_, to)| *to));
    }
    Level { has_any: level.has_any, policies: next }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &[u8] = &[0x2a, 1];
    const B: &[u8] = &[0x2a, 2];

    fn of(policies: &[&'static [u8]]) -> Policies<'static> {
        let policies = (!policies.is_empty()).then(|| policies.iter().copied().collect());
        Policies { policies, mappings: Ok(Vec::new()), require_explicit: None, inhibit_mapping: None, inhibit_any: None }
    }

    fn checked(path: &[Policies<'static>]) -> Result<(), Refused> {
        let path: Vec<Result<Policies<'static>, Fault>> = path.iter().cloned().map(Ok).collect();
        check(&path.iter().map(|policies| (policies, false)).collect::<Vec<_>>())
    }

    #[test]
    fn a_policy_counts_only_if_an_authority_demands_one() {
        assert_eq!(checked(&[of(&[]), of(&[A])]), Ok(()));
        let demands = Policies { require_explicit: Some(0), ..of(&[A]) };
        assert_eq!(checked(&[of(&[]), demands.clone()]), Err(Refused::None));
        assert_eq!(checked(&[of(&[B]), demands.clone()]), Err(Refused::None));
        assert_eq!(checked(&[of(&[A, B]), demands.clone()]), Ok(()));
        assert_eq!(checked(&[of(&[ANY]), demands.clone()]), Ok(()));
        let maps = Policies { mappings: Ok(vec![(A, B)]), ..demands };
        assert_eq!((checked(&[of(&[B]), maps.clone()]), checked(&[of(&[A]), maps])), (Ok(()), Err(Refused::None)));
        let later = Policies { require_explicit: Some(2), ..of(&[A]) };
        assert_eq!(checked(&[of(&[]), later]), Ok(()));
    }

    #[test]
    fn any_policy_can_be_inhibited() {
        let demands = Policies { require_explicit: Some(0), inhibit_any: Some(0), ..of(&[A]) };
        assert_eq!((checked(&[of(&[ANY]), demands.clone()]), checked(&[of(&[A]), demands])), (Err(Refused::None), Ok(())));
    }
}
