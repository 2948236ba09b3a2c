//! One arm on one passage: prefill, compression, scoring, decoding, passkey.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kvhook_engine::hooks::{Figures, HookTime, Source};
use kvhook_engine::quality::{argmax, nll};
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, LogitsRow, Work};
use kvhook_engine::{ArmConfig, Begin, PluginConfig, Runner, Scoring, SequenceId};

use super::Plan;
use super::passage::Prepared;
use crate::account::{self, hook_times};
use crate::arm::{ArmSpec, NO_PLUGIN};
use crate::error::CliError;
use crate::model::Loaded;
use crate::plugins;
use crate::results::{Measures, Passage, Quality};

/// Tokens of one prefill step.
const CHUNK: usize = 512;
/// Tokens that are decoded to time it, which are also the first words.
const DECODED: usize = 32;
/// Tokens in which a passkey must come out.
const ANSWER: usize = 8;
/// A paged cache holds so many passages: a prompt and the one with the key, each beside its compressed copy.
const PASSAGES_HELD: usize = 4;

/// A runner with all arms.
pub(super) struct Bench {
    runner: Runner,
}

/// What an arm leaves of a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// Rows of each layer before.
    pub rows: usize,
    /// Rows of each layer after; None where nothing was compressed.
    pub lengths: Option<Vec<usize>>,
    /// Why not, in words, one line for each reason.
    pub why: String,
}

/// What was seen of one arm on one passage.
pub(super) struct Observed {
    /// Logits behind x_{T-1} and all of y but its last token.
    pub(super) rows: Vec<LogitsRow>,
    /// All but the quality, which follows from `rows` and those of the uncompressed run.
    pub(super) measures: Measures,
    /// Positions left, by layer, for each KV head of each rank.
    pub(super) survivors: Option<Vec<Vec<Vec<u32>>>>,
}

impl Bench {
    /// Loads the plugins of all arms.
    pub(super) fn new(loaded: &Loaded, plan: &Plan<'_>) -> Result<Self, CliError> {
        let rows = PASSAGES_HELD * (plan.prefix + plan.continuation + DECODED);
        let folders = plugins::folders(plan.arms.iter().map(|arm| arm.plugin.as_str()));
        let config = PluginConfig { folders, ..PluginConfig::default() };
        let runner = Runner::with_plugins(loaded.model.clone(), plan.cache.with_room_for(rows), &config)?;
        let bench = Self { runner };
        plan.arms.iter().try_for_each(|arm| bench.add(arm))?;
        Ok(bench)
    }

    /// Loads the plugin of one more arm.
    pub(super) fn add(&self, arm: &ArmSpec) -> Result<(), CliError> {
        let own = ArmConfig::new(&arm.name, &arm.plugin, &arm.config);
        let set = self.runner.plugins().map_or(Ok(()), |plugins| plugins.set_arm(&own, Source::Operator));
        set.map_err(|source| CliError::Arm { name: arm.name.clone(), source })
    }

    /// Runs an arm on a passage's prefix only.
    pub(super) fn try_out(&mut self, arm: &ArmSpec, prepared: &Prepared) -> Result<Remains, CliError> {
        let prompt = &prepared.prefix[..prepared.prefix.len() - 1];
        let (id, _) = self.runner.prefill_on(&begin(Some(arm), prompt), CHUNK)?;
        let report = self.runner.report(id)?;
        let lengths = report.commits.last().map(|commit| commit.lengths_after.clone());
        self.runner.free(id)?;
        Ok(Remains { rows: prompt.len(), lengths, why: account::fallbacks(&report) })
    }

    /// Name of the device, if that is not the processor.
    pub(super) fn accelerator(&self) -> Option<&str> {
        self.runner.backend().name()
    }

    /// What the model makes of a passage without compression and without a prefix.
    pub(super) fn passage(&mut self, prepared: &Prepared, full: &Observed) -> Result<Passage, CliError> {
        let last = &prepared.prefix[prepared.prefix.len() - 1..];
        let (id, first) = self.runner.prefill_on(&begin(None, last), CHUNK)?;
        let fed = &prepared.continuation[..prepared.continuation.len() - 1];
        let rest = if fed.is_empty() { Vec::new() } else { self.runner.score(id, fed, Scoring::Together)? };
        self.runner.free(id)?;
        let rows: Vec<LogitsRow> = [first].into_iter().chain(rest).collect();
        Ok(Passage {
            text: prepared.text.clone(),
            start: prepared.start,
            nll_full: nll(&full.rows, &prepared.continuation),
            nll_no_prefix: Some(nll(&rows, &prepared.continuation)),
        })
    }

