//! A weighted sample without replacement.

use crate::error::KernelError;
use crate::top_k::{Protected, keep_smallest};

/// Names the random numbers of one head's draw: the same four numbers give the same ones for each token, alone or in
/// any batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Seed of the configuration.
    pub seed: u64,
    /// Round of compression of the sequence, so that repeated draws differ.
    pub round: u64,
    /// Layer.
    pub layer: u32,
    /// KV head of the model (not of the rank), so that ranks agree.
    pub head: u32,
}

impl Draw {
    /// A uniform number in (0, 1] for a token: the counter-based use of SplitMix64 (Steele et al., OOPSLA 2014).
    pub fn uniform(self, token: usize) -> f64 {
        let stream = mix(self.round_stream() ^ (u64::from(self.layer) << 32 | u64::from(self.head)));
        let bits = mix(stream ^ token as u64);
        ((bits >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// What all layers and heads share.
    pub(crate) fn round_stream(self) -> u64 {
        mix(mix(self.seed) ^ self.round)
    }
}

/// SplitMix64's step and finaliser: a bijection of 64 bits in which each input bit changes half of the output's.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Draws `out.len()` tokens without replacement, each draw with probabilities in proportion to the weights of the
/// tokens that are left; ascending. Protected tokens are always kept and take no part in the draw.
///
/// The method is Efraimidis and Spirakis (Information Processing Letters 97, 2006): the tokens with the smallest
/// `-ln(u) / weight`, u uniform. A token of weight 0 is kept only when no other is left, lower index first.
///
/// Floor: one logarithm and a few comparisons a token.
///
/// # Errors
/// [`KernelError::Weight`] with the first token, not protected, whose weight is negative, infinite or NaN;
/// [`KernelError::Keep`] unless `out.len()` is at least the number of protected tokens and at most `weights.len()`; no
/// working memory.
pub fn sample(weights: &[f32], protected: Protected, draw: Draw, out: &mut [u32]) -> Result<(), KernelError> {
    keep_smallest(weights.len(), protected, out, |token| {
        let weight = weights[token];
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(KernelError::Weight { token, value: weight });
        }
        // Zero or more, infinite for weight 0, so the bits are in the order of the numbers.
        let key = if weight > 0.0 { -draw.uniform(token).ln() / f64::from(weight) } else { f64::INFINITY };
        Ok((key + 0.0).to_bits())
    })
}
