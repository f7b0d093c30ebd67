//! Attestation on the shared socket: the peer's pidfd, its cgroups, its pod, and the pod's service account.
//!
//! The order is part of the proof. The pidfd is taken first ([`Peer`]), the evidence is read while the process lives, and the last step
//! checks that it still lives. The caller of this module keeps the [`Peer`] for as long as the connection: dropping it ends the watch for
//! the end of the process.

use std::{fmt, fs::File, io, path::PathBuf, sync::Arc};

use futures::future::BoxFuture;
use rustix::fs::{Mode, OFlags, openat};
use sds_server::attest::{Attested, Attestor, Error, Method, Reason, origin::Origins};
use unix_peer::peer::Peer;
use workload_identity::{Account, PodRef};

use crate::{
    cgroup::{self, HostPrefix, PodCgroup, PodUid},
    pods::{Known, Pods},
};

mod origins;

pub use origins::CgroupOrigins;

/// Restricts which processes of a pod may fetch on the shared socket. Default: all. A caller must satisfy both lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttestationPolicy {
    /// `containers`: names of allowed containers; empty for all.
    pub containers: Vec<Arc<str>>,
    /// `uids`: allowed user ids, as seen in the node's user namespace; empty for all.
    pub uids: Vec<u32>,
}

/// Attests callers on the shared socket: peer, pod, service account.
pub struct KubernetesAttestor {
    pods: Pods,
    proc: PathBuf,
    own: HostPrefix,
    policy: AttestationPolicy,
    accepts_pid_reuse: bool,
}

impl fmt::Debug for KubernetesAttestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesAttestor").field("pods", &self.pods).finish_non_exhaustive()
    }
}

