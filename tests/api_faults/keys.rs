//! A private key in data from the cluster: no part of it, in any form, reaches the log, `/certs` or an Event.

use agent_runtime::text::test_keys::Key;

use super::*;

/// A time in which an order is retried more than once, even with the longest backoff, and the pod gets an Event.
const A_WHILE: Duration = Duration::from_secs(320);

impl World {
    /// A pod requests a certificate for [`A_WHILE`]; by then every failure is visible.
    async fn asked_for_a_while(&self) {
        self.watching().await;
        let pod = PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: "pod-1".into() };
        let _lease = self.store.lease(&identity("a"), Demand::Now, Some(pod));
        tokio::time::sleep(A_WHILE).await;
        // Guards against a test that checks nothing.
        assert!(self.log.count("no new certificate") + self.log.count("still waits") > 0, "{}", self.log.text());
        assert_eq!(self.inventory.rows().len(), 1);
        assert!(!self.wire.api.objects("events").is_empty(), "no Event: {}", self.log.text());
    }

    /// Asserts that no output contains a part of `key`.
    fn assert_tame(&self, key: &Key, what: &str) {
        let log = self.log.text();
        for line in log.lines() {
            assert!(line.len() < 4096, "{what}: a line of {} bytes", line.len());
        }
        let certs = json!(self.inventory.rows()).to_string();
        let events = json!(self.wire.api.objects("events")).to_string();
        for (sink, text) in [("the log", log), ("/certs", certs), ("an Event", events)] {
            assert_eq!(key.leak_in(&text), None, "{what}: {sink}: {text}");
        }
        let told = self.inventory.rows()[0]["last_error"].as_str().map_or(0, str::len);
        assert!(told < 4096, "{what}: last_error has {told} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_in_an_issuers_answer_is_not_shown() {
    let key = Key::ecdsa();
    for (name, input) in key.inputs() {
        let world = World::new();
        let ready = json!([{"type": "Ready", "status": "True", "reason": "Issued", "message": input}]);
        let encoded = STANDARD.encode(&input);
        for (certificate, ca) in [(&encoded, &encoded), (&input, &input)] {
            let status = json!({"conditions": ready, "certificate": certificate, "ca": ca});
            world.refusals.lock().unwrap().extend(std::iter::repeat_n(json!({"status": status}), 10));
        }
        world.asked_for_a_while().await;
        world.assert_tame(&key, name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_in_a_conditions_words_is_not_shown() {
    let key = Key::ecdsa();
    let conditions = [("Denied", "True", ""), ("InvalidRequest", "True", ""), ("Ready", "False", "Failed"), ("Ready", "False", "Pending")];
    for (at, (name, input)) in key.some_texts().enumerate() {
        // Each text is used with one condition, and each condition with every form.
        let (kind, status, reason) = conditions[at % conditions.len()];
        let reason = if reason.is_empty() { input.as_str() } else { reason };
        let prefix = ["", "Vault failed to sign certificate: failed to sign certificate by vault: x509: "][at / conditions.len() % 2];
        let world = World::new();
        let condition = json!({"type": kind, "status": status, "reason": reason, "message": format!("{prefix}{input}")});
        let approved = json!({"type": "Approved", "status": "True", "reason": "test"});
        let status = json!({"conditions": [approved, condition]});
        world.refusals.lock().unwrap().extend(std::iter::repeat_n(json!({"status": status}), 20));
        world.asked_for_a_while().await;
        world.assert_tame(&key, &format!("{kind}: {name}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_in_the_api_servers_words_is_not_shown() {
    let key = Key::ecdsa();
    for (at, (name, text)) in key.some_texts().enumerate() {
        let code = [403, 409, 422, 500][at % 4];
        let status = json!({"kind": "Status", "code": code, "reason": "x", "message": format!("admission webhook denied: {text}")});
        let world = World::new();
        world.wire.api.fail("create", CR, agent_kube::fake::Fault::Status(code, status.clone()), usize::MAX);
        world.wire.api.fail("get", "clusterissuers", agent_kube::fake::Fault::Status(code, status), 2);
        world.asked_for_a_while().await;
        world.assert_tame(&key, &format!("{code}: {name}"));
    }
}
