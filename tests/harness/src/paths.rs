//! Paths of the repository and of the files that cargo builds.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

/// The directory of the repository.
pub fn root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        root.canonicalize().unwrap_or_else(|e| panic!("{}: {e}", root.display()))
    });
    &ROOT
}

/// A program of the package whose test this is. Cargo names it in the environment; a test that is started by hand looks beside its own
/// directory.
pub fn program(name: &str) -> PathBuf {
    let program = env::var_os(format!("CARGO_BIN_EXE_{name}")).map_or_else(|| profile().join(name), PathBuf::from);
    assert!(program.is_file(), "{} is missing: cargo build --features real-tests --bin {name}", program.display());
    program
}

/// `target/tmp`, for files of tests.
pub fn tmp() -> PathBuf {
    let tmp = profile().parent().expect("a profile's folder lies in target").join("tmp");
    fs::create_dir_all(&tmp).unwrap_or_else(|e| panic!("{}: {e}", tmp.display()));
    tmp
}

/// The directory of the profile, such as `target/debug`: test programs are in its `deps`.
fn profile() -> PathBuf {
    let program = env::current_exe().expect("a path of this program");
    program.ancestors().nth(2).expect("cargo puts test programs into target/PROFILE/deps").to_owned()
}
