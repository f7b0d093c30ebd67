//! Creates a request exactly once, even if answers are lost.
//!
//! Only this process uses the name, so that a retry under the same name is safe. A 409 means that an earlier attempt succeeded. The watch
//! may show the request before the API server answers.

use std::time::Duration;

use agent_kube::{Call, Cause, Failure};
use cert_manager::CertificateRequest;
use kube::{Api, api::PostParams};
use tokio::time::sleep;

use crate::issuer::{
    Error, Retry,
    certificate_request::{RESOURCE, Requests, api_error, tracker::RequestHandle},
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::issuer::cert_manager::create";

/// Attempts with an uncertain result, after which the order fails.
const MAX_TRIES: u32 = 4;
/// Wait before the second attempt. It doubles with each further attempt.
const INITIAL_BACKOFF: Duration = Duration::from_millis(500);
/// Time to wait for the API server's answer after the watch has shown the request.
const LATE_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Creates `object` and records the result in `handle`.
pub(super) async fn create(requests: &Requests, handle: &mut RequestHandle, object: &CertificateRequest) -> Result<(), Error> {
    let key = handle.key().clone();
    let api: Api<CertificateRequest> = Api::namespaced(requests.client().clone(), &key.namespace);
    let call = Call { verb: "create", resource: RESOURCE, name: None, namespace: Some(&key.namespace) };
    let mut uncertain = false;
    let mut tries = 1;
    loop {
        let parameters = PostParams::default();
        let answer = tokio::select! {
            biased;
            answer = api.create(&parameters, object) => answer,
            () = shown_for(handle, LATE_ANSWER_TIMEOUT) => {
                handle.created(None);
                return Ok(());
            }
        };
        let failure = match answer {
            Ok(created) => {
                handle.created(created.metadata.uid);
                return Ok(());
            }
            Err(error) => Failure::of(&error, &call),
        };
        if failure.cause == Cause::AlreadyExists {
            return resolve(&api, handle, object).await;
        }
        uncertain |= failure.cause.is_ambiguous();
        if !failure.cause.is_ambiguous() || tries == MAX_TRIES {
            if !uncertain {
                handle.leave();
            }
            if failure.cause == Cause::Policy {
                requests.check_node().await;
            }
            return Err(api_error(&call, failure));
        }
        tracing::debug!(target: LOG_TARGET, request = %key.name, error = %failure, tries, "the result of a create is uncertain; retrying under the same name");
        tokio::select! {
            () = sleep(jittered(INITIAL_BACKOFF * 2_u32.pow(tries - 1))) => {}
            () = handle.shown() => {}
        }
        tries += 1;
    }
}

/// Handles a name that exists already: an earlier attempt of this agent made it, or a client that guessed the name.
async fn resolve(api: &Api<CertificateRequest>, handle: &mut RequestHandle, object: &CertificateRequest) -> Result<(), Error> {
    let key = handle.key().clone();
    let call = Call { verb: "get", resource: RESOURCE, name: Some(&key.name), namespace: Some(&key.namespace) };
    match api.get(&key.name).await {
        Ok(found) if found.spec.request == object.spec.request => {
            tracing::info!(target: LOG_TARGET, request = %key.name, "an earlier create had arrived; going on with it");
            handle.created(found.metadata.uid);
            Ok(())
        }
        Ok(_) => {
            handle.leave();
            let message = "a request of this name exists that the agent did not make".to_owned();
            Err(Error::Api { action: call.to_string(), message, retry: Retry::Backoff })
        }
        Err(error) => Err(api_error(&call, Failure::of(&error, &call))),
    }
}

async fn shown_for(handle: &RequestHandle, grace: Duration) {
    handle.shown().await;
    sleep(grace).await;
}

/// Returns a random duration between half of `pause` and all of it.
pub(super) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + 0.5 * fastrand::f64())
}
