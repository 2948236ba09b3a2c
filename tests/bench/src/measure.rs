//! Measuring: pairs that take turns, medians with their confidence, the verdict.

use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Time of one call.
pub fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// The middle one; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// A median and the interval in which it lies with 95 % confidence, whatever the distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// The median of the sample.
    pub median: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// By order statistics: the median lies between the values `1.96 * sqrt(n) / 2` places from the middle.
    pub fn of(values: &[f64]) -> Self {
        let mut values = values.to_vec();
        values.sort_unstable_by(f64::total_cmp);
        let (count, middle) = (values.len() as f64, values.len() as f64 / 2.0);
        let reach = 0.98 * count.sqrt();
        let at = |place: f64| values.get((place.max(0.0) as usize).min(values.len().saturating_sub(1)));
        let value = |place: f64| at(place).copied().unwrap_or(0.0);
        Self { low: value(middle - reach), median: value(middle), high: value((middle + reach).ceil()) }
    }

    /// The same of the ratios of pairs that took turns, as a difference in percent: how much longer the second took.
    pub fn of_percent(firsts: &[f64], seconds: &[f64]) -> Self {
        let percent = |(first, second): (&f64, &f64)| 100.0 * (second / first - 1.0);
        Self::of(&firsts.iter().zip(seconds).map(percent).collect::<Vec<_>>())
    }
}

/// Whether all gates hold.
#[derive(Debug, Default)]
pub struct Gates {
    failed: bool,
}

impl Gates {
    /// Notes a gate, and says how it came out.
    pub fn check(&mut self, holds: bool) -> &'static str {
        self.failed |= !holds;
        if holds { "ok" } else { "GATE FAILED" }
    }

    /// The program's end.
    pub fn exit(self) -> ExitCode {
        if self.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}

/// Cores, and so threads.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// Prints what a reader needs to judge figures: cores and the load of the machine.
pub fn print_machine() {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split(' ').take(3).collect();
    println!("{} cores, load average {}", cores(), load.join(" "));
}
