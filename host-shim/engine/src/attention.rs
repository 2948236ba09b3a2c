//! Causal attention of one step over cached rows, with grouped queries (Ainslie et al. 2023, arXiv 2305.13245).
//!
//! Each query row sees the keys of its own sequence in order, and nothing in its arithmetic depends on the rows beside
//! it, the cache's kind or the number of threads:
//!
//! * a score is a dot product with eight lanes, channel `c` in lane `c % 8`, times `1 / sqrt(head_dim)`;
//! * the exponentials of the distances to the row's largest score are summed by lanes of `key % 8`;
//! * each channel of the output is one chain of fused multiply-adds over the keys in order, divided at the end.
//!
//! Scores of a tile of queries are kept whole, so memory is `24 * keys` floats for each thread.

use rayon::prelude::*;

use crate::cache::{KvBuffer, LayerView, RowLayout, read_rows};
use crate::ops::exponentials;
use crate::rank::{BatchSequence, HeadShard};
use crate::simd::{Kernel, LANES, dispatch, dot};

/// Queries of one task; with their group they share each block of keys.
const TILE: usize = 8;
/// Keys converted to f32 at a time: with 64 channels they fit half the first-level cache.
const KEY_BLOCK: usize = 64;
/// Channels accumulated at a time: four vectors of eight.
const CHANNELS: usize = 4 * LANES;

/// Attention of all rows of neighbouring sequences of a batch in one layer, on one rank.
///
/// `q` is `[rows of the sequences, query heads of the shard, head_dim]`, after RoPE; so is the result. The step's own K
/// and V must be in the cache already: row `i` of a sequence sees the rows cached before the step and `i + 1` more.
pub fn attend(
    view: &LayerView<'_>,
    q: &[f32],
    sequences: &[BatchSequence],
    layer: usize,
    shard: &HeadShard,
) -> Vec<f32> {
    let head_dim = view.layout.head_dim;
    let stride = shard.query_heads.len() * head_dim;
    let first_row = sequences.first().map_or(0, |sequence| sequence.first_row);
    let mut tiles = Vec::new();
    for sequence in sequences {
        let cache = &sequence.layers[layer];
        for start in (0..sequence.rows).step_by(TILE) {
            for kv_head in 0..shard.kv_heads.len() {
                tiles.push(Tile {
                    k: view.k,
                    v: view.v,
                    layout: view.layout,
                    table: &cache.blocks,
                    kv_head,
                    heads: shard.group_of(kv_head),
                    q,
                    stride,
                    first_row: sequence.first_row - first_row + start,
                    rows: TILE.min(sequence.rows - start),
                    visible: cache.len + start + 1,
                });
            }
        }
    }
    let results: Vec<Vec<f32>> = tiles.par_iter().map(dispatch).collect();
    let mut out = vec![0.0; q.len()];
    for (tile, result) in tiles.iter().zip(results) {
        let width = tile.heads.len() * head_dim;
        for (row, values) in result.chunks_exact(width).enumerate() {
            let at = (tile.first_row + row) * stride + tile.heads.start * head_dim;
            out[at..at + width].copy_from_slice(values);
        }
    }
    out
}

/// Some neighbouring queries of one sequence, for the query heads of one KV head.
struct Tile<'a> {
    k: &'a KvBuffer,
    v: &'a KvBuffer,
    layout: RowLayout,
    table: &'a [u32],
    /// KV head, counted within the shard.
    kv_head: usize,
    /// Its query heads, counted within the shard.
    heads: std::ops::Range<usize>,
    q: &'a [f32],
    stride: usize,
    first_row: usize,
    rows: usize,
    /// Keys that the first row sees; each next row sees one more.
    visible: usize,
}

impl Kernel for &Tile<'_> {
    /// `[rows, heads, head_dim]`
    type Output = Vec<f32>;

    #[inline(always)]
    fn run(self) -> Vec<f32> {
        let head_dim = self.layout.head_dim;
        let heads = self.heads.len();
        let keys = self.visible + self.rows - 1;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut scores = vec![0.0f32; self.rows * heads * keys];
        let mut block = vec![0.0f32; KEY_BLOCK * head_dim];

        for start in (0..keys).step_by(KEY_BLOCK) {
            let block = &mut block[..KEY_BLOCK.min(keys - start) * head_dim];
            read_rows(self.k, &self.layout, self.table, self.kv_head, start, block);
            for row in 0..self.rows {
                let count = self.seen_of_block(row, start);
                for head in 0..heads {
                    let q = self.query(row, head);
                    let scores = &mut scores[(row * heads + head) * keys + start..][..count];
                    for (score, key) in scores.iter_mut().zip(block.chunks_exact(head_dim)) {
                        *score = dot(q, key) * scale;
                    }
                }
            }
        }

        let mut sums = Vec::with_capacity(self.rows * heads);
        for (index, scores) in scores.chunks_exact_mut(keys).enumerate() {
            sums.push(exponentials(&mut scores[..self.visible + index / heads]));
        }

        let mut out = vec![0.0f32; self.rows * heads * head_dim];
        for start in (0..keys).step_by(KEY_BLOCK) {
            let block = &mut block[..KEY_BLOCK.min(keys - start) * head_dim];
            read_rows(self.v, &self.layout, self.table, self.kv_head, start, block);
            for row in 0..self.rows {
                let count = self.seen_of_block(row, start);
                for head in 0..heads {
                    let index = row * heads + head;
                    let weights = &scores[index * keys + start..][..count];
                    accumulate(weights, block, &mut out[index * head_dim..][..head_dim]);
                }
            }
        }
        for (out, sum) in out.chunks_exact_mut(head_dim).zip(sums) {
            for value in out {
                *value /= sum;
            }
        }
        out
    }
}

