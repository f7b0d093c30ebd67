//! The agent's verdict on a shape, at its socket: an agent of its own, whose issuer answers with the shape.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use agent_runtime::{clock::SystemClock, shutdown::Shutdown};
use futures::future::BoxFuture;
use issuance::{
    issuer::{Error, Issued, Issuer, Order, csr, verify},
    rotation::IssuanceObserver,
};
use sds_agent::{
    app::{Base, Deps, build_with},
    config,
    handover::holder::SameUser,
};
use sds_server::{
    attest::unix::UnixAttestor,
    grpc::client,
    material::{CertificateChain, Svid, push_pem},
    proto::envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{Secret, secret::Type},
        service::{discovery::v3::DiscoveryRequest, secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient},
    },
    store::Entry,
    trust::{self, Source, Trust},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use workload_identity::{IssuerName, Profile};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

use super::table::Shape;

/// Limit for an answer. A refusal is observed at once, so that only a fault takes this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// The secrets that the agent serves, in PEM.
#[derive(Debug, Clone)]
pub struct Served {
    pub chain: String,
    pub key: String,
    pub roots: String,
    pub lists: Option<String>,
}

/// Concatenates PEM blocks.
pub fn pem(label: &str, ders: &[Vec<u8>]) -> String {
    let mut out = Vec::new();
    ders.iter().for_each(|der| push_pem(label, der, &mut out));
    String::from_utf8(out).expect("PEM is ASCII")
}

/// Returns what the agent serves, or why it does not.
pub async fn verdict(shape: &'static Shape) -> Result<Served, String> {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let socket = directory.path().join("sds.sock");
    let flags = config::Dev { socket: Some(socket.clone()), admin: Some(([127, 0, 0, 1], 0).into()), ..config::Dev::default() };
    let mut config = config::dev(flags, &|_| None).expect("a configuration");
    let dns_names = shape.dns.iter().map(|name| (*name).into()).collect();
    config.default_profile = Arc::new(Profile { dns_names, ..(*config.default_profile).clone() });

    let trust = Trust::new(trust::Metrics::default());
    let refusal = Arc::new(Refusal::default());
    let issuer = Arc::new(Shaped { shape, source: trust.source(None, "file roots"), refusal: refusal.clone() });
    let issuers: BTreeMap<IssuerName, Arc<dyn Issuer>> = BTreeMap::from([(IssuerName("embedded".into()), issuer as Arc<dyn Issuer>)]);
    let deps = Deps {
        clock: Arc::new(SystemClock),
        attestor: Arc::new(UnixAttestor),
        holder_attestor: Arc::new(SameUser),
        pods: None,
        issuer_set: issuers.into(),
        trust: trust.clone(),
        await_bundle: false,
        observer: Some(refusal.clone()),
        caller_observer: None,
        tasks: Vec::new(),
        last: CancellationToken::new(),
    };
    let shutdown = Shutdown::new(Duration::ZERO);
    let bound = build_with(&config, Base::new(shutdown.clone()), deps).await.expect("an agent");
    let running = tokio::spawn(bound.run());
    let verdict = tokio::select! {
        // A refused list does not keep the agent from serving. The refusal comes first.
        biased;
        why = refusal.observed() => Err(why),
        served = ask(&socket, &trust) => served,
    };
    shutdown.drain.cancel();
    drop(timeout(PATIENCE, running).await);
    verdict
}

