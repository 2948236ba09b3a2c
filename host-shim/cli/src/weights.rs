//! Weight files of `mlp-decouple`: what `inspect` prints of one, and `convert`.

use std::path::Path;

use kvhook_mlp_weights::report::Report;
use kvhook_mlp_weights::state_dict::{self, Choice, Fate, Outcome};
use kvhook_mlp_weights::{Kind, Mapped, Stored, Terms, WeightsError, pytorch, read, replace, v1, v2};
use serde_json::{Map, Value};

use crate::args::{Convert, WeightVersion};
use crate::error::CliError;
use crate::files;

/// Whether a file begins like a weight file or a checkpoint. One that cannot be opened does not.
pub fn is_weight_file(path: &Path) -> bool {
    Mapped::open(path).is_ok_and(|file| Kind::of(file.bytes()).is_some())
}

/// What a weight file holds, and whether it can be used.
///
/// # Errors
/// [`CliError::Weights`] for a file that cannot be read. One whose content is wrong is described, and not usable.
pub fn inspect(path: &Path, json: bool) -> Result<(String, bool), CliError> {
    let file = Mapped::open(path).map_err(|source| unusable(path, source))?;
    let read = read(file.bytes(), None);
    let finite = read.as_ref().map_or(Ok(()), Stored::check_finite);
    let report = read.as_ref().ok().map(Report::new);
    let problem = read.as_ref().err().or(finite.as_ref().err()).map(WeightsError::to_string);
    let name = path.display();
    let text = if json {
        let value = serde_json::json!({
            "file": name.to_string(), "passed": problem.is_none(), "problem": problem, "weights": report
        });
        format!("{value:#}\n")
    } else {
        let said = report.map_or_else(String::new, |report| report.to_text());
        let check = problem.as_ref().map_or("pass".into(), |problem| format!("FAIL\n  {problem}"));
        format!("{name}\n{said}\nCheck: {check}\n")
    };
    Ok((text, problem.is_none()))
}

/// Converts a file; what became of each tensor, and what was written, as text.
///
/// # Errors
/// [`CliError::Weights`], [`CliError::Terms`], [`CliError::Read`].
pub fn convert(options: &Convert) -> Result<String, CliError> {
    let wrong = |source| unusable(&options.input, source);
    let input = Mapped::open(&options.input).map_err(wrong)?;
    let (mut stored, outcomes) = take(input.bytes(), options).map_err(wrong)?;
    stored.check_finite().map_err(wrong)?;
    if let Some(path) = &options.terms {
        stored.terms = overlaid(&stored.terms, path)?;
        // A version 1 file behind this one says nothing of them.
        stored.origin = stored.origin.filter(|_| options.to == WeightVersion::V2);
    }
    let order = options.image_order.map(Into::into);
    let bytes = match options.to {
        WeightVersion::V1 => v1::write(&stored, order),
        WeightVersion::V2 => v2::write(&stored),
    };
    let bytes = bytes.map_err(wrong)?;
    // What will be there is read as a plugin would read it.
    let report = Report::new(&read(&bytes, order).map_err(wrong)?);
    replace(&options.output, &bytes).map_err(|source| unusable(&options.output, source))?;
    Ok(format!("{}{}\n{}", listed(&outcomes), options.output.display(), report.to_text()))
}

fn unusable(path: &Path, source: WeightsError) -> CliError {
    CliError::Weights { path: path.into(), source: Box::new(source) }
}

/// The weights in a file of any kind that can be converted, and what became of its tensors when it was a checkpoint.
fn take<'a>(bytes: &'a [u8], options: &Convert) -> Result<(Stored<'a>, Vec<Outcome>), WeightsError> {
    let dtype = options.dtype.map(Into::into);
    let tensors = match Kind::of(bytes) {
        Some(Kind::Zip | Kind::Pickle) => pytorch::read(bytes)?,
        Some(Kind::Safetensors) if !v2::is_ours(bytes)? => state_dict::from_safetensors(bytes)?,
        _ => {
            let stored = read(bytes, options.image_order.map(Into::into))?;
            let dtype = dtype.unwrap_or(stored.dtype);
            return Ok((stored.with_dtype(dtype)?, Vec::new()));
        }
    };
    let choice = Choice { prefix: options.prefix.clone(), dtype, terms: Terms::default() };
    state_dict::read(tensors, &choice)
}

/// The terms with those fields replaced that the file of `--terms` has.
fn overlaid(terms: &Terms, path: &Path) -> Result<Terms, CliError> {
    let wrong = |source| CliError::Terms { path: path.into(), source };
    let given: Map<String, Value> = serde_json::from_str(&files::read_text(path)?).map_err(wrong)?;
    let mut fields: Map<String, Value> = serde_json::to_value(terms).and_then(serde_json::from_value).map_err(wrong)?;
    fields.extend(given);
    serde_json::from_value(Value::Object(fields)).map_err(wrong)
}

/// One line for each tensor. Names come from the file: without control characters.
fn listed(outcomes: &[Outcome]) -> String {
    let width = outcomes.iter().map(|outcome| outcome.name.chars().count()).max().unwrap_or(0);
    let line = |outcome: &Outcome| {
        let fate = match &outcome.fate {
            Fate::Used(name) => format!("used as {name}"),
            Fate::Ignored(why) => format!("ignored: {why}"),
        };
        let line = format!("{:<width$}  {} {:?}  {fate}", outcome.name, outcome.dtype, outcome.shape);
        line.chars().filter(|c| !c.is_control()).chain(['\n']).collect::<String>()
    };
    outcomes.iter().map(line).collect()
}
