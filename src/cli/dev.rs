//! `sds-agent dev`: the agent with the embedded authority and callers known by their uid.

use std::{net::SocketAddr, path::PathBuf};

use super::{Exit, output};
use crate::config::{self, Dev, Env, Loaded};

/// The flags of `dev`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Where to serve [default: $XDG_RUNTIME_DIR/sds-agent/sds.sock, or /tmp/sds-agent/sds.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How long a certificate lives, at least 10s [default: 2m]
    #[arg(long, value_name = "DUR")]
    pub lifetime: Option<humantime::Duration>,
    /// The trust domain of all identities [default: example.org]
    #[arg(long, value_name = "TD")]
    pub trust_domain: Option<String>,
    /// Where health, metrics and the list of certificates are served, loopback only [default: 127.0.0.1:15090]
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<SocketAddr>,
}

const EXAMPLES: &str = "\
Every caller gets the identity spiffe://<trust domain>/uid/<its user id>, signed by an authority that lives in memory and
ends with the process.

Examples:
  sds-agent dev                           serve, and say how to ask
  sds-agent dev --lifetime 20s            rotate every ten seconds or so
  sds-agent dev --socket /tmp/a.sock --admin 127.0.0.1:0
                                          a second one beside it
  sds-agent fetch --watch                 in another terminal: see certificates rotate";

impl Args {
    /// The configuration that the flags ask for; errors have been told when this returns an exit code.
    pub fn load(self, env: Env<'_>) -> Result<Loaded, Exit> {
        let Self { socket, lifetime, trust_domain, admin } = self;
        let flags = Dev { socket, lifetime: lifetime.map(Into::into), trust_domain, admin };
        config::dev(flags, env).map(|config| Loaded { config, warnings: Vec::new() }).map_err(|errors| {
            output::tell(format_args!("{errors}"));
            Exit::Usage
        })
    }
}
