//! The MLP that makes one row of each group of adjacent rows: FastCache's compressor.

use std::ops::Range;

use crate::check::check_len;
use crate::dtype::{self, Dtype};
use crate::error::KernelError;
use crate::rows::Rows;
use crate::scratch;

/// Outputs of a panel: two AVX-512 vectors, or four of AVX2.
const PANEL: usize = 32;
/// Channels of a block of a tile: a row's place in a block is known at compile time.
const BLOCK: usize = 64;
/// Groups of a tile: a multiple of the rows that each instruction set multiplies at a time.
const TILE: usize = 48;
/// Floats of a cache line, to which panels and tiles are aligned.
const LINE: usize = 16;

/// One dense layer, stored for the multiplication: panels of 32 outputs, `[panel][input][32]`, the last one padded with
/// zeros, and the bias `[panel][32]`.
#[derive(Debug, Clone)]
struct Dense {
    /// The panels, from a line's start on.
    weights: Aligned,
    bias: Aligned,
}

/// A weight matrix `[out, in]`, row major, as PyTorch's `Linear` stores it, and its bias `[out]`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// `[out, in]`.
    pub weight: &'a [f32],
    /// `[out]`.
    pub bias: &'a [f32],
}

/// `y = W3 relu(W2 relu(W1 x + b1) + b2) + b3`, packed once for [`grouped_mlp`]. `x` is `factor` adjacent rows of one KV
/// head, oldest first, and `y` is one row of the same `head_dim`.
#[derive(Debug, Clone)]
pub struct GroupedMlp {
    factor: usize,
    head_dim: usize,
    layers: [Dense; 3],
}

impl GroupedMlp {
    /// Packs three layers: `W1` is `[head_dim, factor * head_dim]`, `W2` and `W3` are `[head_dim, head_dim]`.
    ///
    /// # Errors
    /// [`KernelError::Group`] for a factor or head_dim of 0; [`KernelError::SliceLength`] for a matrix or bias of another
    /// shape; no memory.
    pub fn pack(factor: usize, head_dim: usize, layers: [Linear<'_>; 3]) -> Result<Self, KernelError> {
        let inputs = factor.checked_mul(head_dim).filter(|inputs| *inputs > 0);
        let Some(inputs) = inputs else { return Err(KernelError::Group { factor, head_dim }) };
        let [first, second, third] = layers;
        let layers = [
            Dense::pack(first, inputs, head_dim)?,
            Dense::pack(second, head_dim, head_dim)?,
            Dense::pack(third, head_dim, head_dim)?,
        ];
        Ok(Self { factor, head_dim, layers })
    }

    /// Rows that become one.
    pub fn factor(&self) -> usize {
        self.factor
    }

    /// Elements of a row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| (layer.weights.0.len() + layer.bias.0.len()) * size_of::<Line>()).sum()
    }

    /// Elements of working memory that [`grouped_mlp`] wants: `48 * (factor + 2)` padded rows, some 50 KB for factor 2 at
    /// head_dim 64, and 172 KB for factor 5 at 128.
    pub fn scratch_len(&self) -> usize {
        (self.factor + 2) * self.row_blocks() * TILE * BLOCK + self.row_blocks() * BLOCK + LINE
    }

    /// Additions and multiplications for one group.
    pub fn operations(&self) -> usize {
        2 * (self.factor + 2) * self.head_dim * self.head_dim
    }

    fn row_blocks(&self) -> usize {
        self.head_dim.div_ceil(BLOCK)
    }
}

/// Which rows [`grouped_mlp`] reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// First row of the first group.
    pub source_start: usize,
    /// Groups; each is `factor` adjacent rows.
    pub count: usize,
    /// Row of the destination that the first group becomes.
    pub destination_start: usize,
}

