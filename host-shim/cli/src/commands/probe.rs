//! `kvhook probe`: replays prompts on each arm of a form and uncompressed, and writes a record.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use kvhook_engine::hooks::Source;
use kvhook_engine::quality::{argmax, kl};
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, LogitsRow, Work};
use kvhook_engine::{Begin, PluginConfig, Runner, Scoring, SequenceId};
use serde_json::Value;

use crate::args::Probe;
use crate::arm::NO_PLUGIN;
use crate::error::CliError;
use crate::files::read_text;
use crate::progress::Progress;
use crate::record::{figures_line, probe_line};
use crate::{model, plugins};

/// Tokens of one prefill step.
const CHUNK: usize = 512;

/// Appends to the record: the arms' figures, the probes, and the figures again.
///
/// # Errors
/// Each of [`CliError`] but those of other commands; [`CliError::Prompts`].
pub fn execute(options: &Probe) -> Result<(), CliError> {
    let prompts = prompts(&options.prompts)?;
    let form = read_text(&options.form)?;
    let loaded = model::load_named(options.model.as_deref())?;
    let encode = |(name, text): (String, String)| Ok((name, loaded.model.tokenizer.encode_text(&text)?));
    let prompts = prompts.into_iter().map(encode).collect::<Result<Vec<_>, CliError>>()?;
    let longest = prompts.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0);
    // A prompt and its compressed copy.
    let cache = options.cache.with_room_for(2 * (longest + options.max_new_tokens));
    let config =
        PluginConfig { folders: plugins::folders(paths(&form).iter().map(String::as_str)), ..PluginConfig::default() };
    let mut prober = Prober {
        runner: Runner::with_plugins(loaded.model.clone(), cache, &config)?,
        record: Record::append_to(&options.record, &loaded.name)?,
        limit: options.max_new_tokens,
    };
    let arms = prober.arms(&form)?;
    let progress = Progress::steps("", (prompts.len() * (arms.len() + 1)) as u64);
    prober.write_figures()?;
    for (name, prompt) in &prompts {
        prober.probe(name, prompt, &arms, &progress)?;
    }
    prober.write_figures()
}

/// Name and text of each prompt: one a line, as it stands or as a JSON string.
fn prompts(path: &Path) -> Result<Vec<(String, String)>, CliError> {
    let text = read_text(path)?;
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let wrong = |line: usize, what: String| CliError::Prompts { path: path.into(), line, what };
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(index, line)| {
        let text = match line.starts_with('"') {
            true => serde_json::from_str(line).map_err(|error| wrong(index + 1, error.to_string()))?,
            false => line.to_owned(),
        };
        Ok((format!("{file}:{}", index + 1), text))
    });
    let prompts = prompts.collect::<Result<Vec<_>, CliError>>()?;
    if prompts.is_empty() { Err(wrong(1, "there is no prompt".into())) } else { Ok(prompts) }
}

/// What the form names as plugins. A form that is wrong is told by the host.
fn paths(form: &str) -> Vec<String> {
    let form: Value = serde_json::from_str(form).unwrap_or_default();
    let form = form.get("kv_plugin").unwrap_or(&form);
    let arms = form.get("arms").and_then(Value::as_array).into_iter().flatten();
    [form].into_iter().chain(arms).filter_map(|arm| arm.get("plugin")?.as_str().map(str::to_owned)).collect()
}

/// A record that grows.
struct Record {
    file: File,
    path: std::path::PathBuf,
    model: String,
    run: String,
}

impl Record {
    fn append_to(path: &Path, model: &str) -> Result<Self, CliError> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.map_err(|source| CliError::Write { path: path.into(), source })?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let run = format!("{}-{}", std::process::id(), since.as_millis());
        Ok(Self { file, path: path.into(), model: model.to_owned(), run })
    }

    fn write(&mut self, line: &str) -> Result<(), CliError> {
        self.file.write_all(line.as_bytes()).map_err(|source| CliError::Write { path: self.path.clone(), source })
    }
}

/// Replays prompts as the engine serves them.
struct Prober {
    runner: Runner,
    record: Record,
    /// Most tokens of an answer.
    limit: usize,
}

impl Prober {
    /// Loads the form; the names of its arms.
    fn arms(&self, form: &str) -> Result<Vec<String>, CliError> {
        if let Some(plugins) = self.runner.plugins() {
            plugins.configure(form, Source::Operator)?;
        }
        Ok(self
            .figures()?
            .get("arms")
            .and_then(Value::as_object)
            .map_or_else(Vec::new, |arms| arms.keys().cloned().collect()))
    }

