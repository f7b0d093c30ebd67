//! Decides which requests of the node are orphans. It does no I/O.

use std::{collections::HashSet, sync::Arc, time::Duration};

use cert_manager::naming::{Agent, PROCESS_PREFIX};

use crate::issuer::certificate_request::tracker::{KEPT_FOR, Key, Record};

/// Age at which the request of an agent outside of a pod is an orphan: 1 h. The sweep cannot know whether that process still runs.
const PROCESS_GRACE: Duration = Duration::from_secs(3600);

/// Returns the requests of `unclaimed` whose agents no longer run. `live` has the UIDs of the node's running pods, read after `unclaimed`.
/// Without it, only requests of this pod and of agents outside of a pod can be orphans. A refused request stays for [`KEPT_FOR`], so that
/// an operator can read it.
pub(super) fn orphans(
    agent: &Agent,
    unclaimed: Vec<(Key, Record)>,
    live: Option<&HashSet<Arc<str>>>,
    now_unix_seconds: i64,
) -> Vec<(Key, Record)> {
    let own = agent.uid();
    let age = |record: &Record| Duration::from_secs(u64::try_from(now_unix_seconds - record.created).unwrap_or(0));
    let is_orphan = |record: &Record| {
        if record.instance == agent.instance {
            return true;
        }
        if record.refused && age(record) < KEPT_FOR {
            return false;
        }
        if record.agent == own {
            // An earlier process of this pod made it, and its keys are lost.
            return true;
        }
        if record.agent.starts_with(PROCESS_PREFIX) {
            return age(record) > PROCESS_GRACE;
        }
        live.is_some_and(|live| !live.contains(record.agent.as_str()))
    };
    unclaimed.into_iter().filter(|(_, record)| is_orphan(record)).collect()
}

#[cfg(test)]
mod tests {
    use workload_identity::{NodeEnvironment, PodRef};

    use super::*;

    #[test]
    fn only_requests_of_agents_that_have_gone_are_taken() {
        let pod = PodRef { namespace: "a".into(), name: "b".into(), uid: "own".into() };
        let agent = Agent::new(&NodeEnvironment { node_name: None, pod: Some(pod) }, None, 1);
        let live: HashSet<Arc<str>> = ["own".into(), "sibling".into()].into();
        let record = |agent: &str, instance: &str, refused| Record {
            uid: "u".into(),
            agent: agent.into(),
            instance: instance.into(),
            created: 1000,
            refused,
        };
        let key = Key { namespace: "a".into(), name: "r".into() };
        for (record, now, with_pods, without) in [
            (record("own", &agent.instance, false), 1000, true, true),
            (record("own", "before", false), 1000, true, true),
            (record("own", "before", true), 1000, false, false),
            (record("own", "before", true), 1601, true, true),
            (record("sibling", "x", false), 99_999, false, false),
            (record("gone", "x", false), 1000, true, false),
            (record("gone", "x", true), 1000, false, false),
            (record("", "", false), 1000, true, false),
            (record("process-1", "1", false), 1000, false, false),
            (record("process-1", "1", false), 5000, true, true),
        ] {
            let taken = |live| !orphans(&agent, vec![(key.clone(), record.clone())], live, now).is_empty();
            assert_eq!((taken(Some(&live)), taken(None)), (with_pods, without), "{record:?} at {now}");
        }
    }
}
