//! A signer and approver that a test controls, for a cluster whose own are disabled. The test sets the answer for each SPIFFE ID.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures::StreamExt;
use kube::{
    api::DynamicObject,
    runtime::{WatchStreamExt, watcher},
};
use rcgen::{CertificateSigningRequestParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    cluster::Cluster,
    recorder::{Request, csr},
};

/// The answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Good,
    Denied,
    Failed,
    Expired,
    NotYetValid,
    WrongKey,
    WrongName,
    /// PEM with content that is no certificate.
    Garbage,
    /// Text that is no PEM.
    Words,
    /// Ready, without any certificate.
    Nothing,
}

/// A request and its answer.
#[derive(Debug, Clone)]
pub struct Answered {
    pub name: String,
    pub answer: Answer,
    pub at: Instant,
    /// The serial of the signed certificate, in the format of `fetch`.
    pub serial: Option<String>,
}

/// Answers requests until dropped.
pub struct Signer {
    orders: Arc<Mutex<BTreeMap<String, Answer>>>,
    given: Arc<Mutex<Vec<(String, Answered)>>>,
    task: JoinHandle<()>,
}

impl Signer {
    /// Answers the requests of `namespace` with certificates that live for `lifetime`, until [`Signer::answer`] sets another answer.
    pub async fn start(cluster: &Cluster, namespace: &str, lifetime: Duration) -> Self {
        let (orders, given) = (Arc::<Mutex<BTreeMap<_, _>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let hand = Hand { authority: authority(cluster).await, lifetime };
        let (cluster, namespace) = (cluster.clone(), namespace.to_owned());
        let (told, book) = (orders.clone(), given.clone());
        let task = tokio::spawn(async move {
            let requests = cluster.certificate_requests(&namespace);
            let mut events = std::pin::pin!(watcher(requests, watcher::Config::default()).default_backoff().touched_objects());
            let mut done = BTreeSet::new();
            while let Some(event) = events.next().await {
                let Ok(object) = event else { continue };
                let Some(id) = Request::read(&object).uris.pop() else { continue };
                let name = object.metadata.name.clone().expect("the API server names it");
                if object.metadata.deletion_timestamp.is_some() || !done.insert(name.clone()) {
                    continue;
                }
                let answer = told.lock().expect("not poisoned").get(&id).copied().unwrap_or(Answer::Good);
                let (serial, status) = hand.status(answer, &object);
                let answered = Answered { name: name.clone(), answer, at: Instant::now(), serial };
                book.lock().expect("not poisoned").push((id, answered));
                let path = format!("/apis/cert-manager.io/v1/namespaces/{namespace}/certificaterequests/{name}/status");
                cluster.patch(&path, &json!({"status": status})).await;
            }
        });
        Self { orders, given, task }
    }

    /// Sets the answer for this SPIFFE ID from now on.
    pub fn answer(&self, id: &str, answer: Answer) {
        self.orders.lock().expect("not poisoned").insert(id.to_owned(), answer);
    }

    /// The answers to the requests for this ID so far, in order.
    pub fn given(&self, id: &str) -> Vec<Answered> {
        assert!(!self.task.is_finished(), "the signer has failed; its output is above");
        let given = self.given.lock().expect("not poisoned");
        given.iter().filter(|(asked, _)| asked == id).map(|(_, answered)| answered.clone()).collect()
    }

    /// The serials of the valid certificates for this ID.
    pub fn good(&self, id: &str) -> Vec<String> {
        self.given(id).into_iter().filter(|given| given.answer == Answer::Good).filter_map(|given| given.serial).collect()
    }
}

impl Drop for Signer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn authority(cluster: &Cluster) -> Issuer<'static, KeyPair> {
    let (certificate, key) = cluster.authority_with_key().await;
    Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key).expect("the CA's key")).expect("the CA")
}

struct Hand {
    authority: Issuer<'static, KeyPair>,
    lifetime: Duration,
}

impl Hand {
    /// The serial of the signed certificate, and the status that contains it.
    fn status(&self, answer: Answer, request: &DynamicObject) -> (Option<String>, Value) {
        let approved = json!({"type": "Approved", "status": "True", "reason": "ByHand", "message": "approved by the test"});
        let issued = json!({"type": "Ready", "status": "True", "reason": "Issued", "message": "signed by the test"});
        let (serial, certificate) = match answer {
            Answer::Denied => {
                let denied = json!({"type": "Denied", "status": "True", "reason": "Policy", "message": "not on my watch"});
                let ready = json!({"type": "Ready", "status": "False", "reason": "Denied", "message": "not on my watch"});
                return (None, json!({"conditions": [denied, ready]}));
            }
            Answer::Failed => {
                let ready = json!({"type": "Ready", "status": "False", "reason": "Failed", "message": "the signer is out of ink"});
                return (None, json!({"conditions": [approved, ready], "failureTime": "2020-01-01T00:00:00Z"}));
            }
            Answer::Garbage => (None, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned()),
            Answer::Words => (None, "the certificate is in the other pocket\n".to_owned()),
            Answer::Nothing => return (None, json!({"conditions": [approved, issued]})),
            _ => self.sign(answer, &csr(request)),
        };
        (serial, json!({"conditions": [approved, issued], "certificate": BASE64_STANDARD.encode(certificate)}))
    }

    fn sign(&self, answer: Answer, csr: &str) -> (Option<String>, String) {
        let mut request = CertificateSigningRequestParams::from_pem(csr).expect("a CSR");
        let (from, until) = match answer {
            Answer::Expired => (-2 * self.lifetime.as_secs().cast_signed(), -self.lifetime.as_secs().cast_signed()),
            Answer::NotYetValid => (3600, 7200),
            _ => (0, self.lifetime.as_secs().cast_signed()),
        };
        let now = OffsetDateTime::now_utc();
        let params = &mut request.params;
        (params.not_before, params.not_after) = (now + time::Duration::seconds(from), now + time::Duration::seconds(until));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        if answer == Answer::WrongName {
            params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/elsewhere/sa/stranger".try_into().expect("a URI"))];
        }
        let signed = match answer {
            Answer::WrongKey => {
                let another = KeyPair::generate().expect("a key");
                request.params.signed_by(&another, &self.authority)
            }
            _ => request.signed_by(&self.authority),
        };
        let pem = signed.expect("a certificate").pem();
        let (_, parsed) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let serial = parsed.parse_x509().expect("X.509").tbs_certificate.raw_serial_as_string().replace(':', "");
        (Some(serial.to_ascii_lowercase()), pem)
    }
}
