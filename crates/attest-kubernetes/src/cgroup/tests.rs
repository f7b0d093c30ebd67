//! Every format of cgroup paths that occurs, and segments that a workload may append.

use proptest::prelude::*;

use super::*;

const A: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
const B: &str = "99999999-8888-7777-6666-555555555555";
const STATIC: &str = "0123456789abcdef0123456789abcdef";
/// Id of a container.
const C: &str = "b3cd3e5f7a9b1c3d5e7f9a1b3c5d7e9fb3cd3e5f7a9b1c3d5e7f9a1b3c5d7e9f";

/// Replaces `{A}` and `{B}` by the UIDs, and `{a}` and `{b}` by the UIDs with underscores.
fn fill(text: &str) -> String {
    let under = |uid: &str| uid.replace('-', "_");
    text.replace("{A}", A).replace("{B}", B).replace("{a}", &under(A)).replace("{b}", &under(B)).replace("{S}", STATIC).replace("{C}", C)
}

fn judge(file: &str, own: &HostPrefix) -> Result<String, Error> {
    pod_uid(&fill(file), own).map(|uid| uid.to_string())
}

/// Cgroup files of a process in container C of pod A, on every kind of node.
const SHAPES: &[(&str, &str)] = &[
    ("v2, cgroupfs", "0::/kubepods/burstable/pod{A}/{C}"),
    ("v2, cgroupfs, guaranteed", "0::/kubepods/pod{A}/{C}"),
    ("v2, cgroupfs, CRI-O", "0::/kubepods/besteffort/pod{A}/crio-{C}"),
    ("v2, systemd, containerd", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{a}.slice/cri-containerd-{C}.scope"),
    ("v2, systemd, guaranteed", "0::/kubepods.slice/kubepods-pod{a}.slice/crio-{C}.scope"),
    ("CRI-O with crun", "0::/kubepods.slice/kubepods-pod{a}.slice/crio-{C}.scope/container"),
    ("docker", "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{a}.slice/docker-{C}.scope"),
    ("the kubelet's own slice", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{a}.slice/cri-containerd-{C}.scope"),
    ("colon-joined", "0::/kubepods-burstable-pod{a}.slice:cri-containerd:{C}"),
    ("colon-joined, below the runtime", "0::/system.slice/containerd.service/kubepods-besteffort-pod{a}.slice:cri-containerd:{C}"),
    ("from the agent's cgroup namespace, systemd", "0::/../../kubepods-burstable-pod{a}.slice/cri-containerd-{C}.scope"),
    ("the same, another class", "0::/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{a}.slice/cri-containerd-{C}.scope"),
    ("the same, cgroupfs", "0::/../../pod{A}/{C}"),
    ("the same, cgroupfs, another class", "0::/../../../besteffort/pod{A}/{C}"),
    ("the same, colon-joined", "0::/../kubepods-pod{a}.slice:cri-containerd:{C}"),
    (
        "v1",
        "12:memory:/kubepods/burstable/pod{A}/{C}\n4:cpu,cpuacct:/kubepods/burstable/pod{A}/{C}\n1:name=systemd:/kubepods/burstable/pod{A}/{C}\n",
    ),
    ("v1, and a hierarchy that the kubelet does not use", "3:misc:/\n2:memory:/kubepods/burstable/pod{A}/{C}"),
    ("v1, and a hierarchy without containers", "3:pids:/kubepods/burstable/pod{A}\n2:memory:/kubepods/burstable/pod{A}/{C}"),
    ("v1 and v2 at once", "2:memory:/kubepods/burstable/pod{A}/{C}\n1:name=systemd:/kubepods/burstable/pod{A}/{C}\n0::/"),
    ("v1 and v2, both used", "2:memory:/kubepods/burstable/pod{A}/{C}\n0::/kubepods/burstable/pod{A}/{C}"),
    ("v1 and v2, the runtime's service in v2", "2:memory:/kubepods/pod{A}/{C}\n0::/system.slice/containerd.service"),
];

#[test]
fn every_shape_that_occurs() {
    for (name, file) in SHAPES {
        let place = place(&fill(file), &HostPrefix::default()).unwrap();
        assert_eq!((place.pod.as_str(), place.container.as_deref()), (A, Some(C)), "{name}");
    }
    let static_pod = place(&fill("0::/kubepods/burstable/pod{S}/{C}"), &HostPrefix::default()).unwrap();
    assert_eq!((static_pod.pod.as_str(), static_pod.container.as_deref()), (STATIC, Some(C)));
}

#[test]
fn what_is_in_the_pod_and_in_no_container_of_it() {
    for (name, file) in [
        ("the pod's cgroup itself", "0::/kubepods/burstable/pod{A}"),
        ("CRI-O's conmon", "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{a}.slice/crio-conmon-{C}.scope"),
        ("CRI-O's conmon, cgroupfs", "0::/kubepods/pod{A}/crio-conmon-{C}"),
        ("something else of the runtime's", "0::/kubepods/pod{A}/kata_overhead"),
        ("no whole id", "0::/kubepods/pod{A}/f00"),
        ("deeper than a container", "0::/kubepods/pod{A}/x/{C}"),
        ("an id that was taken away", "0::/kubepods/pod{A}/{C} (deleted)"),
        ("a container of another runtime", "0::/kubepods-pod{a}.slice:x:{C}"),
        ("two containers", "2:memory:/kubepods/pod{A}/{C}\n1:cpu:/kubepods/pod{A}/cc{C}\n0::/kubepods/pod{A}/{S}{S}"),
    ] {
        let place = place(&fill(file), &HostPrefix::default()).unwrap();
        assert_eq!((place.pod.as_str(), place.container.as_deref()), (A, None), "{name}");
    }
}

#[test]
fn what_is_in_no_pod() {
    for file in [
        "",
        "0::/",
        "0::/user.slice/user-1000.slice/session-1.scope",
        "0::/system.slice/docker-f00.scope",
        "0::/docker/f00",
        // A container id without a pod UID.
        "0::/docker/{C}",
        "0::/system.slice/docker-{C}.scope",
        "0::/kubepods/{C}",
        "0::/kubepods/burstable",
        // The kernel writes `..` at the beginning only.
        "0::/kubepods/../pod{A}/{C}",
        "0::/../other-container-of-the-agents-pod",
        "0::/kubepods/pod",
        "0::/kubepods/podA",
        "0::/kubepods/pod2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4",
        "0::/kubepods/pod2B1FB2F4-4B5A-4B9A-9A4E-0C5A1B2C3D4E",
        "0::/kubepods/pod{a}",
        "0::/kubepods/pod{A} (deleted)",
        "0::/machine.slice/machine-libpod_pod_f00.slice",
        // Created by a user below the cgroup that systemd delegates to users.
        "0::/user.slice/user-1000.slice/user@1000.service/kubepods/pod{A}/f00",
        "0::/user.slice/user-1000.slice/user@1000.service/kubepods-pod{a}.slice/x",
        // Created below a container that is in no pod.
        "0::/docker/f00/kubepods/pod{A}/x",
        "0::/kubepods.slice/mykubepods-pod{a}.slice/x",
    ] {
        assert!(
            matches!(judge(file, &HostPrefix::default()), Err(Error::NotInPod(_))),
            "{file}: {:?}",
            judge(file, &HostPrefix::default())
        );
    }
}

#[test]
fn the_first_pod_decides_whatever_is_made_below_it() {
    for file in [
        "0::/kubepods/burstable/pod{A}/f00/kubepods/burstable/pod{B}/x",
        "0::/kubepods/burstable/pod{A}/pod{B}",
        "0::/kubepods.slice/kubepods-pod{a}.slice/cri-containerd-f00.scope/kubepods.slice/kubepods-pod{b}.slice/x",
        "0::/../../pod{A}/f00/pod{B}",
        "0::/kubepods-burstable-pod{a}.slice:cri-containerd:f00/kubepods-burstable-pod{b}.slice",
    ] {
        assert_eq!(judge(file, &HostPrefix::default()).as_deref(), Ok(A), "{file}");
    }
}

#[test]
fn contradictions_and_broken_lines_are_errors() {
    let conflict = judge("2:memory:/kubepods/pod{A}/x\n1:cpu:/kubepods/pod{B}/x", &HostPrefix::default()).unwrap_err();
    assert_eq!(conflict.to_string(), format!("its cgroups contradict each other: pod {A} and pod {B}"));
    for (file, line) in [("nonsense", 1), ("0::/\n0:x", 2), ("0::relative", 1), ("x::/", 1)] {
        assert_eq!(judge(file, &HostPrefix::default()), Err(Error::Malformed(line)), "{file}");
    }
}

#[test]
fn a_node_in_a_container_is_taken_off_by_the_agents_own_place() {
    // kind: the node is a container, here in a pod of an outer cluster; the agent is a pod of the inner one.
    let outer = "/kubepods/burstable/pod{B}/c0de";
    let agent = "11111111-2222-3333-4444-555555555555";
    let own = fill(&format!("0::{outer}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{}.slice/x", agent.replace('-', "_")));
    let own = HostPrefix::of(&own, Some(agent)).unwrap();
    let inner = format!("0::{outer}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{{a}}.slice/x");
    assert_eq!(judge(&inner, &own).as_deref(), Ok(A));
    assert_eq!(judge(&format!("0::{outer}/kubelet/kubepods/burstable/pod{{A}}/x"), &own).as_deref(), Ok(A));
    // A process of the node container itself is in no pod of the inner cluster.
    assert!(matches!(judge(&format!("0::{outer}/init.scope"), &own), Err(Error::NotInPod(_))));

    // The agent is a process of such a node outside of pods.
    let own = HostPrefix::of(&fill(&format!("0::{outer}\n1:memory:/")), None).unwrap();
    assert_eq!(judge(&format!("0::{outer}/kubepods/pod{{A}}/x\n1:memory:/kubepods/pod{{A}}/x"), &own).as_deref(), Ok(A));
    // The prefix ends at the end of a segment, and applies only to its own hierarchy.
    assert_eq!(judge(&format!("1:memory:{outer}/kubepods/pod{{A}}/x"), &own).as_deref(), Ok(B));

    // The ordinary cases: no prefix is removed.
    let own = HostPrefix::of(&fill("0::/kubepods/burstable/pod{B}/x"), Some(B)).unwrap();
    assert_eq!(own, HostPrefix(vec![(String::new(), String::new())]));
    assert_eq!(judge("0::/kubepods/burstable/pod{A}/x", &own).as_deref(), Ok(A));
    assert_eq!(judge("0::/kubepods/burstable/pod{B}/x/kubepods/pod{A}", &own).as_deref(), Ok(B));
}

#[test]
fn names_in_the_log_are_tame_and_bounded() {
    let error = place(&format!("0::/\u{1b}[31m{}", "x".repeat(4000)), &HostPrefix::default()).unwrap_err().to_string();
    assert!(error.contains("/?[31mxx") && error.len() < 400, "{error}");
}

/// A segment that a workload may create, including imitations of a pod's segments.
fn segment() -> impl Strategy<Value = String> {
    let likeness = prop::sample::select(vec![
        "kubepods",
        "kubepods.slice",
        "kubepods-burstable.slice",
        "burstable",
        "pod{B}",
        "kubepods-pod{b}.slice",
        "kubepods-burstable-pod{b}.slice:cri-containerd:{C}",
        "{S}{S}",
        "cri-containerd-{S}{S}.scope",
        "..",
    ]);
    prop_oneof![likeness.prop_map(fill), "[^/\n\r]{1,20}"]
}

fn shape() -> impl Strategy<Value = String> {
    prop::sample::select(SHAPES.iter().map(|(_, file)| fill(file)).collect::<Vec<_>>())
}

/// Appends `below` to every path of `file` that contains a pod.
fn deeper(file: &str, below: &str) -> String {
    file.lines()
        .map(|line| if line.contains("pod") && line.len() > 30 { format!("{line}{below}\n") } else { format!("{line}\n") })
        .collect()
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>(), own in any::<Vec<u8>>()) {
        let (file, own) = (String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&own));
        let own = HostPrefix::of(&own, Some(A)).or_else(|_| HostPrefix::of(&own, None)).unwrap_or_default();
        let _ = place(&file, &own);
    }

    #[test]
    fn no_lines_make_it_panic(paths in prop::collection::vec(prop::collection::vec(segment(), 0..6), 0..6), pod in prop::option::of(Just(B))) {
        let file: String = paths.iter().enumerate().map(|(i, path)| format!("{i}:h{i}:/{}\n", path.join("/"))).collect();
        let own = HostPrefix::of(&file, pod).unwrap_or_default();
        let _ = (place(&file, &own), place(&file, &HostPrefix::default()));
    }

    #[test]
    fn nothing_below_a_pods_own_path_changes_the_answer(file in shape(), below in prop::collection::vec(segment(), 1..8)) {
        let below = format!("/{}", below.join("/"));
        let place = place(&deeper(&file, &below), &HostPrefix::default()).unwrap();
        prop_assert_eq!(place.pod.as_str(), A);
        // In a hierarchy without a segment of the container, the next segment may be one that the workload has created.
        prop_assert!(place.container.is_none_or(|id| id == C));
    }

    #[test]
    fn the_order_of_the_lines_does_not_matter(file in shape(), other in shape(), below in segment(), seed in any::<u64>()) {
        let other = other.replace(A, B).replace(&A.replace('-', "_"), &B.replace('-', "_"));
        for file in [file.clone(), format!("{}7:other:/{below}\n", deeper(&file, "")), format!("{}{other}", deeper(&file, ""))] {
            let mut lines: Vec<&str> = file.lines().collect();
            let before = place(&file, &HostPrefix::default());
            fastrand::Rng::with_seed(seed).shuffle(&mut lines);
            let after = place(&lines.join("\n"), &HostPrefix::default());
            prop_assert!(before == after || (before.is_err() && after.is_err()), "{before:?} {after:?}");
        }
    }

    #[test]
    fn a_victims_path_below_a_cgroup_outside_of_pods_is_nobodys(
        base in prop::sample::select(vec!["user.slice/user-1.slice/user@1.service/x", "docker/{C}", "system.slice/x.service", "init.scope", "lxc/a"]),
        between in prop::collection::vec(segment(), 0..3),
        victim in shape(),
    ) {
        let between: String = between.iter().map(|segment| format!("/{segment}")).collect();
        let file: String = victim.lines().filter_map(|line| {
            let (head, path) = line.split_once(":/").map(|(head, path)| (head, path.trim_start_matches("../")))?;
            Some(format!("{head}:/{}{between}/{path}\n", fill(base)))
        }).collect();
        prop_assert!(matches!(place(&file, &HostPrefix::default()), Err(Error::NotInPod(_))), "{file}");
    }
}
