//! Parses the arguments, runs the subcommand in a runtime and returns its exit code. Everything else is in the library.

use std::{future::Future, process::ExitCode};

use sds_agent::{
    app::File,
    cli::{self, Cli, Command, Exit, Style},
    config::{self, Loaded},
};
use tokio::runtime::Builder;

fn main() -> ExitCode {
    let cli = match Cli::from_args(std::env::args_os()) {
        Ok(cli) => cli,
        Err(exit) => return exit.into(),
    };
    // An error means that a provider is already installed.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let env = &config::process_environment;
    match cli.command {
        Command::Run(args) => {
            let file = File { path: args.config.clone(), env: config::process_environment };
            start(args.load(env), Some(file), Style::Run)
        }
        Command::Dev(args) => start(args.load(env), None, Style::Dev),
        Command::Approver(args) => match args.load(env) {
            Ok(ready) => told(cli::approver::start(ready, env)),
            Err(exit) => exit.into(),
        },
        Command::MountHelper(args) => match args.load(env) {
            Ok(ready) => told(cli::mount_helper::start(ready, env)),
            Err(exit) => exit.into(),
        },
        Command::Fetch(args) => block_on(Builder::new_current_thread(), async { Ok(cli::fetch::fetch(args, env).await.into()) }),
        Command::Doctor(args) => block_on(Builder::new_current_thread(), async { Ok(cli::doctor::run(args, env).await.into()) }),
        Command::Certs(args) => block_on(Builder::new_current_thread(), async { Ok(cli::certs::run(args).await.into()) }),
        Command::Completions(args) => cli::completions::print(&args).into(),
        Command::CheckConfig(args) => cli::check_config::check(&args, env).into(),
        Command::Explain(args) => cli::explain::print(&args).into(),
    }
}

fn start(loaded: Result<Loaded, Exit>, file: Option<File>, style: Style) -> ExitCode {
    match loaded {
        Ok(loaded) => told(cli::run::start(&loaded, file, style, &config::process_environment)),
        Err(exit) => exit.into(),
    }
}

fn block_on(mut runtime: Builder, work: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    told(runtime.enable_all().build().map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(work)))
}

fn told(done: anyhow::Result<ExitCode>) -> ExitCode {
    done.unwrap_or_else(|error| {
        cli::output::complain(format_args!("{error:#}"));
        Exit::Failed.into()
    })
}