    /// Runs an arm on a passage; without an arm, nothing is compressed.
    pub(super) fn observe(&mut self, arm: Option<&ArmSpec>, prepared: &Prepared) -> Result<Observed, CliError> {
        let (prompt, last) = prepared.prefix.split_at(prepared.prefix.len() - 1);
        let before = self.figures(arm)?;
        let start = Instant::now();
        let (id, _) = self.runner.prefill_on(&begin(arm, prompt), CHUNK)?;
        let prefill = start.elapsed();
        // Where prefixes are shared, the uncompressed run has computed this one before.
        let taken_over = arm.is_some() && self.runner.shared_block_size().is_some();
        let in_prefill = spent(&self.figures(arm)?, &before);
        let report = self.runner.report(id)?;
        let survivors = arm.map(|_| self.survivors(id)).transpose()?;

        let fed = [last, &prepared.continuation[..prepared.continuation.len() - 1]].concat();
        let rows = self.runner.score(id, &fed, self.scoring(id, &fed))?;
        let in_all = spent(&self.figures(arm)?, &before);

        let id = self.rewind(id, fed.len(), report.commits.len(), arm, prompt)?;
        let start = Instant::now();
        let words = self.greedy(id, last, DECODED)?;
        let decode = start.elapsed();
        self.runner.free(id)?;

        let in_plugin = |spent: &Spent| spent.hooks.values().sum::<Duration>() + spent.commit;
        Ok(Observed {
            rows,
            survivors,
            measures: Measures {
                entries_before: report.entries_full as u64,
                entries_after: report.entries as u64,
                bytes_before: report.bytes_full as u64,
                bytes_after: report.bytes as u64,
                prefill_ms: if taken_over { f64::NAN } else { ms(prefill.saturating_sub(in_plugin(&in_prefill))) },
                hook_ms: in_all.hooks.iter().map(|(name, &time)| ((*name).to_owned(), ms(time))).collect(),
                commit_ms: ms(in_all.commit),
                decode_tokens_per_second: DECODED as f64 / decode.as_secs_f64(),
                quality: Quality::default(),
                passkey_found: self.passkey_found(arm, prepared)?,
                first_words: self.runner.model().tokenizer.decode(&words)?,
            },
        })
    }

    /// How often the host kept an arm's sequences as they were, by reason.
    pub(super) fn fallbacks(&self, arm: &ArmSpec) -> Result<BTreeMap<String, u64>, CliError> {
        let reasons = self.figures(Some(arm))?.reasons;
        Ok(reasons.into_iter().map(|(reason, count)| (reason.name().to_owned(), count)).collect())
    }

    fn figures(&self, arm: Option<&ArmSpec>) -> Result<Figures, CliError> {
        match (arm, self.runner.plugins()) {
            (Some(arm), Some(plugins)) => Ok(plugins.figures(&arm.name)?),
            _ => Ok(Figures::default()),
        }
    }

    /// Positions by layer, the heads of all ranks behind each other.
    fn survivors(&self, id: SequenceId) -> Result<Vec<Vec<Vec<u32>>>, CliError> {
        let mut layers = vec![Vec::new(); self.runner.model().config.layers];
        for of_rank in self.runner.survivors(id)? {
            for (layer, heads) in layers.iter_mut().zip(of_rank) {
                layer.extend(heads);
            }
        }
        Ok(layers)
    }

    /// One by one where the plugin wants to compress again meanwhile; else together, which gives the same logits.
    fn scoring(&self, id: SequenceId, fed: &[u32]) -> Scoring {
        let work = Work { sequence: id, tokens: fed, phase: Phase::Decode, prompt_ends: false, logits: Logits::All };
        if self.runner.will_ask(&work) { Scoring::OneByOne } else { Scoring::Together }
    }

    /// Takes a sequence back to its prompt by cutting its last `rows` rows; where it was compressed again since
    /// `commits` commits, rows of the prompt are gone, and it is run again.
    fn rewind(
        &mut self,
        id: SequenceId,
        rows: usize,
        commits: usize,
        arm: Option<&ArmSpec>,
        prompt: &[u32],
    ) -> Result<SequenceId, CliError> {
        if self.runner.report(id)?.commits.len() == commits {
            self.runner.cut(id, rows)?;
            return Ok(id);
        }
        self.runner.free(id)?;
        Ok(self.runner.prefill_on(&begin(arm, prompt), CHUNK)?.0)
    }

    /// Feeds tokens and goes on with the likeliest one, `count` times.
    fn greedy(&mut self, id: SequenceId, fed: &[u32], count: usize) -> Result<Vec<u32>, CliError> {
        let mut rows = self.runner.score(id, fed, Scoring::Together)?;
        let mut tokens = Vec::with_capacity(count);
        while let Some(row) = rows.pop() {
            tokens.push(argmax(&row));
            if tokens.len() == count {
                break;
            }
            rows = self.runner.score(id, &tokens[tokens.len() - 1..], Scoring::OneByOne)?;
        }
        Ok(tokens)
    }

    /// Whether the arm still knows the key after its prompt was compressed; the question comes behind that (E5).
    fn passkey_found(&mut self, arm: Option<&ArmSpec>, prepared: &Prepared) -> Result<Option<bool>, CliError> {
        let Some(passkey) = &prepared.passkey else { return Ok(None) };
        let (id, _) = self.runner.prefill_on(&begin(arm, &passkey.prompt), CHUNK)?;
        let answer = self.greedy(id, &passkey.question, ANSWER)?;
        self.runner.free(id)?;
        Ok(Some(passkey.found_in(&self.runner.model().tokenizer.decode(&answer)?)))
    }
}

fn begin<'a>(arm: Option<&'a ArmSpec>, prompt: &'a [u32]) -> Begin<'a> {
    Begin { arm: Some(arm.map_or(NO_PLUGIN, |arm| &arm.name)), ..Begin::new(prompt) }
}

/// Time in a plugin and in the host's commits.
struct Spent {
    hooks: BTreeMap<&'static str, Duration>,
    commit: Duration,
}

fn spent(now: &Figures, before: &Figures) -> Spent {
    let since = |now: HookTime, before: HookTime| now.total.saturating_sub(before.total);
    let both = hook_times(now).into_iter().zip(hook_times(before));
    let hooks = both.map(|((name, now), (_, before))| (name, since(now, before))).filter(|(_, time)| !time.is_zero());
    Spent { hooks: hooks.collect(), commit: since(now.commit, before.commit) }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