impl KubernetesAttestor {
    /// Creates an attestor that looks up pods in `pods`. `proc` is the mount point of procfs, `/proc`; the agent's own cgroups are read
    /// there once. `own_pod` is the agent's pod, if it runs in one.
    ///
    /// # Errors
    ///
    /// The error of reading `self/cgroup`, and [`io::ErrorKind::InvalidData`] if its content is not a cgroup file.
    pub fn new(pods: Pods, proc: PathBuf, own_pod: Option<&PodRef>) -> io::Result<Self> {
        let file = cgroup::read(File::open(proc.join("self/cgroup")))?;
        let own = HostPrefix::of(&file, own_pod.map(|pod| &*pod.uid)).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Self { pods, proc, own, policy: AttestationPolicy::default(), accepts_pid_reuse: false })
    }

    /// Serves only callers that `policy` allows. If it names containers, `pods` must be created [with containers](Pods::with_containers).
    pub fn with_policy(self, policy: AttestationPolicy) -> Self {
        Self { policy, ..self }
    }

    /// Serves callers without a pidfd too (default: false). If such a caller ends after connecting and another process takes over its pid,
    /// the agent attests that process as the caller.
    pub fn accepting_pid_reuse(self, accepts_pid_reuse: bool) -> Self {
        Self { accepts_pid_reuse, ..self }
    }

    /// Returns the UID of the peer's pod and the pod's service account, also of a pod that has ended or was deleted: it says what the
    /// process was started as, and not that it may still be served. `None` for a pod without a service account.
    ///
    /// # Errors
    ///
    /// As for [`Attestor::attest`], except that the pod may have ended. A pod that the API server does not know is
    /// [`Reason::unknown_pod`].
    ///
    /// # Cancel safety
    ///
    /// A dropped future only stops waiting.
    pub async fn account_of(&self, peer: &Peer) -> Result<(PodUid, Option<Account>), Error> {
        self.check_handle(peer)?;
        let place = self.place(peer).await?;
        let account = self.pods.account(place.pod.as_str()).await?;
        // Last step, as in `judge`.
        if !peer.is_alive() {
            return Err(Error::refused(Reason::process_gone, format!("process {} ended while it was being attested", peer.pid)));
        }
        Ok((place.pod, account))
    }

    /// Returns an error if the evidence could be about another process.
    fn check_handle(&self, peer: &Peer) -> Result<(), Error> {
        if peer.pid == 0 {
            let detail = "the caller's process is not visible in the agent's PID namespace: run the agent with hostPID: true";
            return Err(Error::refused(Reason::pid_invisible, detail));
        }
        if !peer.has_handle() {
            let detail = format!("process {} ended before its connection was accepted", peer.pid);
            return Err(Error::refused(Reason::process_gone, detail));
        }
        if !peer.is_pinned() && !self.accepts_pid_reuse {
            let detail = "the kernel gives no handle on the caller: the shared socket needs Linux 6.5";
            return Err(Error::refused(Reason::no_pidfd, detail));
        }
        Ok(())
    }

    async fn judge(&self, peer: &Peer) -> Result<Attested, Error> {
        self.check_handle(peer)?;
        let place = self.place(peer).await?;
        let known = self.pods.wait_for(place.pod.as_str()).await?;
        let pod = &known.pod;
        if pod.service_account.is_none() {
            let kind = if pod.mirror { "static pod" } else { "pod" };
            // A static pod is reported with the UID that the kubelet uses, and not with the UID of its mirror pod.
            let told = PodRef { uid: place.pod.as_str().into(), ..pod.pod.clone() };
            return Err(Error::refused(Reason::no_service_account, format!("{kind} {} has no service account", pod.pod)).by(&told));
        }
        self.allow(peer, &place, &known).await?;
        let terminated = known.terminated.child_token();
        let ended = peer.ended().map_err(|e| Error::temporary(Reason::unreadable, format!("cannot watch the caller's process: {e}")))?;
        // Last step: all evidence above is about the process that connected, if that process still lives.
        if !peer.is_alive() {
            return Err(Error::refused(Reason::process_gone, format!("process {} ended while it was being attested", peer.pid)));
        }
        tokio::spawn({
            let terminated = terminated.clone();
            async move {
                tokio::select! {
                    () = terminated.cancelled() => {}
                    ended = ended => if ended { terminated.cancel() },
                }
            }
        });
        known.first_call.cancel();
        Ok(Attested { workload: pod.workload(), facts: Some(known.facts.subscribe()), terminated })
    }

    /// Checks the caller against the policy.
    async fn allow(&self, peer: &Peer, place: &PodCgroup, known: &Known) -> Result<(), Error> {
        let AttestationPolicy { containers, uids } = &self.policy;
        let (pod, pid) = (&known.pod.pod, peer.pid);
        if !uids.is_empty() && !uids.contains(&peer.uid) {
            let detail = format!("process {pid} of pod {pod} runs as user {}, who is not among attestationPolicy.uids", peer.uid);
            return Err(Error::refused(Reason::uid_not_allowed, detail).by(pod));
        }
        if containers.is_empty() {
            return Ok(());
        }
        let Some(id) = &place.container else {
            let detail =
                format!("process {pid} cannot be attributed to one container of pod {pod}, as attestationPolicy.containers requires");
            return Err(Error::refused(Reason::container_not_allowed, detail).by(pod));
        };
        let name = self.pods.wait_for_container(&pod.uid, id).await?;
        if containers.iter().any(|allowed| **allowed == *name) {
            return Ok(());
        }
        let detail = format!("process {pid} is in container {name} of pod {pod}, which is not among attestationPolicy.containers");
        Err(Error::refused(Reason::container_not_allowed, detail).by(pod))
    }

    async fn place(&self, peer: &Peer) -> Result<PodCgroup, Error> {
        let pid = peer.pid;
        let opened = peer.directory().map(|directory| openat(directory, "cgroup", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()));
        let path = self.proc.join(pid.to_string()).join("cgroup");
        // The quotas have already read this file (`CgroupOrigins`), but that result is no evidence. It may be a second old, come from
        // another connection of the process, and precede a move of the process by the container runtime. The proof requires pidfd, evidence
        // and liveness in this order, for this call (docs/security.md). The kernel takes a global lock to produce this file, so a thread
        // that serves no other task reads it.
        let read =
            tokio::task::spawn_blocking(move || cgroup::read(opened.map_or_else(|| File::open(path), |opened| Ok(File::from(opened?)))))
                .await;
        let file = match read {
            Ok(Ok(file)) => file,
            Ok(Err(error))
                if matches!(error.kind(), io::ErrorKind::NotFound)
                    || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
            {
                return Err(Error::refused(Reason::process_gone, format!("process {pid} ended before its cgroups were read")));
            }
            Ok(Err(error)) => {
                return Err(Error::temporary(Reason::unreadable, format!("cannot read the cgroups of process {pid}: {error}")));
            }
            Err(_) => return Err(Error::temporary(Reason::unreadable, "the agent is ending")),
        };
        cgroup::place(&file, &self.own).map_err(|error| {
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

    /// Origins are pods, because every proxy of a mesh runs as the same user.
    fn origins(&self) -> Origins {
        Origins::ByPod(Arc::new(CgroupOrigins::new(self.proc.clone(), Arc::new(self.own.clone()))))
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        Box::pin(self.judge(peer))
    }

    fn still_holds(&self, peer: &Peer) -> bool {
        peer.is_alive()
    }
}

#[cfg(test)]
mod tests;
