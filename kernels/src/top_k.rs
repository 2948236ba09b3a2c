//! The k best tokens of a head.

use crate::check::check_len;
use crate::error::KernelError;
use crate::scratch;

/// Tokens that a selection always keeps: the first ones (attention sinks) and the most recent ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Protected {
    /// Tokens kept at the front.
    pub sinks: usize,
    /// Tokens kept at the end.
    pub recent: usize,
}

impl Protected {
    /// How many of `length` tokens are protected; where the two ranges meet, all.
    pub fn count(self, length: usize) -> usize {
        self.sinks.saturating_add(self.recent).min(length)
    }
}

/// The `out.len()` tokens with the largest scores, ascending; of equal scores the lower index is kept.
///
/// Protected tokens are always kept, whatever their score. Zero and negative zero are equal; infinities are ordered.
///
/// Floor: reads 4 bytes a token and writes 4 a kept one; the selection itself does a few comparisons a token (a
/// quickselect, linear on average and at worst).
///
/// # Errors
/// [`KernelError::Keep`] unless `out.len()` is at least the number of protected tokens and at most `scores.len()`;
/// [`KernelError::ScoreNotANumber`] with the first token, not protected, whose score is NaN; no working memory.
pub fn top_k(scores: &[f32], protected: Protected, out: &mut [u32]) -> Result<(), KernelError> {
    keep_smallest(scores.len(), protected, out, |token| {
        let score = scores[token];
        if score.is_nan() { Err(KernelError::ScoreNotANumber { token }) } else { Ok(descending_key(score)) }
    })
}

/// [`top_k`] for each head of `scores`, `[heads, length]`, into `out`, `[heads, keep]`.
///
/// # Errors
/// As [`top_k`]; [`KernelError::SliceLength`] when `scores` or `out` do not divide into `heads` rows.
pub fn top_k_heads(scores: &[f32], heads: usize, protected: Protected, out: &mut [u32]) -> Result<(), KernelError> {
    if heads == 0 {
        return check_len("kept tokens", out.len(), 0);
    }
    let (length, keep) = (scores.len() / heads, out.len() / heads);
    check_len("scores", scores.len(), length * heads)?;
    check_len("kept tokens", out.len(), keep * heads)?;
    for head in 0..heads {
        top_k(&scores[head * length..][..length], protected, &mut out[head * keep..][..keep])?;
    }
    Ok(())
}

/// A key that is the smaller the larger the score is.
fn descending_key(score: f32) -> u32 {
    // Adding zero makes a negative zero positive.
    let bits = (score + 0.0).to_bits();
    // Ascending over all floats: negative ones are mirrored, positive ones come after them.
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    !ascending
}

/// Keeps the protected tokens and, of the others, those with the smallest keys (of equal keys the lower index), until
/// `out` is full; ascending.
pub(crate) fn keep_smallest<K: Ord + Copy + Default>(
    length: usize,
    protected: Protected,
    out: &mut [u32],
    key: impl Fn(usize) -> Result<K, KernelError>,
) -> Result<(), KernelError> {
    let keep = out.len();
    let protected_count = protected.count(length);
    if keep < protected_count || keep > length {
        return Err(KernelError::Keep { keep, protected: protected_count, length });
    }
    let first = protected.sinks.min(length);
    let open = length - protected_count;
    let wanted = keep - protected_count;

    let mut keys = scratch::filled(open, K::default())?;
    for (place, slot) in keys.iter_mut().enumerate() {
        *slot = key(first + place)?;
    }
    let mut kept = 0;
    let mut push = |token: usize| {
        out[kept] = token as u32;
        kept += 1;
    };
    (0..first).for_each(&mut push);
    if wanted == open {
        (first..first + open).for_each(&mut push);
    } else if wanted > 0 {
        let mut sorted = scratch::filled(open, K::default())?;
        sorted.copy_from_slice(&keys);
        let (below, &mut threshold, _) = sorted.select_nth_unstable(wanted - 1);
        let mut equal = wanted - below.iter().filter(|&&key| key < threshold).count();
        for (place, &key) in keys.iter().enumerate() {
            if key < threshold || (key == threshold && equal > 0) {
                equal -= usize::from(key == threshold);
                push(first + place);
            }
        }
    }
    (first + open..length).for_each(&mut push);
    Ok(())
}