/// Makes one row of each group, for each of `heads`: row `destination_start + g` of the destination becomes
/// `mlp(rows source_start + g * factor ..)`. The views may have any layout and dtype, paged or not, and must not overlap.
///
/// All three products of 48 groups are done before the next groups are read: rows are widened from where they lie into
/// a tile of working memory that stays in the second-level cache, hidden values never leave it, and results are rounded
/// to the destination's dtype as they are written. The groups of several heads share tiles.
///
/// Each result is one chain of fused multiply-adds over the inputs in order, then the bias, so its bits depend on
/// neither the groups beside it, nor threads, nor the processor's vector width.
///
/// Floor: `2 * (factor + 2) * head_dim^2` operations for each group and head, at the rate of a large matrix product;
/// reading a row takes `head_dim * dtype` bytes, far less time than that.
///
/// # Errors
/// Before the first row is written: heads and rows outside a view, another head_dim, [`KernelError::SliceLength`] unless
/// `scratch` has [`GroupedMlp::scratch_len`] elements. [`KernelError::ResultTooLarge`] where a result is not a number or
/// does not fit the destination's dtype; rows before it are written then.
pub fn grouped_mlp(
    mlp: &GroupedMlp,
    source: &Rows,
    destination: &Rows,
    heads: Range<usize>,
    groups: Groups,
    scratch: &mut [f32],
) -> Result<(), KernelError> {
    let Groups { source_start, count, destination_start } = groups;
    for (what, rows) in [("rows of the groups", source), ("destination", destination)] {
        if rows.head_dim() != mlp.head_dim {
            return Err(KernelError::HeadDimMismatch { what, found: rows.head_dim(), expected: mlp.head_dim });
        }
    }
    let source_end = source_start.saturating_add(count.saturating_mul(mlp.factor));
    source.check(heads.clone(), source_start..source_end)?;
    destination.check(heads.clone(), destination_start..destination_start.saturating_add(count))?;
    check_len("working memory", scratch.len(), mlp.scratch_len())?;

    let largest = largest(destination.dtype());
    let (tile, row) = split_scratch(mlp, scratch);
    let all = heads.len() * count;
    for start in (0..all).step_by(TILE) {
        let rows = TILE.min(all - start);
        let place = |group: usize| (heads.start + (start + group) / count, (start + group) % count);
        for group in 0..rows {
            let (head, number) = place(group);
            load(mlp, source, head, source_start + number * mlp.factor, group, tile.input);
        }
        // The third layer's results go where the first one's were.
        run(Multiply::new(mlp, 0, rows, tile.input, tile.first, true));
        run(Multiply::new(mlp, 1, rows, tile.first, tile.second, true));
        run(Multiply::new(mlp, 2, rows, tile.second, tile.first, false));
        for group in 0..rows {
            let (head, number) = place(group);
            for (block, row) in row.chunks_exact_mut(BLOCK).enumerate() {
                row.copy_from_slice(&tile.first[(block * TILE + group) * BLOCK..][..BLOCK]);
            }
            let row = &row[..mlp.head_dim];
            if !row.iter().fold(true, |fit, value| fit & (value.abs() <= largest)) {
                return Err(KernelError::ResultTooLarge { head, row: destination_start + number, largest });
            }
            destination.store(destination_start + number, head, row)?;
        }
    }
    Ok(())
}

/// The largest value that a dtype holds; from half a step above it on, rounding gives infinity.
fn largest(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::MAX,
        Dtype::F16 => half::f16::MAX.to_f32(),
        Dtype::Bf16 => half::bf16::MAX.to_f32(),
    }
}

/// Values of 48 groups between the layers, each `[row of the group][block of channels][group][64]`.
struct Tile<'a> {
    input: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

/// The tile, and a row, in working memory from the next line's start on.
fn split_scratch<'a>(mlp: &GroupedMlp, scratch: &'a mut [f32]) -> (Tile<'a>, &'a mut [f32]) {
    let hidden = mlp.row_blocks() * TILE * BLOCK;
    let skip = line_offset(scratch);
    let (input, rest) = scratch[skip..].split_at_mut(mlp.factor * hidden);
    let (first, rest) = rest.split_at_mut(hidden);
    let (second, rest) = rest.split_at_mut(hidden);
    (Tile { input, first, second }, &mut rest[..mlp.row_blocks() * BLOCK])
}

