//! The scores as their papers write them, in f64, one key at a time.

use kvhook_testing::{Layer, PerHead};

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
    let mut mean = vec![0.0f64; layer.k_head_dim()];
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
pub fn attention(layer: &Layer, head: usize, queries: &PerHead, pool: usize) -> Vec<f64> {
    let keys = &layer.keys[head];
    let (tokens, window) = (keys.len(), queries.len());
    let group = queries[0].len() / layer.heads();
    let mut mass = vec![0.0f64; tokens];
    for (age, position) in queries.iter().enumerate() {
        for query in &position[head * group..(head + 1) * group] {
            let visible = tokens - window + age + 1;
            let logits: Vec<f64> =
                keys[..visible].iter().map(|key| dot(query, key) / (layer.k_head_dim() as f64).sqrt()).collect();
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
