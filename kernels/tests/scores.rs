//! Scores, compared with their formulas in f64 and with closed forms.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Cache, Random, Shape, shapes};
use kvhook_kernels::key_diff::key_diff;
use kvhook_kernels::norms::row_norms;
use kvhook_kernels::window_attention::{WindowQueries, window_attention};
use kvhook_kernels::{Dtype, IndexKind, KernelError, parallel};
use proptest::prelude::*;

fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (place, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= tolerance, "place {place}: {found}, expected {expected}");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// SnapKV's score by its definition: probabilities of each query, their mean, the pooled mean, the group's mean.
fn snapkv(cache: &Cache, head: usize, queries: &WindowQueries<'_>, length: usize, kernel: usize) -> Vec<f64> {
    let (window, group) = (queries.window, queries.query_heads / cache.shape.kv_heads);
    let keys: Vec<Vec<f64>> = (0..length).map(|token| cache.get(token, head)).collect();
    let history = length - window;
    let mut scores = vec![0.0; history];
    for member in 0..group {
        let mut mean = vec![0.0; history];
        for position in 0..window {
            let start = position * queries.stride_position + (head * group + member) * queries.stride_head;
            let query: Vec<f64> = queries.data[start..][..cache.shape.head_dim].iter().map(|&x| f64::from(x)).collect();
            let visible = length - window + position + 1;
            let weights: Vec<f64> =
                keys[..visible].iter().map(|key| (dot(&query, key) * f64::from(queries.scale)).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (mean, weight) in mean.iter_mut().zip(&weights) {
                *mean += weight / total / window as f64;
            }
        }
        for (place, score) in scores.iter_mut().enumerate() {
            for offset in 0..kernel {
                let neighbour = (place + offset).checked_sub(kernel / 2).and_then(|place| mean.get(place));
                *score += neighbour.unwrap_or(&0.0) / (kernel * group) as f64;
            }
        }
    }
    let largest = scores.iter().copied().fold(0.0, f64::max);
    scores.extend(std::iter::repeat_n(largest, window));
    scores
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn norms_follow_their_formula(shape in shapes(1..200), seed in 1u64..) {
        let mut random = Random(seed);
        let mut cache = Cache::new(shape.clone());
        let start = random.below(shape.capacity);
        let heads = random.below(shape.kv_heads)..shape.kv_heads;
        let mut out = vec![f32::NAN; heads.len() * (shape.capacity - start)];
        row_norms(&cache.rows(), heads.clone(), start..shape.capacity, &mut out).unwrap();
        let expected: Vec<f64> =
            heads.flat_map(|head| (start..shape.capacity).map(move |token| (token, head))).map(|(token, head)| norm(&cache.get(token, head))).collect();
        assert_close(&out, &expected, 1e-5);
    }

    #[test]
    fn key_diff_follows_its_formula(shape in shapes(1..200)) {
        let length = shape.capacity;
        let mut cache = Cache::new(shape.clone());
        let mut out = vec![f32::NAN; shape.kv_heads * length];
        key_diff(&cache.rows(), 0..shape.kv_heads, length, &mut out).unwrap();
        for head in 0..shape.kv_heads {
            let units: Vec<Vec<f64>> = (0..length)
                .map(|token| {
                    let key = cache.get(token, head);
                    let norm = norm(&key);
                    key.iter().map(|x| x / norm).collect()
                })
                .collect();
            let mean: Vec<f64> = (0..shape.head_dim)
                .map(|element| units.iter().map(|unit| unit[element]).sum::<f64>() / length as f64)
                .collect();
            let size = norm(&mean);
            // A mean that nearly cancels has no direction to compare with.
            if size > 1e-2 && units.iter().flatten().all(|x| x.is_finite()) {
                let expected: Vec<f64> = units.iter().map(|unit| -dot(unit, &mean) / size).collect();
                assert_close(&out[head * length..][..length], &expected, 1e-4);
            }
        }
    }

    #[test]
    fn window_attention_follows_its_formula(
        shape in shapes(1..120),
        seed in 1u64..,
        group in 1usize..4,
        reach in 0usize..4,
        sharpness in 0.1f32..30.0,
    ) {
        let mut random = Random(seed);
        let mut cache = Cache::new(shape.clone());
        let length = 1 + random.below(shape.capacity);
        let window = 1 + random.below(length.min(70));
        let query_heads = group * shape.kv_heads;
        let stride_head = shape.head_dim + random.below(3);
        let stride_position = stride_head * query_heads + random.below(3);
        let data: Vec<f32> = (0..stride_position * window).map(|_| random.real()).collect();
        let scale = sharpness / (shape.head_dim as f32).sqrt();
        let queries = WindowQueries { data: &data, window, query_heads, stride_position, stride_head, scale };
        let kernel = 2 * reach + 1;
        let mut out = vec![f32::NAN; shape.kv_heads * length];
        window_attention(&cache.rows(), &queries, 0..shape.kv_heads, length, kernel, &mut out).unwrap();
        for head in 0..shape.kv_heads {
            assert_close(&out[head * length..][..length], &snapkv(&cache, head, &queries, length, kernel), 2e-5);
        }
    }
}

fn shape(dtype: Dtype, kv_heads: usize, capacity: usize, head_dim: usize) -> Shape {
    Shape {
        dtype,
        kv_heads,
        capacity,
        head_dim,
        block_size: 0,
        token_major: false,
        element_step: 1,
        table_per_head: false,
        kind: IndexKind::U32,
        seed: 8,
    }
}

/// n orthogonal keys of any length: each has the cosine 1 / sqrt(n) with their mean direction.
#[test]
fn key_diff_of_orthogonal_keys() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let mut cache = Cache::new(shape(dtype, 1, 16, 16));
        for token in 0..16 {
            let mut key = [0.0; 16];
            key[token] = (token + 1) as f32;
            cache.set(token, 0, &key);
        }
        let mut out = [0.0; 16];
        key_diff(&cache.rows(), 0..1, 16, &mut out).unwrap();
        assert_close(&out, &[-0.25; 16], 1e-6);
    }
}

