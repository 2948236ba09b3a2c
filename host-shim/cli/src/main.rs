//! Entry point of `kvhook`.

use std::process::ExitCode;

use clap::Parser;
use kvhook::args::{Cli, Command};
use kvhook::error::CliError;

fn main() -> ExitCode {
    match execute(&Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn execute(command: &Command) -> Result<ExitCode, CliError> {
    Err(CliError::NotInThisBuild(match command {
        Command::Demo(_) => "demo",
        Command::Run(_) => "run",
        Command::Compare(_) => "compare",
        Command::Inspect(_) => "inspect",
    }))
}
