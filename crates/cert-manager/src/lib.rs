//! cert-manager's CertificateRequest as the agent writes it and the approver reads it: the typed resource, its names, and its verdict.
//!
//! Owns the wire format and the vocabulary (labels, annotations, reasons) that both sides share. Nothing here does I/O or reads a
//! clock. A caller owes nothing: every field that another may have written is optional, so that no odd object breaks a watch.

use std::{collections::BTreeMap, fmt};

use agent_kube::object::{Kind, Observed};
use base64::{Engine, engine::general_purpose::STANDARD};
use kube::CustomResource;
use serde::{Deserialize, Deserializer, Serialize, de::Visitor};

pub mod csr;
pub mod naming;
pub mod verdict;

/// The API group.
pub const GROUP: &str = "cert-manager.io";
/// The resource's plural.
pub const PLURAL: &str = "certificaterequests";
/// Requests in one page of a list. A single request can be as large as etcd allows, 1.5 MiB, whoever made it.
pub const REQUESTS_PER_PAGE: u32 = 20;
/// The longest CSR that is kept, in characters of base64. An agent's largest, with an RSA key, has about 2,000.
const MAX_CSR_CHARACTERS: usize = 64 << 10;

/// cert-manager's reference to an issuer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IssuerRef {
    /// `name`
    pub name: String,
    /// `kind`
    pub kind: String,
    /// `group`
    pub group: String,
}

/// Where CertificateRequests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestNamespace {
    /// One namespace, the agents' own by default.
    Fixed(String),
    /// `workload`: each into the namespace of its pod.
    Workload,
}

/// Labels and annotations of a request. They carry evidence and help people; none of them authorises anything.
pub mod keys {
    /// What each of them begins with.
    pub const PREFIX: &str = "sds-agent.io/";
    /// Label: the node of the agent that asks, see [`node_label`](super::naming::node_label). The agent's watch selects by it.
    pub const NODE: &str = "sds-agent.io/node";
    /// Label: the UID of the agent's pod, or [`PROCESS_PREFIX`](super::naming::PROCESS_PREFIX) and its instance where it has none.
    pub const AGENT: &str = "sds-agent.io/agent-uid";
    /// Label: the process of the agent that holds the key. A restarted container keeps the pod's UID and loses the keys.
    pub const INSTANCE: &str = "sds-agent.io/instance";
    /// Annotation: the node's whole name, which a label cannot always hold.
    pub const NODE_NAME: &str = "sds-agent.io/node-name";
    /// Annotation: `namespace/name` of the agent's pod.
    pub const AGENT_POD: &str = "sds-agent.io/agent-pod";
    /// Annotation: the pod for which the certificate is, as evidence: its namespace.
    pub const POD_NAMESPACE: &str = "sds-agent.io/pod-namespace";
    /// Annotation: the evidence pod's name.
    pub const POD_NAME: &str = "sds-agent.io/pod-name";
    /// Annotation: the evidence pod's UID.
    pub const POD_UID: &str = "sds-agent.io/pod-uid";
    /// Annotation: the profile by which the agent asks. The approver derives it again.
    pub const PROFILE: &str = "sds-agent.io/profile";
    /// Annotation: the SPIFFE ID, for people; the CSR holds the one that counts.
    pub const SPIFFE_ID: &str = "sds-agent.io/spiffe-id";
}

/// Claims in `spec.extra`, which the API server takes from a pod-bound token and cert-manager's webhook copies.
pub mod claims {
    /// The node that the requester's pod runs on.
    pub const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
    /// That node's UID.
    pub const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
    /// The requester's pod.
    pub const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
    /// That pod's UID.
    pub const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
}

/// The usages of every certificate that the agent asks for: both sides of mTLS. cert-manager keeps the order.
pub const USAGES: [&str; 4] = ["digital signature", "key encipherment", "server auth", "client auth"];

/// The reason of the condition `Approved`, and who reports Events.
pub const APPROVER: &str = "approver.sds-agent.io";

