//! Dense matrix products with one order of summation for each result.
//!
//! A library's product may sum a row in another order when it comes alone or among others (candle's gives a single row
//! other bits than the same row among more), or on another machine. Here each result is one chain of fused
//! multiply-adds over the inner dimension, in order, and vector lanes run over columns: a row is the same bits alone,
//! in a batch and in a chunk of any size, at the library's speed. So batched decode equals decode alone, chunked
//! prefill equals whole prefill, and decode equals prefill.

use rayon::prelude::*;

use crate::simd::{Kernel, dispatch};

/// Columns of a panel: two vectors of eight.
const PANEL: usize = 16;
/// Rows of a full tile: 6 x 16 results fill 12 of 16 vector registers.
const TILE: usize = 6;
/// Rows that one task works on: with 1,536 inner values they fit the second-level cache.
const ROW_BLOCK: usize = 48;
/// Panels that one task works on when there are few rows.
const PANEL_GROUP: usize = 8;

/// A weight matrix `[outputs, inputs]`, stored by panels of 16 outputs: `[panel][input][16]`, the last one padded.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    panels: Vec<f32>,
    outputs: usize,
    inputs: usize,
}

impl PackedMatrix {
    /// Packs matrices that share their inputs, one under the other, each row-major `[outputs, inputs]`.
    pub fn pack(parts: &[&[f32]], inputs: usize) -> Self {
        let rows: Vec<&[f32]> = parts.iter().flat_map(|part| part.chunks_exact(inputs)).collect();
        let mut panels = vec![0.0; rows.len().div_ceil(PANEL) * PANEL * inputs];
        panels.par_chunks_mut(PANEL * inputs).zip(rows.par_chunks(PANEL)).for_each(|(panel, rows)| {
            for (lane, row) in rows.iter().enumerate() {
                for (input, &value) in row.iter().enumerate() {
                    panel[input * PANEL + lane] = value;
                }
            }
        });
        Self { panels, outputs: rows.len(), inputs }
    }

    /// Number of outputs (rows of the weight matrix).
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs (columns of the weight matrix).
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The panels, `[panel][input][16]`.
    #[cfg(feature = "cuda")]
    pub(crate) fn panels(&self) -> &[f32] {
        &self.panels
    }

    /// Copies one row of the weight matrix, `[inputs]`, out of its panel.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        let panel = &self.panels[row / PANEL * PANEL * self.inputs..];
        for (input, value) in out.iter_mut().enumerate() {
            *value = panel[input * PANEL + row % PANEL];
        }
    }

    /// `x` times the transposed matrix: `x` is `[rows, inputs]`, the result `[rows, outputs]`, both row-major.
    pub fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut out = vec![0.0; rows * self.outputs];
        if rows == 0 {
            return out;
        }
        if rows > ROW_BLOCK {
            out.par_chunks_mut(ROW_BLOCK * self.outputs).zip(x.par_chunks(ROW_BLOCK * self.inputs)).for_each(
                |(out, x)| {
                    let x = pack_rows(x, self.inputs);
                    let width = self.outputs;
                    dispatch(Block { x: &x, panels: &self.panels, inputs: self.inputs, out, width });
                },
            );
            return out;
        }
        // Few rows: the weights are the traffic, so the cores share them.
        let x = pack_rows(x, self.inputs);
        let width = PANEL_GROUP * PANEL;
        let groups: Vec<Vec<f32>> = self
            .panels
            .par_chunks(width * self.inputs)
            .map(|panels| {
                let mut part = vec![0.0; rows * width];
                dispatch(Block { x: &x, panels, inputs: self.inputs, out: &mut part, width });
                part
            })
            .collect();
        for (group, part) in groups.iter().enumerate() {
            let start = group * width;
            let columns = width.min(self.outputs - start);
            for (row, values) in part.chunks_exact(width).enumerate() {
                out[row * self.outputs + start..][..columns].copy_from_slice(&values[..columns]);
            }
        }
        out
    }
}

/// Reorders rows into tiles of [`TILE`] rows (the last one smaller), each `[inputs][rows of the tile]`.
fn pack_rows(x: &[f32], inputs: usize) -> Vec<f32> {
    let mut packed = Vec::with_capacity(x.len());
    for tile in x.chunks(TILE * inputs) {
        for input in 0..inputs {
            packed.extend(tile.iter().skip(input).step_by(inputs));
        }
    }
    packed
}

