//! CRLs with the roots: Envoys reject a revoked certificate, and accept the next one.

use std::{fs, path::Path, time::Duration};

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use test_harness::{
    agent::Agent,
    cluster::Cluster,
    envoy::Sds,
    eventually,
    pair::{End, Pair},
    scene::{PATIENCE, Scene, Workload},
};
use time::OffsetDateTime;
use x509_parser::extensions::ParsedExtension;

/// A new certificate that replaces another one is published after a twentieth of its lifetime.
const ARRIVES: Duration = Duration::from_secs(60);
const SETTINGS: &str = "certificate: { lifetime: 5m }\nreissueOver: 1s\n";

/// A CRL of the cluster's authority with these hexadecimal serial numbers.
async fn list(cluster: &Cluster, serials: &[&str]) -> String {
    let (certificate, key) = cluster.authority_with_key().await;
    let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key).unwrap()).unwrap();
    let now = OffsetDateTime::now_utc() - Duration::from_secs(5);
    let revoked = serials.iter().map(|serial| {
        let digits: Vec<_> =
            serial.as_bytes().chunks(2).map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        RevokedCertParams {
            serial_number: SerialNumber::from_slice(&digits),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        }
    });
    let params = CertificateRevocationListParams {
        this_update: now,
        next_update: now + Duration::from_secs(3600),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::PreSpecified(key_id(&certificate)),
    };
    params.signed_by(&issuer).unwrap().pem().unwrap()
}

/// The key identifier of an authority's certificate. Envoy finds a CRL by it.
fn key_id(pem: &str) -> Vec<u8> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
    let certificate = pem.parse_x509().expect("a certificate");
    let id = certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    });
    id.expect("a key identifier")
}

async fn serial(agent: &Agent, workload: &Workload) -> String {
    let row = agent.certificate(&workload.id()).await.expect("a certificate");
    row["serial"].as_str().expect("a serial number").to_owned()
}

/// Replaces the file by a rename, as editors do.
fn replace(file: &Path, text: &str) {
    let beside = file.with_extension("next");
    fs::write(&beside, text).unwrap();
    fs::rename(&beside, file).unwrap();
}

#[tokio::test]
async fn peers_reject_a_revoked_certificate_and_accept_the_next_one() {
    let _turn = test_harness::turn().await;
    let cluster = Cluster::connect().await;
    let mut scene = Scene::new(&cluster).await;
    let file = scene.dir.path().join("crl.pem");
    fs::write(&file, list(&cluster, &[]).await).unwrap();
    scene.agent_pod.more_roots = vec![file.clone()];
    let launch = scene.agent_pod.launch(scene.dir.path(), SETTINGS);
    let agent = launch.start().await;
    let [server, client] = [scene.workload("server").await, scene.workload("client").await];
    let (server_id, client_id) = (server.id(), client.id());
    let pair = Pair::start(
        agent.socket(),
        End { id: &server_id, sds: Sds::StateOfTheWorld, cgroup: Some(&server.cgroup) },
        End { id: &client_id, sds: Sds::Delta, cgroup: Some(&client.cgroup) },
    )
    .await;
    // The CRL is served after the first certificate.
    let roots = eventually("the list is served", PATIENCE, async || {
        let served = agent.metric_of("sds_agent_crls", &["state=\"served\""]).await;
        if served > 0.5 { Ok(client.fetch_roots(&agent).await) } else { Err(served.to_string()) }
    })
    .await;
    assert!(roots["crl_pem"].as_str().is_some_and(|pem| pem.contains("BEGIN X509 CRL")), "{roots}");
    pair.request().await.expect("no certificate is revoked");

    let revoked = serial(&agent, &server).await;
    replace(&file, &list(&cluster, &[&revoked]).await);
    eventually("the client refuses the revoked certificate", PATIENCE, async || match pair.request().await {
        Ok(()) => Err("it is taken".to_owned()),
        Err(words) if words.contains("503") => Ok(()),
        Err(words) => Err(words),
    })
    .await;
    assert!(pair.client.stats().await.sum(".ssl.fail_verify_error") > 0);

    // The operator's next step.
    let answer = agent.post(&format!("/reissue?over=0s&spiffe_id={server_id}")).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    eventually("the next certificate is taken", ARRIVES, async || pair.request().await).await;
    assert_ne!(serial(&agent, &server).await, revoked);

    // The next agent knows none of the chains that this one has seen: it requests one certificate, and then serves the CRLs.
    let mut agent = agent;
    agent.terminate();
    assert!(agent.exit(PATIENCE).await.success());
    let agent = launch.start().await;
    eventually("the lists are served again", ARRIVES, async || {
        let served = agent.metric_of("sds_agent_crls", &["state=\"served\""]).await;
        if served > 0.5 { Ok(()) } else { Err(served.to_string()) }
    })
    .await;
    pair.request().await.unwrap();

    // A file without a valid CRL changes nothing: the previous CRL is still served.
    let before = client.fetch_roots(&agent).await;
    replace(&file, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
    eventually("it is refused", PATIENCE, async || {
        let name = format!("source=\"file {}\"", file.display());
        let refused = agent.metric_of("sds_agent_bundles_refused_total", &[&name]).await;
        if refused > 0.5 { Ok(()) } else { Err(refused.to_string()) }
    })
    .await;
    pair.request().await.unwrap();
    let after = client.fetch_roots(&agent).await;
    assert!(after["crl_pem"].is_string() && after["crl_pem"] == before["crl_pem"], "{after}");
    assert!(agent.metric_of("sds_agent_crls", &["state=\"withheld\""]).await < 0.5);
}
