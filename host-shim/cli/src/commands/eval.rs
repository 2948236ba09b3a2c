//! `kvhook eval`: a plugin against the controls.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kvhook_host::load::{self, Policy, Source, is_bare_name};

use crate::args::{CacheDtype, CacheKind, CacheOptions, Eval};
use crate::arm::{ArmSpec, FULL, MAX_NAME, NO_PLUGIN};
use crate::error::{CliError, EXIT_CHECK_FAILED};
use crate::eval::Evaluation;
use crate::eval::config::{value, with_keep};
use crate::eval::controls::CONTROLS;
use crate::files::{read_text, write_text};
use crate::measure::{Plan, Session, Text};
use crate::progress::Progress;
use crate::results::Comparison;
use crate::{model, page, plugins, table};

/// Texts in the public domain, from which passages are taken where no others are named.
const TEXTS: [(&str, &str); 2] = [
    ("moby-dick.txt", include_str!("../../../../tests/text/moby-dick.txt")),
    ("state-of-the-union.txt", include_str!("../../../../tests/text/state-of-the-union.txt")),
];

/// Measures the plugin and the controls until the passages or the minutes are over, and prints what came out. The exit code
/// tells whether the plugin failed.
///
/// # Errors
/// Each of [`CliError`] but those of other commands; [`CliError::NothingCompressed`].
pub fn execute(options: &Eval) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let arm = own_arm(options)?;
    let texts = texts(options)?;
    // Paged, so that the arms share one prefill of each passage.
    let cache = CacheOptions { cache: CacheKind::Paged, ranks: 1, dtype: CacheDtype::F16, device: options.device };
    let plan = Plan {
        texts: &texts,
        arms: std::slice::from_ref(&arm),
        prefix: options.prefix,
        continuation: options.continuation,
        passages: options.passages,
        cache,
    };
    let loaded = model::load_named(options.model.as_deref())?;
    let mut session = Session::new(&loaded, &plan)?;
    session.scatter();
    let remains = session.try_out(&arm)?;
    if remains.lengths.is_none() {
        let why = remains.why.trim_end().replace('\n', "; ");
        return Err(CliError::NothingCompressed { name: arm.name, rows: remains.rows, why });
    }
    let every = value(&arm.config, "every").and_then(|every| every.parse().ok()).filter(|&every| every > 0);
    for control in &CONTROLS {
        session.add(control.arm(&remains, every))?;
    }
    measure(&mut session, start, options.minutes)?;
    let comparison = session.finish()?;
    let evaluation = Evaluation::of(&comparison, &arm.name, options.passages);
    deliver(options, &comparison, &evaluation)?;
    Ok(if evaluation.failed { ExitCode::from(EXIT_CHECK_FAILED) } else { ExitCode::SUCCESS })
}

/// Passage by passage, at least one; none is begun that would not be done in time.
fn measure(session: &mut Session<'_>, start: Instant, minutes: f64) -> Result<(), CliError> {
    let limit = Duration::try_from_secs_f64(minutes * 60.0).unwrap_or(Duration::MAX);
    let progress = Progress::steps("", (session.passages() * session.arms()) as u64);
    let mut longest = Duration::ZERO;
    while session.measured() < session.passages() {
        if session.measured() > 0 && start.elapsed() + longest > limit {
            break;
        }
        let begun = Instant::now();
        session.measure(&progress)?;
        longest = longest.max(begun.elapsed());
    }
    Ok(())
}

fn own_arm(options: &Eval) -> Result<ArmSpec, CliError> {
    let policy = Policy::new(plugins::folders([options.plugin.as_str()]), None);
    let file = policy.open(&options.plugin, Source::Operator).map_err(CliError::Plugin)?;
    let said = load::inspect(file.path()).map_err(CliError::Plugin)?;
    let config = with_keep(&options.config, options.keep, &said.config_schema).map_err(CliError::Keep)?;
    Ok(ArmSpec { name: arm_name(&options.plugin), plugin: options.plugin.clone(), config })
}

/// The plugin's name as that of an arm, and none of the controls'.
fn arm_name(plugin: &str) -> String {
    let stem = Path::new(plugin).file_stem().unwrap_or_default().to_string_lossy();
    let stem = if is_bare_name(plugin) { plugin } else { &stem };
    let stem = ["libkvhook_", "lib"].iter().find_map(|prefix| stem.strip_prefix(prefix)).unwrap_or(stem);
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = stem.chars().map(allowed).take(MAX_NAME - "-plugin".len()).collect();
    let taken = CONTROLS.iter().map(|control| control.name).chain([FULL, NO_PLUGIN, ""]);
    if taken.into_iter().any(|taken| taken == name) { name + "-plugin" } else { name }
}

fn texts(options: &Eval) -> Result<Vec<Text>, CliError> {
    if options.texts.is_empty() {
        return Ok(TEXTS.map(|(name, content)| Text { name: name.into(), content: content.into() }).to_vec());
    }
    let text = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Text { name, content: read_text(path)? })
    };
    options.texts.iter().map(text).collect()
}

fn deliver(options: &Eval, comparison: &Comparison, evaluation: &Evaluation) -> Result<(), CliError> {
    if let Some(path) = &options.out {
        write_text(path, &page::render_evaluation(comparison, evaluation))?;
    }
    let text = if options.json { comparison.to_json_with(evaluation) } else { text(comparison, evaluation) };
    io::stdout().write_all(text.as_bytes()).map_err(|source| CliError::Write { path: "standard output".into(), source })
}

fn text(comparison: &Comparison, evaluation: &Evaluation) -> String {
    let mut text: String = evaluation.problems.iter().map(|problem| format!("{problem}\n")).collect();
    if !text.is_empty() {
        text.push('\n');
    }
    text += &table::measures(comparison);
    text.push('\n');
    for sentence in evaluation.sentences() {
        text += &format!("{sentence}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_are_named_after_their_files() {
        assert_eq!(arm_name("truncate"), "truncate");
        assert_eq!(arm_name("./target/release/libkvhook_value_norm.so"), "value_norm");
        assert_eq!(arm_name("/x/libvalue norm.so"), "value_norm");
        assert_eq!(arm_name("/x/libkvhook_snapkv.so"), "snapkv-plugin");
        assert!(arm_name(&format!("/x/lib{}.so", "y".repeat(99))).len() <= MAX_NAME);
    }
}
