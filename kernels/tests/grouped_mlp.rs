//! The grouped MLP against the formula in f64, in every layout and dtype.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Cache, Random, Shape, shapes};
use kvhook_kernels::grouped_mlp::{GroupedMlp, Groups, Linear, grouped_mlp};
use kvhook_kernels::{Dtype, IndexKind, KernelError};
use proptest::prelude::*;

/// Three matrices, `[out][in]`, and their biases.
struct Weights {
    factor: usize,
    dim: usize,
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Weights {
    fn new(factor: usize, dim: usize, seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let mut layer = |inputs: usize| {
            // Sums of about one, whatever the width, as trained weights give.
            let scale = (3.0 / inputs as f32).sqrt();
            let weight = (0..dim * inputs).map(|_| scale * random.real()).collect();
            (weight, (0..dim).map(|_| random.real()).collect())
        };
        Self { factor, dim, layers: vec![layer(factor * dim), layer(dim), layer(dim)] }
    }

    fn packed(&self) -> GroupedMlp {
        let layers =
            [0, 1, 2].map(|layer: usize| Linear { weight: &self.layers[layer].0, bias: &self.layers[layer].1 });
        GroupedMlp::pack(self.factor, self.dim, layers).unwrap()
    }

    /// The formula, one output at a time.
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut x = x.to_vec();
        for (number, (weight, bias)) in self.layers.iter().enumerate() {
            let inputs = x.len();
            let output = |out: usize| {
                let row = &weight[out * inputs..(out + 1) * inputs];
                let sum: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
                let y = sum + f64::from(bias[out]);
                if number < 2 { y.max(0.0) } else { y }
            };
            x = (0..self.dim).map(output).collect();
        }
        x
    }
}

/// Half a step of the dtype at 1, and the rounding of f32 sums: relative to the largest result of a row.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-5,
        Dtype::F16 => 5e-4,
        Dtype::Bf16 => 4e-3,
    }
}

fn dense(dtype: Dtype, kv_heads: usize, capacity: usize, head_dim: usize, seed: u64) -> Shape {
    let kind = IndexKind::I32;
    let (block_size, token_major, element_step, table_per_head) = (0, false, 1, false);
    Shape { dtype, kv_heads, capacity, head_dim, block_size, token_major, element_step, table_per_head, kind, seed }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn equals_the_formula_and_writes_nothing_else(
        shape in shapes(1..140),
        target in shapes(140..141),
        factor in 1usize..6,
        from in 0.0f64..1.0,
        seed: u64,
    ) {
        let target = Shape { dtype: shape.dtype, kv_heads: shape.kv_heads, head_dim: shape.head_dim, ..target };
        let weights = Weights::new(factor, shape.head_dim, seed);
        let mlp = weights.packed();
        let source_start = (from * shape.capacity as f64) as usize;
        let count = (shape.capacity - source_start) / factor;
        let destination_start = 140 - count - seed as usize % (141 - count);
        let heads = seed as usize % shape.kv_heads..shape.kv_heads;
        let groups = Groups { source_start, count, destination_start };
        let (mut source, mut destination) = (Cache::new(shape.clone()), Cache::new(target));
        let before = (source.bytes.clone(), destination.bytes.clone());
        let mut scratch = vec![f32::NAN; mlp.scratch_len()];
        grouped_mlp(&mlp, &source.rows(), &destination.rows(), heads.clone(), groups, &mut scratch).unwrap();
        prop_assert!(source.bytes == before.0, "the source is as it was");

        let mut with_results = before.1;
        for head in heads {
            for group in 0..count {
                let x: Vec<f64> = (0..factor).flat_map(|row| source.get(source_start + group * factor + row, head)).collect();
                let (found, expected) = (destination.get(destination_start + group, head), weights.apply(&x));
                let largest = expected.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
                for (found, expected) in found.iter().zip(&expected) {
                    prop_assert!((found - expected).abs() <= tolerance(shape.dtype) * largest, "{found} for {expected}");
                }
                for element in 0..shape.head_dim {
                    let at = destination.offset(destination_start + group, head, element);
                    let bytes = at..at + shape.dtype.size();
                    with_results[bytes.clone()].copy_from_slice(&destination.bytes[bytes]);
                }
            }
        }
        prop_assert!(with_results == destination.bytes, "nothing beside the results was written");
    }
}

