//! The entries of the table, in the order of the page.

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
        title: "Callers and sockets",
        fields: &[
            field("trustDomain", Text, Value("cluster.local"), "The SPIFFE trust domain of every identity that the agent serves."),
            field(
                "attestation",
                Choice(&["kubernetes", "unix"]),
                Value("kubernetes"),
                "How the agent identifies a caller. `kubernetes`: by its process, cgroup, pod and service account; needs `NODE_NAME`. \
                 `unix`: by its user id, for development and for machines without Kubernetes; `sds-agent approver` denies the requests \
                 of such an agent.",
            ),
            field(
                "attestationPolicy",
                Section,
                Nothing,
                "Which processes of a pod may fetch on the shared socket, with `attestation: kubernetes`. A caller must pass both \
                 lists.",
            ),
            field(
                "attestationPolicy.containers",
                Texts,
                Value("[]"),
                "Names of the containers that may fetch: regular, init or ephemeral ones. Empty: all containers. A call from a \
                 container that the kubelet has not yet reported waits for up to 30 s.",
            ),
            field(
                "attestationPolicy.uids",
                Integers(0, MAX_UID),
                Value("[]"),
                "User ids that may fetch, as the node sees them: with `hostUsers: false` they differ from those in the container. \
                 Empty: all user ids.",
            ),
            field("sockets", Section, Nothing, "The sockets that workloads call. At least one of the two is enabled."),
            field("sockets.shared", Section, Nothing, "The socket that every pod of the node may call."),
            field("sockets.shared.enabled", Boolean, Value("true"), "Whether the agent serves the shared socket."),
            field("sockets.shared.path", Path, Value("/run/sds-agent/sds.sock"), "Path of the socket, at most 100 bytes."),
            field(
                "sockets.shared.mode",
                Mode,
                Value("\"0666\""),
                "Permission bits of the socket. They control which processes can connect; attestation decides which callers are served.",
            ),
            field(
                "sockets.shared.acceptPidReuse",
                Boolean,
                Value("false"),
                "With `attestation: kubernetes`, the agent serves the shared socket only if the kernel gives a pidfd of the caller \
                 (Linux 6.5 or newer). `true` serves it on an older kernel too: a process that takes over the pid of a caller that has \
                 just ended is then served as that caller. See [security.md](security.md#the-shared-socket).",
            ),
            field(
                "sockets.perPod",
                Section,
                Nothing,
                "A socket for each pod: the agent is a CSI driver and identifies a caller by the mount. Needs `attestation: \
                 kubernetes`.",
            ),
            field("sockets.perPod.enabled", Boolean, Value("false"), "Whether pods can have their own sockets."),
            field(
                "sockets.perPod.directory",
                Path,
                Value("/run/sds-agent-pods"),
                "Directory of these sockets on the host. It must outlive the agent, only root may write to it, and no pod may mount it. \
                 It must not be inside the directory of `sockets.shared.path`.",
            ),
            field(
                "sockets.perPod.driverName",
                Text,
                Value("csi.sds-agent.io"),
                "Name of the CSI driver, which a pod's volume refers to. A CSIDriver object must have the same name.",
            ),
            field(
                "sockets.perPod.kubeletDirectory",
                Path,
                Value("/var/lib/kubelet"),
                "Directory of the kubelet. The agent must mount it at the same path as on the host, and its subdirectory `pods` with \
                 `mountPropagation: Bidirectional`.",
            ),
            field(
                "sockets.perPod.waitForCertificate",
                Duration,
                Value("0s"),
                "How long the start of a pod may wait for its certificate; at most `1m`. If the certificate is not issued by then, the \
                 pod starts without it.",
            ),
            field(
                "warmUp",
                Section,
                Nothing,
                "Orders certificates before the first call, for starting pods that will call the shared socket. The agent skips pods \
                 that already run, because their clients hold certificates and report them. A certificate is kept until the pod has \
                 called, or for 10 minutes. At most four orders without a waiting client run at the same time. \
                 `sds_agent_warm_ups_total` counts how many were used. A volume of the CSI driver does not need this: publishing it \
                 orders the certificate.",
            ),
            field(
                "warmUp.enabled",
                Boolean,
                Value("false"),
                "Whether the agent orders certificates before the first call. Needs `attestation: kubernetes` and `sockets.shared`.",
            ),
            field(
                "warmUp.socketMount",
                Boolean,
                Value("true"),
                "Selects pods that mount the directory of `sockets.shared.path` by `hostPath`, or a directory above or below it. A \
                 mount of `/` does not count; `/var/run` is the same as `/run`.",
            ),
            field(
                "warmUp.podLabels",
                Labels,
                Words("none"),
                "Selects pods that carry every one of these labels with exactly this value, regardless of their mounts.",
            ),
        ],
    },
    Group {
        title: "Certificates",
        fields: &[
            field(
                "identity",
                Section,
                Nothing,
                "Templates of the names in a certificate. With `attestation: kubernetes` they may use `{trustDomain}`, `{namespace}`, \
                 `{serviceAccount}`, `{podName}` and `{podUid}`; with `unix`, `{trustDomain}` and `{uid}`.",
            ),
            field(
                "identity.spiffeId",
                Text,
                Words("`spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}`, or `spiffe://{trustDomain}/uid/{uid}` with `unix`"),
                "SPIFFE ID, the URI name of the certificate. It begins with `spiffe://` and the trust domain. A template that could give two \
                 workloads one name, such as `{namespace}-{serviceAccount}`, is an error: separate placeholders with `/` or `_`.",
            ),
            field(
                "identity.dnsNames",
                Texts,
                Value("[]"),
                "DNS names of the certificate, such as `\"{serviceAccount}.{namespace}.svc\"`. Wildcards and names that two workloads could share \
                 are not allowed.",
            ),
            field("certificate", Section, Nothing, "Properties of a certificate, and the time of its renewal."),
            field(
                "certificate.lifetime",
                Duration,
                Value("24h"),
                "The requested lifetime, from `10s` to ten years. The issuer may shorten it; the agent uses the validity of the issued \
                 certificate.",
            ),
            field(
                "certificate.key",
                Choice(KEYS),
                Value("ecdsa-p256"),
                "Type of the key. Each certificate has its own key. Between Envoys, P-384 works only with \
                 `tls_maximum_protocol_version: TLSv1_3` in the client Envoy's `UpstreamTlsContext`. Ed25519 is rejected, because Envoy does not accept it.",
            ),
            field(
                "certificate.renewAt",
                Fraction(0.1, 0.9),
                Value("0.5"),
                "The share of its lifetime after which a certificate is replaced.",
            ),
            field(
                "certificate.jitter",
                Fraction(0.0, 0.3),
                Value("0.1"),
                "Random spread around that time, as a share of it. `renewAt × (1 + jitter)` is at most 0.95.",
            ),
            field(
                "certificate.perPod",
                Boolean,
                Value("false"),
                "`true`: each pod has its own certificate. `false`: the pods of a service account on a node share one.",
            ),
            field(
                "authorityEpoch",
                Integer(0, u64::MAX),
                Value("0"),
                "Raising it makes every certificate outdated, and the agent replaces all of them: the emergency measure after a key or \
                 an authority was compromised.",
            ),
        ],
    },
    Group {
        title: "Issuer",
        fields: &[
            field("issuer", Section, Required, "The certificate authority: exactly one of the two sections below."),
            field("issuer.certManager", Section, Nothing, "cert-manager, through CertificateRequests."),
            field("issuer.certManager.issuerRef", Section, Required, "Reference to the issuer."),
            field("issuer.certManager.issuerRef.name", Text, Required, "Its name."),
            field(
                "issuer.certManager.issuerRef.kind",
                Text,
                Required,
                "`ClusterIssuer` or `Issuer`. It has no default, because cert-manager's default is `Issuer`: a request that names a \
                 ClusterIssuer without its kind is never signed. External issuers have their own kinds.",
            ),
            field("issuer.certManager.issuerRef.group", Text, Value("cert-manager.io"), "The API group of an external issuer."),
            field(
                "issuer.certManager.namespace",
                Text,
                Words("`POD_NAMESPACE`, else `sds-agent`"),
                "Namespace of the requests. An `Issuer` must be in the same namespace. `workload` creates each request in the namespace \
                 of its pod.",
            ),
            field(
                "issuer.certManager.trustStatusCA",
                Boolean,
                Value("false"),
                "Adds the CA certificate that cert-manager reports with a signed request to the trust bundle, if the signed chain leads to \
                 it. A root is dropped when it was not reported for the lifetime of a certificate. Use it only for issuers that you \
                 trust to report their own root; prefer `trust.sources`.",
            ),
            field(
                "issuer.embedded",
                Section,
                Nothing,
                "`{}`: a certificate authority in the memory of this process, for development and tests only. No other node trusts it, \
                 and a restart replaces it.",
            ),
        ],
    },
    Group {
        title: "Several authorities, several kinds of certificates",
        fields: &[
            field("profiles", Sections, Value("[]"), "Profiles in order: the first that matches a pod applies."),
            field(
                "profiles[].name",
                Text,
                Required,
                "Unique name: at most 63 lower-case letters, digits and `-`; not `default`. Metrics (label `issuer`), requests and \
                 volumes use it.",
            ),
            field(
                "profiles[].match",
                Section,
                Required,
                "The pods that get this profile. All conditions must hold; `{}` matches every pod.",
            ),
            field(
                "profiles[].match.namespaces",
                Texts,
                Words("all"),
                "Any of these namespaces. An entry is a name, or a part of one with one `*` at its beginning or at its end: `payments`, \
                 `pay-*`, `*-canary`.",
            ),
            field("profiles[].match.serviceAccounts", Texts, Words("all"), "Any of these service accounts, written in the same way."),
            field(
                "profiles[].match.podLabels",
                Labels,
                Words("none"),
                "Every one of these labels, with exactly this value: `{ tier: gold }`.",
            ),
            field("profiles[].selectable", Boolean, Value("false"), "`true`: only pods that select this profile get it."),
            field("profiles[].identity", Section, Nothing, "The fields that differ from `identity`."),
            field("profiles[].identity.spiffeId", Text, Words("`identity.spiffeId`"), "As above, for this profile."),
            field("profiles[].identity.dnsNames", Texts, Words("`identity.dnsNames`"), "Replaces the whole list; `[]` means no DNS names."),
            field("profiles[].certificate", Section, Nothing, "The fields that differ from `certificate`."),
            field("profiles[].certificate.lifetime", Duration, Words("`certificate.lifetime`"), "As above, for this profile."),
            field("profiles[].certificate.key", Choice(KEYS), Words("`certificate.key`"), "As above, for this profile."),
            field("profiles[].certificate.renewAt", Fraction(0.1, 0.9), Words("`certificate.renewAt`"), "As above, for this profile."),
            field("profiles[].certificate.jitter", Fraction(0.0, 0.3), Words("`certificate.jitter`"), "As above, for this profile."),
            field("profiles[].certificate.perPod", Boolean, Words("`certificate.perPod`"), "As above, for this profile."),
            field(
                "profiles[].issuerRef",
                Section,
                Words("that of `issuer.certManager`"),
                "Reference to the issuer. It replaces the whole reference: kind and group are not inherited.",
            ),
            field("profiles[].issuerRef.name", Text, Required, "As in `issuer.certManager.issuerRef`."),
            field("profiles[].issuerRef.kind", Text, Required, "As in `issuer.certManager.issuerRef`."),
            field("profiles[].issuerRef.group", Text, Value("cert-manager.io"), "As in `issuer.certManager.issuerRef`."),
            field(
                "profiles[].namespace",
                Text,
                Words("`issuer.certManager.namespace`"),
                "Namespace of the requests of this profile, or `workload`.",
            ),
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
                "Added to the global `authorityEpoch`: raising either of them replaces the certificates of this profile.",
            ),
        ],
    },
    Group {
        title: "Trust bundles",
        fields: &[
            field("trust", Section, Nothing, "The roots that workloads receive."),
            field(
                "trust.sources",
                Sections,
                Value("[]"),
                "Sources of the roots of the agent's own trust domain; the bundle is their union. If a source has no usable roots, its \
                 last good roots stay in use. With cert-manager, no source and no `trustStatusCA`, clients receive no bundle. A source \
                 may also hold revocation lists (`X509 CRL`), with or without roots; see security.md.",
            ),
            field("trust.sources[].configMap", Section, Nothing, "A ConfigMap, as trust-manager writes it."),
            field("trust.sources[].configMap.namespace", Text, Required, "Its namespace."),
            field("trust.sources[].configMap.name", Text, Required, "Its name."),
            field("trust.sources[].configMap.key", Text, Value("ca.crt"), "The key that holds the PEM."),
            field(
                "trust.sources[].clusterTrustBundle",
                Section,
                Nothing,
                "ClusterTrustBundles (`certificates.k8s.io`), instead of a ConfigMap: one by `name`, or all of a `signerName` that \
                 `labelSelector` selects. The agent uses `v1`, `v1beta1` or `v1alpha1`, the newest that the API server serves. Kubernetes \
                 serves `v1` from 1.37 on. Older versions need the feature gate `ClusterTrustBundle` and the `--runtime-config` \
                 `certificates.k8s.io/v1beta1/clustertrustbundles=true`. If no object is selected, the last good roots stay in use.",
            ),
            field(
                "trust.sources[].clusterTrustBundle.name",
                Text,
                Nothing,
                "Its name. An object of a signer is named `<domain>:<path>:<suffix>`, as in `example.com:mesh:roots`.",
            ),
            field(
                "trust.sources[].clusterTrustBundle.signerName",
                Text,
                Nothing,
                "The signer, such as `example.com/mesh`. The roots are the union of the selected objects, in the order of their names.",
            ),
            field(
                "trust.sources[].clusterTrustBundle.labelSelector",
                Section,
                Nothing,
                "Which objects of the signer are used, as in other objects of Kubernetes. Required with `signerName`; `{}` selects all.",
            ),
            field("trust.sources[].clusterTrustBundle.labelSelector.matchLabels", Labels, Nothing, "Labels that an object must have."),
            field(
                "trust.sources[].clusterTrustBundle.labelSelector.matchExpressions",
                Sections,
                Nothing,
                "Conditions that the labels of an object must meet.",
            ),
            field("trust.sources[].clusterTrustBundle.labelSelector.matchExpressions[].key", Text, Required, "The key of a label."),
            field(
                "trust.sources[].clusterTrustBundle.labelSelector.matchExpressions[].operator",
                Choice(&["In", "NotIn", "Exists", "DoesNotExist"]),
                Required,
                "How the label is compared.",
            ),
            field(
                "trust.sources[].clusterTrustBundle.labelSelector.matchExpressions[].values",
                Texts,
                Nothing,
                "The values for `In` and `NotIn`.",
            ),
            field("trust.sources[].file", Path, Nothing, "Absolute path of a PEM file, instead of a ConfigMap."),
            field(
                "trust.sources[].inline",
                Text,
                Nothing,
                "The PEM itself, as a block of YAML, instead of a ConfigMap. It must not have a private key. The label `source` of the \
                 metrics has the place of the source, such as `inline trust.sources[0]`.",
            ),
            field(
                "trust.federated",
                Entries,
                Value("{}"),
                "Other trust domains by name, each with one source. The agent's own trust domain is not allowed here.",
            ),
            field("trust.federated.<name>.configMap", Section, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.configMap.namespace", Text, Required, "Its namespace."),
            field("trust.federated.<name>.configMap.name", Text, Required, "Its name."),
            field("trust.federated.<name>.configMap.key", Text, Value("ca.crt"), "The key that holds the PEM."),
            field("trust.federated.<name>.clusterTrustBundle", Section, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.clusterTrustBundle.name", Text, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.clusterTrustBundle.signerName", Text, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.clusterTrustBundle.labelSelector", Section, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.clusterTrustBundle.labelSelector.matchLabels", Labels, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.clusterTrustBundle.labelSelector.matchExpressions", Sections, Nothing, "As in `trust.sources`."),
            field(
                "trust.federated.<name>.clusterTrustBundle.labelSelector.matchExpressions[].key",
                Text,
                Required,
                "As in `trust.sources`.",
            ),
            field(
                "trust.federated.<name>.clusterTrustBundle.labelSelector.matchExpressions[].operator",
                Choice(&["In", "NotIn", "Exists", "DoesNotExist"]),
                Required,
                "As in `trust.sources`.",
            ),
            field(
                "trust.federated.<name>.clusterTrustBundle.labelSelector.matchExpressions[].values",
                Texts,
                Nothing,
                "As in `trust.sources`.",
            ),
            field("trust.federated.<name>.file", Path, Nothing, "As in `trust.sources`."),
            field("trust.federated.<name>.inline", Text, Nothing, "As in `trust.sources`."),
            field("names", Section, Nothing, "Resource names that clients can use instead of SPIFFE IDs."),
            field("names.certificate", Text, Value("default"), "Name of the workload's own certificate."),
            field("names.bundle", Text, Value("ROOTCA"), "Name of the bundle of the agent's trust domain."),
        ],
    },
    Group {
        title: "Approver",
        fields: &[
            field(
                "approver",
                Section,
                Nothing,
                "Settings that only the approver uses. It also reads the sections that it shares with the agents.",
            ),
            field(
                "approver.agents",
                Texts,
                Words("`[system:serviceaccount:<POD_NAMESPACE, else sds-agent>:sds-agent]`"),
                "User names of the agents' service accounts. The approver denies requests for the configured issuers from any other \
                 account.",
            ),
            field(
                "approver.annotations",
                Texts,
                Value("[]"),
                "Annotations that a request may carry beside the agents' own: keys, or parts of a key with one `*` at an end. List the \
                 annotations that components of the cluster add to every object. A request with any other annotation is denied, because \
                 issuers read instructions from annotations. Never list an annotation that your issuer reads.",
            ),
            field(
                "approver.overlap",
                Duration,
                Value("10m"),
                "How long the previous configuration still applies after a change of this file, so that agents without the new file are \
                 not denied; at most a day. A request that neither configuration allows stays undecided for this time, at most two \
                 minutes, because the agent may have a newer file. A removed agent is denied at once, and requests for a removed issuer \
                 are no longer approved. `0s` applies every restriction at once, and denies at once. See \
                 [security.md](security.md#changes-of-the-configuration).",
            ),
        ],
    },
    Group {
        title: "How the agent runs",
        fields: &[
            field("keys", Section, Nothing, "How the agent keeps keys in memory."),
            field(
                "keys.lockMemory",
                Choice(&["auto", "always", "never"]),
                Value("auto"),
                "Keeps keys out of swap. `auto`: lock memory if the process may lock without a limit and the node has swap. `always`: \
                 do not start if memory cannot be locked. `never`: do not lock.",
            ),
            field(
                "confinement",
                Choice(&["auto", "always", "never"]),
                Value("auto"),
                "Confines the agent to the files, TCP ports and system calls that it needs, by Landlock and seccomp. `auto`: as far as the \
                 kernel supports them. `always`: do not start if one of them is not in force. `never`: do not confine. With a kubeconfig, \
                 every file can be read, and programs can start. [security.md](security.md#confinement) has the details.",
            ),
            field("limits", Section, Nothing, "Limits of one agent."),
            field(
                "limits.connections",
                Integer(1, 1_000_000),
                Value("16384"),
                "Open connections in total. The last eighth is reserved for pods with fewer than four connections, so that no pod can \
                 take all of them.",
            ),
            field(
                "limits.connectionsPerPod",
                Integer(1, 1_000_000),
                Value("256"),
                "Open connections of one pod. All callers outside of pods count as one pod, here and below.",
            ),
            field(
                "limits.newConnectionsPerSecondPerPod",
                Integer(1, 1_000_000),
                Value("50"),
                "New connections of one pod per second, on average. The agent closes a connection above this rate at once.",
            ),
            field("limits.newConnectionsBurstPerPod", Integer(1, 1_000_000), Value("200"), "New connections of one pod in a burst."),
            field(
                "limits.streams",
                Integer(1, 10_000_000),
                Value("65536"),
                "Concurrent streams and other calls in total, with the same reserve.",
            ),
            field(
                "limits.streamsPerPod",
                Integer(1, 10_000_000),
                Value("1024"),
                "Concurrent streams and other calls of one pod. The next call returns `RESOURCE_EXHAUSTED`.",
            ),
            field("limits.streamsPerConnection", Integer(1, 10_000), Value("100"), "Concurrent calls on one connection."),
            field(
                "limits.messageBytes",
                Integer(65_536, 16_777_216),
                Value("524288"),
                "Bytes of one request. The first request of an Envoy has 61 KB, so the minimum is 65536.",
            ),
            field("limits.namesPerStream", Integer(1, 10_000), Value("64"), "Resource names on one stream."),
            field(
                "limits.memoryBytes",
                Integer(8_388_608, 1_099_511_627_776),
                Value("738197504"),
                "Bytes that all callers together can make the agent hold. Each connection reserves 44 KiB and each call 10 KiB, which is what \
                 the HTTP/2 implementation can hold for them at most. Requests count as they arrive. The last eighth is reserved for pods that \
                 hold little. The memory limit of the container has to be at least a third larger.",
            ),
            field(
                "limits.memoryBytesPerPod",
                Integer(1_048_576, 1_099_511_627_776),
                Value("33554432"),
                "Bytes that one pod can make the agent hold. The next connection is closed, and the next call returns `RESOURCE_EXHAUSTED`.",
            ),
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
                "Rate limit for all requests of the agent to the Kubernetes API: creates, deletes, reads and watches. A certificate \
                 costs two of them.",
            ),
            field(
                "kubernetes.requestsPerSecond",
                Integer(1, 10_000),
                Value("20"),
                "Requests per second, on average. Requests above this rate wait, and those for new certificates go first; \
                 `sds_agent_kube_request_wait_seconds` measures the wait. If the server answers 429 or 503 with `Retry-After`, the agent \
                 always waits for that time, at most 5 to 7½ minutes.",
            ),
            field("kubernetes.burst", Integer(1, 10_000), Value("40"), "Requests in a burst."),
            field(
                "events",
                Boolean,
                Value("true"),
                "Writes Kubernetes Events about problems with the certificates of a pod, and about pods that may not have one. Each \
                 problem has one Warning when it begins and one Normal when it ends, not one for each retry; at most 30 Events a minute \
                 in total. Needs the verb `create` on `events` of `events.k8s.io` in the pods' namespaces; without it only the Events \
                 are missing.",
            ),
            field(
                "retention",
                Duration,
                Value("5m"),
                "How long a certificate is kept after its last stream has ended, or after the last call of a client that fetches; at \
                 most a day. An Envoy reconnects within 30 s. A certificate that is fetched within this time is renewed when it is \
                 due. When no pod of the node has the identity any longer, its key is removed at once.",
            ),
            field(
                "reissueOver",
                Duration,
                Value("10m"),
                "The time over which the agent replaces certificates that a change of this file makes outdated; at most seven days. \
                 Each is replaced at a random time within it, and not later than its own renewal.",
            ),
            field("drain", Duration, Value("10s"), "How long open streams may take to end at shutdown; at most `10m`."),
            field("admin", Section, Nothing, "The interface for the operator of the node."),
            field(
                "admin.address",
                Address,
                Value("127.0.0.1:15090"),
                "Address for the inventory of certificates, the log level and reissuing. Loopback only. A request that changes something \
                 needs the header `Sds-Agent-Admin: 1`.",
            ),
            field("metrics", Section, Nothing, "The interface for Prometheus."),
            field(
                "metrics.address",
                Address,
                Value("\"[::]:15091\""),
                "Address for metrics, which Prometheus reaches at the address of the pod. It serves the probes too. `[::]` listens on \
                 every IPv6 and IPv4 address, and on IPv4 alone on a node without IPv6; `0.0.0.0` listens on IPv4 alone.",
            ),
            field(
                "metrics.perWorkload",
                Boolean,
                Value("false"),
                "Adds two series for each service account that uses a certificate on the node: when the certificate expires, and when \
                 it will be renewed. They end with the last stream of the account. Without it, no series carries the name of a \
                 workload. [metrics.md](metrics.md) describes all series.",
            ),
            field("probes", Section, Nothing, "The interface for the kubelet."),
            field(
                "probes.address",
                Address,
                Value("\"[::]:15092\""),
                "Address for `/livez` and `/readyz` alone, so that clients of the metrics cannot occupy it. `[::]` and `0.0.0.0` mean the \
                 same as in `metrics.address`.",
            ),
            field(
                "mountHelper",
                Section,
                Nothing,
                "The mount helper (`sds-agent mount-helper`), which shares the network of the agent's pod.",
            ),
            field(
                "mountHelper.metricsAddress",
                Address,
                Value("\"[::]:15093\""),
                "Address for the metrics of the mount helper. `[::]` and `0.0.0.0` mean the same as in `metrics.address`.",
            ),
            field("mountHelper.probesAddress", Address, Value("\"[::]:15094\""), "Address for `/livez` and `/readyz` of the mount helper."),
            field("workerThreads", Integer(1, 512), Value("2"), "Threads that serve requests."),
        ],
    },
];
