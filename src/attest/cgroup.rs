//! From the text of `/proc/<pid>/cgroup` to the UID of a pod: a pure function of the text and of the agent's own place.
//!
//! The rule against nesting: what lies above a pod's cgroup is made by the kubelet and by root; what lies below may be made by the pod
//! itself, in the likeness of another's. So the agent's own prefix is taken off (for nodes that run in containers), then the *first* pod
//! segment decides, reached only through segments that a kubelet makes, and anything deeper is ignored. Hierarchies that contradict each
//! other are an error, never a guess. Only this file is evidence: mounts can be forged.

use std::fmt;

/// The UID of a pod, as the API writes it; of a static pod, as the kubelet writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodUid(String);

impl PodUid {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why there is no UID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No hierarchy leads through a pod.
    #[error("its cgroups lead through no pod: {0}")]
    NotInPod(String),
    /// Two hierarchies lead through different pods.
    #[error("its cgroups contradict each other: pod {first} and pod {second}")]
    Conflicting {
        /// One pod.
        first: PodUid,
        /// Another.
        second: PodUid,
    },
    /// A line that the kernel does not write.
    #[error("line {0} of its cgroup file is not id:controllers:path")]
    Malformed(usize),
}

/// The agent's own place in each hierarchy, as a prefix of what it sees of others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own(Vec<(String, String)>);

impl Own {
    /// Reads the agent's own cgroup file. In a pod (`pod_uid`), the prefix is what lies above its kubelet's cgroups: the container that is
    /// the node, or nothing. Outside of any pod the agent runs where the node's processes run, and all of its path is the prefix.
    pub fn of(cgroup_file: &str, pod_uid: Option<&str>) -> Result<Self, Error> {
        let prefix = |path: &str| {
            let segments: Vec<&str> = segments(path).collect();
            let own = |segment: &&str| pod_uid.is_some() && pod_segment(segment).as_ref().map(PodUid::as_str) == pod_uid;
            let end = match segments.iter().rposition(own) {
                Some(pod) => segments[..pod].iter().rposition(|s| !is_kubelets(s)).map_or(0, |above| above + 1),
                None => segments.len(),
            };
            segments[..end].iter().flat_map(|s| ["/", *s]).collect::<String>()
        };
        lines(cgroup_file)
            .map(|line| line.map(|(hierarchy, path)| (hierarchy.to_owned(), prefix(path))))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// `path` below the prefix, or all of it where it lies elsewhere.
    fn strip<'a>(&self, hierarchy: &str, path: &'a str) -> &'a str {
        let prefix = self.0.iter().find(|(name, _)| name == hierarchy).map_or("", |(_, prefix)| prefix);
        match path.strip_prefix(prefix) {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
            _ => path,
        }
    }
}

impl fmt::Display for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut prefixes: Vec<&str> = self.0.iter().map(|(_, prefix)| prefix.as_str()).filter(|prefix| !prefix.is_empty()).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        f.write_str(if prefixes.is_empty() { "nothing" } else { "" })?;
        f.write_str(&prefixes.join(", "))
    }
}

/// The pod that the process of `cgroup_file` runs in.
pub fn pod_uid(cgroup_file: &str, own: &Own) -> Result<PodUid, Error> {
    let mut found: Option<PodUid> = None;
    for line in lines(cgroup_file) {
        let (hierarchy, path) = line?;
        match (pod_of(own.strip(hierarchy, path)), &found) {
            (Some(second), Some(first)) if second != *first => return Err(Error::Conflicting { first: first.clone(), second }),
            (Some(uid), None) => found = Some(uid),
            _ => {}
        }
    }
    found.ok_or_else(|| Error::NotInPod(evidence(cgroup_file)))
}

/// (hierarchy, path) of each line. A path may hold colons, a hierarchy may not.
fn lines(file: &str) -> impl Iterator<Item = Result<(&str, &str), Error>> {
    file.lines().enumerate().filter(|(_, line)| !line.is_empty()).map(|(index, line)| {
        let mut parts = line.splitn(3, ':');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(id), Some(hierarchy), Some(path)) if id.parse::<u32>().is_ok() && path.starts_with('/') => Ok((hierarchy, path)),
            _ => Err(Error::Malformed(index + 1)),
        }
    })
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|s| !s.is_empty())
}

fn pod_of(path: &str) -> Option<PodUid> {
    for segment in segments(path) {
        if let Some(uid) = pod_segment(segment) {
            return Some(uid);
        }
        if !is_kubelets(segment) {
            return None;
        }
    }
    None
}

