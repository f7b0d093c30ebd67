//! A walk over a tree of values that collects all errors instead of stopping at the first.
//!
//! Owns the state of the walk: the path, the fields that were read, and the fields of the file that were not read. A caller reads every
//! field of a section in the section's closure; the remaining fields are reported as unknown. `None` instead of a value means that the
//! error has been recorded.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use agent_runtime::text;
use serde_json::{Map, Value};

use super::error::{FieldError, Problem, Warning, quoted, shown};

/// The results of the walk so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    problems: RefCell<Vec<Problem>>,
    warnings: RefCell<Vec<Warning>>,
    known: RefCell<BTreeSet<String>>,
    strays: RefCell<Vec<Stray>>,
}

/// An unknown field. Its remedy is chosen at the end of the walk, when all known fields are recorded.
#[derive(Debug)]
struct Stray {
    /// Index of its error in `problems`.
    problem: usize,
    key: String,
    /// The known fields of the same section.
    asked: Vec<&'static str>,
}

impl Report {
    /// Records an error about `path`.
    pub(super) fn problem(&self, path: &str, value: Option<String>, wrong: FieldError) {
        // Both may quote a value and are redacted here. `plain` redacts the keys in the path.
        let [what, remedy] = [wrong.what, wrong.remedy].map(|words| text::redact(&words).into_owned());
        self.problems.borrow_mut().push(Problem { path: path.to_owned(), value, what, remedy });
    }

    /// Records a warning for the operator.
    pub(super) fn warn(&self, path: &str, message: impl Into<String>) {
        let message = text::redact(&message.into()).into_owned();
        self.warnings.borrow_mut().push(Warning { path: path.to_owned(), message });
    }

    /// Walks `tree` as the file's top level.
    pub(super) fn root<T>(&self, tree: &Value, decode: impl FnOnce(&Section<'_>) -> T) -> T {
        Section::enter(self, String::new(), String::new(), Some(tree), decode)
    }

    /// The errors and warnings, in the order in which they were found.
    pub(super) fn finish(self) -> (Vec<Problem>, Vec<Warning>) {
        let (mut problems, known) = (self.problems.into_inner(), self.known.into_inner());
        for stray in self.strays.into_inner() {
            if let Some(problem) = problems.get_mut(stray.problem) {
                problem.remedy = stray.remedy(&known);
            }
        }
        (problems, self.warnings.into_inner())
    }

    /// Every field that the walk has read, with `[]` for an index of a list and `<name>` for a key that the operator chooses.
    #[cfg(test)]
    pub(crate) fn known(&self) -> BTreeSet<String> {
        self.known.borrow().clone()
    }
}

/// One mapping of the file. If it is absent, every field has its default.
#[derive(Debug)]
pub(super) struct Section<'a> {
    report: &'a Report,
    path: String,
    /// The path with `[]` instead of indexes and `<name>` instead of chosen keys, for [`Report::known`].
    generic: String,
    map: Option<&'a Map<String, Value>>,
    asked: RefCell<Vec<&'static str>>,
    free_keys: Cell<bool>,
}

