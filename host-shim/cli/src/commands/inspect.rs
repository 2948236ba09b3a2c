//! `kvhook inspect`: what a plugin's file or a weight file says of itself, and whether it would be taken.

use std::io::{self, Write};
use std::process::ExitCode;

use kvhook_host::load::{Policy, Source};

use crate::args::Inspect;
use crate::error::{CliError, EXIT_CHECK_FAILED};
use crate::inspect::Inspection;
use crate::plugins;
use crate::weights;

/// Prints the inspection; the exit code tells whether a check failed.
///
/// # Errors
/// [`CliError::Plugin`] for a file that is no plugin, where no checks were asked for that would say so;
/// [`CliError::Weights`] for a weight file that cannot be read at all; [`CliError::Write`].
pub fn execute(options: &Inspect) -> Result<ExitCode, CliError> {
    if weights::is_weight_file(&options.file) {
        let (text, usable) = weights::inspect(&options.file, options.json)?;
        return print(&text, usable);
    }
    let file = options.file.to_string_lossy().into_owned();
    // Here a name is a file's, not a plugin's.
    let path = std::path::absolute(&options.file).unwrap_or_else(|_| options.file.clone());
    let mut inspection = match kvhook_host::load::inspect(&path) {
        Ok(said) => Inspection::new(file, said),
        Err(_) if options.load => Inspection { file, ..Inspection::default() },
        Err(error) => return Err(CliError::Plugin(error)),
    };
    if options.load {
        let path = path.to_string_lossy();
        let policy = Policy::new(plugins::folders([&*path]), None);
        inspection.checks =
            kvhook_host::load::checks(&policy, &path, Source::Operator, None).into_iter().map(Into::into).collect();
    }
    let text = if options.json { inspection.to_json() } else { inspection.to_text() };
    print(&text, inspection.passed())
}

fn print(text: &str, passed: bool) -> Result<ExitCode, CliError> {
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|source| CliError::Write { path: "standard output".into(), source })?;
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CHECK_FAILED) })
}
