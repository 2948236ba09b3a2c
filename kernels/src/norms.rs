//! Row norms: the importance `key_norm`.

use std::ops::Range;

use crate::check::check_len;
use crate::error::KernelError;
use crate::rows::Rows;
use crate::scratch;
use crate::simd::{self, Body};

/// Rows that are converted to f32 at a time: at most 64 KiB at head_dim 256, within the second-level cache.
pub(crate) const TILE: usize = 64;

/// The Euclidean norm of each row: `out[h, t] = |row(t, h)|`, `out` being `[heads, tokens]`.
///
/// Knorm keeps the rows with the *lowest* norms (Devoto et al., arXiv 2406.11430): its score is the norm negated.
///
/// Floor: reads each row once, `heads * tokens * head_dim * dtype` bytes.
///
/// # Errors
/// Heads or tokens outside the view; `out` of another length; no working memory.
pub fn row_norms(rows: &Rows, heads: Range<usize>, tokens: Range<usize>, out: &mut [f32]) -> Result<(), KernelError> {
    rows.check(heads.clone(), tokens.clone())?;
    check_len("norms", out.len(), heads.len() * tokens.len())?;
    if tokens.is_empty() {
        return Ok(());
    }
    let dim = rows.head_dim();
    let mut tile = scratch::filled(TILE * dim, 0.0)?;
    for (head, out) in heads.zip(out.chunks_exact_mut(tokens.len())) {
        for (start, norms) in tokens.clone().step_by(TILE).zip(out.chunks_mut(TILE)) {
            let tile = &mut tile[..norms.len() * dim];
            rows.load_many(head, start..start + norms.len(), tile)?;
            simd::run(Norms { tile, dim, norms });
        }
    }
    Ok(())
}

/// Norms of a tile of f32 rows.
pub(crate) struct Norms<'a> {
    /// `[rows, dim]`.
    pub(crate) tile: &'a [f32],
    /// Elements of a row.
    pub(crate) dim: usize,
    /// One for each row.
    pub(crate) norms: &'a mut [f32],
}

impl Body for Norms<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (row, norm) in self.tile.chunks_exact(self.dim).zip(self.norms) {
            *norm = simd::dot(row, row).sqrt();
        }
    }
}
