//! What compression did to the answers: pure functions over logits, losses and passages.
//!
//! Logits are f32 rows of the vocabulary; everything is computed in f64.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::Tokenizer;

/// Index of the largest value; the lower index where two are equal.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

/// Natural logarithms of the softmax of a row.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&value| (f64::from(value) - max).exp()).sum();
    let norm = max + sum.ln();
    row.iter().map(|&value| f64::from(value) - norm).collect()
}

/// Negative log likelihood of the targets, in nats a token: `-(1/M) sum_t ln p(y_t)`. Row `t` predicts target `t`.
pub fn nll(rows: &[Vec<f32>], targets: &[u32]) -> f64 {
    let losses = rows.iter().zip(targets).map(|(row, &target)| -log_softmax(row)[target as usize]);
    mean(&losses.collect::<Vec<_>>())
}

/// Perplexity of a mean negative log likelihood: `exp(nll)`.
pub fn perplexity(nll: f64) -> f64 {
    nll.exp()
}

/// Divergence of one row from a reference row, in nats: `sum_w p(w) ln(p(w) / p_c(w))` (Kullback and Leibler 1951).
pub fn kl(reference: &[f32], row: &[f32]) -> f64 {
    let (p, q) = (log_softmax(reference), log_softmax(row));
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Mean of [`kl`] over rows.
pub fn mean_kl(reference: &[Vec<f32>], rows: &[Vec<f32>]) -> f64 {
    mean(&reference.iter().zip(rows).map(|(p, q)| kl(p, q)).collect::<Vec<_>>())
}

/// Fraction of rows whose largest logit is at the same token as the reference's.
pub fn top1_agreement(reference: &[Vec<f32>], rows: &[Vec<f32>]) -> f64 {
    let equal = |(p, q): (&Vec<f32>, &Vec<f32>)| f64::from(u8::from(argmax(p) == argmax(q)));
    mean(&reference.iter().zip(rows).map(equal).collect::<Vec<_>>())
}

/// How much of what the context is worth was recovered: `1 - (nll - full) / (no_prefix - full)`.
///
/// 1 is as good as the full cache, 0 as bad as no prefix, below 0 harmful. Not a number where the prefix is worth
/// nothing.
pub fn recovered_context(nll: f64, full: f64, no_prefix: f64) -> f64 {
    1.0 - (nll - full) / (no_prefix - full)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Mean over passages, with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Arithmetic mean; not a number without values.
    pub mean: f64,
    /// `s / sqrt(n)` with the sample deviation `s`; 0 for a single value.
    pub standard_error: f64,
    /// Number of passages.
    pub count: usize,
}

/// Summarises one value for each passage. Tokens within a passage are correlated, so passages are what is counted.
pub fn summarise(values: &[f64]) -> Summary {
    let (mean, count) = (mean(values), values.len());
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let standard_error = if count > 1 { (squares / (count - 1) as f64 / count as f64).sqrt() } else { 0.0 };
    Summary { mean, standard_error, count }
}

/// Summarises the differences `a - b` of two methods on the same passages.
pub fn paired_difference(a: &[f64], b: &[f64]) -> Summary {
    summarise(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
}

/// 95 % interval of a proportion (Wilson 1927), for passkey accuracies.
pub fn wilson_interval(successes: usize, trials: usize) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    let n = trials as f64;
    let p = successes as f64 / n;
    let centre = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    ((centre - half) / scale, (centre + half) / scale)
}

/// A prompt in which a number is hidden, to be asked for after compression (Mohtashami and Jaggi 2023, arXiv
/// 2305.16300).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passkey {
    /// Filler, the key's sentences, and filler again.
    pub prompt: Vec<u32>,
    /// The question, to be fed after the prompt was compressed.
    pub question: Vec<u32>,
    /// Where in the prompt the key's sentences are.
    pub needle: Range<usize>,
    /// The key's digits.
    pub key: String,
}