/// Elements to the start of the next line; at most `LINE - 1`, or 0 where it cannot be told.
fn line_offset(values: &[f32]) -> usize {
    let offset = values.as_ptr().align_offset(LINE * size_of::<f32>());
    if offset < LINE { offset } else { 0 }
}

/// Widens a group's rows into its places in the tile. The rows were checked.
fn load(mlp: &GroupedMlp, source: &Rows, head: usize, first: usize, group: usize, tile: &mut [f32]) {
    let layout = source.layout();
    let blocks = mlp.row_blocks();
    for member in 0..mlp.factor {
        // SAFETY: `grouped_mlp` checked head and rows.
        let row = unsafe { source.locate(first + member, head) };
        for block in 0..blocks {
            let channels = BLOCK.min(mlp.head_dim - block * BLOCK);
            let place = ((member * blocks + block) * TILE + group) * BLOCK;
            let out = &mut tile[place..place + channels];
            let from = row.wrapping_offset((block * BLOCK) as isize * layout.stride_element);
            // SAFETY: the row's elements are readable by `Rows::new`'s contract, and the tile is other memory.
            unsafe {
                if layout.dense_rows() {
                    dtype::widen(layout.dtype, from, out);
                } else {
                    dtype::widen_strided(layout.dtype, from, layout.stride_element, out);
                }
            }
        }
    }
}

/// One layer over the groups of a tile.
struct Multiply<'a> {
    layer: &'a Dense,
    /// Rows of a group that are its input: `factor`, or 1 for hidden values.
    members: usize,
    head_dim: usize,
    groups: usize,
    x: &'a [f32],
    out: &'a mut [f32],
    relu: bool,
}

impl<'a> Multiply<'a> {
    fn new(mlp: &'a GroupedMlp, layer: usize, groups: usize, x: &'a [f32], out: &'a mut [f32], relu: bool) -> Self {
        let members = if layer == 0 { mlp.factor } else { 1 };
        Self { layer: &mlp.layers[layer], members, head_dim: mlp.head_dim, groups, x, out, relu }
    }

    /// The layer, `ROWS` groups at a time; the last ones may be stale values, which nobody reads.
    #[inline(always)]
    fn run<const ROWS: usize>(self) {
        let Self { layer, members, head_dim, groups, x, out, relu } = self;
        let blocks = head_dim.div_ceil(BLOCK);
        let panel_len = members * head_dim * PANEL;
        let panels = layer.weights.values().chunks_exact(panel_len);
        // Panels outside: one stays in the cache while the groups pass.
        for (panel, (weights, bias)) in panels.zip(layer.bias.values().as_chunks::<PANEL>().0).enumerate() {
            for first in (0..groups).step_by(ROWS) {
                let mut sums = [[0.0f32; PANEL]; ROWS];
                let mut weights = weights.as_chunks::<PANEL>().0;
                for block in 0..members * blocks {
                    let channels = BLOCK.min(head_dim - block % blocks * BLOCK);
                    let (these, rest) = weights.split_at(channels);
                    weights = rest;
                    let x = x[(block * TILE + first) * BLOCK..][..ROWS * BLOCK].as_chunks::<BLOCK>().0;
                    accumulate(&mut sums, x, these);
                }
                let place = ((panel * PANEL / BLOCK) * TILE + first) * BLOCK + panel * PANEL % BLOCK;
                for (row, sums) in sums.iter().enumerate() {
                    let out = &mut out[place + row * BLOCK..][..PANEL];
                    for lane in 0..PANEL {
                        let value = sums[lane] + bias[lane];
                        out[lane] = if relu && value < 0.0 { 0.0 } else { value };
                    }
                }
            }
        }
    }
}

/// Adds the products of a block's channels, in order.
#[inline(always)]
fn accumulate<const ROWS: usize>(sums: &mut [[f32; PANEL]; ROWS], x: &[[f32; BLOCK]], weights: &[[f32; PANEL]]) {
    let Ok(x) = <&[[f32; BLOCK]; ROWS]>::try_from(x) else { return };
    let mut acc = *sums;
    for (channel, weights) in weights.iter().enumerate().take(BLOCK) {
        for row in 0..ROWS {
            for lane in 0..PANEL {
                acc[row][lane] = x[row][channel].mul_add(weights[lane], acc[row][lane]);
            }
        }
    }
    *sums = acc;
}

