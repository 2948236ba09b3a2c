//! Runs arms over passages and takes their measures, E1 to E5 of the evaluation plan.
//!
//! For a prefix x of T tokens and a continuation y of M: the KV of x_0 .. x_{T-2} is compressed; x_{T-1} is fed as the
//! first decode token, so that already its logits come from the compressed cache; then y is fed token by token as the
//! text has it. Positions stay those of the text. The uncompressed run comes first, and the others are compared with
//! its logits.

mod bench;
mod passage;

use std::collections::BTreeMap;

use kvhook_engine::quality::{mean_kl, nll, top1_agreement};
use kvhook_engine::runner::LogitsRow;

use crate::args::{CacheOptions, name_of};
use crate::arm::{ArmSpec, FULL};
use crate::error::CliError;
use crate::machine;
use crate::model::Loaded;
use crate::progress::Progress;
use crate::results::{Arm, Comparison, FORMAT, Measures, Model, Passage, Quality, Settings, SurvivorCounter};

use bench::{Bench, Observed};

pub use bench::Remains;
use passage::Prepared;

/// Bins of a survivor map.
const SURVIVOR_BINS: usize = 128;

/// A text to take passages from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Name in reports.
    pub name: String,
    /// All of it.
    pub content: String,
}

/// What is to be measured, and how.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// Where passages are taken from.
    pub texts: &'a [Text],
    /// The arms beside the uncompressed run, at least one; paired differences are taken to the first.
    pub arms: &'a [ArmSpec],
    /// T: tokens of a passage that are prefilled, at least 2.
    pub prefix: usize,
    /// M: tokens of a passage that are scored, at least 1.
    pub continuation: usize,
    /// Number of passages, at least 1.
    pub passages: usize,
    /// How the KV cache is laid out and stored.
    pub cache: CacheOptions,
}

/// Measures all arms on all passages, with a progress bar.
///
/// # Errors
/// [`CliError::TooLittleText`]; [`CliError::Arm`] for a plugin that cannot be loaded or refuses its config;
/// [`CliError::Engine`].
pub fn compare(loaded: &Loaded, plan: &Plan<'_>) -> Result<Comparison, CliError> {
    let mut session = Session::new(loaded, plan)?;
    let progress = Progress::steps("", (session.passages() * session.arms()) as u64);
    while session.measured() < session.passages() {
        session.measure(&progress)?;
    }
    session.finish()
}

/// A comparison that is going on.
pub struct Session<'a> {
    loaded: &'a Loaded,
    plan: Plan<'a>,
    date: String,
    bench: Bench,
    /// Passages in the order in which they are measured.
    prepared: Vec<Prepared>,
    arms: Vec<Measured>,
    /// Those that are measured.
    passages: Vec<Passage>,
}

impl<'a> Session<'a> {
    /// Takes the passages out of the texts and loads the plugins.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn new(loaded: &'a Loaded, plan: &Plan<'a>) -> Result<Self, CliError> {
        let date = machine::now();
        let prepared = passage::prepare(&loaded.model.tokenizer, plan)?;
        let bench = Bench::new(loaded, plan)?;
        let arms = [None].into_iter().chain(plan.arms.iter().cloned().map(Some)).map(Measured::new).collect();
        Ok(Self { loaded, plan: *plan, date, bench, prepared, arms, passages: Vec::new() })
    }

    /// Number of passages.
    pub fn passages(&self) -> usize {
        self.prepared.len()
    }

    /// Number of passages that are measured.
    pub fn measured(&self) -> usize {
        self.passages.len()
    }

    /// Number of arms, the uncompressed run among them.
    pub fn arms(&self) -> usize {
        self.arms.len()
    }

    /// Goes through the passages in an order whose beginning is spread over all texts, too.
    pub fn scatter(&mut self) {
        let mut places: Vec<Option<Prepared>> = std::mem::take(&mut self.prepared).into_iter().map(Some).collect();
        let order = scattered(places.len());
        self.prepared = order.into_iter().filter_map(|place| places[place].take()).collect();
    }

    /// Adds an arm whose plugin has a bare name, before the first passage is measured.
    ///
    /// # Errors
    /// [`CliError::Arm`].
    pub fn add(&mut self, arm: ArmSpec) -> Result<(), CliError> {
        self.bench.add(&arm)?;
        self.arms.push(Measured::new(Some(arm)));
        Ok(())
    }

    /// Runs an arm on the next passage's prefix and looks at what is left of it.
    ///
    /// # Errors
    /// [`CliError::Engine`].
    pub fn try_out(&mut self, arm: &ArmSpec) -> Result<Remains, CliError> {
        match self.prepared.get(self.passages.len()) {
            Some(prepared) => self.bench.try_out(arm, prepared),
            None => Ok(Remains::default()),
        }
    }

    /// Measures all arms on the next passage, one step of `progress` for each arm.
    ///
    /// # Errors
    /// [`CliError::Engine`].
    pub fn measure(&mut self, progress: &Progress) -> Result<(), CliError> {
        let Some(prepared) = self.prepared.get(self.passages.len()) else { return Ok(()) };
        let mut full = None;
        for arm in &mut self.arms {
            progress.say(&arm.name());
            let observed = self.bench.observe(arm.spec.as_ref(), prepared)?;
            let (passage, rows) = match &full {
                Some(baseline) => baseline,
                None => full.insert((self.bench.passage(prepared, &observed)?, observed.rows.clone())),
            };
            arm.add(observed, rows, prepared, passage);
            progress.step();
        }
        self.passages.extend(full.map(|(passage, _)| passage));
        Ok(())
    }

    /// What was measured.
    ///
    /// # Errors
    /// [`CliError::Engine`].
    pub fn finish(self) -> Result<Comparison, CliError> {
        let Self { loaded, plan, date, bench, arms, passages, .. } = self;
        Ok(Comparison {
            format: FORMAT,
            date,
            machine: machine::this_machine(bench.accelerator()),
            model: describe(loaded),
            settings: settings(&plan),
            passages,
            arms: arms.into_iter().map(|arm| arm.finish(&bench, &plan)).collect::<Result<_, _>>()?,
        })
    }
}

