//! For tests: a file of a ConfigMap or a Secret, as the kubelet mounts it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "for tests alone")]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// A file behind a symlink to a directory. Publishing replaces the symlink.
#[derive(Debug)]
pub struct MountedFile {
    folder: PathBuf,
    name: String,
    version: u32,
}

impl MountedFile {
    /// Creates a file with this name in `folder`, with its first content.
    pub fn new(folder: &Path, name: &str, text: &str) -> Self {
        let mut file = Self { folder: folder.to_owned(), name: name.to_owned(), version: 0 };
        file.publish(text);
        symlink(Path::new("..data").join(name), file.path()).unwrap();
        file
    }

    /// Path of the file.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Replaces the content and removes the previous one, as the kubelet does.
    pub fn publish(&mut self, text: &str) {
        let at = |name: &str| self.folder.join(name);
        let (former, version) = (format!("..{}", self.version), format!("..{}", self.version + 1));
        fs::create_dir(at(&version)).unwrap();
        fs::write(at(&version).join(&self.name), text).unwrap();
        symlink(&version, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        if self.version > 0 {
            fs::remove_dir_all(at(&former)).unwrap();
        }
        self.version += 1;
    }
}
