//! `--write-key`: writes the private key to the file that the user names. The program writes no other file.
//!
//! The key is written to a new file in the same directory, which only the owner can read and which follows no link. A rename then replaces
//! the old file, so that a reader sees either the old or the new key, complete.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use super::resource::Key;
use crate::cli::output::printable;

/// The reason why a key was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The server sent the certificate without a key.
    #[error("{}: the server sent no private key to write", printable(.0))]
    NoKey(String),
    /// The server sent two keys, and the file holds one.
    #[error("--write-key takes one key, and the server sent two, for {} and {}; ask for one with --name", printable(.0), printable(.1))]
    Two(String, String),
    /// The path is occupied by something else.
    #[error("--write-key: {} {why}; remove it or choose another file", .path.display())]
    Occupied {
        /// The file.
        path: PathBuf,
        /// The reason, as a sentence without its subject.
        why: &'static str,
    },
    /// The file system returned an error.
    #[error("--write-key: cannot write {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
}

/// The file for the key of one certificate.
#[derive(Debug)]
pub(super) struct KeyFile {
    path: PathBuf,
    owner: Option<String>,
}

impl KeyFile {
    /// Creates no file yet.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, owner: None }
    }

    /// Writes the key of the certificate `name`. The file accepts only the first name.
    pub(super) fn write(&mut self, name: &str, key: Option<&Key>) -> Result<(), Error> {
        match &self.owner {
            Some(owner) if owner != name => return Err(Error::Two(owner.clone(), name.to_owned())),
            Some(_) => {}
            None => self.owner = Some(name.to_owned()),
        }
        let key = key.ok_or_else(|| Error::NoKey(name.to_owned()))?;
        self.check_place()?;
        replace(&self.path, key.pem()).map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    fn check_place(&self) -> Result<(), Error> {
        let occupied = |why| Err(Error::Occupied { path: self.path.clone(), why });
        match fs::symlink_metadata(&self.path) {
            Ok(found) if !found.file_type().is_file() => occupied("is not an ordinary file"),
            Ok(found) if found.uid() != rustix::process::geteuid().as_raw() => occupied("belongs to another user"),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::Io { path: self.path.clone(), source }),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the one file that is written, because its user named it")]
/// Writes a temporary file beside `path` and renames it; after a failure the old file is unchanged.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file_name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it names no file"))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(file_name);
    hidden.push(format!(".{:016x}", fastrand::u64(..)));
    let beside = path.with_file_name(hidden);
    let flags = (OFlags::NOFOLLOW | OFlags::CLOEXEC).bits().cast_signed();
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(flags).open(&beside)?;
    let done = fill(file, bytes).and_then(|()| fs::rename(&beside, path));
    if done.is_err() {
        // The caller receives the first error, so this one is ignored.
        let _ = fs::remove_file(&beside);
    }
    done
}

fn fill(mut file: File, bytes: &[u8]) -> io::Result<()> {
    // The mode must not depend on the umask: only the owner can read the file.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &'static str) -> Key {
        Key::new(text.into())
    }

    #[test]
    fn a_key_is_written_for_its_owner_only_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let mut file = KeyFile::new(path.clone());
        file.write("default", Some(&key("first"))).unwrap();
        let old = File::open(&path).unwrap();
        file.write("default", Some(&key("second"))).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(io::read_to_string(old).unwrap(), "first", "an open old file stays complete");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file remains");
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    fn links_and_directories_are_refused_and_keep_what_they_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for path in [link, dir.path().to_owned()] {
            let error = KeyFile::new(path).write("default", Some(&key("k"))).unwrap_err();
            assert!(error.to_string().ends_with("is not an ordinary file; remove it or choose another file"), "{error}");
        }
        assert_eq!(fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn one_file_takes_one_certificates_key() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = KeyFile::new(dir.path().join("key.pem"));
        file.write("a", Some(&key("a"))).unwrap();
        assert!(matches!(file.write("b", Some(&key("b"))), Err(Error::Two(..))));
        assert!(matches!(KeyFile::new(dir.path().join("other")).write("c", None), Err(Error::NoKey(_))));
        let missing = KeyFile::new(dir.path().join("no/such/key.pem")).write("a", Some(&key("a"))).unwrap_err();
        assert!(matches!(missing, Error::Io { .. }));
    }
}
