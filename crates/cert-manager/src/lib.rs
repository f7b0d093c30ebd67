//! cert-manager's CertificateRequest, as the agent writes it and the approver reads it.
//!
//! The crate owns the wire format, the labels, annotations and denial reasons, the names of requests, the parser of CSRs, and the reading
//! of a status. It does no I/O and reads no clock. Each field that another program may write is optional, so that a malformed object does
//! not break a watch.

use std::{collections::BTreeMap, fmt};

use agent_kube::object::{Kind, Observed};
use base64::{Engine, engine::general_purpose::STANDARD};
use kube::CustomResource;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{IgnoredAny, MapAccess, Visitor},
    ser::SerializeMap,
};

pub mod csr;
pub mod naming;
pub mod verdict;

/// API group of cert-manager.
pub const GROUP: &str = "cert-manager.io";
/// Plural name of the resource.
pub const PLURAL: &str = "certificaterequests";
/// Requests in one page of a list. An agent's request has less than 4 KiB. Pages of larger requests shrink
/// ([`agent_kube::pages`]).
pub const REQUESTS_PER_PAGE: u32 = 100;
/// Maximum length of a CSR that is kept: 64 Ki characters of base64. The largest CSR of an agent, with an RSA key, has about 2,000.
const MAX_CSR_CHARACTERS: usize = 64 << 10;

/// Reference to an issuer, as configured.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IssuerRef {
    /// Name of the issuer.
    pub name: String,
    /// Kind of the issuer: `Issuer`, `ClusterIssuer` or an external kind.
    pub kind: String,
    /// API group of the kind.
    pub group: String,
}

/// Namespace in which CertificateRequests are created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestNamespace {
    /// One namespace. Default: the namespace of the agents.
    Fixed(String),
    /// `workload`: the namespace of the pod that needs the certificate.
    Workload,
}

/// Keys of the labels and annotations of a request. They carry evidence and inform operators. They authorise nothing.
pub mod keys {
    /// Common prefix of all keys.
    pub const PREFIX: &str = "sds-agent.io/";
    /// Label: the node of the requesting agent, see [`node_label`](super::naming::node_label). Agents of the previous version select by it.
    pub const NODE: &str = "sds-agent.io/node";
    /// Label: the UID of the node of the requesting agent. The agent's watch selects by it. Absent if the agent's token names no node.
    pub const NODE_UID: &str = "sds-agent.io/node-uid";
    /// Label: the UID of the agent's pod. An agent outside of a pod has [`PROCESS_PREFIX`](super::naming::PROCESS_PREFIX) and its instance.
    pub const AGENT: &str = "sds-agent.io/agent-uid";
    /// Label: the agent process that holds the key. A restarted container keeps the UID of its pod, but loses the keys.
    pub const INSTANCE: &str = "sds-agent.io/instance";
    /// Annotation: the full name of the node, which may be too long for a label.
    pub const NODE_NAME: &str = "sds-agent.io/node-name";
    /// Annotation: `namespace/name` of the agent's pod.
    pub const AGENT_POD: &str = "sds-agent.io/agent-pod";
    /// Annotation: namespace of the evidence pod, in whose name the agent requests the certificate.
    pub const POD_NAMESPACE: &str = "sds-agent.io/pod-namespace";
    /// Annotation: name of the evidence pod.
    pub const POD_NAME: &str = "sds-agent.io/pod-name";
    /// Annotation: UID of the evidence pod.
    pub const POD_UID: &str = "sds-agent.io/pod-uid";
    /// Annotation: name of the profile by which the agent requests. The approver derives the profile again.
    pub const PROFILE: &str = "sds-agent.io/profile";
    /// Annotation: the SPIFFE ID, for operators. The SPIFFE ID in the CSR is the authoritative one.
    pub const SPIFFE_ID: &str = "sds-agent.io/spiffe-id";
}

/// Claims in `spec.extra`. The API server takes them from a pod-bound token, and cert-manager's webhook copies them into the request.
pub mod claims {
    /// Name of the node of the requester's pod.
    pub const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
    /// UID of that node.
    pub const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
    /// Name of the requester's pod.
    pub const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
    /// UID of that pod.
    pub const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
}

/// Usages of each certificate that an agent requests: both sides of mutual TLS. cert-manager keeps the order.
pub const USAGES: [&str; 4] = ["digital signature", "key encipherment", "server auth", "client auth"];

/// Reason of the condition `Approved`, and reporter of the approver's Events.
pub const APPROVER: &str = "approver.sds-agent.io";

