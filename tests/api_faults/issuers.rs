//! Failures of requests that exist.

use super::*;

impl World {
    /// Waits until `number` requests exist and their creates have been answered.
    async fn stuck(&self, number: usize) -> Vec<Value> {
        let requests = self.wire.api.until_count(CR, number).await;
        tokio::time::sleep(SECOND).await;
        requests
    }
}

#[tokio::test(start_paused = true)]
async fn a_deleted_or_relabelled_request_is_created_again() {
    for relabelled in [false, true] {
        let world = World::new();
        world.watching().await;
        world.dead.lock().unwrap().insert("mesh-ca".into());
        let lease = world.want("a");
        let name = world.stuck(1).await[0]["metadata"]["name"].as_str().unwrap().to_owned();
        if relabelled {
            world.wire.api.change(CR, "sds-agent", &name, |object| object["metadata"]["labels"] = json!({}));
        } else {
            world.wire.api.remove(CR, "sds-agent", &name);
        }
        world.until("another one", |api| (api.created(CR) == 2).then_some(())).await;
        world.dead.lock().unwrap().clear();
        world.wire.api.put("configmaps", json!({"metadata": {"name": "x", "namespace": "x"}}));
        world.assert_served(&[lease], 2).await;
        let told = world.log.lines("no new certificate");
        assert_eq!(told.len(), 1);
        assert!(told[0]["cause"].as_str().unwrap().ends_with("another client deleted or relabelled the request"), "{}", told[0]);
    }
}

/// A network failure of Vault ends a request permanently: the agent creates a new one later. It does not soon repeat a request that is
/// invalid, because only a change of the configuration helps.
#[tokio::test(start_paused = true)]
async fn a_failed_request_is_made_anew_soon_and_an_invalid_one_is_not() {
    let condition = |kind: &str, status: &str, reason: &str| json!({"type": kind, "status": status, "reason": reason, "message": "words"});
    for (refusal, soonest, latest) in [
        (condition("Ready", "False", "Failed"), Duration::from_millis(500), 3 * SECOND),
        (condition("InvalidRequest", "True", "BadUsages"), 240 * SECOND, 301 * SECOND),
    ] {
        let world = World::new();
        world.watching().await;
        world.refusals.lock().unwrap().push(refusal);
        let lease = world.want("a");
        world.until("another one", |api| (api.created(CR) == 2).then_some(())).await;
        let creates = world.seen("create");
        let between = creates[1].at - creates[0].at;
        assert!(between >= soonest && between <= latest, "{between:?}");
        assert_eq!(world.log.lines("no new certificate").len(), 1);
        let mut watch = lease.watch();
        tokio::time::timeout(HOUR, watch.wait_for(Option::is_some)).await.expect("in time").unwrap();
        // The failed request is kept for ten minutes, in which the certificate might be renewed.
        drop(lease);
        world.wire.api.until_count(CR, 0).await;
        assert_eq!(world.wire.api.created(CR), 2);
        assert!((world.metric("sds_agent_issuances_total{issuer=\"mesh\",result=\"ok\"}") - 1.0).abs() < 0.5);
        assert!((world.metric("sds_agent_issuances_total{issuer=\"mesh\",result=\"failed\"}") - 1.0).abs() < 0.5);
    }
}

#[tokio::test(start_paused = true)]
async fn eight_requests_stuck_at_a_dead_issuer_do_not_hold_up_another_issuers() {
    let world = World::new();
    world.watching().await;
    world.dead.lock().unwrap().insert("other-ca".into());
    let mut stuck: Vec<Lease> = (0..20).map(|n| world.want_other(&format!("w{n}"))).collect();
    // Six slots are for identities without a certificate; no request is parked yet.
    world.stuck(6).await;
    let start = Instant::now();
    let lease = world.want("a");
    let mut watch = lease.watch();
    tokio::time::timeout(SECOND, watch.wait_for(Option::is_some)).await.expect("at once").unwrap();
    assert!(start.elapsed() < SECOND / 2, "{:?}", start.elapsed());

    // The requests of the unresponsive issuer are parked, and its next ones are created.
    world.until("all", |api| (api.created(CR) == 21).then_some(())).await;
    world.dead.lock().unwrap().clear();
    world.wire.api.put("configmaps", json!({"metadata": {"name": "x", "namespace": "x"}}));
    for lease in &mut stuck {
        tokio::time::timeout(HOUR, lease.watch().wait_for(Option::is_some)).await.expect("in time").unwrap();
    }
    world.wire.api.until_count(CR, 0).await;
    assert_eq!((world.wire.api.created(CR), world.seen("delete").len()), (21, 21), "no pending request was given up");
}

#[tokio::test(start_paused = true)]
async fn two_hundred_identities_are_served_when_their_issuer_recovers() {
    let world = World::new();
    world.watching().await;
    world.dead.lock().unwrap().insert("mesh-ca".into());
    let leases: Vec<Lease> = (0..200).map(|n| world.want(&format!("w{n}"))).collect();
    tokio::time::sleep(Duration::from_secs(600)).await;
    let left = world.wire.api.objects(CR).len();
    assert!((40..=75).contains(&left), "{left} requests in ten minutes");
    let lines = world.log.lines("the issuer is unresponsive");
    assert_eq!((lines.len(), &lines[0]["issuer"]), (1, &json!("mesh")), "the name of all other lines and of the metrics");
    assert!(world.metric("sds_agent_issuances_parked") >= 32.0);
    let start = Instant::now();
    tokio::time::timeout(SECOND, world.want_other("x").watch().wait_for(Option::is_some)).await.expect("at once").unwrap();

    world.dead.lock().unwrap().clear();
    world.wire.api.put("configmaps", json!({"metadata": {"name": "x", "namespace": "x"}}));
    world.until("everybody's", |api| (api.created(CR) == 201).then_some(())).await;
    world.assert_served(&leases, 201).await;
    assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
    assert_eq!(world.log.lines("gets requests as usual again").len(), 1);
    assert_eq!(world.log.lines("no new certificate").len(), 0, "an identity has failed");
}
