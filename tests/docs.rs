//! The documentation against the source: the tests and files that it names exist.

#![allow(clippy::expect_used, clippy::panic, reason = "tests fail loudly")]

use std::{
    fs,
    path::{Path, PathBuf},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below `folder` with this extension. Folders named `target` are left out.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                found.extend(files(&path, extension));
            }
        } else if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
    found
}

/// The parts of `text` in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn is_test_name(text: &str) -> bool {
    text.matches('_').count() >= 4 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// A file, or a module of a test program such as `real_node/attest`.
fn is_source_path(text: &str) -> bool {
    let is_plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_/".contains(&b));
    let program = text.split('/').next().unwrap_or_default();
    let is_module = is_plain && text.contains('/') && ["agent", "api_faults", "cli", "long_", "real_", "serving"].iter().any(|it| program.starts_with(it));
    is_module || text.ends_with(".rs") && text.contains('/')
}

/// A promise whose test was renamed or removed is a promise without a test.
#[test]
fn every_test_that_the_threat_model_names_is_there() {
    let source: String =
        ["src", "crates", "tests", "fuzz"].iter().flat_map(|it| files(&root().join(it), "rs")).map(|it| read(&it)).collect();
    let text = read(&root().join("docs/security.md"));
    let named: Vec<_> = quoted(&text).filter(|name| is_test_name(name) && !name.starts_with("sds_agent_")).collect();
    assert!(named.len() > 40, "only {} tests are named", named.len());
    let missing: Vec<_> = named.into_iter().filter(|name| !source.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "docs/security.md names tests that are not there: {missing:#?}");
}

/// `moves.md` is about files of the past on its left side.
#[test]
fn every_source_file_that_a_page_names_is_there() {
    let mut named = 0;
    for page in files(&root().join("docs"), "md").into_iter().chain([root().join("README.md"), root().join("tests/README.md")]) {
        let text = read(&page);
        let is_of_the_past = page.ends_with("decisions/moves.md");
        let lines = text.lines().map(|line| if is_of_the_past { line.rsplit_once("` | `").map_or("", |(_, new)| new) } else { line });
        for line in lines {
            let line = if is_of_the_past { format!("`{line}") } else { line.to_owned() };
            for path in quoted(&line).filter(|text| is_source_path(text)) {
                // Below `tests/`, as its own page has it; a module by its name alone.
                let bases = [root().to_owned(), root().join("tests")];
                let there = bases.iter().any(|base| base.join(path).exists() || base.join(format!("{path}.rs")).exists());
                assert!(there, "{} names {path}, which is not there", page.display());
                named += 1;
            }
        }
    }
    assert!(named > 100, "only {named} files are named");
}

/// A longer name is a sentence that a reader parses twice: the module says what its tests have in common.
#[test]
fn names_of_tests_have_at_most_70_characters() {
    const MOST: usize = 70;
    let mut tests = 0;
    let mut long = Vec::new();
    for file in ["src", "crates", "tests", "examples", "benches"].iter().flat_map(|it| files(&root().join(it), "rs")) {
        let text = read(&file);
        // The function after `#[test]` or `#[tokio::test…]` and whatever other attributes.
        for (_, rest) in text.match_indices("test").filter_map(|(at, _)| Some((at, text.get(at..)?))) {
            let is_attribute = rest.starts_with("test]\n") || rest.starts_with("test(");
            let Some(name) = is_attribute.then(|| rest.split("fn ").nth(1)?.split(['(', '<']).next()).flatten() else { continue };
            tests += 1;
            if name.len() > MOST {
                long.push(format!("{}: {name} ({})", file.display(), name.len()));
            }
        }
    }
    assert!(tests > 900, "only {tests} tests were found");
    assert!(long.is_empty(), "{long:#?}");
}
