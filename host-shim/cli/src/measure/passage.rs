//! The passages of a comparison as tokens.

use kvhook_engine::model::Tokenizer;
use kvhook_engine::quality::Passkey;

use super::Plan;
use crate::error::CliError;
use crate::passages::spread;

/// Depths at which passkeys are hidden, passage by passage (E5).
const DEPTHS: [f64; 5] = [0.5, 0.25, 0.75, 0.05, 0.95];

/// One passage, ready to be run.
pub(super) struct Prepared {
    /// Name of the text.
    pub(super) text: String,
    /// First token of the passage in that text.
    pub(super) start: usize,
    /// x: T tokens, the first of them the model's begin-of-text token where it wants one.
    pub(super) prefix: Vec<u32>,
    /// y: M tokens.
    pub(super) continuation: Vec<u32>,
    /// The same prefix with a key hidden in it; None where T is too short for that.
    pub(super) passkey: Option<Passkey>,
}

/// Takes the passages of a plan out of its texts.
pub(super) fn prepare(tokenizer: &Tokenizer, plan: &Plan<'_>) -> Result<Vec<Prepared>, CliError> {
    let begin = tokenizer.encode_text("")?;
    let texts = plan.texts.iter().map(|text| tokenizer.encode(&text.content)).collect::<Result<Vec<_>, _>>()?;
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let prefix = plan.prefix.saturating_sub(begin.len());
    let spans = spread(&lengths, prefix + plan.continuation, plan.passages)?;
    let prepared = spans.iter().enumerate().map(|(index, span)| {
        let (own, rest) = texts[span.text][span.start..].split_at(prefix);
        let depth = DEPTHS[index % DEPTHS.len()];
        Ok(Prepared {
            text: plan.texts[span.text].name.clone(),
            start: span.start,
            prefix: [&begin, own].concat(),
            continuation: rest[..plan.continuation].to_vec(),
            passkey: Passkey::new(tokenizer, &tokenizer.decode(own)?, key(index), depth, plan.prefix).ok(),
        })
    });
    prepared.collect()
}

/// A five-digit key that follows from the passage's index, so that runs can be repeated.
fn key(passage: usize) -> u32 {
    // Knuth's multiplicative hash spreads neighbouring indices over the range.
    let hash = (passage as u64 + 1).wrapping_mul(2_654_435_761) % 90_000;
    10_000 + hash as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_five_digits_and_differ() {
        let keys: std::collections::BTreeSet<_> = (0..100).map(key).collect();
        assert_eq!(keys.len(), 100);
        assert!(keys.iter().all(|key| (10_000..100_000).contains(key)));
    }
}
