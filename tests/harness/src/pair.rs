//! Two Envoys that call each other over mTLS, and the conditions that hold after load has passed through them.

use std::{net::SocketAddr, path::Path, time::Duration};

use crate::{
    cgroups::PodCgroup,
    envoy::{ANSWER, Envoy, Sds, Side},
    eventually, http,
    load::{Load, Tally},
};

/// The identity of an end, the protocol by which it requests secrets, and its pod.
#[derive(Clone, Copy)]
pub struct End<'a> {
    pub id: &'a str,
    pub sds: Sds,
    pub cgroup: Option<&'a PodCgroup>,
}

/// A client Envoy that forwards to a server Envoy, both live.
pub struct Pair {
    pub server: Envoy,
    pub client: Envoy,
    /// The server's TLS port.
    pub tls: SocketAddr,
    /// The client's plain port: a request to it passes through both Envoys.
    pub entrance: SocketAddr,
}

impl Pair {
    /// Starts both on the socket of the agent.
    pub async fn start(socket: &Path, server: End<'_>, client: End<'_>) -> Self {
        Self::expecting(socket, server, client, (server.id, client.id)).await
    }

    /// Like [`Pair::start`]; the client expects `expected.0` of the server, and the server `expected.1` of the client.
    pub async fn expecting(socket: &Path, server: End<'_>, client: End<'_>, expected: (&str, &str)) -> Self {
        let first = Envoy::start(Side::Server { client: expected.1 }, socket, server.sds, server.cgroup).await;
        let tls = first.live().await;
        let second = Envoy::start(Side::Client { server: expected.0, at: tls }, socket, client.sds, client.cgroup).await;
        let entrance = second.live().await;
        Self { server: first, client: second, tls, entrance }
    }

    /// Sends one request through both.
    pub async fn request(&self) -> Result<(), String> {
        let body = http::get_ok(self.entrance, "/").await?;
        if body == ANSWER { Ok(()) } else { Err(format!("unexpected answer {body:?}")) }
    }

    /// Sends requests through both until stopped.
    pub fn load(&self) -> Load {
        Load::start(self.entrance, ANSWER)
    }

    /// The number of certificates that each end has received, as server and client.
    pub async fn taken(&self) -> [u64; 2] {
        let taken = async |envoy: &Envoy| envoy.stats().await.sum("sds.default.update_success");
        [taken(&self.server).await, taken(&self.client).await]
    }

    /// Waits until both ends have received `count` more certificates than at `since`.
    pub async fn rotated(&self, since: [u64; 2], count: u64, limit: Duration) {
        eventually(&format!("{count} rotations at both ends"), limit, async || {
            let now = self.taken().await;
            let enough = now.iter().zip(since).all(|(now, since)| *now >= since + count);
            if enough { Ok(()) } else { Err(format!("from {since:?} to {now:?}")) }
        })
        .await;
    }

    /// Waits for `count` rotations one by one, with a phase of `load` before the first and after each.
    pub async fn rotated_under(&self, load: &Load, since: [u64; 2], count: u64, limit: Duration) {
        load.passes("before the first rotation").await;
        for number in 1..=count {
            self.rotated(since, number, limit).await;
            load.passes(&format!("after rotation {number}")).await;
        }
    }

    /// Asserts that no request failed and that each request used a full handshake.
    pub async fn assert_clean(&self, tally: &Tally) {
        let [server, client] = self.taken().await;
        let handshakes = self.server.stats().await.sum(".ssl.handshake");
        eprintln!(
            "figure: {} requests ({}), {} failed; {handshakes} handshakes; {server} and {client} certificates taken",
            tally.requests,
            tally.phases.join(", "),
            tally.failed
        );
        assert!(!tally.phases.is_empty(), "nothing was waited for, and so nothing is proven");
        assert_eq!(tally.failed, 0, "{tally:?}");
        for (side, envoy) in [("server", &self.server), ("client", &self.client)] {
            let stats = envoy.stats().await;
            let handshakes = stats.sum(".ssl.handshake");
            assert!(handshakes >= tally.requests, "{side}: {handshakes} handshakes for {tally:?}");
            let bad = [
                ".ssl.session_reused",
                ".ssl.connection_error",
                ".ssl.fail_verify_error",
                ".ssl.fail_verify_san",
                ".ssl.fail_verify_no_cert",
                "sds.default.update_rejected",
                "sds.ROOTCA.update_rejected",
                "sds.default.key_rotation_failed",
            ];
            for name in bad {
                assert_eq!(stats.sum(name), 0, "{side}: {name}: {:?}", stats.like("ssl"));
            }
        }
        let client = self.client.stats().await;
        assert_eq!(client.sum("cluster.other-side.upstream_cx_connect_fail"), 0);
        assert_eq!(client.sum("cluster.other-side.upstream_cx_total"), client.sum("cluster.other-side.upstream_rq_total"));
    }
}