impl Passkey {
    /// Hides `key` in a prompt of `length` tokens, at `depth` (0: beginning, 1: end) of the filler.
    ///
    /// # Errors
    /// [`Error::Config`] where the filler text is too short, or `length` too small to hold the key.
    pub fn new(tokenizer: &Tokenizer, filler: &str, key: u32, depth: f64, length: usize) -> Result<Self> {
        let key = key.to_string();
        let needle = tokenizer
            .encode(&format!("\nThe secret pass key is {key}. Remember it. {key} is the secret pass key.\n"))?;
        let filler = tokenizer.encode_text(filler)?;
        let room = length.checked_sub(needle.len()).filter(|room| *room <= filler.len());
        let room = room.ok_or_else(|| Error::Config {
            setting: "passkey length",
            found: length.to_string(),
            expected: format!("{} to {} tokens", needle.len(), needle.len() + filler.len()),
        })?;
        let before = ((room as f64 * depth.clamp(0.0, 1.0)).round() as usize).min(room);
        let place = before..before + needle.len();
        let prompt = [&filler[..before], &needle, &filler[before..room]].concat();
        let question = tokenizer.encode("\nWhat is the secret pass key? The secret pass key is")?;
        Ok(Self { prompt, question, needle: place, key })
    }

    /// Whether an answer begins with the key: its first number is the key.
    pub fn found_in(&self, answer: &str) -> bool {
        let digits = answer.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end] == self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn a_uniform_row_has_the_logarithm_of_its_size_as_loss() {
        let rows = vec![vec![3.0f32; 8]; 2];
        assert!(close(nll(&rows, &[0, 7]), 8f64.ln()));
        assert!(close(perplexity(nll(&rows, &[1, 2])), 8.0));
    }

    #[test]
    fn divergence_of_two_coins() {
        // p = (3/4, 1/4), q = (1/2, 1/2).
        let p = [3f32.ln(), 0.0];
        let q = [5.0f32, 5.0];
        let exact = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((kl(&p, &q) - exact).abs() < 1e-7);
        assert!(close(kl(&p, &p), 0.0));
        // A constant added to all logits changes nothing.
        assert!((kl(&[p[0] + 9.0, 9.0], &p)).abs() < 1e-7);
        assert!((mean_kl(&[p.to_vec(), q.to_vec()], &[q.to_vec(), q.to_vec()]) - exact / 2.0).abs() < 1e-7);
    }

    #[test]
    fn agreement_takes_the_lower_of_equal_logits() {
        assert_eq!(argmax(&[1.0, 4.0, 4.0, 2.0]), 1);
        let rows = [vec![0.0f32, 1.0], vec![2.0, 1.0], vec![0.0, 5.0], vec![1.0, 0.0]];
        let other = [vec![0.0f32, 9.0], vec![0.0, 1.0], vec![0.0, 1.0], vec![0.0, 1.0]];
        assert!(close(top1_agreement(&rows, &other), 0.5));
    }

    #[test]
    fn recovered_context_at_its_ends() {
        assert!(close(recovered_context(3.0, 3.0, 4.0), 1.0));
        assert!(close(recovered_context(4.0, 3.0, 4.0), 0.0));
        assert!(close(recovered_context(4.5, 3.0, 4.0), -0.5));
    }

    #[test]
    fn summaries_of_known_samples() {
        let summary = summarise(&[2.0, 4.0, 4.0, 6.0]);
        // Sample variance 8/3.
        assert!(close(summary.mean, 4.0) && close(summary.standard_error, (8.0f64 / 3.0 / 4.0).sqrt()));
        let difference = paired_difference(&[5.0, 7.0, 9.0], &[1.0, 3.0, 5.0]);
        assert!(close(difference.mean, 4.0) && close(difference.standard_error, 0.0));
        assert_eq!(summarise(&[1.5]), Summary { mean: 1.5, standard_error: 0.0, count: 1 });
    }

    #[test]
    fn wilson_interval_of_published_cases() {
        // Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20.
        let (low, high) = wilson_interval(81, 263);
        assert!((low - 0.2553).abs() < 5e-5 && (high - 0.3662).abs() < 5e-5);
        let (low, high) = wilson_interval(0, 20);
        assert!(low.abs() < 1e-12 && (high - 0.1611).abs() < 5e-5);
    }

    #[test]
    fn a_passkey_is_found_only_whole_and_first() {
        let passkey = Passkey { prompt: vec![], question: vec![], needle: 0..0, key: "71432".into() };
        assert!(passkey.found_in(" 71432."));
        assert!(passkey.found_in(" the number 71432, remember"));
        assert!(!passkey.found_in(" 7143"));
        assert!(!passkey.found_in(" 714321"));
        assert!(!passkey.found_in(" 12 or 71432"));
        assert!(!passkey.found_in("none"));
    }
}