#[test]
fn results_do_not_depend_on_what_is_computed_with_them() {
    for (dtype, dim, factor) in [(Dtype::F32, 64, 2), (Dtype::F16, 80, 3), (Dtype::Bf16, 128, 5)] {
        let mlp = Weights::new(factor, dim, 5).packed();
        let count = 61;
        let mut source = Cache::new(dense(dtype, 3, count * factor, dim, 8));
        let mut results = [(); 3].map(|()| Cache::new(dense(dtype, 3, count, dim, 2)));
        let source = source.rows();
        let [whole, heads, ones] = results.each_mut().map(Cache::rows);
        let mut scratch = vec![0.0; mlp.scratch_len()];
        let mut run = |to, heads, start: usize, count| {
            let groups = Groups { source_start: start * factor, count, destination_start: start };
            grouped_mlp(&mlp, &source, to, heads, groups, &mut scratch).unwrap();
        };
        run(&whole, 0..3, 0, count);
        (0..3).rev().for_each(|head| run(&heads, head..head + 1, 0, count));
        for (start, count) in [(0, 1), (1, 11), (12, 12), (24, 37)] {
            run(&ones, 0..2, start, count);
            run(&ones, 2..3, start, count);
        }
        let rows = |cache: &Cache| {
            let head = |head| (0..count).map(|row| cache.row(row, head)).collect::<Vec<_>>();
            (0..3).map(head).collect::<Vec<_>>()
        };
        assert!(rows(&results[1]) == rows(&results[0]));
        assert!(rows(&results[2]) == rows(&results[0]));
    }
}

#[test]
fn what_does_not_fit_is_refused_before_a_row_is_written() {
    let mlp = Weights::new(2, 16, 1).packed();
    let mut source = Cache::new(dense(Dtype::F32, 2, 20, 16, 2));
    let mut destination = Cache::new(dense(Dtype::F32, 2, 9, 16, 4));
    let mut other = Cache::new(dense(Dtype::F32, 2, 9, 17, 4));
    let before = destination.bytes.clone();
    let (rows, to, other) = (source.rows(), destination.rows(), other.rows());
    let mut scratch = vec![0.0; mlp.scratch_len()];
    let mut run = |to, heads, source_start, count, destination_start| {
        let groups = Groups { source_start, count, destination_start };
        grouped_mlp(&mlp, &rows, to, heads, groups, &mut scratch).unwrap_err()
    };
    assert!(matches!(run(&to, 0..3, 0, 1, 0), KernelError::HeadRange { .. }));
    assert!(matches!(run(&to, 0..2, 0, 11, 0), KernelError::TokenRange { .. }));
    assert!(matches!(run(&to, 0..2, 3, 9, 0), KernelError::TokenRange { .. }));
    assert!(matches!(run(&to, 0..2, 0, 9, 1), KernelError::TokenRange { .. }));
    assert!(matches!(run(&to, 0..2, usize::MAX, 2, 0), KernelError::TokenRange { .. }));
    assert!(matches!(run(&to, 0..2, 0, usize::MAX, 0), KernelError::TokenRange { .. }));
    assert!(matches!(run(&other, 0..2, 0, 1, 0), KernelError::HeadDimMismatch { found: 17, .. }));
    let groups = Groups { source_start: 0, count: 1, destination_start: 0 };
    let short = grouped_mlp(&mlp, &rows, &to, 0..1, groups, &mut scratch[1..]);
    assert!(matches!(short, Err(KernelError::SliceLength { .. })));
    assert!(destination.bytes == before);

    let (weight, bias) = (vec![0.0; 32], vec![0.0; 4]);
    let linear = |weight| Linear { weight, bias: &bias };
    let pack =
        |factor, dim, first| GroupedMlp::pack(factor, dim, [first, linear(&weight[..16]), linear(&weight[..16])]);
    assert!(pack(2, 4, linear(&weight)).is_ok());
    assert!(matches!(pack(2, 4, linear(&weight[1..])), Err(KernelError::SliceLength { .. })));
    assert!(matches!(pack(3, 4, linear(&weight)), Err(KernelError::SliceLength { .. })));
    assert!(matches!(pack(0, 4, linear(&weight)), Err(KernelError::Group { .. })));
    assert!(matches!(pack(usize::MAX, 4, linear(&weight)), Err(KernelError::Group { .. })));
}

#[test]
fn a_result_that_the_cache_cannot_hold_is_an_error() {
    for (dtype, value, fits) in [
        (Dtype::F16, 65_504.0, true),
        (Dtype::F16, 65_600.0, false),
        (Dtype::Bf16, 65_600.0, true),
        (Dtype::F32, f32::MAX, true),
        (Dtype::F32, f32::NAN, false),
        (Dtype::Bf16, f32::INFINITY, false),
    ] {
        let mut weights = Weights::new(2, 8, 3);
        weights.layers[2] = (vec![0.0; 64], vec![0.0, 0.0, value, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let mlp = weights.packed();
        let (mut source, mut to) = (Cache::new(dense(dtype, 1, 4, 8, 2)), Cache::new(dense(dtype, 1, 4, 8, 2)));
        let groups = Groups { source_start: 0, count: 2, destination_start: 1 };
        let result = grouped_mlp(&mlp, &source.rows(), &to.rows(), 0..1, groups, &mut vec![0.0; mlp.scratch_len()]);
        match result {
            Ok(()) => assert!(fits && (to.get(1, 0)[2] / f64::from(value) - 1.0).abs() < 4e-3),
            Err(error) => assert!(!fits && matches!(error, KernelError::ResultTooLarge { head: 0, row: 1, .. })),
        }
    }
}
