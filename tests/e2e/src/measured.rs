//! What an arm costs on real text.

use kvhook_engine::quality::{mean_kl, nll, summarise, top1_agreement};
use kvhook_engine::runner::LogitsRow;

/// Measures of one arm, one value for each passage.
#[derive(Default)]
pub struct Measured {
    /// KL to the full cache, nats a token.
    pub kl: Vec<f64>,
    /// Cross entropy, nats a token.
    pub loss: Vec<f64>,
    /// Share of tokens with the same likeliest token as with the full cache.
    pub agreement: Vec<f64>,
}

impl Measured {
    /// Adds a passage: logits with the full cache and the arm's, and the text's own tokens.
    pub fn add(&mut self, full: &[LogitsRow], rows: &[LogitsRow], targets: &[u32]) {
        self.kl.push(mean_kl(full, rows));
        self.loss.push(nll(rows, targets));
        self.agreement.push(top1_agreement(full, rows));
    }

    /// Mean KL over passages.
    pub fn kl(&self) -> f64 {
        summarise(&self.kl).mean
    }
}