#[test]
fn key_diff_without_a_direction() {
    let mut cache = Cache::new(shape(Dtype::F32, 1, 4, 2));
    for (token, key) in [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -3.0]].iter().enumerate() {
        cache.set(token, 0, key);
    }
    let mut out = [f32::NAN; 4];
    key_diff(&cache.rows(), 0..1, 4, &mut out).unwrap();
    assert_eq!(out, [0.0; 4]);
    cache.set(3, 0, &[0.0, 0.0]);
    key_diff(&cache.rows(), 0..1, 4, &mut out).unwrap();
    assert_eq!(out, [0.0, 0.0, -1.0, 0.0]);
}

/// Equal keys share each query's attention equally, whatever the query.
#[test]
fn window_attention_of_equal_keys() {
    let (length, window, dim) = (50, 7, 24);
    let mut cache = Cache::new(shape(Dtype::F16, 2, length, dim));
    for head in 0..2 {
        for token in 0..length {
            cache.set(token, head, &vec![0.5; dim]);
        }
    }
    let mut random = Random(9);
    let data: Vec<f32> = (0..window * 4 * dim).map(|_| random.real()).collect();
    let queries = WindowQueries::dense(&data, window, 4, dim);
    let mut out = vec![0.0; 2 * length];
    window_attention(&cache.rows(), &queries, 0..2, length, 5, &mut out).unwrap();
    let share: f64 = (0..window).map(|position| 1.0 / (44 + position) as f64).sum::<f64>() / window as f64;
    let mut expected = vec![share; length];
    // Zero padding: three, then four of five neighbours are there.
    for (edge, part) in [(0, 0.6), (1, 0.8), (41, 0.8), (42, 0.6)] {
        expected[edge] = share * part;
    }
    let both = [expected.clone(), expected].concat();
    assert_close(&out, &both, 1e-7);
}

