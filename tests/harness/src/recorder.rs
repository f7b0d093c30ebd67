//! Records the CertificateRequests that the API server reports.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures::StreamExt;
use kube::{
    Api,
    api::DynamicObject,
    runtime::{WatchStreamExt, watcher},
};
use tokio::task::JoinHandle;
use x509_parser::{certification_request::X509CertificationRequest, extensions::GeneralName, prelude::FromDer};

const WATCH_START: Duration = Duration::from_secs(30);

/// A recorded CertificateRequest.
#[derive(Debug, Clone)]
pub struct Request {
    pub name: String,
    uid: String,
    /// Unix seconds.
    pub created: i64,
    /// The URI SANs of its CSR.
    pub uris: Vec<String>,
}

impl Request {
    /// Reads the fields that tests use.
    pub fn read(object: &DynamicObject) -> Self {
        let csr = csr(object);
        let (_, pem) = x509_parser::pem::parse_x509_pem(csr.as_bytes()).expect("PEM");
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).expect("a CSR");
        let names = csr.requested_extensions().into_iter().flatten().filter_map(|extension| match extension {
            x509_parser::extensions::ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        });
        let uris = names.flatten().filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        Self {
            name: object.metadata.name.clone().unwrap_or_default(),
            uid: object.metadata.uid.clone().expect("the API server gives a UID"),
            created: object.metadata.creation_timestamp.as_ref().expect("and a creation time").0.as_second(),
            uris: uris.collect(),
        }
    }
}

/// Watches CertificateRequests until dropped.
pub struct Recorder {
    seen: Arc<Mutex<BTreeMap<String, Request>>>,
    task: JoinHandle<()>,
}

impl Recorder {
    /// Starts the recording.
    pub async fn start(requests: Api<DynamicObject>) -> Self {
        let seen = Arc::<Mutex<BTreeMap<String, Request>>>::default();
        let (started, mut ready) = tokio::sync::watch::channel(false);
        let kept = seen.clone();
        let task = tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher(requests, watcher::Config::default()).default_backoff());
            while let Some(event) = events.next().await {
                match event {
                    Ok(watcher::Event::InitDone) => drop(started.send_replace(true)),
                    Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                        let request = Request::read(&object);
                        kept.lock().expect("not poisoned").entry(request.uid.clone()).or_insert(request);
                    }
                    _ => {}
                }
            }
        });
        let listed = tokio::time::timeout(WATCH_START, ready.wait_for(|listed| *listed)).await;
        listed.expect("the watch starts in time").expect("the watch continues");
        Self { seen, task }
    }

    /// The recorded requests, oldest first.
    pub fn seen(&self) -> Vec<Request> {
        let mut seen: Vec<_> = self.seen.lock().expect("not poisoned").values().cloned().collect();
        seen.sort_by_key(|request| request.created);
        seen
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The CSR of a request, in PEM.
pub fn csr(object: &DynamicObject) -> String {
    let encoded = object.data["spec"]["request"].as_str().expect("a request holds a CSR");
    String::from_utf8(BASE64_STANDARD.decode(encoded).expect("base64")).expect("PEM is text")
}