/// A segment that lies above pods: made by a kubelet or by its service manager, or the way up from the agent's own cgroup namespace.
fn is_kubelets(segment: &str) -> bool {
    matches!(
        segment,
        ".." | "kubelet" | "kubelet.slice" | "kubepods" | "burstable" | "besteffort" | "guaranteed"
        // Runtimes that name the pod's slice and the container in one segment put it below their own service.
            | "system.slice" | "containerd.service" | "crio.service" | "docker.service"
    ) || segment.strip_suffix(".slice").is_some_and(is_qos)
}

/// `kubepods`, `kubepods-burstable` or `kubepods-besteffort`, with the names of slices above it in front.
fn is_qos(name: &str) -> bool {
    let name = name.strip_suffix("-burstable").or_else(|| name.strip_suffix("-besteffort")).unwrap_or(name);
    name == "kubepods" || name.ends_with("-kubepods")
}

/// `pod<uid>` of the cgroupfs driver, or `kubepods-burstable-pod<uid with _>.slice` of the systemd driver; either may be followed by
/// a colon and the container.
fn pod_segment(segment: &str) -> Option<PodUid> {
    let segment = segment.split(':').next().unwrap_or_default();
    if let Some(uid) = segment.strip_prefix("pod") {
        return uid_of(uid, '-');
    }
    let (above, uid) = segment.strip_suffix(".slice")?.rsplit_once("-pod")?;
    if is_qos(above) { uid_of(uid, '_') } else { None }
}

/// A UUID with `separator`, or the 32 digits that a static pod has.
fn uid_of(text: &str, separator: char) -> Option<PodUid> {
    let is_hex = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let lengths: Vec<usize> = text.split(separator).map(str::len).collect();
    let fits = matches!(lengths[..], [8, 4, 4, 4, 12] | [32]);
    (fits && text.split(separator).all(is_hex)).then(|| PodUid(text.replace(separator, "-")))
}