impl<'a> Section<'a> {
    fn enter<T>(report: &'a Report, path: String, generic: String, value: Option<&'a Value>, decode: impl FnOnce(&Section<'a>) -> T) -> T {
        let map = match value {
            None | Some(Value::Null) => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => {
                let place = if path.is_empty() { "the file" } else { &path };
                report.problem(place, Some(shown(other)), FieldError::new("is not a mapping", "write its fields as `name: value`"));
                None
            }
        };
        let section = Section { report, path, generic, map, asked: RefCell::default(), free_keys: Cell::new(false) };
        let result = decode(&section);
        section.report_unknown();
        result
    }

    /// The path of this section.
    pub(super) fn here(&self) -> &str {
        &self.path
    }

    /// The path of `field`.
    pub(super) fn path(&self, field: &str) -> String {
        join(&self.path, field)
    }

    /// Whether the file has `field`, even without a value.
    pub(super) fn has(&self, field: &'static str) -> bool {
        self.ask(field);
        self.map.is_some_and(|map| map.contains_key(field))
    }

    /// Whether the file has a value for `field`.
    pub(super) fn is_set(&self, field: &'static str) -> bool {
        self.value(field).is_some()
    }

    fn value(&self, field: &'static str) -> Option<&'a Value> {
        self.ask(field);
        self.map?.get(field).filter(|value| !value.is_null())
    }

    fn ask(&self, field: &'static str) {
        let mut asked = self.asked.borrow_mut();
        if !asked.contains(&field) {
            asked.push(field);
            self.report.known.borrow_mut().insert(join(&self.generic, field));
        }
    }

    /// Parses `field` by `parse`, or returns `default` if it is absent.
    pub(super) fn read<T>(&self, field: &'static str, default: T, parse: impl FnOnce(&Value) -> Result<T, FieldError>) -> Option<T> {
        match self.value(field) {
            None => Some(default),
            Some(value) => self.parsed(field, value, parse),
        }
    }

    /// Parses `field` by `parse`. If it is absent, records the error of `absent`.
    pub(super) fn require<T>(
        &self,
        field: &'static str,
        absent: impl FnOnce() -> FieldError,
        parse: impl FnOnce(&Value) -> Result<T, FieldError>,
    ) -> Option<T> {
        match self.value(field) {
            None => {
                self.report.problem(&self.path(field), None, absent());
                None
            }
            Some(value) => self.parsed(field, value, parse),
        }
    }

    /// Like [`require`](Self::require), for a value that may be secret: an error does not show it.
    pub(super) fn require_hidden<T>(
        &self,
        field: &'static str,
        absent: impl FnOnce() -> FieldError,
        parse: impl FnOnce(&Value) -> Result<T, FieldError>,
    ) -> Option<T> {
        let parsed = self.value(field).map_or_else(|| Err(absent()), parse);
        parsed.map_err(|wrong| self.report.problem(&self.path(field), None, wrong)).ok()
    }

    fn parsed<T>(&self, field: &'static str, value: &Value, parse: impl FnOnce(&Value) -> Result<T, FieldError>) -> Option<T> {
        parse(value).map_err(|wrong| self.report.problem(&self.path(field), Some(shown(value)), wrong)).ok()
    }

    /// Decodes the mapping in `field`.
    pub(super) fn section<T>(&self, field: &'static str, decode: impl FnOnce(&Section<'a>) -> T) -> T {
        let value = self.value(field);
        Section::enter(self.report, self.path(field), join(&self.generic, field), value, decode)
    }

    /// Decodes each mapping of the list in `field`; `None` if one of them is invalid.
    pub(super) fn sections<T>(&self, field: &'static str, decode: impl Fn(&Section<'a>) -> Option<T>) -> Option<Vec<T>> {
        let items = self.items(field)?.iter().enumerate();
        let generic = format!("{}[]", join(&self.generic, field));
        let walked =
            items.map(|(i, item)| Section::enter(self.report, format!("{}[{i}]", self.path(field)), generic.clone(), Some(item), &decode));
        // Decodes every item, so that all errors are found.
        walked.collect::<Vec<_>>().into_iter().collect()
    }

    /// Parses each item of the list in `field`; `None` if one of them is invalid.
    pub(super) fn list<T>(&self, field: &'static str, parse: impl Fn(&Value) -> Result<T, FieldError>) -> Option<Vec<T>> {
        let items = self.items(field)?.iter().enumerate();
        let parsed = items.map(|(i, item)| {
            let path = format!("{}[{i}]", self.path(field));
            parse(item).map_err(|wrong| self.report.problem(&path, Some(shown(item)), wrong)).ok()
        });
        parsed.collect::<Vec<_>>().into_iter().collect()
    }

