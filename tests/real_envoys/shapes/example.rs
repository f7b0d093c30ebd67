//! The authority of `daemonset/example`: its name constraints allow the workloads of the trust domain, and nothing else.

use test_harness::{manifests, tools};

use super::{
    agents::pem,
    der::{CONSTRAINTS, Fields, Key, NAMES, seq, tlv},
    envoys::{self, Trial},
    pki::Authority,
};

/// Subtrees of general names with this tag.
fn subtrees(tag: u8, names: &serde_json::Value) -> Vec<u8> {
    let names = names.as_array().expect("a list").iter().map(|name| name.as_str().expect("a text"));
    names.map(|name| seq(&[&tlv(tag, name.as_bytes())])).collect::<Vec<_>>().concat()
}

#[tokio::test]
async fn the_example_authority_signs_for_its_trust_domain_alone() {
    let objects = manifests::documents(&manifests::read("example/authority.yaml"));
    let certificate = objects.iter().find(|object| object["kind"] == "Certificate").expect("the CA's certificate");
    let constraints = &certificate["spec"]["nameConstraints"];
    let permitted = [subtrees(0x86, &constraints["permitted"]["uriDomains"]), subtrees(0x82, &constraints["permitted"]["dnsDomains"])];
    let mut root = Authority::root("mesh-ca");
    let is_critical = constraints["critical"] == true;
    root.fields.set(CONSTRAINTS, is_critical, &seq(&[&tlv(0xa0, &permitted.concat())]));

    let trial = |id: &str, uri: &str, dns: &str| {
        let key = Key::new();
        let mut leaf = Fields::new(&seq(&[]), &root.fields.subject, &key.spki(), 2);
        leaf.set(NAMES, true, &seq(&[&tlv(0x86, uri.as_bytes()), &tlv(0x82, dns.as_bytes())]));
        root.named_by(&mut leaf);
        Trial {
            id: id.to_owned(),
            chain: pem("CERTIFICATE", &[leaf.signed_by(&root.key)]),
            key: pem("PRIVATE KEY", &[key.pkcs8().to_vec()]),
            roots: pem("CERTIFICATE", &[root.signed()]),
            lists: None,
        }
    };
    let own = "spiffe://cluster.local/ns/shop/sa/cart";
    let trials = [
        trial("own", own, "cart.shop.svc"),
        trial("full", own, "cart.shop.svc.cluster.local"),
        trial("domain", "spiffe://other.example/ns/shop/sa/cart", "cart.shop.svc"),
        trial("host", own, "www.other.example"),
    ];
    for program in [tools::oldest_envoy(), tools::envoy()] {
        let verdicts = envoys::verdicts(&program, &trials).await;
        let accepted: Vec<&str> = verdicts.iter().filter(|(_, verdict)| verdict.accepts()).map(|(id, _)| id.as_str()).collect();
        assert_eq!(accepted, ["full", "own"], "{verdicts:?}");
    }
}