/// Opens a stream as an Envoy does, until both secrets and the final lists have arrived.
async fn ask(socket: &std::path::Path, trust: &Trust) -> Result<Served, String> {
    let (connection, driver) = client::connect(socket).await.map_err(|error| error.to_string())?;
    tokio::spawn(driver);
    let mut client = SecretDiscoveryServiceClient::with_origin(connection, client::origin());
    let (requests, receiver) = mpsc::channel(8);
    let names = || vec!["default".to_owned(), "ROOTCA".to_owned()];
    requests.send(DiscoveryRequest { resource_names: names(), ..Default::default() }).await.map_err(|error| error.to_string())?;
    let answers = client.stream_secrets(ReceiverStream::new(receiver)).await.map_err(|status| status.to_string())?;
    let mut answers = answers.into_inner();
    let (mut chain, mut roots) = (None, None);
    loop {
        let set = trust.subscribe().borrow().clone();
        if let (Some((chain, key)), Some((roots, lists)), Some(own)) = (&chain, &roots, &set.own) {
            let bundle = String::from_utf8(own.roots.to_pem()).expect("PEM is ASCII");
            let final_lists = own.crls_pem().map(|pem| String::from_utf8(pem).expect("PEM is ASCII"));
            if !set.wants_chain && *roots == bundle && *lists == final_lists {
                let (chain, key): (&String, &String) = (chain, key);
                return Ok(Served { chain: chain.clone(), key: key.clone(), roots: bundle, lists: final_lists });
            }
        }
        let answer = timeout(PATIENCE, answers.message()).await.map_err(|_| "no answer".to_owned())?;
        let answer = answer.map_err(|status| status.to_string())?.ok_or("the stream has ended")?;
        for resource in &answer.resources {
            let secret: Secret = prost::Message::decode(&resource.value[..]).map_err(|error| error.to_string())?;
            match secret.r#type {
                Some(Type::TlsCertificate(secret)) => chain = Some((text(secret.certificate_chain), text(secret.private_key))),
                Some(Type::ValidationContext(secret)) => {
                    roots = Some((text(secret.trusted_ca), secret.crl.map(|crl| text(Some(crl)))));
                }
                _ => {}
            }
        }
        let ack = DiscoveryRequest {
            resource_names: names(),
            version_info: answer.version_info,
            response_nonce: answer.nonce,
            ..Default::default()
        };
        requests.send(ack).await.map_err(|error| error.to_string())?;
    }
}

fn text(source: Option<DataSource>) -> String {
    match source.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(bytes)) => String::from_utf8(bytes.to_vec()).expect("PEM is ASCII"),
        other => panic!("not inline: {other:?}"),
    }
}

/// The first refusal of an agent.
#[derive(Debug, Default)]
struct Refusal {
    why: Mutex<Option<String>>,
    changed: tokio::sync::Notify,
}

impl Refusal {
    fn note(&self, why: String) {
        self.why.lock().expect("not poisoned").get_or_insert(why);
        self.changed.notify_one();
    }

    async fn observed(&self) -> String {
        loop {
            self.changed.notified().await;
            if let Some(why) = self.why.lock().expect("not poisoned").clone() {
                return why;
            }
        }
    }
}

impl IssuanceObserver for Refusal {
    fn failed(&self, _entry: &Entry, error: &Error) {
        self.note(error.to_string());
    }

    fn waits(&self, _entry: &Entry, _request: &str, _why: &str) {}

    fn withheld(&self, _entry: &Entry) {}

    fn issued(&self, _entry: &Entry, _svid: &Svid) {}

    fn forgotten(&self, _entry: &Entry) {}
}

/// Answers each order with the shape, and offers the roots of the shape.
struct Shaped {
    shape: &'static Shape,
    source: Source,
    refusal: Arc<Refusal>,
}

impl fmt::Debug for Shaped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.shape.name)
    }
}

impl Issuer for Shaped {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, Error>> {
        let (shape, source, refusal) = (self.shape, self.source.clone(), self.refusal.clone());
        Box::pin(async move {
            let made = csr::generate(&order.identity).await?;
            let (_, request) = X509CertificationRequest::from_der(&made.csr_der).expect("the agent's CSR");
            let material = shape.make(request.certification_request_info.subject_pki.raw);
            let text = pem("CERTIFICATE", &material.bundle) + &pem("X509 CRL", &material.lists);
            if let Err(refused) = source.offer(text.as_bytes()) {
                refusal.note(refused.to_string());
            }
            let chain = CertificateChain::from_pem(pem("CERTIFICATE", &material.chain).as_bytes()).map_err(verify::Error::from)?;
            Ok(Issued { key: made.key, chain, phases: Vec::new() })
        })
    }
}
