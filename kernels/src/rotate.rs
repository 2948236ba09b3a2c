//! Re-rotation: keys that get other positions.

use std::f64::consts::TAU;
use std::ops::Range;

use crate::check::Indices;
use crate::error::KernelError;
use crate::rows::Rows;
use crate::scratch;

/// Which channels of a row turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Channel `c` with `c + rotary_dim / 2`, as Hugging Face stores keys.
    HalfSplit,
    /// Channel `2 c` with `2 c + 1`, as GGUF's `llama` stores them.
    Interleaved,
}

impl Pairing {
    /// The channels of pair `pair` of `pairs`.
    pub(crate) fn channels(self, pair: usize, pairs: usize) -> (usize, usize) {
        match self {
            Self::HalfSplit => (pair, pair + pairs),
            Self::Interleaved => (2 * pair, 2 * pair + 1),
        }
    }
}

/// The rotary position embedding of a model (Su et al., arXiv 2104.09864), one axis.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    /// Radians a position, one for each pair: `base^(-2 i / rotary_dim)`, or as the model scales them. Channels from
    /// twice their number on are not rotated. A factor on the rotated values, as YaRN has, is in the keys already.
    pub frequencies: &'a [f64],
    /// How channels are paired.
    pub pairing: Pairing,
}

/// By how many positions each row moves.
#[derive(Debug, Clone, Copy)]
pub enum Shift<'a> {
    /// All rows by this many; below 0: towards the front.
    All(i64),
    /// The row at place `i` of a head's list was made at position `list[i]`, and its position is now its row number.
    From(Indices<'a>),
}

/// Turns each row of `tokens` in place, so that it is as if the model had made it at its new position:
///
/// ```text
/// (a, b) -> (a cos x - b sin x, a sin x + b cos x),   x = shift * frequency
/// ```
///
/// for the channels `a`, `b` of each pair. Angles are f64, so they are exact to 1e-10 after a million positions; the
/// arithmetic of rows is f32, rounded to the dtype once.
///
/// Floor: reads and writes each row once, `2 * heads * tokens * head_dim * dtype` bytes.
///
/// # Errors
/// Before the first row is written: heads or tokens outside the view; [`KernelError::Rotary`] when the pairs do not fit
/// the row; [`KernelError::SliceLength`] for lists of another length than `tokens`, [`KernelError::Index`] for a buffer
/// that ends before a list does; no working memory.
pub fn rotate(
    rows: &Rows,
    rotary: &Rotary<'_>,
    shift: &Shift<'_>,
    heads: Range<usize>,
    tokens: Range<usize>,
) -> Result<(), KernelError> {
    rows.check(heads.clone(), tokens.clone())?;
    check_pairs(rotary.frequencies.len(), rows.head_dim())?;
    if let Shift::From(positions) = shift {
        crate::check::check_len("positions of rows", positions.count, tokens.len())?;
        heads.clone().try_for_each(|head| positions.of(head).map(|_| ()))?;
    }
    let pairs = rotary.frequencies.len();
    let mut row = scratch::filled(rows.head_dim(), 0.0f32)?;
    let mut turns = scratch::filled(pairs, (1.0f32, 0.0f32))?;
    let mut turned = 0;
    for head in heads {
        for (place, token) in tokens.clone().enumerate() {
            let by = match shift {
                Shift::All(by) => *by,
                Shift::From(positions) => token as i64 - i64::from(positions.of(head)?[place]),
            };
            if by == 0 {
                continue;
            }
            // Neighbours mostly move by as much as each other.
            if by != turned {
                for (turn, frequency) in turns.iter_mut().zip(rotary.frequencies) {
                    let (sin, cos) = (by as f64 * frequency % TAU).sin_cos();
                    *turn = (cos as f32, sin as f32);
                }
                turned = by;
            }
            rows.load(token, head, &mut row)?;
            for (pair, &(cos, sin)) in turns.iter().enumerate() {
                let (first, second) = rotary.pairing.channels(pair, pairs);
                let (a, b) = (row[first], row[second]);
                row[first] = a * cos - b * sin;
                row[second] = a * sin + b * cos;
            }
            rows.store(token, head, &row)?;
        }
    }
    Ok(())
}

/// Refuses more pairs than a row has.
pub(crate) fn check_pairs(pairs: usize, head_dim: usize) -> Result<(), KernelError> {
    if pairs == 0 || pairs > head_dim / 2 { Err(KernelError::Rotary { pairs, head_dim }) } else { Ok(()) }
}
