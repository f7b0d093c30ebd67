//! `sds-agent completions`: prints the completion script of a shell.

use clap::{CommandFactory, ValueEnum};

use super::{Cli, Exit, output};

/// The flags of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Shell of the script
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// A shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// bash, with the package bash-completion
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

const EXAMPLES: &str = "\
The script goes to standard output. It needs no agent.

Examples:
  source <(sds-agent completions bash)                                    for this shell only
  sds-agent completions bash > /etc/bash_completion.d/sds-agent           for all users
  sds-agent completions zsh > \"${fpath[1]}/_sds-agent\"
  sds-agent completions fish > ~/.config/fish/completions/sds-agent.fish

Exit codes: 0 printed, 1 the output failed, 64 usage.";

/// Prints the script.
pub fn print(args: &Args) -> Exit {
    match output::say(&script(args.shell)) {
        Ok(()) => Exit::Ok,
        Err(error) => output::unsaid(&error),
    }
}

fn script(shell: Shell) -> String {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sds-agent", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_learns_every_subcommand_and_its_flags() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for word in ["check-config", "doctor", "certs", "completions", "write-key", "admin"] {
                assert!(script.contains(word), "{shell:?} does not know {word}");
            }
        }
    }
}
