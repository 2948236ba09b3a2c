//! From measures to places on a plot, with ticks at round numbers.

use crate::format::plain;

/// Maps an interval of measures to 0..1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Axis {
    /// Equal steps are equal distances.
    Linear {
        /// Measure at 0.
        from: f64,
        /// Measure at 1.
        to: f64,
    },
    /// Equal ratios are equal distances; bounds are powers of ten.
    Log {
        /// Exponent at 0.
        from: i32,
        /// Exponent at 1.
        to: i32,
    },
}

impl Axis {
    /// A linear axis that holds all finite `values`, with bounds at ticks.
    pub fn linear(values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values).unwrap_or((0.0, 1.0));
        // A single measure still needs a width.
        let margin = if high > low { 0.0 } else { high.abs().max(1e-3) * 0.1 };
        let step = round_step((high - low + 2.0 * margin) / 4.0);
        Self::Linear { from: ((low - margin) / step).floor() * step, to: ((high + margin) / step).ceil() * step }
    }

    /// A logarithmic axis that holds all `values` from `floor` on.
    pub fn log(values: impl IntoIterator<Item = f64>, floor: f64) -> Self {
        let (low, high) = range(values.into_iter().filter(|&v| v >= floor)).unwrap_or((floor, 1.0));
        let from = low.log10().floor() as i32;
        Self::Log { from, to: (high.log10().ceil() as i32).max(from + 1) }
    }

    /// Whether `value` lies below the axis.
    pub fn is_below(&self, value: f64) -> bool {
        value
            < match *self {
                Self::Linear { from, .. } => from,
                Self::Log { from, .. } => 10f64.powi(from),
            }
    }

    /// Where `value` lies, 0 to 1; what lies outside goes to the nearer end.
    pub fn place(&self, value: f64) -> f64 {
        let place = match *self {
            Self::Linear { from, to } => (value - from) / (to - from),
            Self::Log { from, to } => (value.max(f64::MIN_POSITIVE).log10() - f64::from(from)) / f64::from(to - from),
        };
        place.clamp(0.0, 1.0)
    }

    /// Places and labels of the ticks.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        match *self {
            Self::Linear { from, to } => {
                let step = round_step((to - from) / 6.0);
                let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
                let first = (from / step).ceil() as i64;
                let last = (to / step + 1e-9).floor() as i64;
                (first..=last)
                    .map(|i| i as f64 * step)
                    .map(|value| (self.place(value), format!("{value:.decimals$}")))
                    .collect()
            }
            Self::Log { from, to } => (from..=to)
                .map(|exponent| 10f64.powi(exponent))
                .map(|value| (self.place(value), if value < 1e-3 { format!("{value:.0e}") } else { short(value) }))
                .collect(),
        }
    }
}

fn short(power: f64) -> String {
    let text = plain(power);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Smallest and largest finite value.
fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    values.into_iter().filter(|v| v.is_finite()).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((v.min(low), v.max(high))),
    })
}

/// The next of 1, 2, 5 times a power of ten that is not below `rough`.
fn round_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_bounds_are_round_and_hold_the_values() {
        assert_eq!(Axis::linear([1.0, 1.9]), Axis::Linear { from: 1.0, to: 2.0 });
        let labels: Vec<_> = Axis::linear([0.0, 100.0]).ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["0", "20", "40", "60", "80", "100"]);
        assert!(Axis::linear([-0.3, 0.1]).place(-0.3) < 1e-9);
        let Axis::Linear { from, to } = Axis::linear([5.0, f64::NAN]) else { panic!("not linear") };
        assert!(from < 5.0 && to > 5.0);
    }

    #[test]
    fn log_bounds_are_decades() {
        let axis = Axis::log([0.003, 0.4, 0.0], 1e-5);
        assert_eq!(axis, Axis::Log { from: -3, to: 0 });
        assert!(axis.is_below(0.0) && axis.is_below(9e-4) && !axis.is_below(0.003));
        assert!((axis.place(0.1) - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(axis.place(-1.0), 0.0);
        let labels: Vec<_> = axis.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["0.001", "0.01", "0.1", "1"]);
    }
}
