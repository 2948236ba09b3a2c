//! Means, standard errors and paired differences of a comparison.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Arm, Comparison, Measures};
use crate::stats::{Estimate, Proportion};

/// One arm, summed up over its passages.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ArmSummary {
    /// Name of the arm.
    pub name: String,
    /// Number of passages.
    pub n: usize,
    /// Entries of one head of one layer before compression.
    pub entries_per_head_before: f64,
    /// The same after it, a mean where heads or layers differ.
    pub entries_per_head_after: f64,
    /// Share of entries kept, 0 to 1.
    pub kept_fraction: Estimate,
    /// Bytes of K and V before compression.
    pub bytes_before: f64,
    /// The same after it.
    pub bytes_after: f64,
    /// Milliseconds in hooks for one passage.
    pub hook_ms: Estimate,
    /// The same by hook point.
    pub hook_ms_by_hook: BTreeMap<String, Estimate>,
    /// Milliseconds of the commit for one passage.
    pub commit_ms: Estimate,
    /// Milliseconds of the prefill.
    pub prefill_ms: Estimate,
    /// Decode speed, tokens per second.
    pub decode_tokens_per_second: Estimate,
    /// Perplexity of the continuation.
    pub perplexity: Estimate,
    /// Perplexity over that of the full cache.
    pub perplexity_ratio: Estimate,
    /// KL to the full cache, nats per token.
    pub kl: Estimate,
    /// Share of tokens with the same likeliest word, 0 to 1.
    pub top1_agreement: Estimate,
    /// Recovered context; over the passages on which the prefix helps.
    pub recovered_context: Option<Estimate>,
    /// Passkeys found; None when none were hidden.
    pub passkey: Option<Proportion>,
    /// Differences to the reference arm on the same passages; None for that arm itself.
    pub paired: Option<Paired>,
}

/// Differences of an arm to the reference arm, passage by passage: this arm's measure minus the reference's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Paired {
    /// Name of the reference arm.
    pub reference: String,
    /// NLL, nats per token; below 0 this arm predicts better.
    pub nll: Estimate,
    /// KL, nats per token; below 0 this arm is closer to the full cache.
    pub kl: Estimate,
    /// Decode speed, tokens per second.
    pub decode_tokens_per_second: Estimate,
}

impl Comparison {
    /// Summaries of all arms that have measures, in order.
    pub fn summary(&self) -> Vec<ArmSummary> {
        self.arms.iter().filter_map(|arm| self.summarise(arm)).collect()
    }

    /// The arm to which paired differences are taken.
    pub fn reference(&self) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.name == self.settings.reference)
    }

    /// `measure` of `arm` minus that of the reference arm, one value for each passage that both ran.
    pub fn differences(&self, arm: &Arm, measure: impl Fn(&Measures) -> f64) -> Vec<f64> {
        let reference = self.reference().map_or(&[][..], |reference| &reference.measures);
        arm.measures.iter().zip(reference).map(|(own, other)| measure(own) - measure(other)).collect()
    }

    fn summarise(&self, arm: &Arm) -> Option<ArmSummary> {
        let mean = |measure: &dyn Fn(&Measures) -> f64| Estimate::of(arm.measures.iter().map(measure));
        let heads = (self.model.layers * self.model.kv_heads).max(1) as f64;
        let hooks = arm.measures.iter().flat_map(|m| m.hook_ms.keys()).cloned();
        Some(ArmSummary {
            name: arm.name.clone(),
            n: arm.measures.len(),
            entries_per_head_before: mean(&|m| m.entries_before as f64)?.mean / heads,
            entries_per_head_after: mean(&|m| m.entries_after as f64)?.mean / heads,
            kept_fraction: mean(&Measures::kept_fraction)?,
            bytes_before: mean(&|m| m.bytes_before as f64)?.mean,
            bytes_after: mean(&|m| m.bytes_after as f64)?.mean,
            hook_ms: mean(&Measures::total_hook_ms)?,
            hook_ms_by_hook: hooks
                .filter_map(|hook| {
                    let estimate = mean(&|m| m.hook_ms.get(&hook).copied().unwrap_or(0.0))?;
                    Some((hook, estimate))
                })
                .collect(),
            commit_ms: mean(&|m| m.commit_ms)?,
            prefill_ms: mean(&|m| m.prefill_ms)?,
            decode_tokens_per_second: mean(&|m| m.decode_tokens_per_second)?,
            perplexity: mean(&|m| m.quality.perplexity)?,
            perplexity_ratio: mean(&|m| m.quality.perplexity_ratio)?,
            kl: mean(&|m| m.quality.kl)?,
            top1_agreement: mean(&|m| m.quality.top1_agreement)?,
            recovered_context: Estimate::of(arm.measures.iter().filter_map(|m| m.quality.recovered_context)),
            passkey: Proportion::of(arm.measures.iter().filter_map(|m| m.passkey_found)),
            paired: self.paired(arm),
        })
    }

    fn paired(&self, arm: &Arm) -> Option<Paired> {
        let reference = self.reference().filter(|reference| reference.name != arm.name)?;
        Some(Paired {
            reference: reference.name.clone(),
            nll: Estimate::of(self.differences(arm, |m| m.quality.nll))?,
            kl: Estimate::of(self.differences(arm, |m| m.quality.kl))?,
            decode_tokens_per_second: Estimate::of(self.differences(arm, |m| m.decode_tokens_per_second))?,
        })
    }
}
