//! Re-rotation against complex numbers in f64, in every layout and dtype.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Cache, Random, shapes};
use kvhook_kernels::rotate::{Pairing, Rotary, Shift, rotate};
use kvhook_kernels::{Dtype, Indices, KernelError};
use proptest::prelude::*;

fn frequencies(pairs: usize, base: f64) -> Vec<f64> {
    (0..pairs).map(|pair| base.powf(-(pair as f64) / pairs as f64)).collect()
}

/// Half a step of the dtype, and the rounding of f32, for values of up to 1.5.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 4e-7,
        Dtype::F16 => 5e-4,
        Dtype::Bf16 => 4e-3,
    }
}

/// A row turned by `e^(i x)`, pair by pair: the power of a position's step, by squaring.
fn expected(row: &[f64], frequencies: &[f64], pairing: Pairing, by: i64) -> Vec<f64> {
    let mut out = row.to_vec();
    for (pair, frequency) in frequencies.iter().enumerate() {
        let (mut cos, mut sin) = (1.0, 0.0);
        let (mut step_cos, mut step_sin) = (frequency.cos(), frequency.sin() * by.signum() as f64);
        let mut left = by.unsigned_abs();
        while left > 0 {
            if left % 2 == 1 {
                (cos, sin) = (cos * step_cos - sin * step_sin, cos * step_sin + sin * step_cos);
            }
            (step_cos, step_sin) = (step_cos * step_cos - step_sin * step_sin, 2.0 * step_cos * step_sin);
            left /= 2;
        }
        let (a, b) = match pairing {
            Pairing::HalfSplit => (pair, pair + frequencies.len()),
            Pairing::Interleaved => (2 * pair, 2 * pair + 1),
        };
        out[a] = row[a] * cos - row[b] * sin;
        out[b] = row[b] * cos + row[a] * sin;
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn equals_complex_multiplication_and_writes_nothing_else(
        shape in shapes(1..60),
        part in 0.0f64..1.0,
        interleaved: bool,
        all: bool,
        shared: bool,
        seed: u64,
    ) {
        prop_assume!(shape.head_dim >= 2);
        let mut random = Random(seed | 1);
        let pairs = 1 + (part * (shape.head_dim / 2) as f64) as usize;
        let pairs = pairs.min(shape.head_dim / 2);
        let frequencies = frequencies(pairs, 10_000.0);
        let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
        let rotary = Rotary { frequencies: &frequencies, pairing };
        let start = random.below(shape.capacity);
        let tokens = start..start + random.below(shape.capacity - start + 1);
        let heads = random.below(shape.kv_heads)..shape.kv_heads;
        let lists = if shared { 1 } else { shape.kv_heads };
        let positions: Vec<u32> = (0..lists * tokens.len()).map(|_| random.below(200_000) as u32).collect();
        let by_all = random.below(300_000) as i64 - 150_000;
        let indices = if shared {
            Indices::shared(&positions)
        } else {
            Indices::per_head(&positions, tokens.len())
        };
        let shift = if all { Shift::All(by_all) } else { Shift::From(indices) };

        let mut cache = Cache::new(shape.clone());
        let before = cache.bytes.clone();
        rotate(&cache.rows(), &rotary, &shift, heads.clone(), tokens.clone()).unwrap();
        let mut with_results = before.clone();
        for head in heads {
            for (place, token) in tokens.clone().enumerate() {
                let list = if shared { 0 } else { head };
                let by = if all { by_all } else { token as i64 - i64::from(positions[list * tokens.len() + place]) };
                let (found, row) = (cache.get(token, head), before_row(&cache, &before, token, head));
                for (found, expected) in found.iter().zip(expected(&row, &frequencies, pairing, by)) {
                    prop_assert!((found - expected).abs() <= tolerance(shape.dtype), "{found} for {expected} by {by}");
                }
                for element in 0..shape.head_dim {
                    let at = cache.offset(token, head, element);
                    with_results[at..at + shape.dtype.size()].copy_from_slice(&cache.bytes[at..at + shape.dtype.size()]);
                }
            }
        }
        prop_assert!(with_results == cache.bytes, "nothing beside the rows was written");
    }
}

/// The row as it was: alignment of two caches may differ, so it is read at the first one's places.
fn before_row(cache: &Cache, bytes: &[u8], token: usize, head: usize) -> Vec<f64> {
    let size = cache.shape.dtype.size();
    (0..cache.shape.head_dim)
        .map(|element| {
            let bytes = &bytes[cache.offset(token, head, element)..][..size];
            match cache.shape.dtype {
                Dtype::F32 => f64::from(f32::from_ne_bytes(bytes.try_into().unwrap())),
                Dtype::F16 => half::f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
                Dtype::Bf16 => half::bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
            }
        })
        .collect()
}

#[test]
fn what_does_not_fit_is_refused_before_a_row_is_written() {
    let mut random = Random(3);
    let shape = common::Shape {
        dtype: Dtype::F32,
        kv_heads: 2,
        capacity: 8,
        head_dim: 16,
        block_size: 0,
        token_major: false,
        element_step: 1,
        table_per_head: false,
        kind: kvhook_kernels::IndexKind::U32,
        seed: random.next(),
    };
    let mut cache = Cache::new(shape);
    let before = cache.bytes.clone();
    let rows = cache.rows();
    let nine = frequencies(9, 10_000.0);
    let rotary = |pairs: usize| Rotary { frequencies: &nine[..pairs], pairing: Pairing::HalfSplit };
    let refused = |pairs, shift, tokens| rotate(&rows, &rotary(pairs), &shift, 0..2, tokens).unwrap_err();
    assert_eq!(refused(9, Shift::All(1), 0..8), KernelError::Rotary { pairs: 9, head_dim: 16 });
    assert_eq!(refused(0, Shift::All(1), 0..8), KernelError::Rotary { pairs: 0, head_dim: 16 });
    assert!(matches!(refused(8, Shift::All(1), 0..9), KernelError::TokenRange { .. }));
    let seven = Shift::From(Indices::shared(&[0; 7]));
    assert!(matches!(refused(8, seven, 0..8), KernelError::SliceLength { found: 7, expected: 8, .. }));
    let one_list = Shift::From(Indices::per_head(&[0; 8], 8));
    assert!(matches!(refused(8, one_list, 0..8), KernelError::Index(_)));
    assert!(cache.bytes == before);
}