impl Tile<'_> {
    /// How many keys of the block that begins at `start` a row sees.
    #[inline(always)]
    fn seen_of_block(&self, row: usize, start: usize) -> usize {
        (self.visible + row).saturating_sub(start).min(KEY_BLOCK)
    }

    #[inline(always)]
    fn query(&self, row: usize, head: usize) -> &[f32] {
        let at = (self.first_row + row) * self.stride + (self.heads.start + head) * self.layout.head_dim;
        &self.q[at..at + self.layout.head_dim]
    }
}

/// `out += sum over keys of weight * value`, each channel one chain over the keys.
#[inline(always)]
fn accumulate(weights: &[f32], values: &[f32], out: &mut [f32]) {
    let head_dim = out.len();
    let wide = head_dim / CHANNELS * CHANNELS;
    for channel in (0..wide).step_by(CHANNELS) {
        accumulate_channels::<CHANNELS>(weights, values, out, channel);
    }
    for channel in (wide..head_dim).step_by(LANES) {
        accumulate_channels::<LANES>(weights, values, out, channel);
    }
}

#[inline(always)]
fn accumulate_channels<const N: usize>(weights: &[f32], values: &[f32], out: &mut [f32], channel: usize) {
    let head_dim = out.len();
    let Some(out) = out[channel..].first_chunk_mut::<N>() else { return };
    let mut acc = *out;
    for (&weight, row) in weights.iter().zip(values.chunks_exact(head_dim)) {
        let Some(row) = row[channel..].first_chunk::<N>() else { return };
        for lane in 0..N {
            acc[lane] = weight.mul_add(row[lane], acc[lane]);
        }
    }
    *out = acc;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{KvDtype, LayerCache, SequenceId};
    use crate::rank::Phase;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// Softmax attention in f64 over explicit masks.
    fn reference(q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>]) -> Vec<f64> {
        let product = |k: &[f32]| q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let weights: Vec<f64> = k.iter().map(|k| (product(k) / (q.len() as f64).sqrt()).exp()).collect();
        let total: f64 = weights.iter().sum();
        let channel = |c: usize| weights.iter().zip(v).map(|(w, v)| w * f64::from(v[c])).sum::<f64>() / total;
        (0..q.len()).map(channel).collect()
    }

    #[test]
    fn equals_plain_softmax_in_both_layouts_and_any_head_dim() {
        for (head_dim, cached, rows) in [(64, 0, 21), (64, 130, 9), (40, 70, 1), (8, 5, 3)] {
            let shard = HeadShard { kv_heads: 0..2, query_heads: 0..6, group: 3 };
            let keys = cached + rows;
            let (k, v) = (noise(2 * keys * head_dim, 1), noise(2 * keys * head_dim, 2));
            let q = noise(rows * 6 * head_dim, 3);
            let row = |data: &[f32], head: usize, t: usize| data[(head * keys + t) * head_dim..][..head_dim].to_vec();
            let mut results = Vec::new();
            for (block_size, table) in
                [(keys, vec![]), (16, (0..keys.div_ceil(16) as u32).map(|i| (i * 7) % 11 + 11 * (i / 11)).collect())]
            {
                let layout = RowLayout::blocked(2, block_size, head_dim);
                let blocks = table.iter().max().map_or(1, |b| *b as usize + 1);
                let mut buffers = [(); 2].map(|()| KvBuffer::new(KvDtype::F32, blocks * layout.stride_block));
                let [kb, vb] = &mut buffers;
                let mut view = LayerView { k: kb, v: vb, layout };
                for head in 0..2 {
                    for t in 0..keys {
                        view.write(&table, t, head, &row(&k, head, t), &row(&v, head, t));
                    }
                }
                let sequence = BatchSequence {
                    id: SequenceId::unused(),
                    first_row: 0,
                    rows,
                    first_position: 0,
                    layers: vec![LayerCache { len: cached, blocks: table }],
                    prompt_ends: false,
                    phase: Phase::Prefill,
                    tag: crate::hooks::StepTag::default(),
                };
                results.push(attend(&view, &q, &[sequence], 0, &shard));
            }
            assert!(results[0].iter().zip(&results[1]).all(|(a, b)| a.to_bits() == b.to_bits()));
            for i in 0..rows {
                for head in 0..6 {
                    let seen = |data: &[f32]| (0..cached + i + 1).map(|t| row(data, head / 3, t)).collect::<Vec<_>>();
                    let at = (i * 6 + head) * head_dim;
                    let exact = reference(&q[at..at + head_dim], &seen(&k), &seen(&v));
                    for (found, exact) in results[0][at..].iter().zip(exact) {
                        assert!((f64::from(*found) - exact).abs() < 2e-6, "{found} is not {exact}");
                    }
                }
            }
        }
    }
}