/// Reasons of denials, as in the condition `Denied`. The agent chooses the time of its retry by them.
pub mod denied {
    /// The evidence pod no longer exists. The agent retries at once in the name of another pod of the identity, if there is one.
    pub const POD_GONE: &str = "PodGone";
    /// The pod may have a certificate, but not this one: agent and approver use different configurations, during a rollout or by mistake.
    pub const PROFILE_MISMATCH: &str = "ProfileMismatch";
    /// The SPIFFE ID is not the pod's: an attack, or different configurations of agent and approver.
    pub const WRONG_IDENTITY: &str = "WrongIdentity";
    /// The requester is not an agent, and the issuer is reserved for agents.
    pub const NOT_THE_AGENT: &str = "NotTheAgent";
    /// The requester's token names no node, or another node than the pod's.
    pub const WRONG_NODE: &str = "WrongNode";
    /// The request names no pod.
    pub const NO_EVIDENCE: &str = "NoEvidence";
    /// The pod has no service account. Static pods have none.
    pub const NO_SERVICE_ACCOUNT: &str = "NoServiceAccount";
    /// The CSR requests more than names, or is malformed.
    pub const INVALID_CSR: &str = "InvalidCsr";
    /// The usages or `isCA` of the request are not those of an agent.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// The request has annotations that no agent sets. An issuer may obey them.
    pub const INVALID_ANNOTATION: &str = "InvalidAnnotation";
    /// The node has too many undecided requests, and this one is among the last that arrived. The agent retries with its backoff.
    pub const TOO_MANY_REQUESTS: &str = "TooManyRequests";
    /// The operator denies this node: `deniedNodes` of the ConfigMap.
    pub const NODE_DENIED: &str = "NodeDenied";

    /// All reasons.
    pub const ALL: [&str; 12] = [
        POD_GONE,
        PROFILE_MISMATCH,
        WRONG_IDENTITY,
        NOT_THE_AGENT,
        WRONG_NODE,
        NO_EVIDENCE,
        NO_SERVICE_ACCOUNT,
        INVALID_CSR,
        INVALID_SPEC,
        INVALID_ANNOTATION,
        TOO_MANY_REQUESTS,
        NODE_DENIED,
    ];
}

/// `spec` of a request.
///
/// cert-manager's webhook sets `username`, `uid`, `groups` and `extra`, and replaces values of the creator
/// (cert-manager/cert-manager#3630). It rejects later changes of the spec, except in namespaces with
/// `cert-manager.io/disable-validation`. The policy of `daemonset/approver` rejects them in every namespace.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[kube(group = "cert-manager.io", version = "v1", kind = "CertificateRequest", plural = "certificaterequests", namespaced)]
#[kube(status = "Status", schema = "disabled", derive = "PartialEq")]
#[serde(rename_all = "camelCase")]
pub struct CertificateRequestSpec {
    /// The issuer that signs.
    #[serde(default)]
    pub issuer_ref: Reference,
    /// The CSR.
    #[serde(default)]
    pub request: Csr,
    /// Requested lifetime in Go's duration notation, such as `3600s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// Whether the request is for a CA certificate. An agent always sends `false`.
    #[serde(default, rename = "isCA")]
    pub is_ca: bool,
    /// Key usages and extended key usages.
    #[serde(default, deserialize_with = "null_as_default")]
    pub usages: Vec<String>,
    /// Username of the requester.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// UID of the requester.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Groups of the requester.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_as_default")]
    pub groups: Vec<String>,
    /// Claims of the requester, see [`claims`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub extra: BTreeMap<String, Vec<String>>,
    /// Fields that this version does not know. A newer cert-manager may obey them.
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The fields of an object that a type does not know, without their values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnknownFields {
    /// The name of the first one, of at most [`Self::MAX_NAME_CHARS`] characters.
    pub first: Option<String>,
    /// How many there are.
    pub count: usize,
}

impl UnknownFields {
    /// Characters of a name that are held.
    pub const MAX_NAME_CHARS: usize = 64;
}

impl Serialize for UnknownFields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Nothing of them is written back.
        serializer.serialize_map(Some(0))?.end()
    }
}

impl<'de> Deserialize<'de> for UnknownFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = UnknownFields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the fields of an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut unknown = UnknownFields::default();
                while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                    unknown.count += 1;
                    unknown.first.get_or_insert_with(|| name.chars().take(UnknownFields::MAX_NAME_CHARS).collect());
                }
                Ok(unknown)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// A request as the approver reads it: with all annotations and without labels.
pub type Request = Observed<RequestKind, CertificateRequestSpec, Status>;

/// Selects the metadata of a request that the approver keeps.
#[derive(Debug, Clone)]
pub struct RequestKind;

impl Kind for RequestKind {
    const GROUP: &'static str = GROUP;
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "CertificateRequest";
    const PLURAL: &'static str = PLURAL;

    fn keeps_label(_key: &str) -> bool {
        false
    }

    fn keeps_annotation(_key: &str) -> bool {
        true
    }
}

/// `spec.issuerRef`. An empty field means cert-manager's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reference {
    /// Name of the issuer.
    pub name: String,
    /// `Issuer`, `ClusterIssuer`, or an external kind.
    pub kind: String,
    /// API group of the kind.
    pub group: String,
}

impl From<&IssuerRef> for Reference {
    fn from(from: &IssuerRef) -> Self {
        Self { name: from.name.clone(), kind: from.kind.clone(), group: from.group.clone() }
    }
}

