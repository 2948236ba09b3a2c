//! `kvhook bench`: times of compressions, beside their floors and other programs.

use std::io::{self, Write};

use crate::args::Bench;
use crate::bench::error::BenchError;
use crate::bench::report::{Failure, Report};
use crate::bench::{run, table};
use crate::error::CliError;
use crate::files::write_text;

/// Prints each row when it is measured; the JSON file is written anew with each, so that a run that is cut off leaves what
/// it had.
///
/// # Errors
/// Those of [`run`]; [`CliError::Write`]; [`BenchError::Failed`] where rows could not be measured.
pub fn execute(options: &Bench) -> Result<(), CliError> {
    let mut written = Ok(());
    let mut show = |report: &Report| {
        let head = if report.rows.len() == 1 { table::head(report) } else { String::new() };
        if written.is_ok() {
            written = print(&(head + &table::last_row(report))).and_then(|()| save(options, report));
        }
    };
    let ran = run(options, &mut show);
    written?;
    let report = ran?;
    save(options, &report)?;
    match report.failed.first().cloned() {
        None => Ok(()),
        Some(Failure { row, why }) => {
            let failed = report.failed.len();
            Err(BenchError::Failed { failed, of: report.rows.len() + failed, row, why }.into())
        }
    }
}

fn save(options: &Bench, report: &Report) -> Result<(), CliError> {
    options.json.as_deref().map_or(Ok(()), |path| write_text(path, &report.to_json()))
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|source| CliError::Write { path: "standard output".into(), source })
}
