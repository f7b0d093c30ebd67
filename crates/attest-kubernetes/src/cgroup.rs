//! From the text of `/proc/<pid>/cgroup` to a pod and its container: a pure function of the text and of the agent's own place.
//!
//! The rule against nesting: what lies above a pod's cgroup is made by the kubelet and by root; what lies below a container's may be made
//! by the container itself, in the likeness of another pod's. So the agent's own prefix is taken off (for nodes that run in containers),
//! then the *first* pod segment decides, reached only through segments that a kubelet makes; the segment below it is the container, and
//! anything deeper is ignored. Hierarchies that contradict each other are an error, never a guess. A container's id without a pod's UID
//! is no evidence. Only this file is: mounts can be forged.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
};

/// No cgroup file is longer: a dozen hierarchies, each with a path of at most 4,096 bytes.
const MAX_CGROUP_BYTES: u64 = 64 << 10;

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

/// Where a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup {
    /// Its pod.
    pub pod: PodUid,
    /// The id of its container, as the runtime knows it; none for what a runtime runs beside its containers, and where the hierarchies
    /// do not agree.
    pub container: Option<String>,
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
pub struct HostPrefix(Vec<(String, String)>);

impl HostPrefix {
    /// Reads the agent's own cgroup file. In a pod (`pod_uid`), the prefix is what lies above its kubelet's cgroups: the container that is
    /// the node, or nothing. Outside of any pod the agent runs where the node's processes run, and all of its path is the prefix.
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

    /// `path` below the prefix, or all of it where it lies elsewhere.
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

/// The pod that the process of `cgroup_file` runs in.
pub fn pod_uid(cgroup_file: &str, own: &HostPrefix) -> Result<PodUid, Error> {
    place(cgroup_file, own).map(|place| place.pod)
}

/// The pod that the process of `cgroup_file` runs in, and the container.
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

/// The first pod of a path, and the container that is named with it or right below it.
fn pod_of(path: &str) -> Option<(PodUid, Option<&str>)> {
    // The way up from the agent's own cgroup namespace; the kernel writes it at the beginning and nowhere else.
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

/// `<id>`, `cri-containerd-<id>.scope` and their like; not `crio-conmon-<id>.scope`, where the runtime watches over the container.
fn container_segment(segment: &str) -> Option<&str> {
    let name = segment.strip_suffix(".scope").unwrap_or(segment);
    let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
    container_id(runtime, id)
}

fn container_id<'a>(runtime: &str, id: &'a str) -> Option<&'a str> {
    let known = matches!(runtime, "" | "cri-containerd" | "crio" | "docker");
    (known && id.len() == 64 && id.bytes().all(is_hex)).then_some(id)
}

/// A segment that lies above pods: made by a kubelet or by its service manager.
fn is_kubelets(segment: &str) -> bool {
    matches!(
        segment,
        "kubelet" | "kubelet.slice" | "kubepods" | "burstable" | "besteffort" | "guaranteed"
        // Runtimes that name the pod's slice and the container in one segment put it below their own service.
            | "system.slice" | "containerd.service" | "crio.service" | "docker.service"
    ) || segment.strip_suffix(".slice").is_some_and(is_qos)
}

/// `kubepods`, `kubepods-burstable` or `kubepods-besteffort`, with the names of slices above it in front.
fn is_qos(name: &str) -> bool {
    let name = name.strip_suffix("-burstable").or_else(|| name.strip_suffix("-besteffort")).unwrap_or(name);
    name == "kubepods" || name.ends_with("-kubepods")
}

/// `pod<uid>` of the cgroupfs driver, or `kubepods-burstable-pod<uid with _>.slice` of the systemd driver.
fn pod_segment(segment: &str) -> Option<PodUid> {
    if let Some(uid) = segment.strip_prefix("pod") {
        return uid_of(uid, '-');
    }
    let (above, uid) = segment.strip_suffix(".slice")?.rsplit_once("-pod")?;
    if is_qos(above) { uid_of(uid, '_') } else { None }
}

/// A UUID with `separator`, or the 32 digits that a static pod has.
fn uid_of(text: &str, separator: char) -> Option<PodUid> {
    let lengths: Vec<usize> = text.split(separator).map(str::len).collect();
    let fits = matches!(lengths[..], [8, 4, 4, 4, 12] | [32]);
    (fits && text.split(separator).all(|part| part.bytes().all(is_hex))).then(|| PodUid(text.replace(separator, "-")))
}

fn is_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

/// The paths, for the log: each once, and not more than a line holds.
fn evidence(file: &str) -> String {
    let mut paths: Vec<&str> = lines(file).flatten().map(|(_, path)| path).collect();
    paths.sort_unstable();
    paths.dedup();
    // Whoever may make cgroups chooses their names.
    let text = paths.join(" ").replace(char::is_control, "?");
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// All of a cgroup file. Names need not be text; what is none stands for no name that matters.
pub fn read(file: io::Result<File>) -> io::Result<String> {
    let mut bytes = Vec::new();
    file?.take(MAX_CGROUP_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CGROUP_BYTES {
        // What a part of it says is not what it says.
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {MAX_CGROUP_BYTES} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests;
