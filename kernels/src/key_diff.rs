//! KeyDiff: the importance `key_diff`.

use std::ops::Range;

use crate::check::check_len;
use crate::error::KernelError;
use crate::norms::{Norms, TILE};
use crate::rows::Rows;
use crate::scratch;
use crate::simd::{self, Body};

/// KeyDiff's score of each key (Park et al., arXiv 2504.15364), `out` being `[heads, length]`:
///
/// ```text
/// u_i = k_i / |k_i|,   mu = mean of u_j over all keys,   s_i = -<u_i, mu> / |mu|
/// ```
///
/// Keys that point away from the mean direction score highest. A key of norm 0 scores 0; where `mu` is 0, all do.
///
/// Floor: reads K twice, `2 * heads * length * head_dim * dtype` bytes; one head's K mostly comes from the cache the
/// second time. The mean is summed in tiles of 64 rows in f32, and over tiles in f64.
///
/// # Errors
/// Heads or `length` outside the view; `out` of another length; no working memory.
pub fn key_diff(keys: &Rows, heads: Range<usize>, length: usize, out: &mut [f32]) -> Result<(), KernelError> {
    keys.check(heads.clone(), 0..length)?;
    check_len("scores", out.len(), heads.len() * length)?;
    if length == 0 {
        return Ok(());
    }
    let dim = keys.head_dim();
    let mut tile = scratch::filled(TILE * dim, 0.0)?;
    let mut tile_sum = scratch::filled(dim, 0.0f32)?;
    let mut sum = scratch::filled(dim, 0.0f64)?;
    for (head, out) in heads.zip(out.chunks_exact_mut(length)) {
        sum.fill(0.0);
        for (start, inverse_norms) in (0..length).step_by(TILE).zip(out.chunks_mut(TILE)) {
            let tile = &mut tile[..inverse_norms.len() * dim];
            keys.load_many(head, start..start + inverse_norms.len(), tile)?;
            simd::run(Norms { tile, dim, norms: inverse_norms });
            simd::run(SumDirections { tile, dim, norms: inverse_norms, sum: &mut tile_sum });
            for (sum, part) in sum.iter_mut().zip(&tile_sum) {
                *sum += f64::from(*part);
            }
        }
        // The scale of the sum cancels, so mu need not be divided by the number of keys.
        let norm = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        for (direction, sum) in tile_sum.iter_mut().zip(&sum) {
            *direction = if norm > 0.0 { (sum / norm) as f32 } else { 0.0 };
        }
        for (start, scores) in (0..length).step_by(TILE).zip(out.chunks_mut(TILE)) {
            let tile = &mut tile[..scores.len() * dim];
            keys.load_many(head, start..start + scores.len(), tile)?;
            simd::run(Project { tile, dim, direction: &tile_sum, scores });
        }
    }
    Ok(())
}

/// Turns norms into their inverses and adds up the unit rows of a tile.
struct SumDirections<'a> {
    tile: &'a [f32],
    dim: usize,
    norms: &'a mut [f32],
    sum: &'a mut [f32],
}

impl Body for SumDirections<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.sum.fill(0.0);
        for (row, norm) in self.tile.chunks_exact(self.dim).zip(self.norms) {
            let inverse = if *norm > 0.0 { 1.0 / *norm } else { 0.0 };
            *norm = inverse;
            for (sum, element) in self.sum.iter_mut().zip(row) {
                *sum += element * inverse;
            }
        }
    }
}

/// Turns inverse norms into scores.
struct Project<'a> {
    tile: &'a [f32],
    dim: usize,
    direction: &'a [f32],
    scores: &'a mut [f32],
}

impl Body for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (row, score) in self.tile.chunks_exact(self.dim).zip(self.scores) {
            *score *= -simd::dot(row, self.direction);
        }
    }
}
