//! `fetch` from its flags to its output, with a scripted server.

use std::{fs, time::UNIX_EPOCH};

use prost::Message;
use prost_types::Any;
use sds_server::proto::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, TlsCertificate, secret::Type},
    service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::Status;

use super::{resource::TYPE_URL, server::Server, *};

const ID: &str = "spiffe://example.org/uid/7";
const KEY: &str = "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n";

fn pem(subject: &str) -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["cart.shop.svc".to_owned()]).unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(ID.try_into().unwrap()));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, subject);
    params.not_before = (UNIX_EPOCH + Duration::from_secs(1_800_000_000)).into();
    params.not_after = (UNIX_EPOCH + Duration::from_secs(1_800_003_600)).into();
    params.self_signed(&key).unwrap().pem()
}

fn inline(pem: &str) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(pem.to_owned().into())) })
}

fn secret(name: &str, r#type: Option<Type>) -> Any {
    let secret = Secret { name: name.to_owned(), r#type };
    Any { type_url: TYPE_URL.to_owned(), value: secret.encode_to_vec() }
}

fn certificate(name: &str, chain: &str) -> Any {
    let certificate = TlsCertificate { certificate_chain: inline(chain), private_key: inline(KEY) };
    secret(name, Some(Type::TlsCertificate(certificate)))
}

fn bundle(name: &str, roots: &str) -> Any {
    secret(name, Some(Type::ValidationContext(CertificateValidationContext { trusted_ca: inline(roots), crl: None })))
}

fn response(version: &str, resources: Vec<Any>) -> DiscoveryResponse {
    let nonce = format!("nonce-{version}");
    DiscoveryResponse { version_info: version.to_owned(), resources, type_url: TYPE_URL.to_owned(), nonce }
}

fn args(socket: &Path) -> Args {
    Args {
        socket: Some(format!("unix://{}", socket.display())),
        names: Vec::new(),
        watch: false,
        timeout: Duration::from_secs(5).into(),
        api: Api::Sds,
        output: Format::Json,
        write_key: None,
    }
}

fn nothing(_: &str) -> Option<String> {
    None
}

fn socket() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sds.sock");
    (dir, path)
}

/// Runs `fetch` to its end. Returns its output and its result.
async fn run(args: Args) -> (String, Result<(), Failure>) {
    let mut printed = String::new();
    let result = ask(args, &nothing, &mut |text: &str| {
        printed.push_str(text);
        Ok(())
    })
    .await;
    (printed, result)
}

/// Runs `fetch --watch`. Returns a receiver of its output, and its task.
fn watch(args: Args) -> (mpsc::UnboundedReceiver<String>, JoinHandle<Result<(), Failure>>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        let mut out = |text: &str| sender.send(text.to_owned()).map_err(|_| io::ErrorKind::BrokenPipe.into());
        ask(Args { watch: true, ..args }, &nothing, &mut out).await
    });
    (receiver, task)
}

