//! Parses `/proc/<pid>/mountinfo`: the mounts that a process sees.
//!
//! The crate `procfs` does not decode `\040` in paths, and one line that it cannot parse makes it return an error for the whole table.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A line of the table (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// `major:minor`.
    pub(crate) device: String,
    /// The path on the mounted file system that is the root of this mount.
    pub(crate) root: String,
    pub(crate) point: PathBuf,
    pub(crate) read_only: bool,
    /// The mount is in a peer group: mounts below it propagate to the other members.
    pub(crate) shared: bool,
    /// The type of the file system.
    pub(crate) kind: String,
}

/// The mounts that this process sees.
pub(crate) fn of_this_process() -> io::Result<Vec<Mount>> {
    read(Path::new("/proc/self"))
}

/// The mounts of the process with this procfs directory, such as `/proc/self`.
pub(crate) fn read(process: &Path) -> io::Result<Vec<Mount>> {
    fs::read_to_string(process.join("mountinfo")).map(|text| parse(&text))
}

/// Parses the table and skips lines that are malformed.
pub(crate) fn parse(text: &str) -> Vec<Mount> {
    let line = |line: &str| {
        let (mount, system) = line.split_once(" - ")?;
        // id, parent, device, root, mount point, options, tags …
        let fields: Vec<&str> = mount.split(' ').collect();
        Some(Mount {
            device: (*fields.get(2)?).to_owned(),
            root: unescaped(fields.get(3)?),
            point: unescaped(fields.get(4)?).into(),
            read_only: fields.get(5)?.split(',').any(|option| option == "ro"),
            shared: fields.get(6..)?.iter().any(|tag| tag.starts_with("shared:")),
            kind: system.split(' ').next()?.to_owned(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// The mount that `path` is on. If several have the same mount point, the last one is visible.
pub(crate) fn above<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.components().count())
}

/// Decodes octal escapes such as `\040`, which the kernel writes for characters that would end a field.
fn unescaped(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok()) {
            Some(character) => {
                out.push(character);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
