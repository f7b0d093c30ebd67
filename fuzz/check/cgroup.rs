//! Properties of any two cgroup files: the agent's own and a caller's. An input is the agent's file, a line `--`, and the caller's file.

use attest_kubernetes::cgroup::{Error, HostPrefix, PodCgroup, place};

const AGENT: &str = "11111111-2222-3333-4444-555555555555";
const VICTIM: &str = "99999999-8888-7777-6666-555555555555";

/// Panics on a result that violates a property.
pub fn check(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (own, file) = text.split_once("\n--\n").unwrap_or(("", &text));
    for pod in [None, Some(AGENT)] {
        let own = HostPrefix::of(own, pod).unwrap_or_default();
        judge(file, &own);
    }
}

fn judge(file: &str, own: &HostPrefix) {
    let Ok(first) = place(file, own) else { return };
    assert!(is_evident(first.pod.as_str(), file), "{first:?} does not occur in {file:?}");
    assert!(first.container.as_ref().is_none_or(|id| file.contains(id.as_str())), "{first:?} does not occur in {file:?}");

    let backwards: Vec<&str> = file.lines().rev().collect();
    assert_eq!(place(&backwards.join("\n"), own).as_ref(), Ok(&first), "the order matters");

    // A cgroup that a workload creates below its own never makes it another workload.
    for below in ["kubepods/pod", "pod", "../pod", "kubepods.slice/kubepods-pod"] {
        let below = match below.strip_suffix("-pod") {
            Some(slice) => format!("/{slice}-pod{}.slice/x", VICTIM.replace('-', "_")),
            None => format!("/{below}{VICTIM}/x"),
        };
        let deeper: String = file.lines().map(|line| if line.is_empty() { String::new() } else { format!("{line}{below}\n") }).collect();
        match place(&deeper, own) {
            Ok(PodCgroup { pod, .. }) => assert_eq!(pod, first.pod, "gained by {below}"),
            Err(Error::Conflicting { .. }) => {}
            Err(error) => panic!("{error} by {below}"),
        }
    }
}

/// Whether the file contains the UID.
fn is_evident(uid: &str, file: &str) -> bool {
    file.contains(uid) || file.contains(&uid.replace('-', "_"))
}
