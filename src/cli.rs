//! The command line: flags, exit codes, and a module for each subcommand. Scripts depend on flags and exit codes.
//!
//! A subcommand reads the environment only through the function that it receives, and prints through [`output`].

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
pub mod mount_helper;
pub mod output;
pub mod run;

pub use run::Style;

/// A per-node agent that serves Envoy's secret discovery service with certificates from cert-manager.
#[derive(Debug, Parser)]
#[command(name = "sds-agent", version, about, after_help = EXAMPLES, max_term_width = 120)]
pub struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent on a node
    Run(run::Args),
    /// Run an agent with its own authority, without a cluster and without a configuration
    Dev(dev::Args),
    /// Fetch secrets as a workload does, and print them without private keys
    Fetch(fetch::Args),
    /// Approve or deny the agents' requests, by the node that each comes from
    Approver(approver::Args),
    /// Publish the volumes of per-pod sockets for the kubelet, beside an agent
    MountHelper(mount_helper::Args),
    /// List the certificates of an agent, without keys: states, serial numbers, times, errors
    Certs(certs::Args),
    /// Check a configuration: print all of its errors, or a summary
    CheckConfig(check_config::Args),
    /// Describe one field of the configuration or all fields, or print their JSON Schema
    Explain(explain::Args),
    /// Diagnose an agent, a process or a pod: print the evidence and the remedies
    Doctor(doctor::Args),
    /// Print the completion script of a shell
    Completions(completions::Args),
}

const EXAMPLES: &str = "\
Without a cluster:
  sds-agent dev                                run an agent on a socket of your own
  sds-agent fetch --watch                      in another terminal: watch certificates rotate

On a node:
  sds-agent explain certificate                describe the fields of a section
  sds-agent check-config --config agent.yaml   print all errors
  sds-agent run --config agent.yaml
  sds-agent certs                              list its certificates, the most urgent first
  sds-agent doctor --config agent.yaml         diagnose the agent, and print remedies
  sds-agent doctor --config agent.yaml --pid 4711   show why a process is served, or is not

`sds-agent help COMMAND` prints the flags, examples and exit codes of a command.

Exit codes: 0 success, 1 failure, 64 usage or configuration, 69 upstream unavailable, 77 not permitted.";

impl Cli {
    /// Parses the arguments. An error, the help or the version is already printed when this returns an exit code.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, Exit> {
        Self::try_parse_from(args).map_err(|error| {
            // `--help` and `--version` are errors of clap too. A failure to print them has no reader and is ignored.
            let _ = error.print();
            if error.use_stderr() { Exit::Usage } else { Exit::Ok }
        })
    }
}

/// The exit code of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Success.
    Ok,
    /// The command failed.
    Failed,
    /// The command line or the configuration is wrong.
    Usage,
    /// The server or agent that was called does not exist or cannot answer now.
    Unavailable,
    /// The caller has no permission.
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
        // Adds clap's own command `help`, which needs no example.
        command.build();
        let commands: Vec<_> = command.get_subcommands_mut().filter(|command| command.get_name() != "help").collect();
        assert!(commands.len() >= 7);
        for command in commands {
            let (name, help) = (command.get_name().to_owned(), command.render_long_help().to_string());
            assert!(help.contains("Example"), "{name} has no example:\n{help}");
            assert!(help.contains(&format!("\n  sds-agent {name}")), "no example of {name} can be copied:\n{help}");
            assert!(help.contains("Exit codes: 0 "), "{name} does not say how it ends:\n{help}");
            // clap wraps the descriptions of flags to the width of the terminal, but not the other lines.
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
            "sds-agent mount-helper --config /etc/sds-agent/config.yaml",
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
