//! Means with standard errors over passages, and proportions with an interval.

use serde::{Deserialize, Serialize};

/// A mean over passages.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Arithmetic mean.
    #[serde(with = "crate::results::nullable")]
    pub mean: f64,
    /// Standard error of the mean: sample standard deviation over the root of n. None for n = 1.
    pub standard_error: Option<f64>,
    /// Number of passages.
    pub n: usize,
}

impl Estimate {
    /// Mean and standard error of `values`; None when there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let standard_error = (n > 1).then(|| (squares / (n - 1) as f64 / n as f64).sqrt());
        Some(Self { mean, standard_error: standard_error.filter(|e| e.is_finite()), n })
    }
}

/// A share of yes answers with its Wilson 95 % interval (Wilson, 1927).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Proportion {
    /// Yes answers.
    pub yes: usize,
    /// Questions asked.
    pub asked: usize,
    /// Lower end of the interval, 0 to 1.
    pub low: f64,
    /// Upper end of the interval, 0 to 1.
    pub high: f64,
}

impl Proportion {
    /// Counts `answers`; None when there are none.
    pub fn of(answers: impl IntoIterator<Item = bool>) -> Option<Self> {
        let (mut yes, mut asked) = (0, 0);
        for answer in answers {
            asked += 1;
            yes += usize::from(answer);
        }
        if asked == 0 {
            return None;
        }
        // 97.5 % quantile of the standard normal distribution.
        const Z: f64 = 1.959_963_984_540_054;
        let n = asked as f64;
        let share = yes as f64 / n;
        let scale = 1.0 + Z * Z / n;
        let centre = (share + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        Some(Self { yes, asked, low: (centre - half).max(0.0), high: (centre + half).min(1.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_error_of_a_known_sample() {
        // 2, 4, 4, 4, 5, 5, 7, 9: mean 5, sum of squares 32, s.e. = sqrt(32 / 7 / 8).
        let estimate = Estimate::of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert_eq!((estimate.mean, estimate.n), (5.0, 8));
        assert!((estimate.standard_error.unwrap() - 0.755_928_946).abs() < 1e-9);
        assert_eq!(Estimate::of([3.0]).unwrap().standard_error, None);
        assert_eq!(Estimate::of([]), None);
    }

    #[test]
    fn wilson_interval_of_a_known_sample() {
        // Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
        let p = Proportion::of((0..263).map(|i| i < 81)).unwrap();
        assert!((p.low - 0.2553).abs() < 5e-5 && (p.high - 0.3662).abs() < 5e-5, "{p:?}");
        let none = Proportion::of([false; 20]).unwrap();
        assert!(none.low.abs() < 1e-12 && (none.high - 0.1611).abs() < 5e-5, "{none:?}");
        assert_eq!(Proportion::of([]), None);
    }
}
