//! Tests on a real file system, with files and directories that the driver did not create. Changing owners needs root; without it those
//! checks are left out.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        net::UnixListener,
    },
};

use super::*;

const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

fn place(volume: &str) -> Place {
    Place { uid: UID.into(), volume: volume.into() }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn root() -> (tempfile::TempDir, Root) {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(&dir.path().join("pods")).unwrap();
    (dir, root)
}

fn why(result: Result<impl std::fmt::Debug, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn what_is_made_is_found_again_with_its_socket_and_removed_whole() {
    let (_dir, root) = root();
    let (plain, named) = (root.make(&place("sds"), "socket").unwrap(), root.make(&place("other"), "sds.sock").unwrap());
    assert!(plain.is_new && !root.make(&place("sds"), "socket").unwrap().is_new);
    assert_eq!((mode(root.path()), mode(plain.path.parent().unwrap()), mode(&plain.path)), (0o700, 0o700, 0o755));
    let _socket = UnixListener::bind(named.path.join("sds.sock")).unwrap();
    let _unfinished = UnixListener::bind(named.path.join(".sds.sock.7")).unwrap();

    let Scan { found, strays, .. } = root.scan().unwrap();
    assert!(strays.is_empty(), "{strays:?}");
    let seen: Vec<_> = found.iter().map(|f| (&*f.place.volume, &*f.socket, f.path.as_path())).collect();
    assert_eq!(seen, [("other", "sds.sock", named.path.as_path()), ("sds", "socket", plain.path.as_path())]);

    clear_unfinished(&named.path).unwrap();
    assert_eq!(fs::read_dir(&named.path).unwrap().count(), 1);
    root.remove(&place("other")).unwrap();
    root.remove(&place("other")).unwrap();
    assert!(!named.path.exists() && plain.path.exists());
    root.remove(&place("sds")).unwrap();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn a_volume_has_one_socket() {
    let (_dir, root) = root();
    root.make(&place("sds"), "socket").unwrap();
    let error = root.make(&place("sds"), "other").unwrap_err();
    assert!(matches!(&error, Error::OtherSocket(name) if **name == *"socket"), "{error}");
    assert_eq!(root.scan().unwrap().found.len(), 1);
}

#[test]
fn strays_are_named_and_left_alone() {
    let (dir, root) = root();
    let kept = root.make(&place("sds"), "socket").unwrap().path;
    let pod = kept.parent().unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::create_dir(root.path().join(FORMER_VIEW)).unwrap();

    fs::write(root.path().join("file"), "").unwrap();
    fs::create_dir(root.path().join("no-uid")).unwrap();
    symlink(&elsewhere, root.path().join(UID.replace('2', "3"))).unwrap();
    symlink(&elsewhere, pod.join("linked")).unwrap();
    fs::write(pod.join("file"), "").unwrap();
    fs::create_dir(pod.join("Upper")).unwrap();
    fs::create_dir(pod.join("sds+second")).unwrap();
    fs::create_dir(pod.join("other+socket")).unwrap();
    fs::create_dir(pod.join("open")).unwrap();
    fs::set_permissions(pod.join("open"), fs::Permissions::from_mode(0o777)).unwrap();

    let Scan { found, strays, .. } = root.scan().unwrap();
    assert_eq!(found.iter().map(|f| &*f.place.volume).collect::<Vec<_>>(), ["sds"]);
    let mut reasons: Vec<String> = strays.iter().map(ToString::to_string).collect();
    reasons.sort_unstable();
    for (end, why) in [
        ("/file", "is a symbolic link or no directory"),
        ("/Upper", "is not named by a volume"),
        ("/linked", "is a symbolic link"),
        ("/open", "can be written by others (mode 0777)"),
        ("/other+socket", "is not named by a volume"),
        ("/sds+second", "is a second directory of its volume"),
        ("/no-uid", "is not named by the UID of a pod"),
        (&UID.replace('2', "3"), "is a symbolic link"),
    ] {
        assert!(reasons.iter().any(|r| r.contains(&format!("{end} {why}"))), "{end}: {reasons:#?}");
    }
    assert_eq!(strays.len(), 9, "{reasons:#?}");

    for volume in ["linked", "file", "open"] {
        assert!(why(root.make(&place(volume), "socket")).contains("it is left alone"));
        assert!(why(root.remove(&place(volume))).contains("it is left alone"));
    }
    assert_eq!(fs::read_dir(pod).unwrap().count(), 7);
    assert!(elsewhere.exists() && pod.join("linked").is_symlink());
}

#[test]
fn what_is_no_socket_is_not_removed_with_the_sockets() {
    let (_dir, root) = root();
    let leaf = root.make(&place("sds"), "socket").unwrap().path;
    fs::write(leaf.join("precious"), "").unwrap();
    assert!(why(root.remove(&place("sds"))).contains("precious is no socket"));
    assert!(leaf.join("precious").exists());
}

#[test]
fn a_top_directory_that_others_can_change_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let open = dir.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(why(Root::open(&open)).contains("can be written by others (mode 0777)"));
    assert!(why(Root::open(&open.join("pods"))).contains("open can be written by others"));

    symlink(dir.path(), dir.path().join("link")).unwrap();
    assert!(why(Root::open(&dir.path().join("link/pods"))).contains("link is a symbolic link"));

    // The kubelet creates a host path with this mode; opening it removes the access of other users.
    let host = dir.path().join("host");
    fs::create_dir(&host).unwrap();
    fs::set_permissions(&host, fs::Permissions::from_mode(0o755)).unwrap();
    Root::open(&host).unwrap();
    assert_eq!(mode(&host), 0o700);
    if nix::unistd::geteuid().is_root() {
        chown(&host, Some(1), None).unwrap();
        assert!(why(Root::open(&host)).contains("belongs to user 1 and not to 0"));
        assert!(why(Root::open(&host.join("pods"))).contains("belongs to user 1;"));
    }
}

#[test]
fn a_half_made_pod_is_found_and_cleared() {
    let (_dir, root) = root();
    fs::create_dir(root.path().join(UID)).unwrap();
    let Scan { found, strays, empty } = root.scan().unwrap();
    assert_eq!((found.len(), strays.len(), &empty[..]), (0, 0, &[UID.to_owned()][..]));
    root.remove_pod(UID);
    assert!(!root.path().join(UID).exists());
    assert!(root.find(&place("sds"), "socket").unwrap_err().is_missing());
}

#[test]
fn a_directory_with_too_many_entries_is_not_read() {
    let (_dir, root) = root();
    let leaf = root.make(&place("sds"), "socket").unwrap();
    for number in 0..=MAX_ENTRIES {
        fs::write(leaf.path.join(number.to_string()), "").unwrap();
    }
    assert!(why(root.remove(&place("sds"))).contains("has more than 16384 entries"));
    assert_eq!(root.find_any(&place("sds")).unwrap(), Some(leaf.id));
    assert_eq!(root.find_any(&place("other")).unwrap(), None);
}