#[tokio::test]
async fn both_default_names_are_fetched_and_shown_as_the_contract_says() {
    let (dir, path) = socket();
    let (leaf, root) = (pem("leaf"), pem("root"));
    let answer = response("v1", vec![certificate("default", &leaf), bundle("ROOTCA", &root)]);
    let server = Server::start(path, move |request, headers| {
        assert_eq!((request.resource_names, request.type_url.as_str()), (vec!["default".to_owned(), "ROOTCA".to_owned()], TYPE_URL));
        assert_eq!(headers["grpc-timeout"], "5000000u");
        Ok(answer.clone())
    });
    let key = dir.path().join("key.pem");
    let (printed, result) = run(Args { write_key: Some(key.clone()), ..args(&server.path) }).await;
    result.unwrap();

    let lines: Vec<&str> = printed.lines().collect();
    let [first, second] = lines[..] else { panic!("{printed}") };
    let order = ["name", "kind", "version", "spiffe_id", "dns_names", "serial", "fingerprint_sha256", "not_before", "not_after"];
    for (line, last) in [(first, "chain_pem"), (second, "trusted_ca_pem")] {
        let places: Vec<_> = order.iter().chain([&last]).map(|key| line.find(&format!("\"{key}\":")).unwrap()).collect();
        assert!(places.is_sorted(), "{line}");
        assert_eq!(serde_json::from_str::<Value>(line).unwrap().as_object().unwrap().len(), 10);
    }
    let certificate: Value = serde_json::from_str(first).unwrap();
    assert_eq!((&certificate["name"], &certificate["kind"]), (&"default".into(), &"certificate".into()));
    assert_eq!((&certificate["version"], &certificate["spiffe_id"]), (&"v1".into(), &ID.into()));
    assert_eq!(certificate["dns_names"], serde_json::json!(["cart.shop.svc"]));
    assert_eq!((&certificate["not_before"], &certificate["not_after"]), (&"2027-01-15T08:00:00Z".into(), &"2027-01-15T09:00:00Z".into()));
    assert_eq!(certificate["chain_pem"].as_str().unwrap().replace('\r', ""), leaf.replace('\r', ""));
    let bundle: Value = serde_json::from_str(second).unwrap();
    assert_eq!((&bundle["kind"], &bundle["spiffe_id"], &bundle["not_before"]), (&"bundle".into(), &Value::Null, &Value::Null));
    assert_eq!(bundle["not_after"], "2027-01-15T09:00:00Z");

    assert!(!printed.contains("PRIVATE KEY"));
    assert_eq!(fs::read_to_string(key).unwrap(), KEY);
}

#[tokio::test]
async fn text_and_pem_show_no_key() {
    let (_dir, path) = socket();
    let (leaf, root) = (pem("leaf"), pem("ro\x1bot"));
    let answer = response("v1", vec![certificate("default", &leaf), bundle("ROOTCA", &root)]);
    let server = Server::start(path, move |_, _| Ok(answer.clone()));
    let (text, result) = run(Args { output: Format::Text, ..args(&server.path) }).await;
    result.unwrap();
    for part in
        ["default: certificate\n", ID, "cart.shop.svc", "2027-01-15T09:00:00Z", "sha256 ", "1 certificate\n", "ROOTCA: trust bundle\n"]
    {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    assert!(!text.contains('\x1b') && !text.contains("PRIVATE"), "{text}");
    let (pem, result) = run(Args { output: Format::Pem, ..args(&server.path) }).await;
    result.unwrap();
    assert_eq!(pem.matches("BEGIN").count(), 2);
    assert!(!pem.contains("PRIVATE"));
}

#[tokio::test]
async fn the_servers_status_decides_the_exit_code() {
    for (status, exit) in [
        (Status::permission_denied("no pod"), Exit::NotPermitted),
        (Status::unavailable("soon"), Exit::Unavailable),
        (Status::deadline_exceeded("late"), Exit::Unavailable),
        (Status::not_found("nothing"), Exit::Failed),
    ] {
        let (_dir, path) = socket();
        let server = Server::start(path, move |_, _| Err(status.clone()));
        assert_eq!(run(args(&server.path)).await.1.unwrap_err().exit(), exit);
    }
}

#[tokio::test]
async fn without_a_server_it_says_how_to_start_one() {
    let (_dir, path) = socket();
    let missing = run(args(&path)).await.1.unwrap_err();
    assert_eq!(missing.exit(), Exit::Unavailable);
    assert!(missing.to_string().contains("sds-agent dev"), "{missing}");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let refused = run(Args { watch: true, ..args(&path) }).await.1.unwrap_err();
    assert_eq!(refused.exit(), Exit::Unavailable);
    assert!(refused.to_string().starts_with("no process listens at "), "{refused}");
}

#[tokio::test]
async fn what_does_not_speak_grpc_is_a_failure_and_not_a_wait() {
    let (_dir, path) = socket();
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let failure = run(args(&path)).await.1.unwrap_err();
    assert!(matches!(failure, Failure::Status(_) | Failure::Handshake { .. }), "{failure:?}");
}

#[tokio::test]
async fn a_connection_that_ends_is_unavailable() {
    let (_dir, path) = socket();
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok(connection) = listener.accept().await {
            drop(connection);
        }
    });
    let failure = run(args(&path)).await.1.unwrap_err();
    assert_eq!(failure.exit(), Exit::Unavailable, "{failure:?}");
}

