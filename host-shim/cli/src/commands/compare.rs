//! `kvhook compare`: several arms on the same passages.

use std::io;

use crate::args::Compare;
use crate::arm::check_distinct;
use crate::error::CliError;
use crate::files::read_text;
use crate::measure::{self, Plan, Text};
use crate::{model, report};

/// Measures all arms and hands out the results.
///
/// # Errors
/// Each of [`CliError`] but those of `inspect`.
pub fn execute(options: &Compare) -> Result<(), CliError> {
    check_distinct(&options.arms)?;
    let texts = options.texts.iter().map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Text { name, content: read_text(path)? })
    });
    let texts = texts.collect::<Result<Vec<_>, CliError>>()?;
    let plan = Plan {
        texts: &texts,
        arms: &options.arms,
        prefix: options.prefix,
        continuation: options.continuation,
        passages: options.passages,
        cache: options.cache,
    };
    let comparison = measure::compare(&model::load_named(options.model.as_deref())?, &plan)?;
    report::deliver(&comparison, &options.output, &mut io::stdout().lock())
}
