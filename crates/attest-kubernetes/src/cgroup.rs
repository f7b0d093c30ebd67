//! Maps the text of `/proc/<pid>/cgroup` to a pod and its container: a pure function of that text and of the agent's own cgroup prefix.
//!
//! The kubelet and root create the cgroups above and at a pod's cgroup. A container may create cgroups below its own, and imitate those of
//! another pod. The parser therefore removes the agent's own prefix (for nodes that run in containers). Then the *first* pod segment
//! decides, and only segments that a kubelet creates may precede it. The segment below it is the container, and deeper segments are
//! ignored. Hierarchies that contradict each other are an error. A container id without a pod UID is no evidence. No other file is evidence
//! either: mounts can be forged.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
};

/// Maximum size of a cgroup file, 64 KiB: a dozen hierarchies, each with a path of at most 4,096 bytes.
const MAX_CGROUP_BYTES: u64 = 64 << 10;

/// UID of a pod as in the API; for a static pod, as the kubelet writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodUid(String);

impl PodUid {
    /// Returns the UID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Pod and container of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup {
    /// UID of the pod.
    pub pod: PodUid,
    /// Id of the container, as the runtime knows it. `None` for a process that the runtime runs beside the containers, and if the
    /// hierarchies name different containers.
    pub container: Option<String>,
}

/// Reasons why a cgroup file yields no pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No path contains a pod.
    #[error("its cgroup paths contain no pod: {0}")]
    NotInPod(String),
    /// Two hierarchies contain different pods.
    #[error("its cgroups contradict each other: pod {first} and pod {second}")]
    Conflicting {
        /// UID of the first pod.
        first: PodUid,
        /// UID of another pod.
        second: PodUid,
    },
    /// A line does not have the kernel's format.
    #[error("line {0} of its cgroup file is not id:controllers:path")]
    Malformed(usize),
}

/// The agent's own path in each hierarchy, as the prefix of the paths that it reads for other processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPrefix(Vec<(String, String)>);

impl HostPrefix {
    /// Reads the prefix from the agent's own cgroup file. In a pod (`pod_uid`), the prefix is the part above the kubelet's cgroups: the
    /// container that is the node, or nothing. Outside of pods, the agent runs beside the processes of the node, and its complete path is
    /// the prefix.
    ///
    /// # Errors
    ///
    /// [`Error::Malformed`] if a line does not have the kernel's format.
    pub fn of(cgroup_file: &str, pod_uid: Option<&str>) -> Result<Self, Error> {
        let prefix = |path: &str| {
            let segments: Vec<&str> = segments(path).collect();
            let slice = |segment: &str| segment.split(':').next().and_then(pod_segment);
            let own = |segment: &&str| pod_uid.is_some_and(|uid| slice(segment).is_some_and(|own| own.as_str() == uid));
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

    /// Returns the part of `path` below the prefix, or `path` if it does not begin with the prefix.
    fn strip<'a>(&self, hierarchy: &str, path: &'a str) -> &'a str {
        let prefix = self.0.iter().find(|(name, _)| name == hierarchy).map_or("", |(_, prefix)| prefix);
        match path.strip_prefix(prefix) {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
            _ => path,
        }
    }
}

impl fmt::Display for HostPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut prefixes: Vec<&str> = self.0.iter().map(|(_, prefix)| prefix.as_str()).filter(|prefix| !prefix.is_empty()).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        f.write_str(if prefixes.is_empty() { "nothing" } else { "" })?;
        f.write_str(&prefixes.join(", "))
    }
}

/// Returns the pod of the process that `cgroup_file` belongs to.
///
/// # Errors
///
/// As for [`place`].
pub fn pod_uid(cgroup_file: &str, own: &HostPrefix) -> Result<PodUid, Error> {
    place(cgroup_file, own).map(|place| place.pod)
}

/// Returns the pod and the container of the process that `cgroup_file` belongs to.
///
/// # Errors
///
/// [`Error::NotInPod`] if no path contains a pod, [`Error::Conflicting`] if paths contain different pods, [`Error::Malformed`] if a line
/// does not have the kernel's format.
pub fn place(cgroup_file: &str, own: &HostPrefix) -> Result<PodCgroup, Error> {
    let mut pod: Option<PodUid> = None;
    let mut containers: Vec<&str> = Vec::new();
    for line in lines(cgroup_file) {
        let (hierarchy, path) = line?;
        let Some((uid, container)) = pod_of(own.strip(hierarchy, path)) else { continue };
        containers.extend(container);
        match &pod {
            Some(first) if *first != uid => return Err(Error::Conflicting { first: first.clone(), second: uid }),
            Some(_) => {}
            None => pod = Some(uid),
        }
    }
    containers.dedup();
    let container = if let [one] = containers[..] { Some(one.to_owned()) } else { None };
    pod.map(|pod| PodCgroup { pod, container }).ok_or_else(|| Error::NotInPod(evidence(cgroup_file)))
}

