//! SnapKV's score: the importance `attention`.

use std::ops::Range;

use crate::check::check_len;
use crate::error::KernelError;
use crate::rows::Rows;
use crate::scratch;
use crate::simd::{self, Body, LANES};

/// SnapKV's pooling kernel.
pub const DEFAULT_POOLING_KERNEL: usize = 5;

/// Keys that are multiplied at a time; they are packed side by side.
const PANEL: usize = 16;
/// Query rows that are multiplied at a time: 4 x 16 sums fill half of AVX2's registers.
const MICRO: usize = 4;
/// Query rows whose logits are held at a time.
const BLOCK: usize = 16;

/// The queries of the last positions of a sequence, after RoPE.
#[derive(Debug, Clone, Copy)]
pub struct WindowQueries<'a> {
    /// `head_dim` adjacent elements for each position and query head.
    pub data: &'a [f32],
    /// Positions; position `w` is that of key `length - window + w`.
    pub window: usize,
    /// Query heads: a multiple of the view's KV heads. KV head `h` serves the `h`-th group of them.
    pub query_heads: usize,
    /// Distance between two positions, in elements.
    pub stride_position: usize,
    /// Distance between two query heads, in elements.
    pub stride_head: usize,
    /// Factor on the scalar products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl<'a> WindowQueries<'a> {
    /// Dense `[window, query_heads, head_dim]` with the usual scale.
    pub fn dense(data: &'a [f32], window: usize, query_heads: usize, head_dim: usize) -> Self {
        Self {
            data,
            window,
            query_heads,
            stride_position: query_heads * head_dim,
            stride_head: head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }
}

/// SnapKV's score of each key (Li et al., arXiv 2404.14469), `out` being `[heads, length]`.
///
/// With W queries for each of the G query heads of a KV head, and T = `length`:
///
/// ```text
/// a[g, w, i] = softmax over i <= T - W + w of  scale * <q[g, w], k_i>
/// p[i]       = mean over g and w of a[g, w, i]                              for i < T - W
/// s[i]       = (p[i - c] + ... + p[i + c]) / kernel,  c = kernel / 2        for i < T - W
/// ```
///
/// Beyond the ends of `0..T - W`, `p` is zero and the divisor stays `kernel`, as in kvpress (PyTorch's `avg_pool1d` with
/// its default `count_include_pad`): the scores of the outermost keys are lower. The window's own keys get the head's
/// largest score, as in kvpress; a selection should protect them. Without a history (W = T) all scores are 0.
///
/// Each sum has one order, so the bytes do not depend on threads or processor. The logits of 16 query rows are held at
/// a time; working memory is `(head_dim + 17) * length` f32.
///
/// Floor: reads K once, `heads * length * head_dim * dtype` bytes, and multiplies, `2 * W * G * head_dim` operations a
/// key and head. From some ten query rows on the arithmetic is the longer of the two.
///
/// # Errors
/// Heads or `length` outside the view; window, kernel, query heads or slices that do not fit; no working memory.
pub fn window_attention(
    keys: &Rows,
    queries: &WindowQueries<'_>,
    heads: Range<usize>,
    length: usize,
    kernel: usize,
    out: &mut [f32],
) -> Result<(), KernelError> {
    keys.check(heads.clone(), 0..length)?;
    check_len("scores", out.len(), heads.len() * length)?;
    let group = check_queries(keys, queries, length, kernel)?;

    let dim = keys.head_dim();
    let window = queries.window;
    let history = length - window;
    let padded = length.next_multiple_of(PANEL);
    let mut packed = scratch::filled(padded * dim, 0.0f32)?;
    let mut panel_rows = scratch::filled(PANEL * dim, 0.0f32)?;
    let mut block_queries = scratch::filled(BLOCK * dim, 0.0f32)?;
    let mut logits = scratch::filled(BLOCK * padded, 0.0f32)?;
    let mut mean = scratch::filled(history, 0.0f32)?;

    for (head, out) in heads.zip(out.chunks_exact_mut(length)) {
        pack_keys(keys, head, length, &mut panel_rows, &mut packed)?;
        mean.fill(0.0);
        let rows = group * window;
        for first in (0..rows).step_by(BLOCK) {
            let count = BLOCK.min(rows - first);
            block_queries.fill(0.0);
            for (row, target) in (first..first + count).zip(block_queries.chunks_exact_mut(dim)) {
                let (query_head, position) = (head * group + row / window, row % window);
                let start = position * queries.stride_position + query_head * queries.stride_head;
                for (target, &element) in target.iter_mut().zip(&queries.data[start..start + dim]) {
                    *target = element * queries.scale;
                }
            }
            simd::run(Multiply { queries: &block_queries, packed: &packed, dim, count, padded, logits: &mut logits });
            for (row, logits) in (first..first + count).zip(logits.chunks_exact_mut(padded)) {
                let visible = history + row % window + 1;
                simd::run(AddSoftmax { logits: &mut logits[..visible], share: 1.0 / rows as f32, mean: &mut mean });
            }
        }
        pool(&mean, kernel, &mut out[..history]);
        let largest = out[..history].iter().fold(0.0, |most: f32, &score| most.max(score));
        out[history..].fill(largest);
    }
    Ok(())
}

