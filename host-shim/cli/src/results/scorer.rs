//! NLL, KL and top-1 agreement from two rows of logits (E1 to E3).

/// Adds up the measures of one passage, token by token, in f64.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scorer {
    tokens: usize,
    nll: f64,
    nll_full: f64,
    kl: f64,
    agreed: usize,
}

impl Scorer {
    /// Scores one token of the continuation.
    ///
    /// `full` and `arm` are the logits (natural log scale, any constant offset) of the uncompressed and of the
    /// compressed cache, one for each word of the vocabulary; `next` is the token that the text has there.
    /// Returns false, and counts nothing, when the lengths differ or `next` lies outside them.
    #[must_use]
    pub fn add(&mut self, full: &[f32], arm: &[f32], next: u32) -> bool {
        let next = next as usize;
        if full.len() != arm.len() || next >= arm.len() {
            return false;
        }
        let (full_norm, full_top) = log_sum_exp(full);
        let (arm_norm, arm_top) = log_sum_exp(arm);
        self.tokens += 1;
        self.nll += arm_norm - f64::from(arm[next]);
        self.nll_full += full_norm - f64::from(full[next]);
        self.agreed += usize::from(full_top == arm_top);
        self.kl += full
            .iter()
            .zip(arm)
            .map(|(&f, &a)| {
                let log_p = f64::from(f) - full_norm;
                let log_q = f64::from(a) - arm_norm;
                // Words that the full cache rules out weigh nothing, even where the arm's logit is -inf.
                if log_p == f64::NEG_INFINITY { 0.0 } else { log_p.exp() * (log_p - log_q) }
            })
            .sum::<f64>();
        true
    }

    /// Tokens scored so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Mean negative log-likelihood of the arm, nats per token; NaN before the first token.
    pub fn nll(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// Mean negative log-likelihood of the full cache, nats per token; NaN before the first token.
    pub fn nll_full(&self) -> f64 {
        self.nll_full / self.tokens as f64
    }

    /// Mean KL(full ‖ arm), nats per token; NaN before the first token.
    pub fn kl(&self) -> f64 {
        self.kl / self.tokens as f64
    }

    /// Share of tokens with the same likeliest word, 0 to 1; NaN before the first token.
    pub fn top1_agreement(&self) -> f64 {
        self.agreed as f64 / self.tokens as f64
    }
}

/// ln Σ exp(x), shifted by the maximum, and the index of the maximum (lower index on ties).
fn log_sum_exp(logits: &[f32]) -> (f64, usize) {
    let (mut top, mut max) = (0, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        if logit > max {
            (top, max) = (index, logit);
        }
    }
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    (max + sum.ln(), top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_words_by_hand() {
        // p = (3/4, 1/4), q = (1/2, 1/2): KL = ln 2 - H(p); the offset of the logits must not matter.
        let full = [3f32.ln() + 7.0, 7.0];
        let mut scorer = Scorer::default();
        assert!(scorer.add(&full, &[-2.0, -2.0], 1));
        let entropy = -(0.75f64 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        assert!((scorer.kl() - (2f64.ln() - entropy)).abs() < 1e-6);
        assert!((scorer.nll() - 2f64.ln()).abs() < 1e-6);
        assert!((scorer.nll_full() - 4f64.ln()).abs() < 1e-6);
        assert_eq!(scorer.top1_agreement(), 1.0);
        assert!(scorer.add(&full, &[0.0, 1.0], 0));
        assert_eq!((scorer.top1_agreement(), scorer.tokens()), (0.5, 2));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let mut scorer = Scorer::default();
        assert!(!scorer.add(&[0.0, 0.0], &[0.0], 0));
        assert!(!scorer.add(&[0.0], &[0.0], 1));
        assert!(scorer.kl().is_nan());
    }

    #[test]
    fn impossible_words_do_not_spoil_the_divergence() {
        let mut scorer = Scorer::default();
        assert!(scorer.add(&[0.0, f32::NEG_INFINITY], &[0.0, f32::NEG_INFINITY], 0));
        assert_eq!(scorer.kl(), 0.0);
    }
}