/// Some rows times some panels.
struct Block<'a> {
    /// From [`pack_rows`].
    x: &'a [f32],
    panels: &'a [f32],
    inputs: usize,
    /// `[rows, width]`.
    out: &'a mut [f32],
    width: usize,
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { x, panels, inputs, out, width } = self;
        let tile_len = TILE * inputs;
        let full = x.len() / tile_len;
        let rest = x.len() % tile_len / inputs;
        let tail = &x[full * tile_len..];
        // Panels outside, so that a panel stays in the first cache while the tiles pass.
        for (index, panel) in panels.chunks_exact(PANEL * inputs).enumerate() {
            let column = index * PANEL;
            for (tile, x) in x[..full * tile_len].chunks_exact(tile_len).enumerate() {
                store(&product::<TILE>(x, panel), &mut out[tile * TILE * width..], width, column);
            }
            let out = &mut out[full * TILE * width..];
            match rest {
                1 => store(&product::<1>(tail, panel), out, width, column),
                2 => store(&product::<2>(tail, panel), out, width, column),
                3 => store(&product::<3>(tail, panel), out, width, column),
                4 => store(&product::<4>(tail, panel), out, width, column),
                5 => store(&product::<5>(tail, panel), out, width, column),
                _ => {}
            }
        }
    }
}

/// `ROWS x 16` results, each one chain over the inputs in order.
#[inline(always)]
fn product<const ROWS: usize>(x: &[f32], panel: &[f32]) -> [[f32; PANEL]; ROWS] {
    let mut acc = [[0.0f32; PANEL]; ROWS];
    for (x, weights) in x.as_chunks::<ROWS>().0.iter().zip(panel.as_chunks::<PANEL>().0) {
        for row in 0..ROWS {
            for lane in 0..PANEL {
                acc[row][lane] = x[row].mul_add(weights[lane], acc[row][lane]);
            }
        }
    }
    acc
}

/// Writes a tile's results, leaving out the padding of the last panel.
#[inline(always)]
fn store<const ROWS: usize>(acc: &[[f32; PANEL]; ROWS], out: &mut [f32], width: usize, column: usize) {
    let columns = PANEL.min(width - column);
    for (row, values) in acc.iter().enumerate() {
        out[row * width + column..][..columns].copy_from_slice(&values[..columns]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
    }

    #[test]
    fn equals_the_plain_sum_in_f64() {
        for (rows, inputs, outputs) in [(1, 8, 16), (5, 24, 17), (7, 33, 40), (50, 64, 100), (97, 16, 3)] {
            let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
            let out = PackedMatrix::pack(&[&w], inputs).multiply(&x);
            for row in 0..rows {
                for column in 0..outputs {
                    let exact: f64 =
                        (0..inputs).map(|i| f64::from(x[row * inputs + i]) * f64::from(w[column * inputs + i])).sum();
                    let found = f64::from(out[row * outputs + column]);
                    assert!((found - exact).abs() < 1e-5, "{rows}x{inputs}x{outputs} at {row},{column}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        let (inputs, outputs) = (96, 72);
        let (x, w) = (values(100 * inputs, 3), values(outputs * inputs, 4));
        let packed = PackedMatrix::pack(&[&w], inputs);
        let all = packed.multiply(&x);
        for rows in [1, 2, 3, 4, 5, 6, 7, 48, 49] {
            let some = packed.multiply(&x[..rows * inputs]);
            assert!(some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits()), "{rows} rows");
        }
    }

    #[test]
    fn vector_and_portable_code_have_the_same_bits() {
        let (rows, inputs, outputs) = (11, 96, 40);
        let (x, w) = (values(rows * inputs, 5), values(outputs * inputs, 6));
        let packed = PackedMatrix::pack(&[&w], inputs);
        let tiles = pack_rows(&x, inputs);
        let mut out = vec![0.0; rows * outputs];
        Block { x: &tiles, panels: &packed.panels, inputs, out: &mut out, width: outputs }.run();
        let dispatched = packed.multiply(&x);
        assert!(out.iter().zip(&dispatched).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn rows_come_back_out_of_the_panels() {
        let w = values(20 * 8, 7);
        let packed = PackedMatrix::pack(&[&w[..8 * 8], &w[8 * 8..]], 8);
        let mut row = [0.0; 8];
        packed.copy_row(18, &mut row);
        assert_eq!(row, w[18 * 8..19 * 8]);
        assert_eq!((packed.outputs(), packed.inputs()), (20, 8));
    }
}