/// Query heads for each KV head.
fn check_queries(keys: &Rows, queries: &WindowQueries<'_>, length: usize, kernel: usize) -> Result<usize, KernelError> {
    let &WindowQueries { window, query_heads, .. } = queries;
    let kv_heads = keys.kv_heads();
    if window == 0 || window > length {
        return Err(KernelError::Window { window, length });
    }
    if kernel.is_multiple_of(2) {
        return Err(KernelError::PoolingKernel { kernel });
    }
    if kv_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        return Err(KernelError::QueryHeads { query_heads, kv_heads });
    }
    let needed = (window - 1)
        .saturating_mul(queries.stride_position)
        .saturating_add((query_heads - 1).saturating_mul(queries.stride_head))
        .saturating_add(keys.head_dim());
    if queries.data.len() < needed {
        return Err(KernelError::SliceLength { what: "queries", found: queries.data.len(), expected: needed });
    }
    Ok(query_heads / kv_heads)
}

/// Converts a head's keys once, into `[panels, head_dim, PANEL]`; keys beyond `length` are zero.
fn pack_keys(keys: &Rows, head: usize, length: usize, rows: &mut [f32], packed: &mut [f32]) -> Result<(), KernelError> {
    let dim = keys.head_dim();
    for (start, panel) in (0..length).step_by(PANEL).zip(packed.chunks_exact_mut(PANEL * dim)) {
        let count = PANEL.min(length - start);
        keys.load_many(head, start..start + count, &mut rows[..count * dim])?;
        rows[count * dim..].fill(0.0);
        for (element, column) in panel.chunks_exact_mut(PANEL).enumerate() {
            for (key, target) in column.iter_mut().enumerate() {
                *target = rows[key * dim + element];
            }
        }
    }
    Ok(())
}

/// Logits of a block of query rows with all keys.
struct Multiply<'a> {
    /// `[BLOCK, dim]`.
    queries: &'a [f32],
    /// `[panels, dim, PANEL]`.
    packed: &'a [f32],
    dim: usize,
    /// Query rows in use.
    count: usize,
    padded: usize,
    /// `[BLOCK, padded]`.
    logits: &'a mut [f32],
}

impl Body for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { queries, packed, dim, count, padded, logits } = self;
        for (panel, keys) in packed.chunks_exact(PANEL * dim).enumerate() {
            for first in (0..count).step_by(MICRO) {
                let queries: [&[f32]; MICRO] = std::array::from_fn(|row| &queries[(first + row) * dim..][..dim]);
                let sums = multiply_panel(queries, keys);
                for (row, sums) in sums.iter().enumerate() {
                    logits[(first + row) * padded + panel * PANEL..][..PANEL].copy_from_slice(sums);
                }
            }
        }
    }
}

/// Each sum runs over the elements in their order.
#[inline(always)]
fn multiply_panel(queries: [&[f32]; MICRO], keys: &[f32]) -> [[f32; PANEL]; MICRO] {
    let mut sums = [[0.0; PANEL]; MICRO];
    let (columns, _) = keys.as_chunks::<PANEL>();
    for (element, column) in columns.iter().enumerate() {
        for row in 0..MICRO {
            let query = queries[row][element];
            for key in 0..PANEL {
                sums[row][key] += query * column[key];
            }
        }
    }
    sums
}

/// Turns a row's visible logits into probabilities and adds `share` of them to the mean.
struct AddSoftmax<'a> {
    logits: &'a mut [f32],
    share: f32,
    mean: &'a mut [f32],
}

impl Body for AddSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let largest = largest(self.logits);
        let mut total = 0.0f64;
        // Sums of f32 stay short; the total is f64.
        for part in self.logits.chunks_mut(1024) {
            let (lanes, rest) = part.as_chunks_mut::<LANES>();
            let mut sums = [0.0f32; LANES];
            for lanes in lanes {
                for lane in 0..LANES {
                    lanes[lane] = exp(lanes[lane] - largest);
                    sums[lane] += lanes[lane];
                }
            }
            for (sum, logit) in sums.iter_mut().zip(rest) {
                *logit = exp(*logit - largest);
                *sum += *logit;
            }
            total += f64::from(simd::add_lanes(sums));
        }
        let factor = (f64::from(self.share) / total) as f32;
        for (mean, weight) in self.mean.iter_mut().zip(self.logits.iter()) {
            *mean += weight * factor;
        }
    }
}

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let (lanes, rest) = values.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for lanes in lanes {
        for lane in 0..LANES {
            most[lane] = if lanes[lane] > most[lane] { lanes[lane] } else { most[lane] };
        }
    }
    rest.iter().chain(&most).fold(f32::NEG_INFINITY, |most, &value| if value > most { value } else { most })
}

/// `e^x` for x <= 0, to 2 units in the last place; 0 below -87. In plain operations, so that it is vectorised and the same
/// everywhere: `x = n ln 2 + r`, |r| <= ln 2 / 2, and `e^r` by its series up to the seventh power.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    // The lowest bits of `rounded` are n; added to the exponent they multiply by 2^n.
    let scaled = f32::from_bits(series.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x < -87.0 { 0.0 } else { scaled }
}

/// The mean of `kernel` neighbours, absent ones counting as zero.
fn pool(values: &[f32], kernel: usize, out: &mut [f32]) {
    let reach = kernel / 2;
    for (place, out) in out.iter_mut().enumerate() {
        let neighbours = &values[place.saturating_sub(reach)..values.len().min(place.saturating_add(reach + 1))];
        *out = neighbours.iter().sum::<f32>() / kernel as f32;
    }
}
