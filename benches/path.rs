//! The request path and its parts, compared with the floor: `cargo bench --bench path`.
//!
//! Calls go through the real service on a Unix socket, in the process of their client. Compare figures of one run only.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a bench may fail loudly; criterion's macros make functions"
)]

use std::{hint::black_box, os::unix::net::UnixStream, path::Path, sync::Arc, time::SystemTime};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use issuance::issuer::{csr, verify};
use sds_server::{
    attest::{self, unix::UnixAttestor},
    caller::{Authenticator, Connection},
    material::{PrivateKey, Svid},
    sds::{encoded::Variant, secret},
};
use tokio::{runtime::Runtime, sync::watch};
use unix_peer::peer::Peer;
use zeroize::Zeroizing;

use self::support::{
    agent::{self, Timed},
    client::{self, Ask, FETCH},
    floor::{self, ECHO},
};

mod support;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Calls through the sockets.
fn calls(c: &mut Criterion) {
    let (runtime, directory) = (runtime(), tempfile::tempdir().unwrap());
    let [agent, floor] = ["agent", "floor"].map(|name| Arc::<Path>::from(directory.path().join(name)));
    let (agent_client, floor_client) = runtime.block_on(async {
        agent::start(&agent, Arc::new(UnixAttestor), Timed::new()).await;
        let mut agent_client = client::connect(&agent).await;
        let like = client::unary(&mut agent_client, FETCH, Ask::small("default")).await;
        floor::start(&floor, &like);
        (agent_client, client::connect(&floor).await)
    });

    let mut group = c.benchmark_group("fetch, cached");
    for (name, client, path) in [("agent", &agent_client, FETCH), ("floor", &floor_client, ECHO)] {
        group.bench_function(name, |b| {
            b.to_async(&runtime).iter(|| {
                let mut client = client.clone();
                async move { client::unary(&mut client, path, Ask::small("default")).await }
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("connect to first answer, 61 KB asked");
    group.bench_function("agent", |b| b.to_async(&runtime).iter(|| client::first_secret(agent.clone(), "default")));
    group.bench_function("floor", |b| b.to_async(&runtime).iter(|| floor::first_answer(floor.clone())));
    group.finish();
}

/// The parts of the path.
fn parts(c: &mut Criterion) {
    let runtime = runtime();
    let config = agent::config(Path::new("/nowhere/sds.sock"));
    let (issuer, identity) = (Timed::new(), agent::identity(&config, 0));
    let roots = issuer.bundle();

    let resolver = config.resolver();
    let (_sender, resolver) = watch::channel(Arc::new(resolver));
    let authenticator = Authenticator { attestor: Arc::new(UnixAttestor), resolver, metrics: attest::Metrics::default(), observer: None };
    let (_theirs, socket) = UnixStream::pair().unwrap();
    c.bench_function("attest and name", |b| {
        b.to_async(&runtime).iter(|| async { Connection::new(Peer::of(&socket).unwrap(), authenticator.clone()).caller().await.unwrap() });
    });

    c.bench_function("key and CSR, P-256", |b| b.to_async(&runtime).iter(|| csr::generate(&identity)));

    let issued = runtime.block_on(agent::issue(&identity, &issuer));
    c.bench_function("verify", |b| {
        b.iter(|| verify::verify(&identity, &issued.key, &issued.chain, Some(&roots), black_box(SystemTime::now())).unwrap());
    });

    let chain = issued.chain;
    let fresh = || {
        let key = PrivateKey::from_pkcs8_der(Zeroizing::new(issued.key.pkcs8_der().to_vec()));
        let validity = chain.validity;
        Svid::new(identity.clone(), chain.clone(), key, validity.not_after, validity.not_before, "0123456789abcdef".into())
    };
    c.bench_function("encode, first time", |b| {
        b.iter_batched_ref(fresh, |svid| secret::certificate(svid, Variant::Sotw, "default"), BatchSize::SmallInput);
    });
    let svid = fresh();
    c.bench_function("encode, again", |b| {
        b.iter(|| {
            let resource = secret::certificate(&svid, Variant::Sotw, "default");
            secret::response(Variant::Sotw, svid.version(), "", [resource], &[])
        });
    });
}

criterion_group!(benches, calls, parts);
criterion_main!(benches);
