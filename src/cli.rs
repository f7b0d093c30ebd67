//! The command line: its words, its exit codes, and a module for each subcommand. Scripts rely on all of it.
//!
//! A subcommand reads no environment but what it is handed, and prints through [`output`].

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

pub mod admin_client;
pub mod approver;
pub mod certs;
pub mod check_config;
pub mod completions;
pub mod dev;
pub mod doctor;
pub mod explain;
pub mod fetch;
pub mod output;
pub mod run;

pub use run::Style;

/// A per-node agent that serves Envoy's secret discovery service with certificates from cert-manager.
#[derive(Debug, Parser)]
#[command(name = "sds-agent", version, about, after_help = EXAMPLES, max_term_width = 120)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The agent, as it runs on a node
    Run(run::Args),
    /// The agent with an authority of its own: needs no cluster and no configuration
    Dev(dev::Args),
    /// Ask for secrets as a workload would, and show them without their keys
    Fetch(fetch::Args),
    /// Decide which of the agents' requests are signed, by the node that each comes from
    Approver(approver::Args),
    /// What an agent holds, without keys: states, serial numbers, times, errors
    Certs(certs::Args),
    /// Tell every error of a configuration at once, and what it means
    CheckConfig(check_config::Args),
    /// What a field of the configuration means, or all of them; or their JSON Schema
    Explain(explain::Args),
    /// What is wrong with an agent, a process or a pod: the evidence, and the remedy
    Doctor(doctor::Args),
    /// A script that teaches a shell this command line
    Completions(completions::Args),
}

const EXAMPLES: &str = "\
Try it, without a cluster:
  sds-agent dev                                an agent on a socket of your own
  sds-agent fetch --watch                      in another terminal: see certificates rotate

On a node:
  sds-agent explain certificate                what its fields mean
  sds-agent check-config --config agent.yaml   what is wrong with it, all at once
  sds-agent run --config agent.yaml
  sds-agent certs                              what it holds, the most pressing first
  sds-agent doctor --config agent.yaml         what is wrong, and what to do about it
  sds-agent doctor --config agent.yaml --pid 4711   why a process is served, or is not

`sds-agent help COMMAND` shows a command's flags, examples and exit codes.

Exit codes: 0 fine, 1 failed, 64 usage or configuration, 69 upstream unavailable, 77 not permitted.";

impl Cli {
    /// Reads the arguments; what is to be said about them has been said when this returns an exit code.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, Exit> {
        Self::try_parse_from(args).map_err(|error| {
            // `--help` and `--version` come this way too. Where they cannot be printed, nobody reads them.
            let _ = error.print();
            if error.use_stderr() { Exit::Usage } else { Exit::Ok }
        })
    }
}

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// All is well.
    Ok,
    /// It failed.
    Failed,
    /// The command line or the configuration is wrong.
    Usage,
    /// What was asked is not there, or cannot serve now.
    Unavailable,
    /// The caller may not have it.
    NotPermitted,
}

impl Exit {
    /// The number that scripts see.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 64,
            Self::Unavailable => 69,
            Self::NotPermitted => 77,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &str) -> Result<Cli, Exit> {
        Cli::from_args(args.split(' ').map(OsString::from))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_command_teaches() {
        let mut command = Cli::command();
        // With what clap adds: `help`, which explains itself.
        command.build();
        let commands: Vec<_> = command.get_subcommands_mut().filter(|command| command.get_name() != "help").collect();
        assert!(commands.len() >= 7);
        for command in commands {
            let (name, help) = (command.get_name().to_owned(), command.render_long_help().to_string());
            assert!(help.contains("Example"), "{name} has no example:\n{help}");
            assert!(help.contains(&format!("\n  sds-agent {name}")), "no example of {name} can be copied:\n{help}");
            assert!(help.contains("Exit codes: 0 "), "{name} does not say how it ends:\n{help}");
            // Flags are wrapped by clap where there is a terminal; the rest stands as it is written.
            let long: Vec<_> = help.lines().filter(|line| !line.starts_with("          ") && line.chars().count() > 130).collect();
            assert!(long.is_empty(), "{name} has lines that no terminal shows: {long:?}");
        }
    }

    #[test]
    fn usage_errors_are_64_and_help_and_version_are_0() {
        for (args, exit) in [
            ("sds-agent", Exit::Usage),
            ("sds-agent frobnicate", Exit::Usage),
            ("sds-agent run", Exit::Usage),
            ("sds-agent approver", Exit::Usage),
            ("sds-agent dev --lifetime tomorrow", Exit::Usage),
            ("sds-agent fetch -o xml", Exit::Usage),
            ("sds-agent doctor --pid 0", Exit::Usage),
            ("sds-agent doctor --pod shop/cart", Exit::Usage),
            ("sds-agent doctor --config a --pod cart", Exit::Usage),
            ("sds-agent certs --admin https://127.0.0.1:15090", Exit::Usage),
            ("sds-agent completions tcsh", Exit::Usage),
            ("sds-agent explain a b", Exit::Usage),
            ("sds-agent --help", Exit::Ok),
            ("sds-agent fetch --help", Exit::Ok),
            ("sds-agent --version", Exit::Ok),
        ] {
            assert_eq!(parse(args).err(), Some(exit), "{args}");
        }
    }

    #[test]
    fn the_contract_of_the_command_line_is_accepted() {
        for args in [
            "sds-agent run --config /etc/sds-agent/agent.yaml",
            "sds-agent dev --socket /tmp/a.sock --lifetime 30s --trust-domain example.org --admin 127.0.0.1:0",
            "sds-agent fetch --socket /tmp/a.sock --name default --name ROOTCA --watch --api sds -o json --write-key key.pem --timeout 3s",
            "sds-agent check-config --config agent.yaml -o json",
            "sds-agent doctor --config agent.yaml -o json",
            "sds-agent approver --config /etc/sds-agent/config.yaml",
            "sds-agent doctor --pid 1",
            "sds-agent doctor",
            "sds-agent certs",
            "sds-agent certs --admin http://127.0.0.1:15090 -o json",
            "sds-agent completions bash",
            "sds-agent explain",
            "sds-agent explain certificate.renewAt -o json",
            "sds-agent doctor --config agent.yaml --pod shop/cart-0",
        ] {
            assert!(parse(args).is_ok(), "{args}");
        }
    }
}