#[tokio::test]
async fn part_of_an_answer_is_shown_and_none_is_a_failure() {
    let (_dir, path) = socket();
    let root = pem("root");
    let server = Server::start(path, move |request, _| {
        let known = request.resource_names.iter().filter(|name| *name == "ROOTCA").map(|name| bundle(name, &root)).collect();
        Ok(response("v1", known))
    });
    let (printed, result) = run(args(&server.path)).await;
    result.unwrap();
    assert_eq!(printed.lines().count(), 1);
    let names = vec!["other".to_owned(), "other".to_owned()];
    let (printed, result) = run(Args { names, ..args(&server.path) }).await;
    let failure = result.unwrap_err();
    assert_eq!((printed.as_str(), failure.exit()), ("", Exit::Failed));
    assert_eq!(failure.to_string(), "the server answered, but has nothing under other");
}

#[tokio::test]
async fn garbage_is_told_and_fails() {
    let (_dir, path) = socket();
    let server = Server::start(path, |_, _| Ok(response("v1", vec![certificate("default", "no pem"), bundle("ROOTCA", "")])));
    let failure = run(args(&server.path)).await.1.unwrap_err();
    assert_eq!((failure.to_string().as_str(), failure.exit()), ("default: the certificate chain holds no certificate", Exit::Failed));
}

#[tokio::test]
async fn a_server_without_fetch_is_asked_by_a_stream() {
    let (_dir, path) = socket();
    let mut server = Server::start(path, |_, _| Err(Status::unimplemented("streams only")));
    let fetch = tokio::spawn(run(args(&server.path)));
    let mut stream = server.streams.recv().await.unwrap();
    assert_eq!(stream.requests.message().await.unwrap().unwrap().resource_names, ["default", "ROOTCA"]);
    stream.responses.send(Ok(response("1", vec![certificate("default", &pem("leaf"))]))).await.unwrap();
    stream.responses.send(Ok(response("2", vec![bundle("ROOTCA", &pem("root"))]))).await.unwrap();
    let (printed, result) = fetch.await.unwrap();
    result.unwrap();
    assert_eq!(printed.lines().count(), 2);
}