/// Reasons of denials: one word for programs, in the condition `Denied`. The agent decides by them when to ask again.
pub mod denied {
    /// The evidence pod has gone: the agent asks again at once, in a sibling's name.
    pub const POD_GONE: &str = "PodGone";
    /// The pod may have a certificate, but not this one: agent and approver read different configurations, for a while or by mistake.
    pub const PROFILE_MISMATCH: &str = "ProfileMismatch";
    /// The SPIFFE ID is not the pod's: an attack, or different configurations again.
    pub const WRONG_IDENTITY: &str = "WrongIdentity";
    /// Somebody else asks of an issuer that is the agents' alone.
    pub const NOT_THE_AGENT: &str = "NotTheAgent";
    /// The requester's token names no node, or another one than the pod's.
    pub const WRONG_NODE: &str = "WrongNode";
    /// The request names no pod.
    pub const NO_EVIDENCE: &str = "NoEvidence";
    /// The pod has no service account, as static pods have none.
    pub const NO_SERVICE_ACCOUNT: &str = "NoServiceAccount";
    /// The CSR asks for more than names, or is none.
    pub const INVALID_CSR: &str = "InvalidCsr";
    /// The request's own fields are not those of an agent: usages, `isCA`.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// The request has annotations of others, from which an issuer may take orders.
    pub const INVALID_ANNOTATION: &str = "InvalidAnnotation";

    /// All of them.
    pub const ALL: [&str; 10] = [
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
    ];
}

/// `spec`. `username`, `uid`, `groups` and `extra` are the webhook's: whatever a creator writes is replaced. cert-manager's webhook refuses
/// later changes, but not in namespaces with `cert-manager.io/disable-validation`; the policy of `daemonset/approver` refuses them everywhere.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[kube(group = "cert-manager.io", version = "v1", kind = "CertificateRequest", plural = "certificaterequests", namespaced)]
#[kube(status = "Status", schema = "disabled", derive = "PartialEq")]
#[serde(rename_all = "camelCase")]
pub struct CertificateRequestSpec {
    /// Who signs.
    #[serde(default)]
    pub issuer_ref: Reference,
    /// The CSR.
    #[serde(default)]
    pub request: Csr,
    /// The lifetime to ask for, in Go's notation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// Whether a CA is asked for; the agent never does.
    #[serde(default, rename = "isCA")]
    pub is_ca: bool,
    /// Key usages and extended key usages.
    #[serde(default, deserialize_with = "null_as_default")]
    pub usages: Vec<String>,
    /// The requester's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// The requester's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The requester's groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_as_default")]
    pub groups: Vec<String>,
    /// The requester's claims, see [`claims`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub extra: BTreeMap<String, Vec<String>>,
}

/// A request as the approver reads it: the annotations all count, the labels do not.
pub type Request = Observed<RequestKind, CertificateRequestSpec, Status>;

/// What the approver keeps of a request's metadata.
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

/// `spec.issuerRef`. Empty fields mean cert-manager's defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reference {
    /// The issuer's name.
    pub name: String,
    /// `Issuer`, `ClusterIssuer`, or an external kind.
    pub kind: String,
    /// The API group of the kind.
    pub group: String,
}

impl From<&IssuerRef> for Reference {
    fn from(from: &IssuerRef) -> Self {
        Self { name: from.name.clone(), kind: from.kind.clone(), group: from.group.clone() }
    }
}

/// A PEM CSR in base64, as JSON carries it. It is never printed. One that is longer than 64 KiB is read as none: it is no agent's, and
/// a list of such requests must not fill the reader's memory.
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
    /// Wraps PKCS#10 DER.
    pub fn from_der(der: &[u8]) -> Self {
        let body = STANDARD.encode(der);
        let mut pem = String::with_capacity(body.len() + body.len() / 64 + 80);
        pem.push_str("-----BEGIN CERTIFICATE REQUEST-----\n");
        for line in body.as_bytes().chunks(64) {
            // Base64 is ASCII: every cut is a character's.
            pem.extend(line.iter().copied().map(char::from));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE REQUEST-----\n");
        Self(Some(STANDARD.encode(pem)))
    }

    /// The PEM bytes; none where it is no base64, or was too long to be kept.
    pub fn pem(&self) -> Option<Vec<u8>> {
        STANDARD.decode(self.0.as_ref()?).ok()
    }
}

impl fmt::Debug for Csr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Csr(redacted)")
    }
}

/// `status`, written by approvers and signers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    /// How far it is.
    #[serde(deserialize_with = "null_as_default")]
    pub conditions: Vec<Condition>,
    /// The chain, leaf first: PEM in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// What the issuer believes to be its root: PEM in base64. Not a trust bundle unless the operator says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// When signing failed for good.
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
    /// One word for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// A sentence for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
}

/// PEM in base64, as the status carries it.
pub fn decode_pem(field: &str) -> Option<Vec<u8>> {
    STANDARD.decode(field).ok()
}

fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Namespace and name of a request; empty where it has none.
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
