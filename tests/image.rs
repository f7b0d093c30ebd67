//! The `Dockerfile` agrees with the crate: it copies the files that the compiler reads, has a stub for each target, and repeats the
//! metadata of `Cargo.toml`. `tests/image.sh` tests the build itself, which takes minutes.

#![allow(clippy::disallowed_methods, clippy::expect_used, clippy::panic, reason = "tests read and write files, and fail loudly")]

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The instructions and their arguments, with continued lines joined and comments removed.
fn dockerfile() -> Vec<(String, String)> {
    let text = read(&Path::new(ROOT).join("Dockerfile")).replace("\\\n", " ");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| line.split_once(' ').expect("an instruction has arguments"))
        .map(|(word, rest)| (word.to_owned(), rest.to_owned()))
        .collect()
}

/// The paths that are copied from the context, in any stage or only in the builder.
fn copied(builder: bool) -> BTreeSet<String> {
    let mut stages = 0;
    let mut copied = BTreeSet::new();
    for (word, rest) in dockerfile() {
        stages += usize::from(word == "FROM");
        if word == "COPY" && !rest.starts_with("--from") && (!builder || stages == 1) {
            let mut paths: Vec<_> = rest.split_whitespace().map(str::to_owned).collect();
            paths.pop();
            copied.extend(paths);
        }
    }
    copied
}

/// The stubs that are written for the targets before any source is copied.
fn stubs() -> BTreeSet<String> {
    let instructions = dockerfile();
    let stubs = instructions.iter().find_map(|(word, rest)| (word == "RUN").then(|| rest.strip_prefix("for target in "))?);
    let (stubs, _) = stubs.and_then(|rest| rest.split_once(';')).expect("a loop over the targets");
    stubs.split_whitespace().map(str::to_owned).collect()
}

/// The packages of the workspace.
fn packages() -> Vec<Value> {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(ROOT).output();
    let metadata: Value = serde_json::from_slice(&output.expect("cargo runs").stdout).expect("cargo writes JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

/// The source files of the libraries, including included files, as the compiler reported them to cargo. Files that only tests include are
/// left out.
fn read_by_the_compiler() -> BTreeSet<PathBuf> {
    let packages = packages();
    let names = packages.iter().map(|package| package["name"].as_str().expect("a name")).filter(|name| *name != "test-harness");
    names.flat_map(|name| of_library(&name.replace('-', "_"))).collect()
}

fn of_library(library: &str) -> Vec<PathBuf> {
    let prefix = format!("lib{library}-");
    let profile = Path::new(env!("CARGO_BIN_EXE_sds-agent")).parent().expect("a folder");
    let built = fs::read_dir(profile.join("deps")).expect("cargo's folder of what it built").map(|entry| entry.expect("an entry").path());
    // Built as a test, it is not a library. The newest library was built for this test, or from the same files.
    let libraries = built.filter(|path| {
        path.extension().is_some_and(|extension| extension == "rlib")
            && path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(&prefix))
    });
    let newest = libraries.max_by_key(|path| path.metadata().and_then(|it| it.modified()).expect("a time")).expect("the library is built");
    let name = newest.file_stem().and_then(OsStr::to_str).and_then(|name| name.strip_prefix("lib")).expect("a name");
    let told = read(&newest.with_file_name(name).with_extension("d"));

    // `target: dependencies`; a space in a path is written as `\ `.
    let rule = told.lines().find_map(|line| line.split_once(".rlib: ")).expect("a rule").1.replace("\\ ", "\0");
    let files = rule.split_whitespace().map(|file| PathBuf::from(file.replace('\0', " ")));
    let files = files.map(|file| file.strip_prefix(ROOT).map(Path::to_owned).unwrap_or(file));
    // The build script generates its files from `proto`.
    files.filter(|file| file.is_relative() && !file.starts_with("target")).collect()
}

#[test]
fn what_the_agent_is_made_of_is_copied() {
    let copied = copied(true);
    let mut files = read_by_the_compiler();
    for known in ["src/lib.rs", "crates/sds-server/src/sds/secret.rs"] {
        assert!(files.contains(Path::new(known)), "{known} is no part of the agent: {files:?}");
    }
    let script = read(&Path::new(ROOT).join("build.rs"));
    let proto =
        script.lines().find_map(|line| line.strip_prefix("const ROOT: &str = \"")?.strip_suffix("\";")).expect("what build.rs reads");
    files.extend(["build.rs", "src/main.rs", proto].map(PathBuf::from));
    let missing: Vec<_> = files.iter().filter(|file| !copied.iter().any(|path| file.starts_with(path))).collect();
    assert!(
        missing.is_empty(),
        "the Dockerfile copies {copied:?}, and the agent is also made of {missing:?}: COPY them, here and in .dockerignore"
    );
}

#[test]
fn every_declared_target_has_a_stub() {
    let root = Path::new(ROOT);
    let packages = packages();
    let targets = packages.iter().flat_map(|package| package["targets"].as_array().expect("targets"));
    // cargo finds targets in tests/ automatically, so they need no stub.
    let manifest = read(&root.join("Cargo.toml"));
    let declared = targets.filter(|target| {
        let name = format!("name = {}", target["name"]);
        matches!(target["kind"][0].as_str(), Some("custom-build" | "lib")) || manifest.lines().any(|line| line == name)
    });
    let sources = declared.filter_map(|target| target["src_path"].as_str());
    let sources = sources.map(|path| Path::new(path).strip_prefix(root).expect("a path of the crate").display().to_string());
    assert_eq!(stubs(), sources.collect(), "left: the stubs, right: the targets of Cargo.toml");
    let manifests = packages.iter().map(|package| PathBuf::from(package["manifest_path"].as_str().expect("a path")));
    let manifests = manifests.map(|path| path.strip_prefix(root).expect("a path of the workspace").display().to_string());
    for manifest in manifests.chain(["Cargo.lock".to_owned()]) {
        assert!(copied(true).contains(&manifest), "{manifest} is not copied before the stubs are built");
    }
}

#[test]
fn the_context_is_what_is_copied() {
    let ignored = read(&Path::new(ROOT).join(".dockerignore"));
    let mut lines = ignored.lines().filter(|line| !line.starts_with('#'));
    assert_eq!(lines.next(), Some("*"), "everything is left out at first");
    let let_in = lines.map(|line| line.strip_prefix('!').expect("an exception").to_owned());
    assert_eq!(copied(false), let_in.collect(), "left: what the Dockerfile copies, right: what .dockerignore allows");
}

#[test]
fn the_image_is_of_this_crate() {
    let instructions = dockerfile();
    let says = |word: &str, text: &str| instructions.iter().any(|(w, rest)| w == word && rest.contains(text));
    assert!(says("ARG", concat!("VERSION=", env!("CARGO_PKG_VERSION"))));
    let rust = concat!("/rust:", env!("CARGO_PKG_RUST_VERSION"), "-");
    assert!(says("ARG", rust), "the builder is not {rust}");
    assert!(says("LABEL", concat!("image.title=\"", env!("CARGO_PKG_NAME"), "\"")));
    assert!(says("LABEL", concat!("image.description=\"", env!("CARGO_PKG_DESCRIPTION"), "\"")));
    assert!(says("LABEL", concat!("image.licenses=\"", env!("CARGO_PKG_LICENSE"), "\"")));
}
