//! Templates that could give two workloads one name, such as `{namespace}-{serviceAccount}`: namespace `a` with account `b-c`, and
//! namespace `a-b` with account `c`.
//!
//! Names of a template are distinct if each of them can be split into the values of its placeholders in one way only. That holds if
//! each separator has a character that the placeholder before it cannot have, or if each has one that the placeholder behind it cannot have.
//! A placeholder of a fixed length needs no separator.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
};

use workload_identity::{TrustDomain, render};

/// Maximum length of a template for which an example is searched, in bytes. It limits the length of the names that are tried.
const MAX_SEARCHED_BYTES: usize = 256;
/// Maximum number of different separators that the values of an example contain. It limits the number of names that are tried: a
/// placeholder has up to 12 values then.
const MAX_TRIED_SEPARATORS: usize = 4;

/// Two workloads that a template gives one name. Each is the values of the placeholders, as in `namespace "a", serviceAccount "b"`.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::config) struct Collision {
    /// The name of both; `None` if no example was found.
    example: Option<(String, [String; 2])>,
}

impl fmt::Display for Collision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.example {
            Some((name, [first, second])) => write!(f, "gives two workloads one name: {name:?} is that of {first}, and of {second}"),
            None => f.write_str("can give two workloads one name, because its placeholders are not clearly separated"),
        }
    }
}

/// Whether two workloads can have one name by this valid template, although they differ in a placeholder that it has.
pub(in crate::config) fn find(template: &str, trust_domain: &TrustDomain) -> Option<Collision> {
    let (fields, separators) = parts(template, trust_domain)?;
    // A character that no placeholder can have splits every name in the same places.
    let mut first = 0;
    let ends = (0..separators.len()).filter(|at| separators[*at].chars().any(|c| fields.iter().all(|field| !may_have(field, c))));
    for end in ends.chain([separators.len()]) {
        if is_ambiguous(&fields[first..=end], &separators[first..end]) {
            return Some(Collision { example: example(template, &fields, &separators, trust_domain) });
        }
        first = end + 1;
    }
    None
}

/// Whether texts of these placeholders and separators can be split in two ways.
fn is_ambiguous(fields: &[String], separators: &[String]) -> bool {
    let ends = |field: &str, separator: &str| has_fixed_length(field) || separator.chars().any(|c| !may_have(field, c));
    let from_left = separators.iter().zip(fields).all(|(separator, field)| ends(field, separator));
    let from_right = separators.iter().zip(&fields[1..]).all(|(separator, field)| ends(field, separator));
    !(from_left || from_right)
}

/// A pod with a service account has a UUID.
fn has_fixed_length(field: &str) -> bool {
    field == "podUid"
}

/// The placeholders in their order, and the texts between them. `None` for fewer than two placeholders. The trust domain is one text.
fn parts(template: &str, trust_domain: &TrustDomain) -> Option<(Vec<String>, Vec<String>)> {
    const MARK: char = '\0';
    let marked =
        render(template, |field| Some(if field == "trustDomain" { trust_domain.to_string() } else { format!("{MARK}{field}{MARK}") }));
    let marked = marked.ok()?;
    let texts: Vec<&str> = marked.split(MARK).collect();
    // Texts and placeholders alternate, and a text is the first and the last.
    let fields: Vec<String> = texts.iter().skip(1).step_by(2).map(|field| (*field).to_owned()).collect();
    let separators = texts.iter().skip(2).step_by(2).take(fields.len().checked_sub(1)?).map(|text| (*text).to_owned()).collect();
    (fields.len() > 1).then_some((fields, separators))
}

/// Whether a value of a placeholder may have a character: a namespace is a label of RFC 1123, service accounts and pods are its subdomains.
fn may_have(field: &str, c: char) -> bool {
    match field {
        "uid" => c.is_ascii_digit(),
        "podUid" => c.is_ascii_hexdigit() || c == '-',
        "namespace" => c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-',
        _ => c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.',
    }
}

/// Tries short values that contain the separators. The names that it holds meanwhile have less than 10 MiB.
fn example(template: &str, fields: &[String], separators: &[String], trust_domain: &TrustDomain) -> Option<(String, [String; 2])> {
    if template.len() > MAX_SEARCHED_BYTES {
        return None;
    }
    let fields: BTreeSet<&str> = fields.iter().map(String::as_str).collect();
    let separators: BTreeSet<&str> = separators.iter().map(String::as_str).collect();
    let mut workloads: Vec<Vec<(&str, String)>> = vec![Vec::new()];
    for field in fields {
        let joined =
            separators.iter().copied().take(MAX_TRIED_SEPARATORS).chain([""]).filter(|text| text.chars().all(|c| may_have(field, c)));
        let joined = joined.flat_map(|text| [format!("a{text}b"), format!("b{text}a")]);
        let values: Vec<String> = if has_fixed_length(field) {
            ["a", "b"].map(|c| format!("{0}-{1}-{1}-{1}-{2}", c.repeat(8), c.repeat(4), c.repeat(12))).into()
        } else {
            ["a", "b"].map(str::to_owned).into_iter().chain(joined).collect()
        };
        workloads = workloads
            .iter()
            .flat_map(|workload| values.iter().map(|value| workload.iter().cloned().chain([(field, value.clone())]).collect()))
            .collect();
    }
    let mut names: HashMap<String, &[(&str, String)]> = HashMap::new();
    for workload in &workloads {
        let value = |field: &str| match field {
            "trustDomain" => Some(trust_domain.to_string()),
            field => workload.iter().find(|(name, _)| *name == field).map(|(_, value)| value.clone()),
        };
        let name = render(template, value).ok()?;
        if let Some(other) = names.get(&name).filter(|other| **other != workload.as_slice()) {
            return Some((name, [described(other), described(workload)]));
        }
        names.insert(name, workload);
    }
    None
}

