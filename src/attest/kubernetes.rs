//! Attestation on the shared socket: the peer's handle, its cgroups, its pod, the pod's service account.
//!
//! The order is the proof: the handle was taken first ([`Peer`]), the evidence is read while it lives, and that it still lives is asked
//! last. The caller keeps the [`Peer`] for as long as the connection: with it ends the watch for the end of the process.

use std::{
    fmt,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::future::BoxFuture;

use crate::{
    attest::{
        Attested, Attestor, Error, Method, Reason,
        cgroup::{self, Own, PodUid},
        origin::{ByPod, Origins},
        pods::Pods,
    },
    identity::{PodRef, Workload},
    peer::Peer,
};

/// No cgroup file is longer: a dozen hierarchies, each with a path of at most 4,096 bytes.
const MAX_CGROUP_BYTES: u64 = 64 << 10;

/// Peer → pod → service account.
pub struct KubernetesAttestor {
    pods: Pods,
    proc: PathBuf,
    own: Own,
}

impl fmt::Debug for KubernetesAttestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesAttestor").field("pods", &self.pods).finish_non_exhaustive()
    }
}

impl KubernetesAttestor {
    /// Attests by `pods`. `proc` is where procfs is mounted, `/proc`; the agent's own cgroups are read there, once. `own_pod` is the
    /// agent's pod, where it runs in one.
    pub fn new(pods: Pods, proc: PathBuf, own_pod: Option<&PodRef>) -> io::Result<Self> {
        let file = read_cgroup(&proc.join("self/cgroup"))?;
        let own = Own::of(&file, own_pod.map(|pod| &*pod.uid)).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Self { pods, proc, own })
    }

    async fn judge(&self, peer: &Peer) -> Result<Attested, Error> {
        if peer.pid == 0 {
            let detail = "the caller's process is not visible in the agent's PID namespace: run the agent with hostPID: true";
            return Err(Error::refused(Reason::pid_invisible, detail));
        }
        if !peer.has_handle() {
            let detail = "the kernel gives no pidfd for the caller: the shared socket needs Linux 6.5, or the process has ended already";
            return Err(Error::refused(Reason::no_pidfd, detail));
        }
        let uid = self.pod_uid(peer.pid).await?;
        let known = self.pods.wait_for(uid.as_str()).await?;
        let pod = &known.pod;
        let Some(service_account) = pod.service_account.clone() else {
            let kind = if pod.mirror { "static pod" } else { "pod" };
            return Err(Error::refused(Reason::no_service_account, format!("{kind} {} has no service account", pod.pod)));
        };
        let gone = known.gone.child_token();
        let ended = peer.ended().map_err(|e| Error::temporary(Reason::unreadable, format!("cannot watch the caller's process: {e}")))?;
        // Last: all that was read above is about the process that connected.
        if !peer.is_alive() {
            return Err(Error::refused(Reason::process_gone, format!("process {} ended while it was being attested", peer.pid)));
        }
        tokio::spawn({
            let gone = gone.clone();
            async move {
                tokio::select! {
                    () = gone.cancelled() => {}
                    ended = ended => if ended { gone.cancel() },
                }
            }
        });
        Ok(Attested { workload: Workload::Pod { pod: pod.pod.clone(), service_account: Some(service_account) }, gone })
    }

    async fn pod_uid(&self, pid: i32) -> Result<PodUid, Error> {
        let path = self.proc.join(pid.to_string()).join("cgroup");
        // The kernel takes a global lock for this file: not on a thread that serves others.
        let read = tokio::task::spawn_blocking(move || read_cgroup(&path)).await;
        let file = match read {
            Ok(Ok(file)) => file,
            Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::NotFound) || error.raw_os_error() == Some(libc::ESRCH) => {
                return Err(Error::refused(Reason::process_gone, format!("process {pid} ended before its cgroups were read")));
            }
            Ok(Err(error)) => {
                return Err(Error::temporary(Reason::unreadable, format!("cannot read the cgroups of process {pid}: {error}")));
            }
            Err(_) => return Err(Error::temporary(Reason::unreadable, "the agent is ending")),
        };
        cgroup::pod_uid(&file, &self.own).map_err(|error| {
            let reason = match error {
                cgroup::Error::NotInPod(_) => Reason::not_in_pod,
                cgroup::Error::Conflicting { .. } => Reason::conflicting_cgroups,
                cgroup::Error::Malformed(_) => Reason::unreadable,
            };
            Error::refused(reason, format!("process {pid}: {error}"))
        })
    }
}

impl Attestor for KubernetesAttestor {
    fn method(&self) -> Method {
        Method::kubernetes
    }

    /// Every proxy of a mesh runs as the same user: by pod.
    fn origins(&self) -> Origins {
        Origins::ByPod(ByPod::new(self.proc.clone(), Arc::new(self.own.clone())))
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        Box::pin(self.judge(peer))
    }
}