    fn items(&self, field: &'static str) -> Option<&'a [Value]> {
        match self.value(field) {
            None => Some(&[]),
            Some(Value::Array(items)) => Some(items),
            Some(other) => {
                let wrong = FieldError::new("is not a list", "write `[a, b]`, or one `- ` line for each item");
                self.report.problem(&self.path(field), Some(shown(other)), wrong);
                None
            }
        }
    }

    /// Parses each value of the mapping in `field`, whose keys the operator chooses; `None` if one of them is invalid.
    pub(super) fn map<T>(&self, field: &'static str, parse: impl Fn(&str, &Value) -> Result<T, FieldError>) -> Option<BTreeMap<String, T>> {
        let map = match self.value(field) {
            None => return Some(BTreeMap::new()),
            Some(Value::Object(map)) => map,
            Some(other) => {
                let wrong = FieldError::new("is not a mapping", "write its fields as `name: value`");
                self.report.problem(&self.path(field), Some(shown(other)), wrong);
                return None;
            }
        };
        let parsed = map.iter().map(|(key, value)| {
            let wrong = |wrong| self.report.problem(&join(&self.path(field), &plain(key)), Some(shown(value)), wrong);
            parse(key, value).map(|parsed| (key.clone(), parsed)).map_err(wrong).ok()
        });
        parsed.collect::<Vec<_>>().into_iter().collect()
    }

    /// Decodes each mapping of this section, whose keys the operator chooses.
    pub(super) fn entries<T>(&self, decode: impl Fn(&'a str, &Section<'a>) -> Option<T>) -> Option<Vec<T>> {
        self.free_keys.set(true);
        let generic = join(&self.generic, "<name>");
        let entries = self.map.into_iter().flatten();
        let walked = entries.map(|(key, value)| {
            Section::enter(self.report, self.path(&plain(key)), generic.clone(), Some(value), |section| decode(key, section))
        });
        walked.collect::<Vec<_>>().into_iter().collect()
    }

    /// Records an error about `field` that follows from other values too.
    pub(super) fn wrong(&self, field: &str, what: impl Into<String>, remedy: impl Into<String>) {
        let value = self.map.and_then(|map| map.get(field)).filter(|value| !value.is_null()).map(shown);
        self.report.problem(&self.path(field), value, FieldError::new(what, remedy));
    }

    /// Records an error about this section as a whole.
    pub(super) fn wrong_here(&self, what: impl Into<String>, remedy: impl Into<String>) {
        self.report.problem(&self.path, None, FieldError::new(what, remedy));
    }

    /// Records a warning about `field` for the operator.
    pub(super) fn warn(&self, field: &str, message: impl Into<String>) {
        self.report.warn(&self.path(field), message);
    }

    /// Records a warning about `path`, which is not in the file.
    pub(super) fn warn_outside(&self, path: &str, message: impl Into<String>) {
        self.report.warn(path, message);
    }

    fn report_unknown(&self) {
        let Some(map) = self.map.filter(|_| !self.free_keys.get()) else { return };
        let asked = self.asked.borrow();
        for key in map.keys().filter(|key| !asked.contains(&key.as_str())) {
            let of = if self.path.is_empty() { "the configuration".to_owned() } else { self.path.clone() };
            let problem = self.report.problems.borrow().len();
            self.report.problem(&self.path(&plain(key)), None, FieldError::new(format!("is not a field of {of}"), ""));
            self.report.strays.borrow_mut().push(Stray { problem, key: key.clone(), asked: asked.clone() });
        }
    }
}

impl Stray {
    /// Suggests, in this order: another spelling of a field of this section, the same field in another section, a similar field of this
    /// section, or lists the fields of this section.
    fn remedy(&self, known: &BTreeSet<String>) -> String {
        let key = folded(&self.key);
        // A difference of one letter, as in a plural, counts as another spelling.
        if let Some(same) = self.asked.iter().find(|name| distance(&key, &folded(name)) <= 1) {
            return format!("did you mean {same}?");
        }
        if let Some(elsewhere) = known.iter().find(|path| path.rsplit('.').next().is_some_and(|name| folded(name) == key)) {
            return format!("did you mean {elsewhere}?");
        }
        match nearest(&self.key, &self.asked) {
            Some(near) => format!("did you mean {near}?"),
            None if self.asked.is_empty() => "remove it: nothing can be set here".to_owned(),
            None => format!("use one of {}", self.asked.join(", ")),
        }
    }
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// A key as part of a path: in quotes unless it is a plain word.
fn plain(key: &str) -> String {
    let fine = !key.is_empty() && key.len() <= 64 && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    let fine = fine && text::redact(key) == key;
    if fine { key.to_owned() } else { quoted(key) }
}

/// The known field that `key` was probably meant to be.
pub(super) fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let key = folded(key);
    let scored = known.iter().map(|name| (distance(&key, &folded(name)), *name));
    let (distance, name) = scored.min_by_key(|(distance, _)| *distance)?;
    (distance <= key.len().max(name.len()) / 2).then_some(name)
}

/// The name in lower case without `_` and `-`, cut to 64 characters, because the cost of the distance is quadratic.
fn folded(name: &str) -> Vec<char> {
    name.chars().filter(|c| !matches!(c, '_' | '-')).flat_map(char::to_lowercase).take(64).collect()
}

/// Insertions, deletions and replacements from `a` to `b`.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_field_is_found_across_spellings_and_nonsense_has_none() {
        let known = ["trustDomain", "sockets", "certificate"];
        assert_eq!(nearest("trust_domain", &known), Some("trustDomain"));
        assert_eq!(nearest("trustdomian", &known), Some("trustDomain"));
        assert_eq!(nearest("socket", &known), Some("sockets"));
        assert_eq!(nearest("frobnicate-it", &known), None);
        assert_eq!(nearest("", &known), None);
    }

    #[test]
    fn what_is_asked_for_is_known_by_its_generic_path() {
        let report = Report::default();
        let tree = serde_json::json!({"list": [{"abc": 1}, {"abd": 2}], "free": {"x.y": {"c": 3}}});
        report.root(&tree, |root| {
            root.sections("list", |item| item.has("abc").then_some(()));
            root.section("free", |free| free.entries(|_, entry| entry.has("c").then_some(())));
        });
        assert_eq!(report.known().into_iter().collect::<Vec<_>>(), ["free", "free.<name>.c", "list", "list[].abc"]);
        let (problems, _) = report.finish();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].to_string(), "list[1].abd: is not a field of list[1]; did you mean abc?");
    }
}
