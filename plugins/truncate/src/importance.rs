//! How important each row of a KV head is.

use kvhook_kernels::{KernelError, Rows, key_diff, norms, window_attention};
use window_attention::WindowQueries;

/// The measure of importance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Importance {
    /// `-|k|`: keys of low norm draw much attention (Knorm: Devoto et al., arXiv 2406.11430).
    KeyNorm,
    /// `-cos(k, mean direction of the keys)`: unusual keys first (KeyDiff: Park et al., arXiv 2504.15364).
    KeyDiff,
    /// Attention of the last `window` queries, averaged over `pool` neighbours (SnapKV: Li et al., arXiv 2404.14469).
    Attention {
        /// Queries.
        window: u32,
        /// Rows averaged, an odd number.
        pool: u32,
    },
    /// The same for all.
    Uniform,
}

impl Importance {
    /// Whether it depends on the keys' values.
    pub fn reads_keys(self) -> bool {
        self != Self::Uniform
    }
}

/// Scores each of the first `out.len()` rows of `head`: the larger, the more important.
///
/// # Errors
/// The kernels'; `queries` must be there for [`Importance::Attention`], of the last of those rows.
pub fn scores(
    importance: Importance,
    keys: &Rows,
    head: usize,
    queries: Option<&WindowQueries<'_>>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let heads = head..head + 1;
    match (importance, queries) {
        (Importance::KeyNorm, _) => {
            norms::row_norms(keys, heads, 0..out.len(), out)?;
            out.iter_mut().for_each(|score| *score = -*score);
        }
        (Importance::KeyDiff, _) => key_diff::key_diff(keys, heads, out.len(), out)?,
        (Importance::Attention { pool, .. }, Some(queries)) => {
            window_attention::window_attention(keys, queries, heads, out.len(), pool as usize, out)?;
        }
        (Importance::Attention { .. }, None) => return Err(KernelError::Window { window: 0, length: out.len() }),
        (Importance::Uniform, _) => out.fill(0.0),
    }
    Ok(())
}

/// Turns scores into the weights of a draw, in place: finite, zero or more, in the scores' order.
///
/// `key_norm`: `1 / |k|`; `key_diff`: `1 - cos`, the key's distance from the mean direction; `attention`: the score,
/// which is a probability; `uniform`: 1.
pub fn weights(importance: Importance, scores: &mut [f32]) {
    let weight = |score: f32| match importance {
        Importance::KeyNorm => 1.0 / (-score).max(f32::MIN_POSITIVE),
        // A sum's rounding may take the cosine beyond 1. A NaN stays one, for the draw to refuse.
        Importance::KeyDiff => (1.0 + score).clamp(0.0, 2.0),
        Importance::Attention { .. } => score,
        Importance::Uniform => 1.0,
    };
    scores.iter_mut().for_each(|score| *score = weight(*score));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_what_the_page_says() {
        let weighted = |importance, scores: &[f32]| {
            let mut weights = scores.to_vec();
            super::weights(importance, &mut weights);
            weights
        };
        assert_eq!(weighted(Importance::KeyNorm, &[-2.0, -0.5]), [0.5, 2.0]);
        assert_eq!(weighted(Importance::KeyDiff, &[-1.000_001, -0.25, 1.0]), [0.0, 0.75, 2.0]);
        assert_eq!(weighted(Importance::Attention { window: 1, pool: 1 }, &[0.125]), [0.125]);
        assert_eq!(weighted(Importance::Uniform, &[-3.0, 9.0]), [1.0, 1.0]);
        let zero = weighted(Importance::KeyNorm, &[0.0])[0];
        assert!(zero.is_finite() && zero > 1e30, "a key of norm 0 weighs most: {zero}");
        assert!(weighted(Importance::KeyDiff, &[f32::NAN])[0].is_nan());
    }
}
