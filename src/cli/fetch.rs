//! `sds-agent fetch`: asks an SDS server as a workload would, and shows what it answers without the keys. Works with any SDS server.
//!
//! Without `--watch` one `FetchSecrets`; with it one `StreamSecrets` with every name, for ever (`watch`).

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

/// How long the server's own answer to a deadline may take to arrive.
const GRACE: Duration = Duration::from_secs(1);
/// Nobody waits longer for one answer.
const MAX_WAIT: Duration = Duration::from_secs(86_400);

/// The flags of `fetch`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The server's socket [default: SPIFFE_ENDPOINT_SOCKET, or the first there is of $XDG_RUNTIME_DIR, /tmp and /run with
    /// /sds-agent/sds.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// A secret to ask for; may be repeated [default: default and ROOTCA]
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Stay, and show every update; reconnect when the server goes away
    #[arg(long)]
    pub watch: bool,
    /// How long to wait for an answer, without --watch
    #[arg(long, value_name = "DUR", default_value = "10s")]
    pub timeout: humantime::Duration,
    /// The interface to ask
    #[arg(long, value_name = "API", default_value = "sds", hide_possible_values = true)]
    pub api: Api,
    /// How to print: text, json (one object for each update) or pem
    #[arg(short, long, value_name = "FORMAT", default_value = "text", hide_possible_values = true)]
    pub output: Format,
    /// Write the private key to this file, which nobody else can read; with --watch it is replaced at each rotation
    #[arg(long, value_name = "FILE")]
    pub write_key: Option<PathBuf>,
}

/// The interface to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Api {
    /// Envoy's secret discovery service, v3
    Sds,
    /// The SPIFFE Workload API
    Workload,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// One object for each update
    Json,
    /// Certificates only
    Pem,
}

const EXAMPLES: &str = "\
What is shown has no private key in it; only --write-key takes the key out of the answer. A name that the server does not
answer is told on standard error.

Examples:
  sds-agent fetch                                      your own certificate and the trust bundle
  sds-agent fetch --watch                              a line for each rotation
  sds-agent fetch -o json | jq -r .not_after
  sds-agent fetch --name ROOTCA -o pem > roots.pem
  sds-agent fetch --name default -o pem --write-key key.pem > chain.pem
  sds-agent fetch --socket unix:///run/other/agent.sock --name spiffe://example.org

Exit codes: 0 answered, 1 failed, 64 usage, 69 no server or no answer, 77 the server knows no identity for you.";

/// Prints one piece of text; a test takes it instead.
type Out<'a> = &'a mut (dyn FnMut(&str) -> io::Result<()> + Send);

/// Asks and prints.
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
        let sentence = "--api workload: this version serves and asks SDS only; leave the flag out, or use --api sds";
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

/// One `FetchSecrets`, or as much of a stream as answers every name where the server has nothing else.
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
                // Where the server has gone, the next message says so.
                let _ = replies.send(reply).await;
            }
            Ok(first_told(all))
        }
        Err(status) => Err(Failure::status(status)),
    }
}

/// Tells all problems but the first, which the caller ends with.
fn first_told(problems: Vec<resource::Error>) -> Option<resource::Error> {
    let mut problems = problems.into_iter();
    let first = problems.next();
    problems.for_each(|problem| output::complain(format_args!("{problem}")));
    first
}

/// Shows resources as the flags ask.
struct Show<'a> {
    format: Format,
    /// One line for each update, where otherwise there is room.
    live: bool,
    key_file: Option<KeyFile>,
    out: Out<'a>,
}

impl Show<'_> {
    fn all(&mut self, resources: &[Resource]) -> Result<(), Failure> {
        resources.iter().try_for_each(|resource| self.one(resource, SystemClock.now()))
    }

    /// The key is in its file before its certificate is shown.
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