/// The cgroup file of a process.
pub(crate) fn read_cgroup(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_CGROUP_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixStream, time::Duration};

    use serde_json::{Value, json};
    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::kubernetes::{self, fake::FakeApi};

    const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

    /// A peer (this process), and what `/proc` says of it.
    struct World {
        api: FakeApi,
        attestor: KubernetesAttestor,
        peer: Peer,
        proc: tempfile::TempDir,
        shutdown: CancellationToken,
        _socket: UnixStream,
    }

    impl World {
        fn new(cgroup: &str, pods: &[Value]) -> Self {
            let (api, metrics) = (FakeApi::new(), kubernetes::Metrics::default());
            for pod in pods {
                api.put("pods", pod.clone());
            }
            let index = Pods::new(api.client(&metrics), "n1", metrics);
            let shutdown = CancellationToken::new();
            tokio::spawn({
                let (index, shutdown) = (index.clone(), shutdown.clone());
                async move { index.run(shutdown).await }
            });
            let (socket, _other) = UnixStream::pair().unwrap();
            let peer = Peer::of(&socket).unwrap();
            let proc = tempfile::tempdir().unwrap();
            for (name, content) in [("self", "0::/"), (peer.pid.to_string().as_str(), cgroup)] {
                fs::create_dir(proc.path().join(name)).unwrap();
                fs::write(proc.path().join(name).join("cgroup"), content).unwrap();
            }
            let attestor = KubernetesAttestor::new(index, proc.path().to_owned(), None).unwrap();
            Self { api, attestor, peer, proc, shutdown, _socket: socket }
        }

        async fn attest(&self) -> Result<Attested, Error> {
            timeout(Duration::from_secs(20), self.attestor.attest(&self.peer)).await.expect("no verdict")
        }

        async fn refusal(&self) -> (Reason, bool) {
            let error = self.attest().await.unwrap_err();
            (error.reason, error.temporary)
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.shutdown.cancel();
        }
    }

    fn cgroup(uid: &str) -> String {
        format!("0::/kubepods/burstable/pod{uid}/f00")
    }

    fn pod(uid: &str, account: Option<&str>) -> Value {
        json!({"metadata": {"name": "cart-1", "namespace": "shop", "uid": uid}, "spec": {"nodeName": "n1", "serviceAccountName": account}})
    }

    #[tokio::test]
    async fn a_process_in_a_pods_cgroup_is_that_pod_until_the_pod_goes() {
        let world = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
        let attested = world.attest().await.unwrap();
        let Workload::Pod { pod, service_account } = &attested.workload else { panic!("{:?}", attested.workload) };
        assert_eq!((pod.to_string().as_str(), service_account.as_deref()), ("shop/cart-1", Some("cart")));
        let other = world.attest().await.unwrap();
        other.gone.cancel();
        assert!(!attested.gone.is_cancelled(), "a connection's token is its own");
        world.api.remove("pods", "shop", "cart-1");
        timeout(Duration::from_secs(20), attested.gone.cancelled()).await.unwrap();
    }

    #[tokio::test]
    async fn a_pod_that_the_api_tells_later_is_awaited() {
        let world = World::new(&cgroup(UID), &[]);
        timeout(Duration::from_secs(20), world.attestor.pods.synced().wait_for(|s| *s)).await.unwrap().unwrap();
        world.api.fail("list", "pods", kubernetes::fake::Fault::Hang, 1);
        let (attested, ()) = tokio::join!(world.attest(), async {
            world.api.until("the live read", |api| (api.count("list", "pods") == 2).then_some(())).await;
            world.api.put("pods", pod(UID, Some("cart")));
        });
        assert_eq!(&*attested.unwrap().workload.pod().unwrap().name, "cart-1");
    }

    #[tokio::test]
    async fn who_cannot_be_proven_is_refused_with_the_reason() {
        let broken = World::new("0::/user.slice", &[]);
        assert_eq!(broken.refusal().await, (Reason::not_in_pod, false));
        let other = UID.replace('2', "3");
        let conflicting = World::new(&format!("1:cpu:/kubepods/pod{UID}\n0::/kubepods/pod{other}"), &[]);
        assert_eq!(conflicting.refusal().await, (Reason::conflicting_cgroups, false));
        let accountless = World::new(&cgroup(UID), &[pod(UID, None)]);
        assert_eq!(accountless.refusal().await, (Reason::no_service_account, false));
        let unknown = World::new(&cgroup(UID), &[]);
        assert_eq!(unknown.refusal().await, (Reason::unknown_pod, true));

        let mut gone = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
        fs::remove_dir_all(gone.proc.path().join(gone.peer.pid.to_string())).unwrap();
        assert_eq!(gone.refusal().await, (Reason::process_gone, false));
        gone.peer.pid = 0;
        let invisible = gone.attest().await.unwrap_err();
        assert_eq!(invisible.reason, Reason::pid_invisible);
        assert!(invisible.detail.contains("hostPID: true"));
    }
}
