//! `kvhook report`: a record of an engine that served, as text and as a page.

use std::fs::File;
use std::io::{self, BufReader, Write};

use crate::args::Report;
use crate::error::CliError;
use crate::files::write_text;
use crate::record::{self, Findings, Record};
use crate::{page, table};

/// Prints what was found, and writes the page. Lines that do not count are told on standard error.
///
/// # Errors
/// [`CliError::Read`]; [`CliError::EmptyRecord`] where no line counts; [`CliError::NoSuchArm`]; [`CliError::Write`].
pub fn execute(options: &Report) -> Result<(), CliError> {
    let (path, against) = (&options.record, options.against.as_deref());
    let unreadable = |source| CliError::Read { path: path.clone(), source };
    let record = record::read(BufReader::new(File::open(path).map_err(unreadable)?)).map_err(unreadable)?;
    let warnings = record.warnings();
    if record.settings.is_empty() {
        let why = warnings.first().cloned().unwrap_or_else(|| "it has no lines".into());
        return Err(CliError::EmptyRecord { path: path.clone(), why });
    }
    if let Some(name) = against.filter(|name| !record.settings.iter().any(|setting| setting.has_arm(name))) {
        return Err(CliError::NoSuchArm { name: name.into(), path: path.clone() });
    }
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    if let Some(out) = &options.out {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        write_text(out, &page::record::render(&record, &name, against))?;
    }
    io::stdout()
        .write_all(text(&record, against).as_bytes())
        .map_err(|source| CliError::Write { path: "standard output".into(), source })
}

fn text(record: &Record, against: Option<&str>) -> String {
    let of_setting = record.settings.iter().map(|setting| {
        let findings = Findings::of(setting, against);
        let sentences: String = findings.sentences.iter().map(|finding| format!("{}\n", finding.text)).collect();
        format!("{} on {}\n{}\n{sentences}", setting.model, setting.engine, table::arms(&findings))
    });
    of_setting.collect::<Vec<_>>().join("\n")
}
