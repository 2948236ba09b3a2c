//! Means with standard errors over passages, proportions, ratios and paired counts with their intervals.

mod paired;
mod ratio;
mod student;

use kvhook_engine::quality::{summarise, wilson_interval};
use serde::{Deserialize, Serialize};

pub use paired::Discordant;
pub use ratio::Ratio;
pub use student::t_quantile;

/// Where a value lies with a confidence of 95 %.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether it holds `value`, or is no interval of numbers.
    pub fn covers(&self, value: f64) -> bool {
        !(value < self.low || value > self.high)
    }
}

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
        if values.is_empty() {
            return None;
        }
        let summary = summarise(&values);
        // One value has no spread.
        let standard_error = Some(summary.standard_error).filter(|error| summary.count > 1 && error.is_finite());
        Some(Self { mean: summary.mean, standard_error, n: summary.count })
    }

    /// The mean's 95 % interval by Student's t; None for n = 1.
    pub fn interval(&self) -> Option<Interval> {
        let half = t_quantile(self.n.checked_sub(1)?)? * self.standard_error?;
        Some(Interval { low: self.mean - half, high: self.mean + half })
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
        let (low, high) = wilson_interval(yes, asked);
        Some(Self { yes, asked, low: low.max(0.0), high: high.min(1.0) })
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
    fn the_mean_of_two_has_a_closed_form() {
        // t(1) = tan(0.475 pi), standard error 1.
        let interval = Estimate::of([4.0, 6.0]).unwrap().interval().unwrap();
        let half = (0.475 * std::f64::consts::PI).tan();
        assert!((interval.low - (5.0 - half)).abs() < 1e-9 && (interval.high - (5.0 + half)).abs() < 1e-9);
        assert_eq!(Estimate::of([3.0]).unwrap().interval(), None);
        assert!(interval.covers(17.7) && !interval.covers(17.8));
    }

    #[test]
    fn intervals_end_at_none_and_all() {
        // Newcombe (1998), table I: 0 of 20 gives 0 to 0.1611.
        let none = Proportion::of([false; 20]).unwrap();
        assert!(none.low == 0.0 && (none.high - 0.1611).abs() < 5e-5, "{none:?}");
        assert_eq!(Proportion::of([true; 20]).unwrap().high, 1.0);
        assert_eq!(Proportion::of([]), None);
    }
}