/// Logits of thousands and weights that vanish: nothing overflows, one key gets all.
#[test]
fn window_attention_of_a_sharp_query() {
    let mut cache = Cache::new(shape(Dtype::F32, 1, 40, 8));
    for token in 0..40 {
        cache.set(token, 0, &[if token == 13 { 100.0 } else { -100.0 }; 8]);
    }
    let queries = [10.0; 8];
    let mut out = [0.0; 40];
    window_attention(&cache.rows(), &WindowQueries::dense(&queries, 1, 1, 8), 0..1, 40, 1, &mut out).unwrap();
    let mut expected = [0.0; 40];
    (expected[13], expected[39]) = (1.0, 1.0);
    assert_close(&out, &expected, 0.0);
}

/// The same bytes, head by head on any number of threads or all heads at once.
#[test]
fn threads_do_not_matter() {
    let (heads, length, dim, window) = (4, 700, 64, 33);
    let mut cache = Cache::new(Shape { block_size: 16, ..shape(Dtype::Bf16, heads, length, dim) });
    let mut random = Random(2);
    let data: Vec<f32> = (0..window * 2 * heads * dim).map(|_| random.real()).collect();
    let queries = WindowQueries::dense(&data, window, 2 * heads, dim);
    let rows = cache.rows();
    let score = |heads: std::ops::Range<usize>, out: &mut [f32]| -> Result<(), KernelError> {
        let (norms, rest) = out.split_at_mut(heads.len() * length);
        let (differences, attention) = rest.split_at_mut(heads.len() * length);
        row_norms(&rows, heads.clone(), 0..length, norms)?;
        key_diff(&rows, heads.clone(), length, differences)?;
        window_attention(&rows, &queries, heads, length, 5, attention)
    };
    let mut whole = vec![0.0; 3 * heads * length];
    score(0..heads, &mut whole).unwrap();
    for threads in [1, 2, 7] {
        let mut parts = vec![0.0; 3 * heads * length];
        let tasks = parts.chunks_mut(3 * length).enumerate().collect();
        parallel::for_each_on(threads, tasks, |(head, out): (usize, &mut [f32])| score(head..head + 1, out)).unwrap();
        for head in 0..heads {
            for kind in 0..3 {
                let alone = &parts[(3 * head + kind) * length..][..length];
                let together = &whole[(kind * heads + head) * length..][..length];
                assert!(alone.iter().zip(together).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut cache = Cache::new(shape(Dtype::F32, 2, 10, 4));
    let rows = cache.rows();
    let mut out = [7.0; 20];
    let data = [0.0; 3 * 4 * 4];
    let good = WindowQueries::dense(&data, 3, 4, 4);
    let mut attention = |queries: WindowQueries<'_>, length: usize, kernel| {
        window_attention(&rows, &queries, 0..2, length, kernel, &mut out[..2 * length]).unwrap_err()
    };
    assert_eq!(attention(WindowQueries { window: 0, ..good }, 10, 5), KernelError::Window { window: 0, length: 10 });
    assert_eq!(attention(good, 2, 5), KernelError::Window { window: 3, length: 2 });
    assert_eq!(attention(good, 10, 4), KernelError::PoolingKernel { kernel: 4 });
    assert_eq!(
        attention(WindowQueries { query_heads: 3, ..good }, 10, 5),
        KernelError::QueryHeads { query_heads: 3, kv_heads: 2 }
    );
    assert!(matches!(
        attention(WindowQueries { stride_position: 17, ..good }, 10, 5),
        KernelError::SliceLength { found: 48, expected: 50, .. }
    ));
    assert!(matches!(
        attention(WindowQueries { stride_position: usize::MAX, ..good }, 10, 5),
        KernelError::SliceLength { found: 48, .. }
    ));
    assert!(matches!(row_norms(&rows, 0..2, 5..11, &mut out[..12]), Err(KernelError::TokenRange { .. })));
    assert!(matches!(row_norms(&rows, 0..2, 0..10, &mut out[..19]), Err(KernelError::SliceLength { .. })));
    assert!(matches!(key_diff(&rows, 1..3, 10, &mut out), Err(KernelError::HeadRange { .. })));
    assert_eq!(out, [7.0; 20]);
}
