//! Numbers as readers see them, in the terminal and on the page.

use std::time::{Duration, SystemTime};

use crate::stats::{Estimate, Interval};

/// Stands where there is no number.
pub const NONE: &str = "–";

/// `value` with `decimals` places, or a dash when it is not finite.
pub fn fixed(value: f64, decimals: usize) -> String {
    if value.is_finite() { format!("{value:.decimals$}") } else { NONE.into() }
}

/// About four significant digits; scientific below 1e-4, where plain digits would be mostly zeros.
pub fn plain(value: f64) -> String {
    match value.abs() {
        a if !a.is_finite() => NONE.into(),
        0.0 => "0".into(),
        a if a < 1e-4 => format!("{value:.1e}"),
        // The epsilon lets 99.999, which is shown as 100.0, count as a number of three digits.
        a => fixed(value, (3 - (a * 1.00005).log10().floor() as i32).clamp(0, 4) as usize),
    }
}

/// About three significant digits, for ratios and ends of intervals.
pub fn brief(value: f64) -> String {
    match value.abs() {
        a if a >= 99.95 => fixed(value, 0),
        a if a >= 9.995 => fixed(value, 1),
        a if a >= 0.9995 => fixed(value, 2),
        a if a >= 0.0995 => fixed(value, 3),
        _ => plain(value),
    }
}

/// `mean±error`, rounded where the standard error says that digits end: one digit of it, or two when it begins with 1
/// or 2, but no more than four digits of the mean. Without an error, or with one too small to show, [`plain`].
pub fn with_error(estimate: &Estimate) -> String {
    let mean = estimate.mean;
    let Some(error) = estimate.standard_error.filter(|e| *e > 0.0 && mean.is_finite()) else {
        return plain(mean);
    };
    if mean != 0.0 && mean.abs() < 1e-4 {
        return format!("{}±{error:.0e}", plain(mean));
    }
    let exponent = error.log10().floor() as i32;
    let leading = error / 10f64.powi(exponent);
    let wanted = if leading < 2.95 { 1 - exponent } else { -exponent };
    let most = 3 - mean.abs().max(0.1).log10().floor() as i32;
    let decimals = wanted.min(most).clamp(0, 4) as usize;
    if error < 0.5 * 10f64.powi(-(decimals as i32)) {
        return plain(mean);
    }
    format!("{mean:.decimals$}±{error:.decimals$}")
}

/// [`with_error`], or a dash when there is no estimate.
pub fn optional(estimate: Option<&Estimate>) -> String {
    estimate.map_or_else(|| NONE.into(), with_error)
}

/// A number of bytes in MiB, without the unit.
pub fn mebibytes(bytes: f64) -> String {
    let value = bytes / (1024.0 * 1024.0);
    fixed(value, if value < 100.0 { 1 } else { 0 })
}

/// The estimate times 100, for shares shown in percent.
pub fn percent(estimate: &Estimate) -> Estimate {
    Estimate { mean: estimate.mean * 100.0, standard_error: estimate.standard_error.map(|e| e * 100.0), n: estimate.n }
}

/// Seconds since 1970-01-01 UTC as a date and a time, to the second; a dash for what no calendar has.
pub fn moment(at: f64) -> String {
    // Until the year 9999, where the form ends.
    let since = Some(at)
        .filter(|at| *at < 2.5e11)
        .and_then(|at| Duration::try_from_secs_f64(at).ok())
        .and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
    let text = since.map(|at| humantime::format_rfc3339_seconds(at).to_string().replace('T', " ").replace('Z', " UTC"));
    text.unwrap_or_else(|| NONE.into())
}

/// ` (95 % interval 0.63 to 0.80)`; nothing without an interval.
pub fn bracketed(interval: Option<Interval>) -> String {
    interval.map_or_else(String::new, |interval| {
        format!(" (95 % interval {} to {})", brief(interval.low), brief(interval.high))
    })
}

/// `a, b and c`.
pub fn listed(names: &[&str]) -> String {
    match names {
        [rest @ .., last] if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(mean: f64, error: f64) -> Estimate {
        Estimate { mean, standard_error: Some(error), n: 4 }
    }

    #[test]
    fn digits_end_where_the_error_begins() {
        assert_eq!(with_error(&estimate(1.023_44, 0.004_1)), "1.023±0.004");
        assert_eq!(with_error(&estimate(0.123_44, 0.012_3)), "0.123±0.012");
        assert_eq!(with_error(&estimate(44.35, 12.1)), "44±12");
        assert_eq!(with_error(&estimate(95.31, 0.42)), "95.3±0.4");
        assert_eq!(with_error(&estimate(1.0, 0.0)), "1.000");
        assert_eq!(with_error(&estimate(99.998_53, 1.4e-4)), "100.0");
        assert_eq!(with_error(&estimate(30.03, 0.17)), "30.03±0.17");
        assert_eq!(with_error(&estimate(4301.2, 10.4)), "4301±10");
        assert_eq!(with_error(&estimate(2.3e-7, 1.2e-8)), "2.3e-7±1e-8");
        assert_eq!(with_error(&estimate(f64::NAN, 1.0)), NONE);
    }

    #[test]
    fn plain_numbers() {
        assert_eq!(plain(0.0), "0");
        assert_eq!(plain(43.3649), "43.36");
        assert_eq!(plain(0.012_345), "0.0123");
        assert_eq!(plain(12_345.6), "12346");
        assert_eq!(plain(f64::INFINITY), NONE);
        let briefly = [0.946_8, 1.504_4, 19.3, 1400.2, 0.034_56, 0.0].map(brief);
        assert_eq!(briefly, ["0.947", "1.50", "19.3", "1400", "0.0346", "0"]);
        assert_eq!(mebibytes(23.6 * 1024.0 * 1024.0), "23.6");
    }
}