/// A CSR in PEM, encoded in base64 as in JSON. `Debug` does not print it. A CSR of more than 64 Ki characters is read as absent: no agent
/// sends one, and a list of such requests would fill the memory of the reader.
#[derive(Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Csr(Option<String>);

impl<'de> Deserialize<'de> for Csr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(CsrVisitor)
    }
}

struct CsrVisitor;

impl Visitor<'_> for CsrVisitor {
    type Value = Csr;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("base64")
    }

    fn visit_str<E>(self, text: &str) -> Result<Csr, E> {
        Ok(Csr((text.len() <= MAX_CSR_CHARACTERS).then(|| text.to_owned())))
    }
}

impl Csr {
    /// Encodes a PKCS#10 request in DER as PEM.
    pub fn from_der(der: &[u8]) -> Self {
        let body = STANDARD.encode(der);
        let mut pem = String::with_capacity(body.len() + body.len() / 64 + 80);
        pem.push_str("-----BEGIN CERTIFICATE REQUEST-----\n");
        for line in body.as_bytes().chunks(64) {
            // Base64 is ASCII, so each byte is a character.
            pem.extend(line.iter().copied().map(char::from));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE REQUEST-----\n");
        Self(Some(STANDARD.encode(pem)))
    }

    /// Returns the length of the encoded CSR in bytes, 0 without one.
    pub fn encoded_len(&self) -> usize {
        self.0.as_ref().map_or(0, String::len)
    }

    /// Returns the PEM bytes. `None` if the CSR is absent, is not base64, or was too long to be kept.
    pub fn pem(&self) -> Option<Vec<u8>> {
        STANDARD.decode(self.0.as_ref()?).ok()
    }
}

impl fmt::Debug for Csr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Csr(redacted)")
    }
}

/// `status` of a request, written by approvers and signers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    /// Conditions of the request.
    #[serde(deserialize_with = "null_as_default")]
    pub conditions: Vec<Condition>,
    /// Certificate chain, leaf first: PEM in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// Root certificate according to the issuer: PEM in base64. The agent trusts it only if the operator enables `trustStatusCA`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// Time at which signing finally failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_time: Option<String>,
}

/// One condition of a [`Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Condition {
    /// `Approved`, `Denied`, `InvalidRequest` or `Ready`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Machine-readable reason, one word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Message for operators.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Time of the last change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
}

/// Decodes PEM in base64, as `status` carries it. `None` if `field` is not base64.
pub fn decode_pem(field: &str) -> Option<Vec<u8>> {
    STANDARD.decode(field).ok()
}

fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Returns namespace and name of a request. An absent one is empty.
pub fn place(request: &Request) -> (&str, &str) {
    let metadata = &request.metadata;
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_has_the_shape_that_cert_manager_reads() {
        let reference = IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: GROUP.into() };
        let spec = CertificateRequestSpec {
            issuer_ref: Reference::from(&reference),
            request: Csr::from_der(&[7; 100]),
            duration: Some("3600s".into()),
            usages: USAGES.map(String::from).to_vec(),
            ..Default::default()
        };
        let mut written = serde_json::to_value(CertificateRequest::new("a", spec)).unwrap();
        let request = written["spec"]["request"].take();
        let pem = STANDARD.decode(request.as_str().unwrap()).unwrap();
        assert_eq!(&*CertificateSigningRequestDer::from_pem_slice(&pem).unwrap(), &[7; 100]);
        assert_eq!(
            written,
            json!({
                "apiVersion": "cert-manager.io/v1",
                "kind": "CertificateRequest",
                "metadata": {"name": "a"},
                "spec": {
                    "issuerRef": {"name": "mesh-ca", "kind": "ClusterIssuer", "group": "cert-manager.io"},
                    "request": null,
                    "duration": "3600s",
                    "isCA": false,
                    "usages": ["digital signature", "key encipherment", "server auth", "client auth"],
                },
            })
        );
    }

    #[test]
    fn a_csr_that_is_no_agents_is_not_kept() {
        let read = |length: usize| -> Request {
            let text = "QUFB".repeat(length / 4);
            serde_json::from_str(&json!({"spec": {"request": text}}).to_string()).unwrap()
        };
        assert_eq!(read(MAX_CSR_CHARACTERS).spec.request.pem().map(|pem| pem.len()), Some(MAX_CSR_CHARACTERS / 4 * 3));
        let long = read(MAX_CSR_CHARACTERS + 4);
        assert_eq!((long.spec.request.pem(), long.spec.request), (None, Csr(None)));
    }

    #[test]
    fn a_bare_object_is_read_and_no_csr_is_printed() {
        let bare = json!({"apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest", "metadata": {},
            "spec": {"request": "c2VjcmV0", "usages": null}, "status": {"conditions": null}});
        let read: CertificateRequest = serde_json::from_value(bare).unwrap();
        assert_eq!(read.status, Some(Status::default()));
        assert!(!format!("{read:?}").contains("c2VjcmV0"));
    }
}
