//! expected-attention: keeps the entries that the next queries are expected to look at (Devoto et al. 2025, arXiv
//! 2510.00636).
//!
//! The queries of a prompt say what the next ones will be like. Their mean and covariance, taken before RoPE, are what
//! this plugin keeps of a sequence while its prompt runs ([`statistics`]); turned to the positions that come next
//! ([`rope`]), they say how much attention each key will get, if queries are normally distributed ([`attention`]). An
//! entry's score is that attention times the norm of its value.

pub mod attention;
pub mod rope;
pub mod statistics;

use std::collections::HashMap;

use kvhook_abi::kernels::Rows;
use kvhook_abi::kernels::norms::row_norms;
use kvhook_abi::{CreateContext, LayerView, PluginError, Scorer, StepSequence, export_scorer};

use crate::attention::expected_attention;
use crate::rope::Rope;
use crate::statistics::Statistics;

kvhook_abi::config! {
    /// The plugin's own config, beside `keep`, `budget`, `sinks`, `recent`, `min_tokens`, `every` of every scorer.
    pub struct Config {
        /// Queries of so many next positions are expected.
        future: u64 = 512, from 1;
        /// Whether queries spread around their mean; false: all are like their mean, which costs less and loses more.
        covariance: bool = true;
        /// Added to the expected attention, all of which is 1, before it is multiplied by the norm of the value.
        epsilon: f32 = 0.003, in 0.0..=1.0;
    }
}

/// Tokens at the start of a prompt that say nothing of the next queries: attention sinks.
const SINKS: u64 = 4;

/// The method, for one model.
pub struct ExpectedAttention {
    config: Config,
    rope: Rope,
    /// Of each sequence by uid, then by layer.
    seen: HashMap<u64, Vec<Statistics>>,
    layers: usize,
}

impl Scorer for ExpectedAttention {
    type Config = Config;
    const ID: &'static str = "expected-attention";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SEES_QUERIES: bool = true;

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        let rope = Rope::new(context.model)?;
        Ok(Self { config, rope, seen: HashMap::new(), layers: context.model.layers.len() })
    }

    fn see(&mut self, layer: usize, sequence: &StepSequence<'_>, queries: &Rows) -> Result<(), PluginError> {
        let layers = self.seen.entry(sequence.uid).or_insert_with(|| vec![Statistics::default(); self.layers]);
        let skipped = SINKS.saturating_sub(sequence.first_position).min(sequence.tokens as u64);
        let first = sequence.first_token + skipped as usize;
        let tokens = first..sequence.first_token + sequence.tokens;
        let turns = self.rope.turns(sequence.first_position + skipped, tokens.len());
        // The base shows no layer that the model has not.
        layers[layer].add(queries, tokens, &turns, self.config.covariance)
    }

    fn forget(&mut self, uid: u64) {
        self.seen.remove(&uid);
    }

    fn score(&self, layer: &LayerView<'_>, head: usize, scores: &mut [f32]) -> Result<(), PluginError> {
        let seen = layer.uid().and_then(|uid| self.seen.get(&uid)).and_then(|layers| layers.get(layer.index()));
        let seen = seen.ok_or_else(|| PluginError::Internal(format!("layer {}: no queries", layer.index())))?;
        let queries = seen.of_head(head, layer.kv_heads())?;
        let turn = self.rope.mean_turn(layer.next_position(), self.config.future);
        row_norms(&layer.v()?, head..head + 1, 0..scores.len(), scores)?;
        let attention = expected_attention(&layer.k()?, head, scores.len(), &queries, &turn)?;
        for (score, attention) in scores.iter_mut().zip(attention) {
            *score *= attention + self.config.epsilon;
        }
        Ok(())
    }
}

export_scorer!(ExpectedAttention);
