//! `sds-agent fetch`: fetches secrets as a workload does, and prints them without keys. It works with any SDS server.
//!
//! Without `--watch` it makes one call of `FetchSecrets`. With it, it keeps one `StreamSecrets` open with every name, until it is stopped.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use agent_runtime::clock::{Clock, SystemClock};
use clap::ValueEnum;
use tonic::{Code, Request};

use self::{
    client::Client,
    failure::Failure,
    key_file::KeyFile,
    resource::{Material, Resource},
    subscription::{Subscription, Taken},
};
use super::{Exit, output};
use crate::config::Env;

mod client;
mod endpoint;
mod failure;
mod key_file;
mod render;
mod resource;
mod subscription;
mod watch;

/// Time after the deadline in which the server's answer about the deadline may arrive.
const GRACE: Duration = Duration::from_secs(1);
/// Maximum of `--timeout`, one day.
const MAX_WAIT: Duration = Duration::from_secs(86_400);

/// The flags of `fetch`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Socket of the server [default: SPIFFE_ENDPOINT_SOCKET, or the first existing sds-agent/sds.sock in $XDG_RUNTIME_DIR,
    /// /tmp and /run]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// Name of a secret; may be repeated [default: default and ROOTCA]
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Keep running, and print every update; reconnect when the connection ends
    #[arg(long)]
    pub watch: bool,
    /// Time to wait for an answer, without --watch
    #[arg(long, value_name = "DUR", default_value = "10s")]
    pub timeout: humantime::Duration,
    /// API of the server
    #[arg(long, value_name = "API", default_value = "sds", hide_possible_values = true)]
    pub api: Api,
    /// Format of the output: text, json (one object for each update) or pem
    #[arg(short, long, value_name = "FORMAT", default_value = "text", hide_possible_values = true)]
    pub output: Format,
    /// Write the private key to this file, which only its owner can read; with --watch it is replaced at each rotation
    #[arg(long, value_name = "FILE")]
    pub write_key: Option<PathBuf>,
}

/// The API of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Api {
    /// Envoy's secret discovery service, v3
    Sds,
    /// The SPIFFE Workload API
    Workload,
}

/// The format of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For users
    Text,
    /// One object for each update
    Json,
    /// Certificates only
    Pem,
}

const EXAMPLES: &str = "\
The output contains no private key; only --write-key writes the key of the answer. Names without an answer are listed on
standard error.

Examples:
  sds-agent fetch                                      print your certificate and the trust bundle
  sds-agent fetch --watch                              print a line for each rotation
  sds-agent fetch -o json | jq -r .not_after
  sds-agent fetch --name ROOTCA -o pem > roots.pem
  sds-agent fetch --name default -o pem --write-key key.pem > chain.pem
  sds-agent fetch --socket unix:///run/other/agent.sock --name spiffe://example.org

Exit codes: 0 answered, 1 failed, 64 usage, 69 no server or no answer, 77 the server has no identity for this process.";

/// Prints one piece of text; tests collect it instead.
type Out<'a> = &'a mut (dyn FnMut(&str) -> io::Result<()> + Send);

/// Fetches and prints.
pub async fn fetch(args: Args, env: Env<'_>) -> Exit {
    match ask(args, env, &mut output::say).await {
        Ok(()) => Exit::Ok,
        Err(Failure::Unsaid(error)) => output::unsaid(&error),
        Err(failure) => {
            output::complain(format_args!("{failure}"));
            failure.exit()
        }
    }
}

