//! The addresses of probes and metrics: the kubelet and Prometheus use addresses of either family, and a node may have only one family.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use sds_agent::admin;
use test_harness::{agent::Launch, free_port, http, tools};

const PATIENCE: Duration = Duration::from_secs(30);
const SETTINGS: &str = "attestation: unix\nissuer: { embedded: {} }\n";
const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

#[tokio::test]
async fn all_addresses_are_those_of_both_families() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let launch = Launch::run(dir.path(), SETTINGS).metrics_on(&format!("[::]:{port}"));
    let agent = launch.start().await;
    let line = agent.logs("where it listens", PATIENCE, |line| line["message"] == "serving metrics and probes").await;
    assert_eq!(line["address"], format!("[::]:{port}"));
    for ip in LOOPBACKS {
        http::get_ok((ip, port).into(), "/livez").await.unwrap();
    }
}

/// As with `ipv6.disable=1` on the kernel's command line: the address family does not exist.
#[tokio::test]
async fn a_node_without_ipv6_is_served_over_ipv4() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    // The first socket is that of `admin.address`, the second is the dual-stack one.
    let trace = dir.path().join("trace");
    let strace = [tools::strace().to_str().unwrap(), "-D", "-f", "-o", trace.to_str().unwrap(), "-e", "trace=socket"].map(str::to_owned);
    let inject = ["-e", "inject=socket:error=EAFNOSUPPORT:when=2"].map(str::to_owned);
    let launch = Launch::run(dir.path(), SETTINGS).metrics_on(&format!("[::]:{port}")).under(strace.into_iter().chain(inject));
    let agent = launch.start().await;
    let line = agent.logs("where it listens", PATIENCE, |line| line["message"] == "serving metrics and probes").await;
    assert_eq!(line["address"], format!("0.0.0.0:{port}"));
    http::get_ok((LOOPBACKS[0], port).into(), "/livez").await.unwrap();
    assert!(fs::read_to_string(trace).unwrap().contains("socket(AF_INET6, "), "what failed is the socket of IPv6");
}

/// A node on which IPv6 sockets accept no IPv4 unless the program requests it.
#[test]
fn a_node_may_have_sockets_of_ipv6_for_ipv6_alone() {
    let elsewhere = thread::spawn(|| {
        // Affects only this thread.
        unshare(CloneFlags::CLONE_NEWNET).expect("run as root");
        fs::write("/proc/sys/net/ipv6/bindv6only", "1").unwrap();
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(async { admin::bind("metrics.address", "[::]:0".parse().unwrap()) }).unwrap().into_std().unwrap();
        listener.set_nonblocking(false).unwrap();
        let port = listener.local_addr().unwrap().port();
        for ip in LOOPBACKS {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from((ip, port)), PATIENCE).expect("both families");
            stream.write_all(b"x").unwrap();
            let (mut accepted, _) = listener.accept().unwrap();
            accepted.read_exact(&mut [0]).unwrap();
        }
    });
    elsewhere.join().unwrap();
}