/// Returns (hierarchy, path) of each line. A path may contain colons, a hierarchy may not.
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

/// Returns the first pod in a path, and the container that is named in the same segment or in the next one.
fn pod_of(path: &str) -> Option<(PodUid, Option<&str>)> {
    // Paths outside of the agent's cgroup namespace begin with `..`; the kernel writes `..` only at the beginning.
    let mut segments = segments(path).skip_while(|segment| *segment == "..");
    loop {
        let segment = segments.next()?;
        let (slice, joined) = segment.split_once(':').map_or((segment, None), |(slice, rest)| (slice, Some(rest)));
        if let Some(uid) = pod_segment(slice) {
            let container = match joined {
                Some(rest) => rest.split_once(':').and_then(|(runtime, id)| container_id(runtime, id)),
                None => segments.next().and_then(container_segment),
            };
            return Some((uid, container));
        }
        if !is_kubelets(segment) {
            return None;
        }
    }
}

/// Reads `<id>`, `cri-containerd-<id>.scope` and similar names; not `crio-conmon-<id>.scope`, which holds the monitor of the container.
fn container_segment(segment: &str) -> Option<&str> {
    let name = segment.strip_suffix(".scope").unwrap_or(segment);
    let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
    container_id(runtime, id)
}

fn container_id<'a>(runtime: &str, id: &'a str) -> Option<&'a str> {
    let known = matches!(runtime, "" | "cri-containerd" | "crio" | "docker");
    (known && id.len() == 64 && id.bytes().all(is_hex)).then_some(id)
}

/// Returns whether a segment lies above pods: created by a kubelet or by its service manager.
fn is_kubelets(segment: &str) -> bool {
    matches!(
        segment,
        "kubelet" | "kubelet.slice" | "kubepods" | "burstable" | "besteffort" | "guaranteed"
        // Runtimes that name the pod's slice and the container in one segment create it below their own service.
            | "system.slice" | "containerd.service" | "crio.service" | "docker.service"
    ) || segment.strip_suffix(".slice").is_some_and(is_qos)
}

/// Accepts `kubepods`, `kubepods-burstable` and `kubepods-besteffort`, optionally preceded by the names of the slices above.
fn is_qos(name: &str) -> bool {
    let name = name.strip_suffix("-burstable").or_else(|| name.strip_suffix("-besteffort")).unwrap_or(name);
    name == "kubepods" || name.ends_with("-kubepods")
}

/// Reads `pod<uid>` of the cgroupfs driver, or `kubepods-burstable-pod<uid with _>.slice` of the systemd driver.
fn pod_segment(segment: &str) -> Option<PodUid> {
    if let Some(uid) = segment.strip_prefix("pod") {
        return uid_of(uid, '-');
    }
    let (above, uid) = segment.strip_suffix(".slice")?.rsplit_once("-pod")?;
    if is_qos(above) { uid_of(uid, '_') } else { None }
}

/// Reads a UUID with this separator, or the 32 digits that a static pod has.
fn uid_of(text: &str, separator: char) -> Option<PodUid> {
    let lengths: Vec<usize> = text.split(separator).map(str::len).collect();
    let fits = matches!(lengths[..], [8, 4, 4, 4, 12] | [32]);
    (fits && text.split(separator).all(|part| part.bytes().all(is_hex))).then(|| PodUid(text.replace(separator, "-")))
}

fn is_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

/// Returns each path once, truncated to 300 characters, for the log.
fn evidence(file: &str) -> String {
    let mut paths: Vec<&str> = lines(file).flatten().map(|(_, path)| path).collect();
    paths.sort_unstable();
    paths.dedup();
    // A process that may create cgroups chooses their names, so control characters are replaced.
    let text = paths.join(" ").replace(char::is_control, "?");
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Reads a complete cgroup file. Bytes that are not UTF-8 are replaced: they occur in no name that matters here.
///
/// # Errors
///
/// The error of opening or reading `file`, and [`io::ErrorKind::InvalidData`] if it has more than 64 KiB.
pub fn read(file: io::Result<File>) -> io::Result<String> {
    let mut bytes = Vec::new();
    file?.take(MAX_CGROUP_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CGROUP_BYTES {
        // A truncated file could name another pod.
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {MAX_CGROUP_BYTES} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests;
