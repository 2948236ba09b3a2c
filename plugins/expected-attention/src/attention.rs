//! The attention that keys are expected to get.

use kvhook_abi::PluginError;
use kvhook_abi::kernels::Rows;

use crate::rope::Turn;
use crate::statistics::Expected;

/// Rows that are read at a time.
const ROWS: usize = 256;

/// For each of the first `length` rows `k` of a KV head, the mean over its query heads, whose queries have mean `m` and
/// covariance `C`, of
///
/// ```text
/// softmax( k' R m / sqrt(d) + k' R C R' k / (2 d) )
/// ```
///
/// where `R` turns by `turn`: the expected value of `exp(q' k / sqrt(d))` for normal `q`, as a share of all rows'.
///
/// # Errors
/// Keys cannot be read.
pub fn expected_attention(
    keys: &Rows,
    head: usize,
    length: usize,
    queries: &[Expected],
    turn: &Turn,
) -> Result<Vec<f32>, PluginError> {
    let channels = keys.head_dim();
    let mut logits = vec![vec![0.0f32; length]; queries.len()];
    let mut rows = vec![0.0; ROWS.min(length) * channels];
    let mut product = vec![0.0; channels];
    for first in (0..length).step_by(ROWS) {
        let tokens = first..length.min(first + ROWS);
        let rows = &mut rows[..tokens.len() * channels];
        keys.load_many(head, tokens.clone(), rows)?;
        // `R` belongs to the queries; its transpose turns each key, once for all query heads.
        rows.chunks_exact_mut(channels).for_each(|row| turn.back(row));
        for (logits, expected) in logits.iter_mut().zip(queries) {
            for (logit, row) in logits[tokens.clone()].iter_mut().zip(rows.chunks_exact(channels)) {
                *logit = dot(row, &expected.mean) / (channels as f32).sqrt();
                if !expected.form.is_empty() {
                    *logit += quadratic(&expected.form, row, &mut product) / (2 * channels) as f32;
                }
            }
        }
    }
    let mut attention = vec![0.0; length];
    for logits in &logits {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = logits.iter().map(|logit| f64::from((logit - highest).exp())).sum();
        for (attention, logit) in attention.iter_mut().zip(logits) {
            *attention += (f64::from((logit - highest).exp()) / (total * queries.len() as f64)) as f32;
        }
    }
    Ok(attention)
}

/// The sum of `form[i, j] row[i] row[j]` over `i <= j`. `product` has room for one row.
fn quadratic(form: &[f32], row: &[f32], product: &mut [f32]) -> f32 {
    product.fill(0.0);
    let mut form = form;
    for (i, value) in row.iter().enumerate() {
        let (line, rest) = form.split_at(row.len() - i);
        product[i..].iter_mut().zip(line).for_each(|(sum, element)| *sum += value * element);
        form = rest;
    }
    dot(product, row)
}

/// In eight sums: the compiler may not reorder one, and the order must not depend on the machine.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 8];
    let (chunks, rest) = (a.chunks_exact(8).zip(b.chunks_exact(8)), a.len() / 8 * 8);
    for (a, b) in chunks {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let tail: f32 = a[rest..].iter().zip(&b[rest..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + tail
}