/// Runs a layer with the widest instruction set that this processor has: the sums fill its registers.
fn run(multiply: Multiply<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512.
            return unsafe { run_avx512(multiply) };
        }
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            // SAFETY: the processor has AVX2 and fused multiply-adds.
            return unsafe { run_avx2(multiply) };
        }
    }
    multiply.run::<3>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512(multiply: Multiply<'_>) {
    multiply.run::<12>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(multiply: Multiply<'_>) {
    multiply.run::<3>();
}

impl Dense {
    fn pack(linear: Linear<'_>, inputs: usize, outputs: usize) -> Result<Self, KernelError> {
        check_len("weight of a layer", linear.weight.len(), inputs.saturating_mul(outputs))?;
        check_len("bias of a layer", linear.bias.len(), outputs)?;
        let panels = outputs.div_ceil(PANEL);
        let mut weights = Aligned::zeros(panels * inputs * PANEL)?;
        for (output, row) in linear.weight.chunks_exact(inputs).enumerate() {
            let panel = output / PANEL * inputs * PANEL + output % PANEL;
            for (input, &weight) in row.iter().enumerate() {
                weights.values_mut()[panel + input * PANEL] = weight;
            }
        }
        let mut bias = Aligned::zeros(panels * PANEL)?;
        bias.values_mut()[..outputs].copy_from_slice(linear.bias);
        Ok(Self { weights, bias })
    }
}

/// Values that begin with a line.
#[derive(Debug, Clone)]
struct Aligned(Vec<Line>);

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code, reason = "read and written as a part of a slice of floats")]
struct Line([f32; LINE]);

impl Aligned {
    /// `len` zeros, a multiple of a line.
    fn zeros(len: usize) -> Result<Self, KernelError> {
        scratch::filled(len.div_ceil(LINE), Line([0.0; LINE])).map(Self)
    }

    fn values(&self) -> &[f32] {
        // SAFETY: a line is 16 floats without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * LINE) }
    }

    fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * LINE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Whatever the number of groups at a time and the instruction set, the bits are the same.
    #[test]
    fn all_versions_give_the_same_bits() {
        for (factor, head_dim, groups) in [(1, 64, 48), (2, 64, 47), (3, 80, 13), (5, 96, 1), (2, 33, 12)] {
            let inputs = factor * head_dim;
            let (w1, w2, bias) = (values(inputs * head_dim, 1), values(head_dim * head_dim, 2), values(head_dim, 3));
            let layer = |weight| Linear { weight, bias: &bias };
            let mlp = GroupedMlp::pack(factor, head_dim, [layer(&w1), layer(&w2), layer(&w2)]).unwrap();
            let blocks = head_dim.div_ceil(BLOCK);
            let x = values(factor * blocks * TILE * BLOCK, 4);
            let result = |version: &dyn Fn(Multiply<'_>)| {
                let mut out = vec![0.0; blocks * TILE * BLOCK];
                version(Multiply::new(&mlp, 0, groups, &x, &mut out, true));
                let of_group = |group: usize| {
                    (0..head_dim)
                        .map(|channel| out[(channel / BLOCK * TILE + group) * BLOCK + channel % BLOCK].to_bits())
                        .collect::<Vec<_>>()
                };
                (0..groups).map(of_group).collect::<Vec<_>>()
            };
            let expected = result(&run);
            assert_eq!(result(&|multiply| multiply.run::<12>()), expected);
            assert_eq!(result(&|multiply| multiply.run::<3>()), expected);
            assert_eq!(result(&|multiply| multiply.run::<1>()), expected);
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                // SAFETY: the processor has both.
                assert_eq!(result(&|multiply| unsafe { run_avx2(multiply) }), expected);
            }
        }
    }
}