async fn ask(args: Args, env: Env<'_>, out: Out<'_>) -> Result<(), Failure> {
    if args.api == Api::Workload {
        let sentence = "--api workload: this version supports only SDS; leave the flag out, or use --api sds";
        return Err(Failure::Usage(sentence.to_owned()));
    }
    let socket = endpoint::choose(args.socket.as_deref(), env, Path::exists).map_err(Failure::Usage)?;
    let mut names: Vec<String> = Vec::new();
    for name in if args.names.is_empty() { vec!["default".to_owned(), "ROOTCA".to_owned()] } else { args.names } {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut show = Show { format: args.output, live: args.watch, key_file: args.write_key.map(KeyFile::new), out };
    let mut subscription = Subscription::new(names);
    if args.watch {
        return watch::watch(&socket, &mut subscription, &mut show).await;
    }
    let timeout = MAX_WAIT.min(args.timeout.into());
    let mut client = client::connect(&socket).await?;
    let first_problem = match tokio::time::timeout(timeout + GRACE, once(&mut client, &mut subscription, &mut show, timeout)).await {
        Ok(result) => result?,
        Err(_) => return Err(Failure::Timeout(timeout)),
    };
    let missing = subscription.missing().join(", ");
    match (first_problem, subscription.answered()) {
        (Some(problem), _) => Err(Failure::Resource(problem)),
        (None, false) => Err(Failure::Nothing(missing)),
        (None, true) => {
            if !missing.is_empty() {
                output::complain(format_args!("no answer for {}", output::printable(&missing)));
            }
            Ok(())
        }
    }
}

/// Calls `FetchSecrets`. If the server supports only streams, reads a stream until every name has an answer.
async fn once(
    client: &mut Client,
    subscription: &mut Subscription,
    show: &mut Show<'_>,
    timeout: Duration,
) -> Result<Option<resource::Error>, Failure> {
    let mut request = Request::new(subscription.first());
    request.set_timeout(timeout);
    match client.fetch_secrets(request).await {
        Ok(response) => {
            let Taken { updates, problems, .. } = subscription.take(response.into_inner());
            show.all(&updates)?;
            Ok(first_told(problems))
        }
        Err(status) if status.code() == Code::Unimplemented => {
            let (replies, mut responses) = client::stream(client, subscription.first()).await?;
            let end = tokio::time::sleep(timeout);
            tokio::pin!(end);
            let mut all = Vec::new();
            while !subscription.missing().is_empty() {
                let response = tokio::select! {
                    response = responses.message() => response.map_err(Failure::status)?,
                    () = &mut end => None,
                };
                let Some(response) = response else { break };
                let Taken { updates, problems, reply } = subscription.take(response);
                show.all(&updates)?;
                all.extend(problems);
                // If the connection has ended, the next read returns the error.
                let _ = replies.send(reply).await;
            }
            Ok(first_told(all))
        }
        Err(status) => Err(Failure::status(status)),
    }
}

/// Prints all problems except the first, which the caller returns.
fn first_told(problems: Vec<resource::Error>) -> Option<resource::Error> {
    let mut problems = problems.into_iter();
    let first = problems.next();
    problems.for_each(|problem| output::complain(format_args!("{problem}")));
    first
}

/// Prints resources in the format of the flags.
struct Show<'a> {
    format: Format,
    /// Whether text has one line for each update instead of a block.
    live: bool,
    key_file: Option<KeyFile>,
    out: Out<'a>,
}

impl Show<'_> {
    fn all(&mut self, resources: &[Resource]) -> Result<(), Failure> {
        resources.iter().try_for_each(|resource| self.one(resource, SystemClock.now()))
    }

    /// Writes the key to its file before it prints the certificate.
    fn one(&mut self, resource: &Resource, now: SystemTime) -> Result<(), Failure> {
        if let (Some(file), Material::Certificate { key, .. }) = (&mut self.key_file, &resource.material) {
            file.write(&resource.name, key.as_ref())?;
        }
        let text = match (self.format, self.live) {
            (Format::Text, true) => render::line(resource, now),
            (Format::Text, false) => render::block(resource, now),
            (Format::Json, _) => render::json(resource),
            (Format::Pem, _) => render::pem(resource),
        };
        (self.out)(&text).map_err(Failure::Unsaid)
    }
}

#[cfg(test)]
mod server;
#[cfg(test)]
mod tests;
