//! The state that a running agent reports: health on its socket, probes and metrics on its admin address.

use std::{path::Path, time::Duration};

use http::StatusCode;
use sds_server::grpc::client;
use tokio::time::timeout;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::report::Step;
use crate::{
    cli::{
        Exit,
        admin_client::{self, Address},
    },
    config::Config,
};

/// Timeout of a health check.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Checks the health of the server at `socket` with `grpc.health.v1`, as the agent's successor does.
pub(super) async fn health(socket: &Path) -> Step {
    let name = "health";
    let remedy = "check that an agent listens there, and see its log; an agent that drains is about to be replaced";
    let ask = async {
        let (connection, driver) = client::connect(socket).await.map_err(|error| error.to_string())?;
        let driver = tokio::spawn(driver);
        let answer = HealthClient::with_origin(connection, client::origin()).check(HealthCheckRequest::default()).await;
        driver.abort();
        answer.map(|answer| answer.into_inner().status()).map_err(|status| status.message().to_owned())
    };
    match timeout(ANSWER_TIMEOUT, ask).await {
        Ok(Ok(ServingStatus::Serving)) => Step::ok(name, "it serves (grpc.health.v1)"),
        Ok(Ok(status)) => Step::failed(name, Exit::Unavailable, format!("it answers {}", status.as_str_name()), remedy),
        Ok(Err(error)) => Step::failed(name, Exit::Unavailable, error, remedy),
        Err(_) => Step::failed(name, Exit::Unavailable, format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()), remedy),
    }
}

/// Values from the agent's metrics; `None` if they are not available.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Figures {
    /// Open file descriptors, and their limit.
    pub(super) files: Option<(u64, u64)>,
    pub(super) memory_locked: Option<bool>,
}

impl Figures {
    fn of(page: &str) -> Self {
        // Metrics of the process have no prefix `sds_agent_`.
        let value = |name: &str| {
            let of = |line: &str| {
                let (metric, value) = line.split_once(' ')?;
                (metric == name || metric.strip_prefix("sds_agent_") == Some(name)).then(|| value.split('.').next()?.parse::<u64>().ok())?
            };
            page.lines().find_map(of)
        };
        Self {
            files: value("process_open_fds").zip(value("process_max_fds")),
            memory_locked: value("memory_locked").map(|locked| locked != 0),
        }
    }
}

/// Checks liveness and readiness, and reads the metrics.
pub(super) async fn admin(config: &Config) -> (Vec<Step>, Figures) {
    let (agent, ready) = ("agent", "readiness");
    if config.admin.port() == 0 {
        let step =
            Step::unknown(agent, "admin.address has port 0, so the kernel chooses another port at each start", Some("give it a port"));
        return (vec![step], Figures::default());
    }
    let address = Address::from(config.admin);
    let alive = match admin_client::get(&address, "/livez").await {
        Ok((StatusCode::OK, _)) => Step::ok(agent, format!("{address}/livez answers")),
        Ok((status, _)) => {
            let remedy = "another program listens there: give admin.address another port";
            return (vec![Step::failed(agent, Exit::Unavailable, format!("{address}/livez answers {status}"), remedy)], Figures::default());
        }
        Err(error) => {
            let remedy =
                "check that the agent runs, and see its log; run this in its network namespace, because its admin address is on loopback";
            return (vec![Step::failed(agent, Exit::Unavailable, error.to_string(), remedy)], Figures::default());
        }
    };
    let ready = match admin_client::get(&address, "/readyz?verbose").await {
        Ok((StatusCode::OK, _)) => Step::ok(ready, "all conditions of readiness are met"),
        Ok((_, page)) => {
            let detail = page.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
            Step::failed(ready, Exit::Unavailable, detail, "the agent becomes ready by itself; if it does not, see the failed steps below")
        }
        Err(error) => Step::failed(ready, Exit::Unavailable, error.to_string(), "see the log of the agent"),
    };
    let figures = match admin_client::get(&address, "/metrics").await {
        Ok((StatusCode::OK, page)) => Figures::of(&page),
        _ => Figures::default(),
    };
    (vec![alive, ready], figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_whatever_their_prefix() {
        let page =
            "# TYPE sds_agent_memory_locked gauge\nsds_agent_memory_locked 0\nprocess_open_fds 31\nsds_agent_process_max_fds 1024.0\n";
        assert_eq!(Figures::of(page), Figures { files: Some((31, 1024)), memory_locked: Some(false) });
        assert_eq!(Figures::of("process_open_fds 31\n"), Figures::default());
    }
}
