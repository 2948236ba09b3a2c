//! `kvhook convert`: a weight file for `mlp-decouple` out of a checkpoint, or out of one of another version.

use std::io::{self, Write};

use crate::args::Convert;
use crate::error::CliError;
use crate::weights;

/// Converts, and prints what became of each tensor and what was written.
///
/// # Errors
/// [`CliError::Weights`], [`CliError::Terms`], [`CliError::Read`], [`CliError::Write`].
pub fn execute(options: &Convert) -> Result<(), CliError> {
    let text = weights::convert(options)?;
    io::stdout().write_all(text.as_bytes()).map_err(|source| CliError::Write { path: "standard output".into(), source })
}
