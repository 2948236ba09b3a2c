//! Yes and no of two methods on the same samples.

use serde::{Deserialize, Serialize};

use super::Interval;

/// Samples on which only one of two methods says yes. Those on which both say the same tell nothing about which says it more
/// often (McNemar 1947).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Discordant {
    /// Samples on which only the first says yes.
    pub first: usize,
    /// Samples on which only the second does.
    pub second: usize,
}

impl Discordant {
    /// Counts pairs.
    pub fn of(pairs: impl IntoIterator<Item = (bool, bool)>) -> Self {
        pairs.into_iter().fold(Self::default(), |counts, pair| match pair {
            (true, false) => Self { first: counts.first + 1, ..counts },
            (false, true) => Self { second: counts.second + 1, ..counts },
            _ => counts,
        })
    }

    /// Share of the first among them, with its exact 95 % interval (Clopper and Pearson 1934); None where there are none.
    pub fn share(&self) -> Option<Interval> {
        let (yes, n) = (self.first, self.first + self.second);
        if n == 0 {
            return None;
        }
        // The share at which so many or more, or so few or fewer, come with probability 0.025.
        let low = if yes == 0 { 0.0 } else { 1.0 - share_with_tail(n - yes, n) };
        let high = if yes == n { 1.0 } else { share_with_tail(yes, n) };
        Some(Interval { low, high })
    }

    /// Whether the first says yes more often; None where the interval of [`share`](Self::share) covers one half.
    pub fn first_more(&self) -> Option<bool> {
        let share = self.share().filter(|share| !share.covers(0.5))?;
        Some(share.low > 0.5)
    }
}

/// The share of yes at which at most `yes` of `n` come with probability 0.025.
fn share_with_tail(yes: usize, n: usize) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if at_most(yes, n, middle) > 0.025 { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// Probability of at most `yes` of `n` at a share in 0..1, both ends excluded.
fn at_most(yes: usize, n: usize, share: f64) -> f64 {
    let odds = (share / (1.0 - share)).ln();
    // Logarithms, since the first terms of many samples are too small for numbers.
    let mut term = n as f64 * (1.0 - share).ln();
    let mut sum = term.exp();
    for count in 1..=yes {
        term += odds + ((n - count + 1) as f64 / count as f64).ln();
        sum += term.exp();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(first: usize, second: usize) -> (f64, f64) {
        let share = Discordant { first, second }.share().unwrap();
        (share.low, share.high)
    }

    #[test]
    fn exact_intervals_of_published_cases() {
        // Newcombe 1998, table I, method 5: 81 of 263, 15 of 148, 1 of 29.
        for (yes, n, low, high) in [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (1, 29, 0.0009, 0.1776)] {
            let found = share(yes, n - yes);
            assert!((found.0 - low).abs() < 6e-5 && (found.1 - high).abs() < 6e-5, "{yes} of {n}: {found:?}");
        }
    }

    #[test]
    fn none_and_all_have_closed_forms() {
        let (low, high) = share(0, 20);
        assert!(low == 0.0 && (high - (1.0 - 0.025f64.powf(0.05))).abs() < 1e-9);
        let (low, high) = share(20, 0);
        assert!(high == 1.0 && (low - 0.025f64.powf(0.05)).abs() < 1e-9);
        assert_eq!(Discordant::default().share(), None);
    }

    #[test]
    fn a_claim_is_that_of_the_sign_test() {
        // 2 * (1/2)^5 = 0.0625, 2 * (1/2)^6 = 0.03125; 1 of 8: 2 * 9 / 256 = 0.07.
        assert_eq!(Discordant { first: 5, second: 0 }.first_more(), None);
        assert_eq!(Discordant { first: 6, second: 0 }.first_more(), Some(true));
        assert_eq!(Discordant { first: 0, second: 6 }.first_more(), Some(false));
        assert_eq!(Discordant { first: 7, second: 1 }.first_more(), None);
        assert_eq!(Discordant { first: 3, second: 3 }.first_more(), None);
        let pairs = [(true, false), (true, true), (false, true), (true, false), (false, false)];
        assert_eq!(Discordant::of(pairs), Discordant { first: 2, second: 1 });
        assert!(Discordant { first: 3000, second: 2000 }.first_more().unwrap());
    }
}
