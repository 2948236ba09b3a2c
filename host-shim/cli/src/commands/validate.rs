//! `kvhook validate`: whether a plugin keeps the conformance rules.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::args::Validate;
use crate::error::{CliError, EXIT_CHECK_FAILED};
use crate::validate;
use crate::validate::report::Report;

/// Checks the rules and prints what was found; the exit code tells whether all hold.
///
/// # Errors
/// [`CliError::NotAPlugin`], [`CliError::Validate`], [`CliError::Write`].
pub fn execute(options: &Validate) -> Result<ExitCode, CliError> {
    let mut written = Ok(());
    if !options.json {
        written = print(&Report::new(options, String::new()).heading());
    }
    let report = validate::validate(options, &mut |rule| {
        if !options.json && written.is_ok() {
            written = print(&format!("{}\n", rule.to_text()));
        }
    })?;
    written?;
    // On a line of its own, whatever the plugin printed before.
    print(&if options.json { format!("\n{}", report.to_json()) } else { format!("\n{}\n", report.summary()) })?;
    Ok(if report.holds() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CHECK_FAILED) })
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|source| CliError::Write { path: "standard output".into(), source })
}
