//! The way of a path through the directories of the file system.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io,
    path::{Component, Path, PathBuf},
};

/// Links that are followed. The kernel follows as many (`path_resolution(7)`), and then fails to open the file.
const MAX_LINKS: usize = 40;
/// Directories that are watched. Of a longer route, the ones nearest to the file are kept.
const MAX_DIRECTORIES: usize = 64;

/// The directory entries through which a path leads: each directory, each link and the file itself. A change of one of them can change the
/// file to which the path leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Route {
    /// The directories of the entries, by paths without links. The last one has the file, or the first entry that does not exist.
    directories: Vec<PathBuf>,
    /// The names of the entries.
    names: BTreeSet<OsString>,
}

impl Route {
    /// Reads the route of `path` as it is now, to the first entry that does not exist or cannot be read. Blocks.
    pub(super) fn of(path: &Path) -> Self {
        let (mut route, mut links, mut at) = (Self::default(), 0, PathBuf::from("/"));
        // A stack: the target of a link comes before the rest of the path.
        let mut rest = steps(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        while let Some(step) = rest.pop() {
            match step {
                Step::Root => at = PathBuf::from("/"),
                Step::Up => drop(at.pop()),
                Step::Down(name) => {
                    let entry = at.join(&name);
                    route.add(at, name);
                    match fs::read_link(&entry) {
                        Ok(target) if links < MAX_LINKS => {
                            links += 1;
                            at = entry.parent().map_or_else(PathBuf::new, Path::to_owned);
                            rest.extend(steps(&target));
                        }
                        // The entry is not a link.
                        Err(error) if error.kind() == io::ErrorKind::InvalidInput => at = entry,
                        Ok(_) | Err(_) => break,
                    }
                }
            }
        }
        let surplus = route.directories.len().saturating_sub(MAX_DIRECTORIES);
        route.directories.drain(..surplus);
        route
    }

    fn add(&mut self, directory: PathBuf, name: OsString) {
        // The last one stays the last.
        self.directories.retain(|known| *known != directory);
        self.directories.push(directory);
        self.names.insert(name);
    }

    /// The directories of the entries, by paths without links.
    pub(super) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Returns whether a change of `path` may concern the route. The names suffice, because a directory can have several paths (bind mounts).
    pub(super) fn concerns(&self, path: &Path) -> bool {
        path.file_name().is_none_or(|name: &OsStr| self.names.contains(name)) || self.directories.iter().any(|directory| directory == path)
    }
}

#[derive(Debug)]
enum Step {
    Root,
    Up,
    Down(OsString),
}

/// The steps of `path`, the last one first.
fn steps(path: &Path) -> Vec<Step> {
    let step = |component: Component<'_>| match component {
        Component::RootDir => Some(Step::Root),
        Component::ParentDir => Some(Step::Up),
        Component::Normal(name) => Some(Step::Down(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(step).collect()
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests write the files")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The directories of the route below `root`, relative to it.
    fn below(root: &Path, path: &str) -> Vec<String> {
        let route = Route::of(&root.join(path));
        let inside = route.directories.iter().filter_map(|directory| directory.strip_prefix(root).ok());
        inside.map(|directory| directory.display().to_string()).collect()
    }

    #[test]
    fn it_has_every_directory_to_the_file_and_ends_where_nothing_exists() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for directory in ["mount/..1/sub", "links", "far/away"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::write(root.join("mount/..1/sub/ca"), "").unwrap();
        for (link, target) in [
            ("mount/..data", "..1".into()),
            ("mount/sub", "..data/sub".into()),
            ("links/up", PathBuf::from("../far/../mount/sub")),
            ("far/away/absolute", root.join("links/up/ca")),
            ("links/loop", "loop".into()),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        assert_eq!(below(&root, "mount/..1/sub/ca"), ["", "mount", "mount/..1", "mount/..1/sub"]);
        assert_eq!(below(&root, "mount/sub/ca"), ["", "mount", "mount/..1", "mount/..1/sub"]);
        assert_eq!(below(&root, "links/up/ca"), ["links", "", "mount", "mount/..1", "mount/..1/sub"]);
        assert_eq!(below(&root, "far/away/absolute"), ["far", "far/away", "links", "", "mount", "mount/..1", "mount/..1/sub"]);
        assert_eq!(below(&root, "mount/absent/ca"), ["", "mount"]);
        assert_eq!(below(&root, "links/loop"), ["", "links"]);
    }

    #[test]
    fn its_length_is_bounded_and_the_end_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let deep = (0..100).fold(root.clone(), |path, _| path.join("d"));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("ca"), "").unwrap();
        let route = Route::of(&deep.join("ca"));
        assert_eq!((route.directories().len(), route.directories().last()), (MAX_DIRECTORIES, Some(&deep)));
    }

    #[test]
    fn a_change_concerns_it_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let route = Route::of(&root.join("sub/ca"));
        assert!(route.concerns(&root.join("sub")) && route.concerns(&root), "the entry, and the directory itself");
        assert!(!route.concerns(&root.join("ca")), "the file cannot exist before its directory");
        assert!(!route.concerns(&root.join("other")));
    }
}