/// The paths, for the log: each once, and not more than a line holds.
fn evidence(file: &str) -> String {
    let mut paths: Vec<&str> = lines(file).flatten().map(|(_, path)| path).collect();
    paths.sort_unstable();
    paths.dedup();
    let mut text = paths.join(" ");
    if text.len() > 300 {
        text = text.chars().take(300).chain(['…']).collect();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
    const B: &str = "99999999-8888-7777-6666-555555555555";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";

    /// Replaces `{A}`, `{B}` by the UIDs, `{a}`, `{b}` by the same with underscores.
    fn fill(text: &str) -> String {
        let under = |uid: &str| uid.replace('-', "_");
        text.replace("{A}", A).replace("{B}", B).replace("{a}", &under(A)).replace("{b}", &under(B)).replace("{S}", STATIC)
    }

    fn judge(file: &str, own: &Own) -> Result<String, Error> {
        pod_uid(&fill(file), own).map(|uid| uid.to_string())
    }

    #[test]
    fn every_shape_that_occurs() {
        for (name, file) in [
            ("v2, cgroupfs", "0::/kubepods/burstable/pod{A}/f00"),
            ("v2, cgroupfs, guaranteed", "0::/kubepods/pod{A}/f00"),
            (
                "v2, systemd, containerd",
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{a}.slice/cri-containerd-f00.scope",
            ),
            ("v2, systemd, guaranteed", "0::/kubepods.slice/kubepods-pod{a}.slice/crio-f00.scope"),
            ("CRI-O's conmon", "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{a}.slice/crio-conmon-f00.scope"),
            ("docker", "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{a}.slice/docker-f00.scope"),
            ("the kubelet's own slice", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{a}.slice/cri-containerd-f00.scope"),
            ("colon-joined", "0::/kubepods-burstable-pod{a}.slice:cri-containerd:f00"),
            ("colon-joined, below the runtime", "0::/system.slice/containerd.service/kubepods-besteffort-pod{a}.slice:cri-containerd:f00"),
            ("from the agent's cgroup namespace, systemd", "0::/../../kubepods-burstable-pod{a}.slice/cri-containerd-f00.scope"),
            ("the same, another class", "0::/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{a}.slice/cri-containerd-f00.scope"),
            ("the same, cgroupfs", "0::/../../pod{A}/f00"),
            (
                "v1",
                "12:memory:/kubepods/burstable/pod{A}/f00\n4:cpu,cpuacct:/kubepods/burstable/pod{A}/f00\n1:name=systemd:/kubepods/burstable/pod{A}/f00\n",
            ),
            ("v1 and v2 at once", "2:memory:/kubepods/burstable/pod{A}/f00\n1:name=systemd:/kubepods/burstable/pod{A}/f00\n0::/"),
            ("v1 and v2, the runtime's service in v2", "2:memory:/kubepods/pod{A}/f00\n0::/system.slice/containerd.service"),
            ("the pod's cgroup itself", "0::/kubepods/burstable/pod{A}"),
        ] {
            assert_eq!(judge(file, &Own::default()).as_deref(), Ok(A), "{name}");
        }
        assert_eq!(judge("0::/kubepods/burstable/pod{S}/f00", &Own::default()).as_deref(), Ok(STATIC));
    }

    #[test]
    fn what_is_in_no_pod() {
        for file in [
            "",
            "0::/",
            "0::/user.slice/user-1000.slice/session-1.scope",
            "0::/system.slice/docker-f00.scope",
            "0::/docker/f00",
            "0::/kubepods/burstable",
            "0::/../other-container-of-the-agents-pod",
            "0::/kubepods/pod",
            "0::/kubepods/podA",
            "0::/kubepods/pod2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4",
            "0::/kubepods/pod2B1FB2F4-4B5A-4B9A-9A4E-0C5A1B2C3D4E",
            "0::/kubepods/pod{a}",
            "0::/kubepods/pod{A} (deleted)",
            "0::/machine.slice/machine-libpod_pod_f00.slice",
            // Made by a user below what systemd lends to users.
            "0::/user.slice/user-1000.slice/user@1000.service/kubepods/pod{A}/f00",
            "0::/user.slice/user-1000.slice/user@1000.service/kubepods-pod{a}.slice/x",
            // Made below a container that is in no pod.
            "0::/docker/f00/kubepods/pod{A}/x",
            "0::/kubepods.slice/mykubepods-pod{a}.slice/x",
        ] {
            assert!(matches!(judge(file, &Own::default()), Err(Error::NotInPod(_))), "{file}: {:?}", judge(file, &Own::default()));
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
            assert_eq!(judge(file, &Own::default()).as_deref(), Ok(A), "{file}");
        }
    }

    #[test]
    fn contradictions_and_broken_lines_are_errors() {
        let conflict = judge("2:memory:/kubepods/pod{A}/x\n1:cpu:/kubepods/pod{B}/x", &Own::default()).unwrap_err();
        assert_eq!(conflict.to_string(), format!("its cgroups contradict each other: pod {A} and pod {B}"));
        for (file, line) in [("nonsense", 1), ("0::/\n0:x", 2), ("0::relative", 1), ("x::/", 1)] {
            assert_eq!(judge(file, &Own::default()), Err(Error::Malformed(line)), "{file}");
        }
    }

    #[test]
    fn a_node_in_a_container_is_taken_off_by_the_agents_own_place() {
        // kind: the node is a container, here even one in a pod of an outer cluster; the agent is a pod of the inner one.
        let outer = "/kubepods/burstable/pod{B}/c0de";
        let agent = "11111111-2222-3333-4444-555555555555";
        let own = fill(&format!("0::{outer}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{}.slice/x", agent.replace('-', "_")));
        let own = Own::of(&own, Some(agent)).unwrap();
        let inner = format!("0::{outer}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{{a}}.slice/x");
        assert_eq!(judge(&inner, &own).as_deref(), Ok(A));
        assert_eq!(judge(&format!("0::{outer}/kubelet/kubepods/burstable/pod{{A}}/x"), &own).as_deref(), Ok(A));
        // A process of the node container itself is in no pod of the inner cluster.
        assert!(matches!(judge(&format!("0::{outer}/init.scope"), &own), Err(Error::NotInPod(_))));

        // An agent that is a plain process of such a node.
        let own = Own::of(&fill(&format!("0::{outer}\n1:memory:/")), None).unwrap();
        assert_eq!(judge(&format!("0::{outer}/kubepods/pod{{A}}/x\n1:memory:/kubepods/pod{{A}}/x"), &own).as_deref(), Ok(A));
        // The prefix ends at a segment's end, and counts for its own hierarchy only.
        assert_eq!(judge(&format!("1:memory:{outer}/kubepods/pod{{A}}/x"), &own).as_deref(), Ok(B));

        // The ordinary cases: nothing is taken off.
        let own = Own::of(&fill("0::/kubepods/burstable/pod{B}/x"), Some(B)).unwrap();
        assert_eq!(own, Own(vec![(String::new(), String::new())]));
        assert_eq!(judge("0::/kubepods/burstable/pod{A}/x", &own).as_deref(), Ok(A));
        assert_eq!(judge("0::/kubepods/burstable/pod{B}/x/kubepods/pod{A}", &own).as_deref(), Ok(B));
    }
}
