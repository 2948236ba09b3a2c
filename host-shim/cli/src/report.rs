//! Hands a comparison to its readers: the terminal, and the files that were asked for.

use std::io::Write;

use crate::args::Output;
use crate::error::CliError;
use crate::files::write_text;
use crate::results::Comparison;
use crate::{page, table};

/// Prints the tables to `out` and writes the JSON and HTML files of `files`.
///
/// The files come first: a closed pipe must not cost a user the results of a long run.
///
/// # Errors
/// [`CliError::Write`] with the file that could not be written.
pub fn deliver(comparison: &Comparison, files: &Output, out: &mut impl Write) -> Result<(), CliError> {
    if let Some(path) = &files.json {
        write_text(path, &comparison.to_json())?;
    }
    if let Some(path) = &files.html {
        write_text(path, &page::render(comparison))?;
    }
    out.write_all(text(comparison).as_bytes())
        .map_err(|source| CliError::Write { path: "standard output".into(), source })
}

/// What the terminal shows. Differences and details come only with several passages: for one they add nothing.
fn text(comparison: &Comparison) -> String {
    let mut text = table::measures(comparison);
    if comparison.passages.len() > 1 {
        text = text + "\n" + &table::details(comparison);
    }
    let fallbacks = table::fallbacks(comparison);
    if !fallbacks.is_empty() {
        text = text + "\n" + &fallbacks;
    }
    if let Some(passage) = comparison.passages.first() {
        let words = table::first_words(comparison, 0);
        text += &format!("\nFirst words after {}, token {}\n{words}\n", passage.text, passage.start);
    }
    text
}
