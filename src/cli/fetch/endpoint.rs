//! The socket of the server: from the flag, from the environment variable of SPIFFE, or the first default path that exists.

use std::path::{Path, PathBuf};

use crate::config::Env;

/// The default socket of an agent on a node.
const NODE: &str = "/run/sds-agent/sds.sock";
/// The socket of `sds-agent dev` without a runtime directory.
const TEMPORARY: &str = "/tmp/sds-agent/sds.sock";

/// The path of the socket, or an error about the flag or the variable.
pub(super) fn choose(flag: Option<&str>, env: Env<'_>, exists: impl Fn(&Path) -> bool) -> Result<PathBuf, String> {
    if let Some(flag) = flag {
        return path(flag).map_err(|wrong| format!("--socket: {flag:?} {wrong}"));
    }
    if let Some(address) = env("SPIFFE_ENDPOINT_SOCKET").filter(|address| !address.is_empty()) {
        return path(&address).map_err(|wrong| format!("SPIFFE_ENDPOINT_SOCKET: {address:?} {wrong}"));
    }
    let own = env("XDG_RUNTIME_DIR").map(|dir| Path::new(&dir).join("sds-agent/sds.sock"));
    let usual = own.iter().map(PathBuf::as_path).chain([TEMPORARY.as_ref(), NODE.as_ref()]);
    // If no default path exists, the result is the path that `sds-agent dev` would create.
    let found = usual.clone().find(|path| exists(path)).or_else(|| usual.clone().next());
    Ok(found.map_or_else(|| PathBuf::from(NODE), Path::to_owned))
}

/// Parses `unix:///path`, `unix:/path`, `unix:path` or a plain path.
fn path(address: &str) -> Result<PathBuf, &'static str> {
    let path = match address.strip_prefix("unix:") {
        Some(rest) => match rest.strip_prefix("//") {
            Some(path) if path.starts_with('/') => path,
            Some(_) => return Err("names a host; write unix:///path"),
            None => rest,
        },
        None if address.contains("://") => return Err("is not a Unix socket; write unix:///path or a path"),
        None => address,
    };
    if path.is_empty() { Err("names no path; write unix:///path or a path") } else { Ok(path.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn an_address_may_be_written_in_four_ways() {
        for (address, expected) in [("unix:///a/b", "/a/b"), ("unix:/a/b", "/a/b"), ("unix:a", "a"), ("/a/b", "/a/b"), ("a.sock", "a.sock")]
        {
            assert_eq!(choose(Some(address), &nothing, |_| false).unwrap(), Path::new(expected));
        }
        for (address, expected) in [
            ("unix://host/a", r#"--socket: "unix://host/a" names a host; write unix:///path"#),
            ("tcp://127.0.0.1:1", r#"--socket: "tcp://127.0.0.1:1" is not a Unix socket; write unix:///path or a path"#),
            ("unix:", r#"--socket: "unix:" names no path; write unix:///path or a path"#),
        ] {
            assert_eq!(choose(Some(address), &nothing, |_| false).unwrap_err(), expected);
        }
    }

    #[test]
    fn the_flag_goes_before_the_environment_and_that_before_the_usual_places() {
        let env = |name: &str| match name {
            "SPIFFE_ENDPOINT_SOCKET" => Some("unix:///spiffe".to_owned()),
            "XDG_RUNTIME_DIR" => Some("/run/user/7".to_owned()),
            _ => None,
        };
        assert_eq!(choose(Some("/flag"), &env, |_| true).unwrap(), Path::new("/flag"));
        assert_eq!(choose(None, &env, |_| true).unwrap(), Path::new("/spiffe"));
        let runtime = |name: &str| env(name).filter(|_| name == "XDG_RUNTIME_DIR");
        let own = Path::new("/run/user/7/sds-agent/sds.sock");
        assert_eq!(choose(None, &runtime, |_| true).unwrap(), own);
        assert_eq!(choose(None, &runtime, |path| path != own).unwrap(), Path::new(TEMPORARY));
        assert_eq!(choose(None, &runtime, |path| path == Path::new(NODE)).unwrap(), Path::new(NODE));
        assert_eq!(choose(None, &runtime, |_| false).unwrap(), own);
        assert_eq!(choose(None, &nothing, |_| false).unwrap(), Path::new(TEMPORARY));
    }
}