/// An order of `n` places in which neighbours lie about 0.62 `n` apart: its beginnings are spread as well.
fn scattered(n: usize) -> Vec<usize> {
    let golden = (n as f64 * 0.618_034).round() as usize;
    let divides = |step: &usize| (2..=*step).any(|factor| step.is_multiple_of(factor) && n.is_multiple_of(factor));
    let step = (golden.max(1)..).find(|step| !divides(step)).unwrap_or(1);
    (0..n).map(|i| i * step % n).collect()
}

/// An arm and what was measured of it so far; without a spec the uncompressed run.
struct Measured {
    spec: Option<ArmSpec>,
    measures: Vec<Measures>,
    /// Surviving positions of each passage, by layer, for each KV head of each rank.
    survivors: Vec<Vec<Vec<Vec<u32>>>>,
}

impl Measured {
    fn new(spec: Option<ArmSpec>) -> Self {
        Self { spec, measures: Vec::new(), survivors: Vec::new() }
    }

    fn name(&self) -> String {
        self.spec.as_ref().map_or(FULL, |spec| &spec.name).to_owned()
    }

    fn add(&mut self, observed: Observed, full: &[LogitsRow], prepared: &Prepared, passage: &Passage) {
        let rows = &observed.rows;
        let loss = nll(rows, &prepared.continuation);
        let quality = Quality::new(loss, mean_kl(full, rows), top1_agreement(full, rows), passage);
        self.measures.push(Measures { quality, ..observed.measures });
        self.survivors.extend(observed.survivors);
    }

    fn finish(self, bench: &Bench, plan: &Plan<'_>) -> Result<Arm, CliError> {
        let survivors = self.spec.as_ref().map(|_| {
            let layers = self.survivors.first().map_or(0, Vec::len);
            let mut counter = SurvivorCounter::new(layers, plan.prefix - 1, SURVIVOR_BINS);
            for (layer, heads) in self.survivors.iter().flat_map(|of_passage| of_passage.iter().enumerate()) {
                for positions in heads {
                    counter.add_head(layer, positions.iter().map(|&position| position as usize));
                }
            }
            counter.finish()
        });
        Ok(Arm {
            name: self.name(),
            fallbacks: self.spec.as_ref().map_or(Ok(BTreeMap::new()), |spec| bench.fallbacks(spec))?,
            plugin: self.spec.as_ref().map(|spec| spec.plugin.clone()),
            config: self.spec.map_or_else(String::new, |spec| spec.config),
            measures: self.measures,
            survivors,
        })
    }
}

fn describe(loaded: &Loaded) -> Model {
    let config = &loaded.model.config;
    Model {
        name: loaded.name.clone(),
        sha256: loaded.sha256.clone(),
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
    }
}

fn settings(plan: &Plan<'_>) -> Settings {
    Settings {
        prefix: plan.prefix,
        continuation: plan.continuation,
        cache: name_of(&plan.cache.cache),
        dtype: name_of(&plan.cache.dtype),
        ranks: plan.cache.ranks,
        version: env!("CARGO_PKG_VERSION").into(),
        reference: plan.arms.first().map_or_else(|| FULL.into(), |arm| arm.name.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_orders_hold_each_place_once_and_begin_far_apart() {
        for n in 0..60 {
            let order = scattered(n);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            // Any four of the first places lie in both halves.
            if n >= 8 {
                assert!(order[..4].iter().any(|place| place * 2 < n) && order[..4].iter().any(|place| place * 2 >= n));
            }
        }
    }
}
