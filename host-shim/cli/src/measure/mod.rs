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
    let date = machine::now();
    let prepared = passage::prepare(&loaded.model.tokenizer, plan)?;
    let mut bench = Bench::new(loaded, plan)?;
    let mut arms: Vec<Measured> = [None].into_iter().chain(plan.arms.iter().map(Some)).map(Measured::new).collect();
    let progress = Progress::steps("", (prepared.len() * arms.len()) as u64);
    let mut passages = Vec::new();
    for prepared in &prepared {
        let mut full = None;
        for arm in &mut arms {
            progress.say(&arm.name());
            let observed = bench.observe(arm.spec, prepared)?;
            let (passage, rows) = match &full {
                Some(baseline) => baseline,
                None => full.insert((bench.passage(prepared, &observed)?, observed.rows.clone())),
            };
            arm.add(observed, rows, prepared, passage);
            progress.step();
        }
        passages.extend(full.map(|(passage, _)| passage));
    }
    Ok(Comparison {
        format: FORMAT,
        date,
        machine: machine::this_machine(bench.accelerator()),
        model: describe(loaded),
        settings: settings(plan),
        passages,
        arms: arms.into_iter().map(|arm| arm.finish(&bench, plan)).collect::<Result<_, _>>()?,
    })
}

/// An arm and what was measured of it so far; without a spec the uncompressed run.
struct Measured<'a> {
    spec: Option<&'a ArmSpec>,
    measures: Vec<Measures>,
    /// Surviving positions of each passage, by layer, for each KV head of each rank.
    survivors: Vec<Vec<Vec<Vec<u32>>>>,
}

impl<'a> Measured<'a> {
    fn new(spec: Option<&'a ArmSpec>) -> Self {
        Self { spec, measures: Vec::new(), survivors: Vec::new() }
    }

    fn name(&self) -> String {
        self.spec.map_or(FULL, |spec| &spec.name).to_owned()
    }

    fn add(&mut self, observed: Observed, full: &[LogitsRow], prepared: &Prepared, passage: &Passage) {
        let rows = &observed.rows;
        let loss = nll(rows, &prepared.continuation);
        let quality = Quality::new(loss, mean_kl(full, rows), top1_agreement(full, rows), passage);
        self.measures.push(Measures { quality, ..observed.measures });
        self.survivors.extend(observed.survivors);
    }

    fn finish(self, bench: &Bench, plan: &Plan<'_>) -> Result<Arm, CliError> {
        let survivors = self.spec.map(|_| {
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
            plugin: self.spec.map(|spec| spec.plugin.clone()),
            config: self.spec.map_or_else(String::new, |spec| spec.config.clone()),
            measures: self.measures,
            fallbacks: self.spec.map_or(Ok(BTreeMap::new()), |spec| bench.fallbacks(spec))?,
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
