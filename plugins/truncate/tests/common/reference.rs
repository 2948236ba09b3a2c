//! The scores as their papers write them, in f64, one key at a time.

use super::{Layer, Queries};

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn norm(a: &[f32]) -> f64 {
    dot(a, a).sqrt()
}

pub fn key_norm(layer: &Layer, head: usize) -> Vec<f64> {
    layer.keys[head].iter().map(|key| -norm(key)).collect()
}

pub fn key_diff(layer: &Layer, head: usize) -> Vec<f64> {
    let keys = &layer.keys[head];
    let mut mean = vec![0.0f64; layer.dim];
    for key in keys {
        let norm = norm(key);
        mean.iter_mut().zip(key).for_each(|(mean, value)| *mean += f64::from(*value) / norm / keys.len() as f64);
    }
    let mean_norm = mean.iter().map(|value| value * value).sum::<f64>().sqrt();
    keys.iter()
        .map(|key| {
            let along: f64 = mean.iter().zip(key).map(|(mean, value)| mean * f64::from(*value)).sum();
            -along / norm(key) / mean_norm
        })
        .collect()
}

/// SnapKV over the rows before the window; the window's own rows score infinity.
pub fn attention(layer: &Layer, head: usize, queries: &Queries, pool: usize) -> Vec<f64> {
    let keys = &layer.keys[head];
    let (tokens, window) = (keys.len(), queries.len());
    let group = queries[0].len() / layer.heads;
    let mut mass = vec![0.0f64; tokens];
    for (age, position) in queries.iter().enumerate() {
        for query in &position[head * group..(head + 1) * group] {
            let visible = tokens - window + age + 1;
            let logits: Vec<f64> =
                keys[..visible].iter().map(|key| dot(query, key) / (layer.dim as f64).sqrt()).collect();
            let most = logits.iter().cloned().fold(f64::MIN, f64::max);
            let total: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
            for (mass, logit) in mass.iter_mut().zip(&logits) {
                *mass += (logit - most).exp() / total / (window * group) as f64;
            }
        }
    }
    let history = tokens - window;
    (0..tokens)
        .map(|i| {
            if i >= history {
                return f64::INFINITY;
            }
            let half = pool / 2;
            let near = i.saturating_sub(half)..(i + half + 1).min(history);
            mass[near].iter().sum::<f64>() / pool as f64
        })
        .collect()
}

/// Whether `kept` are the best of `scores`, sinks and recent rows apart, to rounding.
pub fn check_top(scores: &[f64], kept: &[u32], sinks: usize, recent: usize, tolerance: f64) {
    let length = scores.len();
    let guarded = |row: usize| row < sinks || row >= length - recent;
    let is_kept = |row: usize| kept.binary_search(&(row as u32)).is_ok();
    for row in (0..length).filter(|row| guarded(*row)) {
        assert!(is_kept(row), "row {row} is protected");
    }
    let open = || (0..length).filter(|row| !guarded(*row));
    let worst_kept = open().filter(|row| is_kept(*row)).map(|row| scores[row]).fold(f64::INFINITY, f64::min);
    let best_dropped = open().filter(|row| !is_kept(*row)).map(|row| scores[row]).fold(f64::NEG_INFINITY, f64::max);
    let scale = open().map(|row| scores[row].abs()).filter(|score| score.is_finite()).fold(0.0, f64::max);
    assert!(worst_kept >= best_dropped - tolerance * scale, "kept {worst_kept} though {best_dropped} was dropped");
}
