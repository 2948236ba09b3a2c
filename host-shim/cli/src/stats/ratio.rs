//! How many times larger one sum is than another.

use serde::{Deserialize, Serialize};

use super::{Interval, t_quantile};

/// A ratio with its 95 % interval.
///
/// The logarithm's standard error is the jackknife's over samples that belong together, each left out in turn (Quenouille
/// 1956, Tukey 1958), the interval Student's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// The ratio of the sums over all samples.
    pub value: f64,
    /// Where it lies; None for a single sample.
    pub interval: Option<Interval>,
    /// Number of samples.
    pub n: usize,
}

impl Ratio {
    /// The sum of `above` over that of `below`, sample by sample from the same passages; None where one is not above 0, also
    /// when any sample is left out.
    pub fn of(above: &[f64], below: &[f64]) -> Option<Self> {
        let samples: Vec<[f64; 2]> = above.iter().zip(below).map(|(&above, &below)| [above, below]).collect();
        Self::of_products(&samples, [1.0, -1.0])
    }

    /// The ratio of two rates, each a sum over a sum: `(sum a / sum b) / (sum c / sum d)` of samples `[a, b, c, d]`.
    pub fn of_rates(samples: &[[f64; 4]]) -> Option<Self> {
        Self::of_products(samples, [1.0, -1.0, -1.0, 1.0])
    }

    fn of_products<const K: usize>(samples: &[[f64; K]], exponents: [f64; K]) -> Option<Self> {
        let n = samples.len();
        let mut sums = [0.0; K];
        for sample in samples {
            sums.iter_mut().zip(sample).for_each(|(sum, value)| *sum += value);
        }
        let logarithm = |left_out: &[f64; K]| -> Option<f64> {
            let rest = sums.iter().zip(left_out).map(|(sum, out)| sum - out);
            let terms = rest.zip(exponents).map(|(rest, exponent)| exponent * rest.ln());
            Some(terms.sum::<f64>()).filter(|log| log.is_finite())
        };
        let whole = logarithm(&[0.0; K])?;
        let interval = match n {
            1 => None,
            _ => {
                let partial = samples.iter().map(logarithm).collect::<Option<Vec<f64>>>()?;
                let mean = partial.iter().sum::<f64>() / n as f64;
                let squares: f64 = partial.iter().map(|log| (log - mean).powi(2)).sum();
                let half = t_quantile(n - 1)? * (squares * (n - 1) as f64 / n as f64).sqrt();
                Some(Interval { low: (whole - half).exp(), high: (whole + half).exp() })
            }
        };
        Some(Self { value: whole.exp(), interval, n })
    }

    /// Whether the interval lies below 1; None where it does not tell.
    pub fn is_less(&self) -> Option<bool> {
        let interval = self.interval.filter(|interval| !interval.covers(1.0))?;
        Some(interval.high < 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in 0..1 of a linear congruential generator (Knuth's MMIX).
    struct Draws(u64);

    impl Draws {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }

        /// Box and Muller 1958.
        fn normal(&mut self) -> f64 {
            let radius = (-2.0 * (1.0 - self.next()).ln()).sqrt();
            radius * (std::f64::consts::TAU * self.next()).cos()
        }
    }

    #[test]
    fn a_constant_ratio_has_no_spread() {
        let ratio = Ratio::of(&[1.0, 2.0, 6.0], &[2.0, 4.0, 12.0]).unwrap();
        let interval = ratio.interval.unwrap();
        assert!((ratio.value - 0.5).abs() < 1e-12 && (interval.high - interval.low).abs() < 1e-9);
        assert_eq!(ratio.is_less(), Some(true));
        assert_eq!(ratio.n, 3);
    }

    #[test]
    fn two_samples_have_a_closed_form() {
        // Left out in turn, the logarithms are ln 3 and ln 1; the standard error is half their distance.
        let ratio = Ratio::of(&[1.0, 3.0], &[1.0, 1.0]).unwrap();
        let half = (0.475 * std::f64::consts::PI).tan() * 3f64.ln() / 2.0;
        let interval = ratio.interval.unwrap();
        assert!((ratio.value - 2.0).abs() < 1e-12);
        assert!((interval.high.ln() - (2f64.ln() + half)).abs() < 1e-6, "{interval:?}");
        assert_eq!(ratio.is_less(), None);
    }

    #[test]
    fn nothing_is_no_ratio() {
        assert_eq!(Ratio::of(&[0.0, 0.0], &[1.0, 1.0]), None);
        assert_eq!(Ratio::of(&[1.0, 0.0], &[1.0, 1.0]), None, "all of it comes from one sample");
        assert_eq!(Ratio::of(&[], &[]), None);
        assert_eq!(Ratio::of(&[f64::NAN, 1.0], &[1.0, 1.0]), None);
        assert_eq!(Ratio::of(&[2.0], &[1.0]).map(|ratio| (ratio.value, ratio.interval)), Some((2.0, None)));
    }

    /// Of 2,000 intervals over log-normal pairs that belong together, about 95 % hold the true ratio.
    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        let mut draws = Draws(7);
        let mut held = 0;
        for _ in 0..2000 {
            let pairs: Vec<(f64, f64)> = (0..12)
                .map(|_| {
                    let passage = 0.6 * draws.normal();
                    ((passage + 0.3 * draws.normal()).exp() * 0.7, (passage + 0.3 * draws.normal()).exp())
                })
                .collect();
            let (above, below): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            held += usize::from(Ratio::of(&above, &below).unwrap().interval.unwrap().covers(0.7));
        }
        assert!((1840..=1940).contains(&held), "{held} of 2000");
    }

    #[test]
    fn rates_are_weighed_by_their_samples() {
        // 10 of 4 against 6 of 6.
        let ratio = Ratio::of_rates(&[[4.0, 1.0, 2.0, 1.0], [6.0, 3.0, 4.0, 5.0]]).unwrap();
        assert!((ratio.value - 2.5).abs() < 1e-12);
    }
}