    fn figures(&self) -> Result<Value, CliError> {
        let text = self.runner.plugins().map_or_else(|| Ok("{}".into()), |plugins| plugins.figures_json())?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    fn write_figures(&mut self) -> Result<(), CliError> {
        let line = figures_line(&self.record.model, &self.record.run, &self.figures()?);
        self.record.write(&line)
    }

    fn probe(&mut self, name: &str, prompt: &[u32], arms: &[String], progress: &Progress) -> Result<(), CliError> {
        progress.say(name);
        let (id, first) = self.prefill(NO_PLUGIN, prompt)?;
        let (answer, rows) = self.answer(id, first)?;
        self.runner.free(id)?;
        let line = probe_line(&self.record.model, name, NO_PLUGIN, &answer, None, None);
        self.record.write(&line)?;
        progress.step();
        for arm in arms {
            let (id, first) = self.prefill(arm, prompt)?;
            let report = self.runner.report(id)?;
            let forced = self.forced(id, &answer[..answer.len() - 1])?;
            self.runner.free(id)?;
            let divergence: Vec<f64> = rows.iter().zip(&forced).map(|(full, own)| kl(full, own)).collect();
            // The likeliest tokens are those of its own answer up to the first that differs.
            let same = argmax(&first) == answer[0]
                && forced.iter().zip(&answer[1..]).all(|(row, &token)| argmax(row) == token);
            let tokens = if same {
                answer.clone()
            } else {
                let (id, first) = self.prefill(arm, prompt)?;
                let tokens = self.answer(id, first)?.0;
                self.runner.free(id)?;
                tokens
            };
            let kept = Some((report.entries, report.entries_full));
            let kl = (!divergence.is_empty()).then_some(&divergence[..]);
            let line = probe_line(&self.record.model, name, arm, &tokens, kl, kept);
            self.record.write(&line)?;
            progress.step();
        }
        Ok(())
    }

    fn prefill(&mut self, arm: &str, prompt: &[u32]) -> Result<(SequenceId, LogitsRow), CliError> {
        Ok(self.runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(prompt) }, CHUNK)?)
    }

    /// The greedy answer, at least one token, with the logits behind each but the last.
    fn answer(&mut self, id: SequenceId, first: LogitsRow) -> Result<(Vec<u32>, Vec<LogitsRow>), CliError> {
        let eos = self.runner.model().tokenizer.eos();
        let mut tokens = vec![argmax(&first)];
        let mut rows = Vec::new();
        while tokens.len() < self.limit && tokens.last().copied() != eos {
            let fed = &tokens[tokens.len() - 1..];
            let Some(row) = self.runner.score(id, fed, Scoring::OneByOne)?.pop() else { break };
            tokens.push(argmax(&row));
            rows.push(row);
        }
        Ok((tokens, rows))
    }

    /// The logits behind each token of a given answer.
    fn forced(&mut self, id: SequenceId, tokens: &[u32]) -> Result<Vec<LogitsRow>, CliError> {
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let work = Work { sequence: id, tokens, phase: Phase::Decode, prompt_ends: false, logits: Logits::All };
        let scoring = if self.runner.will_ask(&work) { Scoring::OneByOne } else { Scoring::Together };
        Ok(self.runner.score(id, tokens, scoring)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_lines_or_json_strings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.txt");
        std::fs::write(&path, "Hello\n\n\"two\\nlines\"\n").unwrap();
        let expected = [("p.txt:1", "Hello"), ("p.txt:3", "two\nlines")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(prompts(&path).unwrap(), expected);
        std::fs::write(&path, "Hello\n\"open\n").unwrap();
        assert!(matches!(prompts(&path), Err(CliError::Prompts { line: 2, .. })));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(prompts(&path), Err(CliError::Prompts { line: 1, .. })));
    }

    #[test]
    fn plugins_of_a_form_are_found() {
        assert_eq!(paths(r#"{"kv_plugin": {"plugin": "/x/a.so"}}"#), ["/x/a.so"]);
        assert_eq!(
            paths(r#"{"arms": [{"name": "a", "plugin": "truncate"}, {"plugin": "/y/b.so"}]}"#),
            ["truncate", "/y/b.so"]
        );
        assert!(paths("no json").is_empty());
    }
}
