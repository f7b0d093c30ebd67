//! The table itself, in the order of the page.

use super::{
    Absence::{Nothing, Required, Value, Words},
    Field, Group,
    Kind::{Address, Boolean, Choice, Duration, Entries, Fraction, Integer, Integers, Labels, Mode, Path, Section, Sections, Text, Texts},
};

const KEYS: &[&str] = &["ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072"];
const MAX_UID: u64 = 4_294_967_294;

const fn field(path: &'static str, kind: super::Kind, default: super::Absence, meaning: &'static str) -> Field {
    Field { path, kind, default, meaning }
}

/// Every field of the file.
pub const GROUPS: &[Group] = &[
    Group {
        title: "Who is served",
        fields: &[
            field("trustDomain", Text, Value("cluster.local"), "The SPIFFE trust domain of every identity that the agent gives."),
            field(
                "attestation",
                Choice(&["kubernetes", "unix"]),
                Value("kubernetes"),
                "How a caller is known. `kubernetes`: the calling process, its cgroup, its pod, its service account; needs `NODE_NAME`. \
                 `unix`: the user id; for development and bare machines.",
            ),
            field(
                "attestationPolicy",
                Section,
                Nothing,
                "Who of a pod may fetch on the shared socket, with `attestation: kubernetes`. Both lists have to let a caller through.",
            ),
            field(
                "attestationPolicy.containers",
                Texts,
                Value("[]"),
                "Only these containers, by name: regular, init or ephemeral. Empty: all. A container that the kubelet has not told of \
                 yet waits for up to 30 s.",
            ),
            field(
                "attestationPolicy.uids",
                Integers(0, MAX_UID),
                Value("[]"),
                "Only these user ids, as the node sees them: with `hostUsers: false` they are not those of the container. Empty: all.",
            ),
            field("sockets", Section, Nothing, "Where workloads ask; at least one of the two is enabled."),
            field("sockets.shared", Section, Nothing, "The socket that every pod of the node may call."),
            field("sockets.shared.enabled", Boolean, Value("true"), "Whether there is one."),
            field("sockets.shared.path", Path, Value("/run/sds-agent/sds.sock"), "Where it is: a path of at most 100 bytes."),
            field(
                "sockets.shared.mode",
                Mode,
                Value("\"0666\""),
                "Its permission bits. Who may connect is not who is served: that is attestation's work.",
            ),
            field(
                "sockets.shared.acceptPidReuse",
                Boolean,
                Value("false"),
                "With `attestation: kubernetes`, the agent does not serve this socket where the kernel gives no handle on a caller \
                 (before Linux 6.5), unless this is `true`: a process that takes over the pid of a caller that has just ended is then \
                 served as that caller. See [security.md](security.md#the-shared-socket).",
            ),
            field(
                "sockets.perPod",
                Section,
                Nothing,
                "A socket for each pod: the agent is a CSI driver, and who calls is known by the mount. Needs `attestation: kubernetes`.",
            ),
            field("sockets.perPod.enabled", Boolean, Value("false"), "Whether pods can have them."),
            field(
                "sockets.perPod.directory",
                Path,
                Value("/run/sds-agent-pods"),
                "Where those sockets are. A directory of the host that outlives the agent, that only root can write, and that no pod \
                 mounts; never inside the directory of `sockets.shared.path`.",
            ),
            field(
                "sockets.perPod.driverName",
                Text,
                Value("csi.sds-agent.io"),
                "The driver that a pod's volume names; a CSIDriver object has the same name.",
            ),
            field(
                "sockets.perPod.kubeletDirectory",
                Path,
                Value("/var/lib/kubelet"),
                "The kubelet's directory, at the same path in the agent as on the host, its `pods` with `mountPropagation: \
                 Bidirectional`.",
            ),
            field(
                "sockets.perPod.waitForCertificate",
                Duration,
                Value("0s"),
                "How long a pod's start may wait until its certificate is there; at most `1m`. When it is not, the pod starts all the \
                 same.",
            ),
            field(
                "warmUp",
                Section,
                Nothing,
                "Certificates ahead of the first call, for pods that start and will call the shared socket. A pod whose containers have \
                 started when the agent first sees it is left alone: after a restart of the agent, clients say what they hold. It is \
                 held until the pod has called, or for 10 minutes; at most four are made at once that nobody has asked for. \
                 `warm_ups_total` tells how many were used. A volume of the CSI driver needs none of this: publishing it orders the \
                 certificate.",
            ),
            field(
                "warmUp.enabled",
                Boolean,
                Value("false"),
                "Whether there are any. Needs `attestation: kubernetes` and `sockets.shared`.",
            ),
            field(
                "warmUp.socketMount",
                Boolean,
                Value("true"),
                "Pods that mount the directory of `sockets.shared.path` by `hostPath`, or one above or below it. Who mounts `/` is not \
                 among them; `/var/run` is `/run`.",
            ),
            field(
                "warmUp.podLabels",
                Labels,
                Words("none"),
                "Pods that carry every one of these labels, with exactly this value, whatever they mount.",
            ),
        ],
    },
    Group {
        title: "What a certificate says",
        fields: &[
            field(
                "identity",
                Section,
                Nothing,
                "Templates. With `attestation: kubernetes` they may use `{trustDomain}`, `{namespace}`, `{serviceAccount}`, `{podName}` \
                 and `{podUid}`; with `unix`, `{trustDomain}` and `{uid}`.",
            ),
            field(
                "identity.spiffeId",
                Text,
                Words("`spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}`, or `spiffe://{trustDomain}/uid/{uid}` with `unix`"),
                "The certificate's URI name. It begins with `spiffe://` and the trust domain.",
            ),
            field(
                "identity.dnsNames",
                Texts,
                Value("[]"),
                "DNS names beside it, such as `\"{serviceAccount}.{namespace}.svc\"`. No wildcards.",
            ),
            field("certificate", Section, Nothing, "What is asked for, and when it is asked for again."),
            field(
                "certificate.lifetime",
                Duration,
                Value("24h"),
                "The lifetime to ask for, from `10s` to ten years. The issuer may give less; what it gives is believed.",
            ),
            field(
                "certificate.key",
                Choice(KEYS),
                Value("ecdsa-p256"),
                "The kind of key, of which each certificate has one of its own. Between Envoys, P-384 works only with \
                 `tls_maximum_protocol_version: TLSv1_3` on the upstream. Ed25519 is refused: Envoy does not take it.",
            ),
            field("certificate.renewAt", Fraction(0.1, 0.9), Value("0.5"), "The share of its life after which a certificate is replaced."),
            field(
                "certificate.jitter",
                Fraction(0.0, 0.3),
                Value("0.1"),
                "The spread around that moment, as a share of it. `renewAt × (1 + jitter)` is at most 0.95.",
            ),
            field(
                "certificate.perPod",
                Boolean,
                Value("false"),
                "One certificate for each pod, where otherwise the pods of a service account on a node share one.",
            ),
            field(
                "authorityEpoch",
                Integer(0, u64::MAX),
                Value("0"),
                "A whole number. Raising it makes every certificate foreign to the agent, which then issues all of them anew: the \
                 break-glass after a stolen key or authority.",
            ),
        ],
    },
    Group {
        title: "Who signs",
        fields: &[
            field("issuer", Section, Required, "The authority: exactly one of the two below."),
            field("issuer.certManager", Section, Nothing, "cert-manager, by CertificateRequests."),
            field("issuer.certManager.issuerRef", Section, Required, "Which issuer."),
            field("issuer.certManager.issuerRef.name", Text, Required, "Its name."),
            field(
                "issuer.certManager.issuerRef.kind",
                Text,
                Required,
                "`ClusterIssuer` or `Issuer`. There is no default, because cert-manager's own is `Issuer`: the name of a ClusterIssuer \
                 without its kind is a request that never ends. External issuers have kinds of their own.",
            ),
            field("issuer.certManager.issuerRef.group", Text, Value("cert-manager.io"), "The API group of an external issuer."),
            field(
                "issuer.certManager.namespace",
                Text,
                Words("`POD_NAMESPACE`, else `sds-agent`"),
                "Where the requests are created. An `Issuer` has to be in the same namespace. `workload` puts each request into the \
                 namespace of its pod.",
            ),
            field(
                "issuer.certManager.trustStatusCA",
                Boolean,
                Value("false"),
                "Take the CA certificate that cert-manager reports with a signed request as a source of the trust bundle. Only for \
                 issuers whose word on their own root is good enough; prefer `trust.sources`.",
            ),
            field(
                "issuer.embedded",
                Section,
                Nothing,
                "`{}`: an authority in the memory of this process, for development and tests only. No other node trusts it, and a \
                 restart replaces it.",
            ),
        ],
    },
    Group {
        title: "Several authorities, several kinds of certificates",
        fields: &[
            field("profiles", Sections, Value("[]"), "In order."),
            field(
                "profiles[].name",
                Text,
                Required,
                "A name of its own: at most 63 lower-case letters, digits and `-`; not `default`. It stands in metrics (`issuer`), in \
                 requests and in volumes.",
            ),
            field("profiles[].match", Section, Required, "Whose profile it is. All that it says has to hold; `{}` holds for every pod."),
            field(
                "profiles[].match.namespaces",
                Texts,
                Words("all"),
                "Any of them. A name, or a part of one with one `*` at its beginning or at its end: `payments`, `pay-*`, `*-canary`.",
            ),
            field("profiles[].match.serviceAccounts", Texts, Words("all"), "Any of them, written in the same way."),
            field("profiles[].match.podLabels", Labels, Words("none"), "Every one of them, with exactly this value: `{ tier: gold }`."),
            field("profiles[].selectable", Boolean, Value("false"), "Only pods that pick it get it."),
            field("profiles[].identity", Section, Nothing, "Where its names differ."),
            field("profiles[].identity.spiffeId", Text, Words("`identity.spiffeId`"), "As above, for this profile."),
            field("profiles[].identity.dnsNames", Texts, Words("`identity.dnsNames`"), "The whole list; `[]` for none."),
            field("profiles[].certificate", Section, Nothing, "Where its certificates differ."),
            field("profiles[].certificate.lifetime", Duration, Words("`certificate.lifetime`"), "As above, for this profile."),
            field("profiles[].certificate.key", Choice(KEYS), Words("`certificate.key`"), "As above, for this profile."),
            field("profiles[].certificate.renewAt", Fraction(0.1, 0.9), Words("`certificate.renewAt`"), "As above, for this profile."),
            field("profiles[].certificate.jitter", Fraction(0.0, 0.3), Words("`certificate.jitter`"), "As above, for this profile."),
            field("profiles[].certificate.perPod", Boolean, Words("`certificate.perPod`"), "As above, for this profile."),
            field(
                "profiles[].issuerRef",
                Section,
                Words("that of `issuer.certManager`"),
                "Who signs. A reference is taken whole: its kind and group are not those of another.",
            ),
            field("profiles[].issuerRef.name", Text, Required, "As in `issuer.certManager.issuerRef`."),
            field("profiles[].issuerRef.kind", Text, Required, "As in `issuer.certManager.issuerRef`."),
            field("profiles[].issuerRef.group", Text, Value("cert-manager.io"), "As in `issuer.certManager.issuerRef`."),
            field("profiles[].namespace", Text, Words("`issuer.certManager.namespace`"), "Where its requests are created; or `workload`."),
            field(
                "profiles[].trustStatusCA",
                Boolean,
                Words("`issuer.certManager.trustStatusCA`"),
                "As above, for the issuer of this profile.",
            ),
            field(
                "profiles[].authorityEpoch",
                Integer(0, u64::MAX),
                Value("0"),
                "Counts beside the global one: raising either issues the profile's certificates anew.",
            ),
        ],
    },
    Group {
        title: "Whom workloads trust",
        fields: &[
            field("trust", Section, Nothing, "Which roots workloads are given."),
            field(
                "trust.sources",
                Sections,
                Value("[]"),
                "Where the roots of the agent's own trust domain come from; the bundle is the union. A source that offers nothing usable \
                 changes nothing: the last good roots stay. With cert-manager, no source and no `trustStatusCA`, nobody gets a bundle. \
                 A source may hold revocation lists (`X509 CRL`) too, beside roots or alone, see security.md.",
            ),
            field("trust.sources[].configMap", Section, Nothing, "A ConfigMap, as trust-manager writes it."),
            field("trust.sources[].configMap.namespace", Text, Required, "Its namespace."),
            field("trust.sources[].configMap.name", Text, Required, "Its name."),
            field("trust.sources[].configMap.key", Text, Value("ca.crt"), "The key that holds the PEM."),
            field("trust.sources[].file", Path, Nothing, "Instead of a ConfigMap: the absolute path of a PEM file."),
            field(
                "trust.federated",
                Entries,
                Value("{}"),
                "Other trust domains by name, each with one source. The agent's own is not among them.",
            ),
            field("trust.federated.<name>.configMap", Section, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.configMap.namespace", Text, Required, "Its namespace."),
            field("trust.federated.<name>.configMap.name", Text, Required, "Its name."),
            field("trust.federated.<name>.configMap.key", Text, Value("ca.crt"), "The key that holds the PEM."),
            field("trust.federated.<name>.file", Path, Nothing, "As in `trust.sources`."),
            field("names", Section, Nothing, "The names under which clients ask, where they are not SPIFFE IDs."),
            field("names.certificate", Text, Value("default"), "The workload's own certificate."),
            field("names.bundle", Text, Value("ROOTCA"), "The bundle of the agent's trust domain."),
        ],
    },
    Group {
        title: "Who decides what is signed",
        fields: &[
            field("approver", Section, Nothing, "What the approver needs beside what it shares with the agents, which do not use it."),
            field(
                "approver.agents",
                Texts,
                Words("`[system:serviceaccount:<POD_NAMESPACE, else sds-agent>:sds-agent]`"),
                "The user names of the agents' service accounts. Requests of the configured issuers by anybody else are denied.",
            ),
            field(
                "approver.annotations",
                Texts,
                Value("[]"),
                "Annotations that a request may carry beside the agents' own, as keys, or parts of one with one `*` at an end: \
                 those that something in the cluster adds to every object. Any other is a denial, because issuers take orders from \
                 annotations. Never name what your issuer reads.",
            ),
            field(
                "approver.overlap",
                Duration,
                Value("10m"),
                "How long after a change of this file the former one counts, too, so that agents which have not got the new one are not \
                 denied; at most a day. A request that neither allows is left undecided for this time, and at most two minutes, because \
                 an agent's file may be the newer one. An agent or issuer that is taken out is out at once. `0s` takes everything back \
                 at once that the change takes back, and denies at once. See [security.md](security.md#changes-of-the-configuration).",
            ),
        ],
    },
    Group {
        title: "How the agent runs",
        fields: &[
            field("keys", Section, Nothing, "How keys are kept."),
            field(
                "keys.lockMemory",
                Choice(&["auto", "always", "never"]),
                Value("auto"),
                "Keep keys out of swap. `auto`: where the process may lock without a limit and there is swap. `always`: or do not start. \
                 `never`: not at all.",
            ),
            field("limits", Section, Nothing, "What one agent takes on."),
            field(
                "limits.connections",
                Integer(1, 1_000_000),
                Value("16384"),
                "Connections in all. The last eighth is kept for pods that hold fewer than four, so that no pod takes every place.",
            ),
            field(
                "limits.connectionsPerPod",
                Integer(1, 1_000_000),
                Value("256"),
                "Connections of one pod. Who is in no pod counts by user id, here and below.",
            ),
            field(
                "limits.newConnectionsPerSecondPerPod",
                Integer(1, 1_000_000),
                Value("50"),
                "How often one pod may connect, in the long run. What comes too often is closed at once.",
            ),
            field("limits.newConnectionsBurstPerPod", Integer(1, 1_000_000), Value("200"), "How often at once."),
            field(
                "limits.streams",
                Integer(1, 10_000_000),
                Value("65536"),
                "Streams and other calls at once in all, with the same reserve.",
            ),
            field(
                "limits.streamsPerPod",
                Integer(1, 10_000_000),
                Value("1024"),
                "Streams and other calls at once of one pod; one more is `RESOURCE_EXHAUSTED`.",
            ),
            field("limits.streamsPerConnection", Integer(1, 10_000), Value("100"), "Calls at once on one connection."),
            field(
                "limits.messageBytes",
                Integer(65_536, 16_777_216),
                Value("524288"),
                "Bytes in one request. An Envoy's first is 61 KB, so at least 65536.",
            ),
            field("limits.namesPerStream", Integer(1, 10_000), Value("64"), "Names on one stream."),
            field(
                "limits.idle",
                Duration,
                Value("1h"),
                "A connection without a call in progress is closed after this time; from `10s` to 30 days.",
            ),
            field(
                "kubernetes",
                Section,
                Nothing,
                "How fast the agent asks the Kubernetes API, for whatever: creating and deleting requests, reading, watching. A \
                 certificate costs two requests.",
            ),
            field(
                "kubernetes.requestsPerSecond",
                Integer(1, 10_000),
                Value("20"),
                "In the long run. What comes faster waits, new certificates first; `kube_request_wait_seconds` counts \
                 it. Whatever is set here, a server that answers 429 or 503 with `Retry-After` is left alone for that time, and at most \
                 5 to 7½ minutes.",
            ),
            field("kubernetes.burst", Integer(1, 10_000), Value("40"), "How many at once."),
            field(
                "events",
                Boolean,
                Value("true"),
                "Tell pods of trouble with their certificates, and that they may have none, by Kubernetes Events: one Warning when it \
                 begins, one Normal when it is over, never one for each try; at most 30 a minute in all. Needs the verb `create` on `events` of `events.k8s.io` in the \
                 pods' namespaces; without it nothing else changes.",
            ),
            field(
                "retention",
                Duration,
                Value("5m"),
                "How long a certificate is kept after its last subscriber has gone; at most a day. An Envoy takes up to 30 s to come \
                 back. When no pod of the node has the identity any more, its key goes at once.",
            ),
            field(
                "reissueOver",
                Duration,
                Value("10m"),
                "The time over which certificates are issued anew that a change of this file makes foreign, each at a moment drawn \
                 within it, and none later than its own renewal; at most seven days.",
            ),
            field("drain", Duration, Value("10s"), "How long open streams may take to end at shutdown; at most `10m`."),
            field("admin", Section, Nothing, "What is for the node's operator alone."),
            field("admin.address", Address, Value("127.0.0.1:15090"), "What the agent holds, the log level, reissuing. Loopback only."),
            field("metrics", Section, Nothing, "What is for Prometheus and the kubelet."),
            field(
                "metrics.address",
                Address,
                Value("\"[::]:15091\""),
                "Metrics and probes: kubelet and Prometheus come by the pod's address. `[::]` is every address, of IPv6 and of IPv4, and \
                 of IPv4 alone on a node without IPv6; `0.0.0.0` is IPv4 alone.",
            ),
            field(
                "metrics.perWorkload",
                Boolean,
                Value("false"),
                "Two more series for each service account that uses a certificate on the node: when it ends, and when it is to be \
                 renewed. They go with its last stream. Without it no series carries the name of a workload. [metrics.md](metrics.md) \
                 describes all.",
            ),
            field("workerThreads", Integer(1, 512), Value("2"), "Threads that serve."),
        ],
    },
];
