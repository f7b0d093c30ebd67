//! The pages agree with the source: the tests and files that they name exist.

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

/// All files below `folder` with this extension, except in directories named `target`.
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
    let is_module = is_plain
        && text.contains('/')
        && ["agent", "api_faults", "cli", "long_", "real_", "serving"].iter().any(|it| program.starts_with(it));
    is_module || text.ends_with(".rs") && text.contains('/')
}

/// Every promise of the page needs a test, so a renamed or removed test must be changed there too.
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

/// In `moves.md`, the left column names files that no longer exist.
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
                // The path is relative to `tests/`, or it is a module without the extension.
                let bases = [root().to_owned(), root().join("tests")];
                let there = bases.iter().any(|base| base.join(path).exists() || base.join(format!("{path}.rs")).exists());
                assert!(there, "{} names {path}, which is not there", page.display());
                named += 1;
            }
        }
    }
    assert!(named > 100, "only {named} files are named");
}

/// A longer name is hard to read: the module's name says what its tests have in common.
#[test]
fn names_of_tests_have_at_most_70_characters() {
    const MOST: usize = 70;
    let mut tests = 0;
    let mut long = Vec::new();
    for file in ["src", "crates", "tests", "examples", "benches"].iter().flat_map(|it| files(&root().join(it), "rs")) {
        let text = read(&file);
        // The function after `#[test]` or `#[tokio::test…]` and any other attributes.
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

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = |c: char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.trim_start_matches('#').trim().to_lowercase().chars().filter(|c| kept(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// A page of this repository has no dead link, neither to a file nor to a heading.
#[test]
fn every_link_of_a_page_leads_to_a_file_and_a_heading() {
    let folders = ["docs", "daemonset", "tests", "fuzz", "proto"].iter().flat_map(|folder| files(&root().join(folder), "md"));
    let top = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"].map(|page| root().join(page));
    let mut links = 0;
    for page in folders.chain(top) {
        let text = read(&page);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()).filter(|link| !link.contains("://")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().expect("a folder").join(file) };
            assert!(target.exists(), "{} links to {link}, which is not there", page.display());
            if !heading.is_empty() {
                let found = read(&target).lines().any(|line| line.starts_with('#') && anchor(line) == heading);
                assert!(found, "{} links to {link}, which is no heading", page.display());
            }
            links += 1;
        }
    }
    assert!(links > 50, "only {links} links were found");
}
