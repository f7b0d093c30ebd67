//! `--write-key`: the only file that this program writes, and only where it is told to.
//!
//! The key goes into a new file beside the old one, which nobody else can read and which no link leads elsewhere, and takes the old
//! one's place in one step. A reader sees one key or the other, whole.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use super::resource::Key;
use crate::cli::output::printable;

/// Why a key was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The certificate came alone.
    #[error("{}: the server sent no private key to write", printable(.0))]
    NoKey(String),
    /// One file holds one key.
    #[error("--write-key takes one key, and the server sent two, for {} and {}; ask for one with --name", printable(.0), printable(.1))]
    Two(String, String),
    /// Something else is in its place.
    #[error("--write-key: {} {why}; remove it or choose another file", .path.display())]
    Occupied {
        /// The file.
        path: PathBuf,
        /// What stands there.
        why: &'static str,
    },
    /// The kernel said no.
    #[error("--write-key: cannot write {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// The place for one certificate's key.
#[derive(Debug)]
pub(super) struct KeyFile {
    path: PathBuf,
    owner: Option<String>,
}

impl KeyFile {
    /// Writes nothing yet.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, owner: None }
    }

    /// Puts the key of the certificate `name` in its place. The first name keeps the file.
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
/// Writes beside `path` and renames over it; a failure leaves what was there.
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
        // The error that matters is the first.
        let _ = fs::remove_file(&beside);
    }
    done
}

fn fill(mut file: File, bytes: &[u8]) -> io::Result<()> {
    // Whatever the umask is, the owner can read it and nobody else.
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
        assert_eq!(io::read_to_string(old).unwrap(), "first", "whoever has the old one open keeps it whole");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
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
