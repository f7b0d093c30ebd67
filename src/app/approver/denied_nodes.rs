//! `deniedNodes`: the nodes whose agents get no certificate, for a node that may be compromised.
//!
//! The key `deniedNodes` of the ConfigMap has one node name per line. A policy reads the key as a parameter. The approver reads the key, or
//! the file of that name in the directory of its configuration. A missing file or key denies no node.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use agent_runtime::file;

/// The name of the file and of the key.
pub(super) const NAME: &str = "deniedNodes";
/// Maximum size of the file, in bytes: that of a ConfigMap.
pub(super) const MAX_BYTES: usize = 1 << 20;
/// Maximum length of a node's name, a DNS subdomain.
const MAX_NAME_BYTES: usize = 253;

/// The file for the configuration at `config`.
pub(super) fn beside(config: &Path) -> PathBuf {
    config.with_file_name(NAME)
}

/// The nodes of a file, and the numbers of the lines that are no node name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DeniedNodes {
    pub(super) nodes: BTreeSet<String>,
    pub(super) invalid_lines: Vec<usize>,
}

/// Parses what was read of the file.
///
/// # Errors
///
/// The file cannot be read, is longer than [`MAX_BYTES`], or is not UTF-8. The former nodes stay denied then.
pub(super) fn of_content(content: Result<&[u8], &io::Error>) -> Result<DeniedNodes, String> {
    let content = match content {
        Ok(content) if content.len() > MAX_BYTES => return Err(format!("is longer than {MAX_BYTES} bytes")),
        Ok(content) => str::from_utf8(content).map_err(|_| "is not UTF-8".to_owned())?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => "",
        Err(error) => return Err(format!("cannot be read: {error}")),
    };
    let mut denied = DeniedNodes::default();
    for (at, line) in content.lines().enumerate() {
        match line.trim() {
            "" => {}
            name if is_node_name(name) => drop(denied.nodes.insert(name.to_owned())),
            _ => denied.invalid_lines.push(at + 1),
        }
    }
    Ok(denied)
}

/// Reads the file for the configuration at `config`, before the approver decides about the first request.
///
/// # Errors
///
/// As [`of_content`].
pub(super) fn load(config: &Path) -> Result<DeniedNodes, String> {
    let content = file::read(&beside(config), MAX_BYTES);
    of_content(content.as_deref())
}

fn is_node_name(name: &str) -> bool {
    let is_allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"-.".contains(&c);
    name.len() <= MAX_NAME_BYTES && name.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_node_and_other_lines_are_reported_by_number() {
        let denied = of_content(Ok(b"node-1\n\n  node-2.example \nNode 3\nnode-1\n# node-4\n")).unwrap();
        assert_eq!(denied.nodes, ["node-1", "node-2.example"].map(str::to_owned).into());
        assert_eq!(denied.invalid_lines, [4, 6]);
    }

    #[test]
    fn a_missing_file_denies_no_node_and_an_unreadable_one_is_an_error() {
        let error = |kind: io::ErrorKind| of_content(Err(&kind.into()));
        assert_eq!(error(io::ErrorKind::NotFound), Ok(DeniedNodes::default()));
        assert!(error(io::ErrorKind::PermissionDenied).unwrap_err().starts_with("cannot be read"));
        assert_eq!(of_content(Ok(b"a\xff")), Err("is not UTF-8".to_owned()));
        assert!(of_content(Ok(&vec![b'\n'; MAX_BYTES + 1])).unwrap_err().starts_with("is longer"));
        assert_eq!(load(Path::new("/nonexistent/config.yaml")), Ok(DeniedNodes::default()));
    }
}
