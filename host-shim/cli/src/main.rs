//! Entry point of `kvhook`.

use std::process::ExitCode;

use clap::Parser;
use kvhook::args::{Cli, Command};
use kvhook::commands::{bench, compare, convert, demo, eval, inspect, new, probe, report, run, validate};
use kvhook::error::CliError;
use kvhook::logs;

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
    let verbose = if let Command::Run(run) = command { run.verbose } else { 0 };
    logs::print_to_stderr(verbose);
    match command {
        Command::Demo(options) => demo::execute(options)?,
        Command::Run(options) => run::execute(options)?,
        Command::Compare(options) => compare::execute(options)?,
        Command::Eval(options) => return eval::execute(options),
        Command::Probe(options) => probe::execute(options)?,
        Command::Report(options) => report::execute(options)?,
        Command::Bench(options) => bench::execute(options)?,
        Command::Inspect(options) => return inspect::execute(options),
        Command::Convert(options) => convert::execute(options)?,
        Command::New(options) => new::execute(options)?,
        Command::Validate(options) => return validate::execute(options),
    }
    Ok(ExitCode::SUCCESS)
}
