//! The files and ports that an agent with a configuration uses, for its [confinement](crate::process::confinement).

use std::path::{Component, Path, PathBuf};

use crate::{
    config::{Attestation, Config, Env, IssuerConfig, TrustSource},
    process::confinement::Access,
};

/// The token of the pod's account, and the roots of the API server.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Set by the kubelet in every container.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";
const KUBECONFIG: &str = "KUBECONFIG";

/// Returns what an agent with this configuration needs. `file` is the path of the configuration.
///
/// A kubeconfig can name any file, and a program that gets a token. So an agent that uses one can read every file and start programs. An
/// agent with a file that a link puts into another directory can read every file too, because the link can change.
pub fn access(config: &Config, file: Option<&Path>, env: Env<'_>) -> Access {
    let shared = config.shared_socket.as_ref().and_then(|socket| socket.path.parent());
    let per_pod = config.per_pod.as_ref().map(|per_pod| &*per_pod.directory);
    let sources = || config.trust_sources.iter().chain(config.federated.values());
    let of_source = |source: &TrustSource| match source {
        TrustSource::File { path } => Some(path.clone()),
        TrustSource::ConfigMap { .. } | TrustSource::ClusterTrustBundle(_) | TrustSource::Inline { .. } => None,
    };
    let files = sources().filter_map(of_source).chain(file.map(Path::to_owned));
    let directories: Option<Vec<_>> = files.map(|path| directory_of(&path)).chain([Some(SERVICE_ACCOUNT.into())]).collect();
    let uses_kubernetes = config.attestation == Attestation::Kubernetes
        || config.issuers.values().any(|issuer| matches!(issuer, IssuerConfig::CertManager { .. }))
        || sources().any(TrustSource::is_in_cluster);
    let is_in_cluster = env(IN_CLUSTER).is_some() && env(KUBECONFIG).is_none();
    let uses_kubeconfig = uses_kubernetes && !is_in_cluster;
    Access {
        sockets: shared.into_iter().chain(per_pod).map(Path::to_owned).collect(),
        reads: directories.filter(|_| !uses_kubeconfig),
        ports: [config.admin, config.metrics, config.probes].map(|address| address.port()).to_vec(),
        starts_programs: uses_kubeconfig,
    }
}

/// Returns the directory in which the way to `file` can change. It is that of the first link, because the files of a volume are replaced by
/// a link to another directory. If a part of the way is missing, it is the nearest existing directory. Returns `None` if a link leads out of
/// this directory.
fn directory_of(file: &Path) -> Option<PathBuf> {
    let mut directory = if file.is_absolute() { PathBuf::from("/") } else { PathBuf::from(".") };
    for part in file.components().filter(|part| !matches!(part, Component::RootDir | Component::CurDir)) {
        let next = directory.join(part);
        if next.is_symlink() || !next.is_dir() {
            break;
        }
        directory = next;
    }
    let leads_out = file.canonicalize().is_ok_and(|file| directory.canonicalize().is_ok_and(|directory| !file.starts_with(directory)));
    (!leads_out).then_some(directory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// As the kubelet lays out a volume with a file in a directory.
    #[test]
    fn a_directory_that_is_replaced_by_a_link_is_read_from_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(place.join("..one/sub")).unwrap();
        std::fs::write(place.join("..one/sub/ca.pem"), "").unwrap();
        symlink("..one", place.join("..data")).unwrap();
        symlink("..data/sub", place.join("sub")).unwrap();
        std::fs::create_dir(place.join("plain")).unwrap();
        for (file, expected) in
            [("sub/ca.pem", &*place), ("..data/sub/ca.pem", &place), ("later/ca.pem", &place), ("plain/ca.pem", &place.join("plain"))]
        {
            assert_eq!(directory_of(&place.join(file)).as_deref(), Some(expected), "{file}");
        }
        assert_eq!(directory_of(Path::new("agent.yaml")).as_deref(), Some(Path::new(".")));
        // The next link could lead anywhere.
        for (link, target) in [("plain/out.pem", "..one/sub/ca.pem"), ("plain/out", "..one/sub")] {
            symlink(place.join(target), place.join(link)).unwrap();
        }
        for file in ["plain/out.pem", "plain/out/ca.pem"] {
            assert_eq!(directory_of(&place.join(file)), None, "{file}");
        }
    }

    fn of(text: &str, variables: &[&str]) -> Access {
        let env = |name: &str| variables.contains(&name).then(|| "a".to_owned());
        access(&Config::parse(text, &env).unwrap().config, Some(Path::new("/etc/config.yaml")), &env)
    }

    #[test]
    fn it_is_what_the_configuration_names() {
        let text = "issuer: { certManager: { issuerRef: { name: ca, kind: ClusterIssuer } } }\n\
                    sockets: { perPod: { enabled: true } }\n\
                    trust: { sources: [ { file: /usr/lib/ca.pem } ], federated: { b.example: { file: /proc/sys/ca.pem } } }\n\
                    probes: { address: '127.0.0.1:9' }\n";
        let in_cluster = of(text, &["NODE_NAME", "KUBERNETES_SERVICE_HOST"]);
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(in_cluster.sockets, paths(&["/run/sds-agent", "/run/sds-agent-pods"]));
        assert_eq!(in_cluster.reads, Some(paths(&["/usr/lib", "/proc/sys", "/etc", SERVICE_ACCOUNT])));
        assert_eq!((&in_cluster.ports[..], in_cluster.starts_programs), (&[15090, 15091, 9][..], false));

        let outside = of(text, &["NODE_NAME"]);
        assert_eq!((&outside.reads, outside.starts_programs), (&None, true));
        assert_eq!(of(text, &["NODE_NAME", "KUBERNETES_SERVICE_HOST", "KUBECONFIG"]), outside);
        let bundles = "attestation: unix\nissuer: { embedded: {} }\ntrust: { sources: [ { clusterTrustBundle: { name: a } } ] }\n";
        assert!(of(bundles, &[]).starts_programs && !of(bundles, &["KUBERNETES_SERVICE_HOST"]).starts_programs, "it uses the API server");
        let unix = of("attestation: unix\nissuer: { embedded: {} }\n", &[]);
        assert_eq!((unix.reads.map(|reads| reads.len()), unix.starts_programs), (Some(2), false));
    }
}
