//! `sds-agent certs`: lists the certificates of an agent, without keys, from its admin address.

use std::io::IsTerminal;

use agent_runtime::clock::{Clock, SystemClock};
use http::StatusCode;
use serde::Deserialize;

use super::{
    Exit,
    admin_client::{self, Address},
    output::{self, Format},
};

mod table;

/// The flags of `certs`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Admin address of the agent (admin.address of its configuration)
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:15090")]
    pub admin: Address,
    /// Format of the output: json is the answer of the admin address, one object with the list certificates
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

const EXAMPLES: &str = "\
Examples:
  sds-agent certs
  kubectl exec -n sds-agent ds/sds-agent -- sds-agent certs
  sds-agent certs -o json | jq -r '.certificates[] | select(.state != \"valid\") | [.spiffe_id, .state, .last_error] | @tsv'
  sds-agent certs -o json | jq -r '.certificates[] | [.spiffe_id, .serial, .fingerprint_sha256, .not_after] | @tsv'
  sds-agent certs --admin http://127.0.0.1:15190

States:
  valid           in use, and its renewal is not due yet
  overdue         in use, and its renewal is late
  expired         expired, and no longer served
  pending         the first certificate is being issued; the line below shows what it waits for
  held_by_client  a client still has a valid certificate from before the agent's start
  idle            has no subscriber: kept for the time of retention, and renewed only if a client fetches it

The fields of JSON: spiffe_id, dns_names, profile, issuer, state, serial, fingerprint_sha256, not_before, not_after, renew_at,
next_attempt, last_error, request (the CertificateRequest's name), waits_for, subscribers, pods. Absent values are null.

Exit codes: 0 printed, 1 an identity in use has an expired certificate (the list is printed), 64 usage, 69 no agent answers.";

/// The fields of the answer that the table needs.
#[derive(Debug, Deserialize)]
struct Answer {
    certificates: Vec<Row>,
}

/// One identity.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Row {
    spiffe_id: String,
    state: String,
    serial: Option<String>,
    not_after: Option<String>,
    renew_at: Option<String>,
    next_attempt: Option<String>,
    last_error: Option<String>,
    request: Option<String>,
    waits_for: Option<String>,
    subscribers: u64,
}

/// Requests the list and prints it.
pub async fn run(args: Args) -> Exit {
    let (exit, text) = match ask(&args).await {
        Ok(body) => match serde_json::from_str::<Answer>(&body) {
            Ok(answer) => (exit(&answer.certificates), show(args.output, body, answer.certificates)),
            Err(error) => {
                output::complain(format_args!("{}/certs does not answer with a list of certificates: {error}", args.admin));
                return Exit::Unavailable;
            }
        },
        Err(why) => {
            output::complain(format_args!("{why}"));
            return Exit::Unavailable;
        }
    };
    match output::say(&text) {
        Err(error) if exit == Exit::Ok => output::unsaid(&error),
        _ => exit,
    }
}

async fn ask(args: &Args) -> Result<String, String> {
    match admin_client::get(&args.admin, "/certs").await {
        Ok((StatusCode::OK, body)) => Ok(body),
        Ok((StatusCode::NOT_FOUND, _)) => {
            Err(format!("{} has no list of certificates; if it is metrics.address, name admin.address with --admin", args.admin))
        }
        Ok((status, _)) => Err(format!("{}/certs answers {status}", args.admin)),
        Err(error) => Err(format!(
            "{error}; check that the agent runs here: its admin address is on loopback, so run this command in its pod or on its node, \
             or name another address with --admin"
        )),
    }
}

fn exit(rows: &[Row]) -> Exit {
    if rows.iter().any(|row| row.state == "expired") { Exit::Failed } else { Exit::Ok }
}

fn show(format: Format, body: String, rows: Vec<Row>) -> String {
    match format {
        Format::Json => body,
        Format::Text => {
            let width = if std::io::stdout().is_terminal() { output::width() } else { None };
            table::text(rows, SystemClock.now(), width)
        }
    }
}