fn described(workload: &[(&str, String)]) -> String {
    let values: Vec<String> = workload.iter().map(|(field, value)| format!("{field} {value:?}")).collect();
    values.join(" with ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collision(template: &str) -> Option<String> {
        find(template, &TrustDomain::new("cluster.local").unwrap()).map(|collision| collision.to_string())
    }

    #[test]
    fn templates_that_can_be_split_in_one_way_have_no_collision() {
        for template in [
            "spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}",
            "spiffe://{trustDomain}/{namespace}_{serviceAccount}",
            "spiffe://{trustDomain}/{serviceAccount}/{namespace}/{podName}",
            "spiffe://{trustDomain}/{podUid}",
            "spiffe://{trustDomain}/{namespace}/{serviceAccount}-{podUid}",
            "spiffe://{trustDomain}/{podUid}{serviceAccount}",
            "spiffe://{trustDomain}/{namespace}.{serviceAccount}/{podName}-{podUid}",
            "spiffe://{trustDomain}/uid/{uid}",
            "{serviceAccount}.{namespace}.svc.{trustDomain}",
            "{namespace}.{serviceAccount}.svc",
            "{podName}.{namespace}.pod.{trustDomain}",
            "constant.example.com",
        ] {
            assert_eq!(collision(template), None, "{template}");
        }
    }

    #[test]
    fn templates_that_join_names_show_two_workloads_with_one_name() {
        for template in [
            "spiffe://{trustDomain}/{namespace}-{serviceAccount}",
            "spiffe://{trustDomain}/{namespace}{serviceAccount}",
            "spiffe://{trustDomain}/{serviceAccount}-{namespace}",
            "spiffe://{trustDomain}/{serviceAccount}.{podName}/{namespace}",
            "spiffe://{trustDomain}/{namespace}-sa-{serviceAccount}",
            "{serviceAccount}.{podName}.{namespace}.svc",
            "{serviceAccount}.{namespace}.{podName}.svc",
            "{serviceAccount}-{namespace}.svc",
        ] {
            let text = collision(template).unwrap_or_else(|| panic!("{template} is accepted"));
            assert!(text.starts_with("gives two workloads one name: ") && text.contains(", and of "), "{template}: {text}");
        }
        assert_eq!(
            collision("{namespace}-{serviceAccount}.svc").unwrap(),
            "gives two workloads one name: \"a-b-a.svc\" is that of namespace \"a\" with serviceAccount \"b-a\", and of namespace \"a-b\" \
             with serviceAccount \"a\""
        );
    }

    /// Each of them would be gigabytes of names.
    #[test]
    fn templates_of_many_or_long_parts_are_refused_without_an_example() {
        let all = ["{namespace}", "{serviceAccount}", "{podName}", "{podUid}"];
        let many = all.repeat(100).join("-");
        let many_separators: String = (1..100).flat_map(|n| all.map(|field| field.to_owned() + &"a".repeat(n))).collect();
        let long = all.join(&"a".repeat(1 << 18));
        for template in [many, many_separators, long] {
            assert_eq!(
                collision(&template).unwrap(),
                "can give two workloads one name, because its placeholders are not clearly separated"
            );
        }
        let several_separators =
            "{namespace}-{serviceAccount}-a-{podName}-aa-{namespace}-aaa-{serviceAccount}-aaaa-{podName}-aaaaa-{podUid}";
        assert!(collision(several_separators).is_some());
    }

    /// The rule, checked against all names of short values.
    #[test]
    fn what_the_rule_accepts_has_no_collision_among_short_values() {
        let domain = TrustDomain::new("d").unwrap();
        let separators = ["", "-", ".", "_", "/", "-x-", ".x", "a"];
        let fields = ["namespace", "serviceAccount", "podName", "podUid"];
        let mut refused = 0;
        for (first, second) in
            fields.iter().flat_map(|first| fields.map(|second| (*first, second))).filter(|(first, second)| first != second)
        {
            for separator in separators {
                let template = format!("{{{first}}}{separator}{{{second}}}");
                let parts = parts(&template, &domain).unwrap();
                let found = example(&template, &parts.0, &parts.1, &domain);
                assert_eq!(find(&template, &domain).is_some(), found.is_some(), "{template}: {found:?}");
                refused += usize::from(found.is_some());
            }
        }
        assert!(refused > 20, "{refused}");
    }
}