#[tokio::test]
async fn a_watch_reconnects_with_the_last_accepted_version() {
    let (dir, path) = socket();
    let never = |_: DiscoveryRequest, _: &http::HeaderMap| Err(Status::internal("not asked"));
    let mut server = Server::start(path.clone(), never);
    let key = dir.path().join("key.pem");
    let (mut printed, task) = watch(Args { write_key: Some(key.clone()), ..args(&path) });
    let mut stream = server.streams.recv().await.unwrap();
    let first = stream.requests.message().await.unwrap().unwrap();
    assert_eq!((first.version_info.as_str(), first.response_nonce.as_str()), ("", ""));

    let (old, root) = (certificate("default", &pem("old")), bundle("ROOTCA", &pem("root")));
    stream.responses.send(Ok(response("v1", vec![old, root.clone()]))).await.unwrap();
    let ack = stream.requests.message().await.unwrap().unwrap();
    assert_eq!((ack.version_info.as_str(), ack.response_nonce.as_str(), ack.error_detail), ("v1", "nonce-v1", None));
    assert!(printed.recv().await.unwrap().contains("\"default\"") && printed.recv().await.unwrap().contains("\"ROOTCA\""));
    assert_eq!(fs::read_to_string(&key).unwrap(), KEY);

    // An invalid certificate is rejected, and the accepted version stays.
    stream.responses.send(Ok(response("bad", vec![certificate("default", "garbage")]))).await.unwrap();
    let nack = stream.requests.message().await.unwrap().unwrap();
    assert_eq!((nack.version_info.as_str(), nack.response_nonce.as_str()), ("v1", "nonce-bad"));
    assert!(nack.error_detail.unwrap().message.contains("holds no certificate"));

    // A rotation: the bundle is sent again, and only the certificate is an update.
    let new = certificate("default", &pem("new"));
    stream.responses.send(Ok(response("v2", vec![new.clone(), root.clone()]))).await.unwrap();
    assert_eq!(stream.requests.message().await.unwrap().unwrap().version_info, "v2");
    assert!(printed.recv().await.unwrap().contains("\"version\":\"v2\""));

    // The server ends and starts again.
    drop((stream, server));
    let mut server = Server::start(path, never);
    let mut stream = server.streams.recv().await.unwrap();
    let again = stream.requests.message().await.unwrap().unwrap();
    assert_eq!((again.version_info.as_str(), again.response_nonce.as_str()), ("v2", ""));
    stream.responses.send(Ok(response("v3", vec![new, root, bundle("spiffe://other", &pem("x"))]))).await.unwrap();
    assert!(printed.recv().await.unwrap().contains("spiffe://other"), "an unchanged resource is not printed again");

    // PERMISSION_DENIED ends the watch, because the identity no longer exists.
    stream.responses.send(Err(Status::permission_denied("gone"))).await.unwrap();
    assert_eq!(task.await.unwrap().unwrap_err().exit(), Exit::NotPermitted);
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_watch_quietly() {
    let (_dir, path) = socket();
    let mut server = Server::start(path.clone(), |_, _| Err(Status::internal("not asked")));
    let (printed, task) = watch(Args { output: Format::Text, ..args(&path) });
    drop(printed);
    let stream = server.streams.recv().await.unwrap();
    stream.responses.send(Ok(response("v1", vec![bundle("ROOTCA", &pem("root"))]))).await.unwrap();
    let Failure::Unsaid(error) = task.await.unwrap().unwrap_err() else { panic!("another failure") };
    assert_eq!(output::unsaid(&error), Exit::Ok);
}

#[tokio::test]
async fn an_update_is_one_line_of_text() {
    let (_dir, path) = socket();
    let mut server = Server::start(path.clone(), |_, _| Err(Status::internal("not asked")));
    let (mut printed, task) = watch(Args { output: Format::Text, ..args(&path) });
    let stream = server.streams.recv().await.unwrap();
    let all = vec![certificate("default", &pem("leaf")), bundle("ROOTCA", &pem("root"))];
    stream.responses.send(Ok(response("v1", all))).await.unwrap();
    for part in [format!(" default {ID} serial "), " ROOTCA 1 root: CN=root, until 2027-01-15T09:00:00Z (".to_owned()] {
        let line = printed.recv().await.unwrap();
        assert!(line.contains(&part) && line.lines().count() == 1, "{line}");
    }
    task.abort();
}

#[tokio::test]
async fn the_workload_api_is_not_asked() {
    let failure = run(Args { api: Api::Workload, ..args(Path::new("/nowhere")) }).await.1.unwrap_err();
    assert_eq!(failure.exit(), Exit::Usage);
    assert!(failure.to_string().contains("this version supports only SDS"));
}

#[tokio::test]
async fn a_server_that_is_silent_is_given_up() {
    let (_dir, path) = socket();
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let failure = run(Args { timeout: Duration::from_millis(50).into(), ..args(&path) }).await.1.unwrap_err();
    assert_eq!((failure.to_string().as_str(), failure.exit()), ("no answer within 50ms", Exit::Unavailable));
    drop(listener);
}
