//! `kvhook run`: generates from a prompt.

use std::io::{self, Write};
use std::time::Instant;

use kvhook_engine::hooks::Source;
use kvhook_engine::model::Tokenizer;
use kvhook_engine::quality::argmax;
use kvhook_engine::{ArmConfig, Begin, PluginConfig, Runner, Scoring};

use crate::args::Run;
use crate::arm::NO_PLUGIN;
use crate::error::CliError;
use crate::files::read_text;
use crate::{account, model, plugins};

/// Name of the arm.
const ARM: &str = "run";
/// Tokens of one prefill step.
const CHUNK: usize = 512;

/// Prints the model's answer while it is generated; what plugins did goes to standard error.
///
/// # Errors
/// Each of [`CliError`] but those of `compare` and `inspect`.
pub fn execute(options: &Run) -> Result<(), CliError> {
    let text = read_text(&options.prompt_file)?;
    let model = model::load_named(options.model.as_deref())?.model;
    let prompt = model.tokenizer.encode_text(&text)?;
    // The compressed copy of a prompt needs as much room again.
    let cache = options.cache.with_room_for(2 * (prompt.len() + options.max_new_tokens));
    let config = PluginConfig { folders: plugins::folders(options.plugin.as_deref()), ..PluginConfig::default() };
    let mut runner = Runner::with_plugins(model.clone(), cache, &config)?;
    if let (Some(plugin), Some(plugins)) = (&options.plugin, runner.plugins()) {
        plugins.set_arm(&ArmConfig::new(ARM, plugin, &options.config), Source::Operator)?;
    }
    let arm = options.plugin.as_ref().map_or(NO_PLUGIN, |_| ARM);
    let say = |text: String| {
        if options.verbose > 0 {
            eprint!("{text}");
        }
    };

    let start = Instant::now();
    let (id, mut logits) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(&prompt) }, CHUNK)?;
    let report = runner.report(id)?;
    say(format!("prefill: {}\n", speed(prompt.len(), start)));
    say(account::compressions(&report, 0) + &account::fallbacks(&report) + &account::cache(&report));

    let start = Instant::now();
    let mut out = Stream { tokenizer: &model.tokenizer, tokens: Vec::new(), printed: 0 };
    while out.tokens.len() < options.max_new_tokens {
        let token = argmax(&logits);
        if Some(token) == model.tokenizer.eos() {
            break;
        }
        out.push(token)?;
        if out.tokens.len() < options.max_new_tokens {
            logits = runner.score(id, &[token], Scoring::OneByOne)?.pop().unwrap_or_default();
        }
    }
    out.finish()?;

    say(format!("decode: {}\n", speed(out.tokens.len(), start)));
    let after = runner.report(id)?;
    let again = account::compressions(&after, report.commits.len());
    if !again.is_empty() {
        say(again + &account::cache(&after));
    }
    if after.kept != report.kept || after.failures != report.failures {
        say(account::fallbacks(&after));
    }
    runner.free(id)?;
    if let (Some(_), Some(plugins)) = (&options.plugin, runner.plugins()) {
        say(account::hooks(&plugins.figures(ARM)?));
    }
    Ok(())
}

fn speed(tokens: usize, start: Instant) -> String {
    let seconds = start.elapsed().as_secs_f64();
    format!("{tokens} tokens in {seconds:.2} s, {:.1} tokens/s", tokens as f64 / seconds)
}

/// Prints an answer token by token.
struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Bytes of the text that are out.
    printed: usize,
}

impl Stream<'_> {
    fn push(&mut self, token: u32) -> Result<(), CliError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        // The bytes of one character may come in several tokens.
        if text.ends_with(char::REPLACEMENT_CHARACTER) { Ok(()) } else { self.print(&text) }
    }

    fn finish(&mut self) -> Result<(), CliError> {
        let text = self.tokenizer.decode(&self.tokens)? + "\n";
        self.print(&text)
    }

    fn print(&mut self, text: &str) -> Result<(), CliError> {
        let new = text.get(self.printed..).unwrap_or_default();
        self.printed = text.len();
        let mut out = io::stdout().lock();
        out.write_all(new.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|source| CliError::Write { path: "standard output".into(), source })
    }
}
