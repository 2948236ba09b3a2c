//! The paired t test (Student, 1908).

use kvhook_engine::quality::paired_difference;

/// Intervals of the integration: even, for Simpson's rule.
const STEPS: usize = 20_000;

/// p of the one-sided paired test that the mean of `lower` is below that of `higher`, on the same passages.
///
/// 0.5 for fewer than two pairs, which say nothing.
pub fn paired_one_sided(lower: &[f64], higher: &[f64]) -> f64 {
    let difference = paired_difference(higher, lower);
    match difference.count {
        0 | 1 => 0.5,
        count => upper_tail(difference.mean / difference.standard_error, (count - 1) as f64),
    }
}

/// P(T > t) for Student's T with `freedom` degrees of freedom, at least 1.
///
/// With x = sqrt(freedom) tan(angle), the density is in proportion to `cos(angle)^(freedom - 1)` over -pi/2..pi/2: smooth
/// and bounded, so that its integral from `t` on over the whole one is exact to many digits.
fn upper_tail(t: f64, freedom: f64) -> f64 {
    let half = std::f64::consts::FRAC_PI_2;
    let density = |angle: f64| angle.cos().max(0.0).powf(freedom - 1.0);
    let tail = simpson(density, (t.abs() / freedom.sqrt()).atan(), half) / (2.0 * simpson(density, 0.0, half));
    if t.is_nan() {
        0.5
    } else if t > 0.0 {
        tail
    } else {
        1.0 - tail
    }
}

/// Integral by Simpson's rule.
fn simpson(f: impl Fn(f64) -> f64, from: f64, to: f64) -> f64 {
    let step = (to - from) / STEPS as f64;
    let inner = |k: usize| if k % 2 == 1 { 4.0 } else { 2.0 } * f(from + k as f64 * step);
    step / 3.0 * (f(from) + (1..STEPS).map(inner).sum::<f64>() + f(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_published_tables() {
        // NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: critical values of Student's t.
        for (t, freedom, p) in [
            (6.314, 1.0, 0.05),
            (31.821, 1.0, 0.01),
            (1.895, 7.0, 0.05),
            (2.453, 31.0, 0.01),
            (3.375, 31.0, 0.001),
            (2.364, 100.0, 0.01),
        ] {
            let found = upper_tail(t, freedom);
            assert!((found / p - 1.0).abs() < 2e-3, "t {t}, {freedom}: {found}, expected {p}");
            assert!((upper_tail(-t, freedom) - (1.0 - found)).abs() < 1e-12);
        }
        assert!((upper_tail(0.0, 5.0) - 0.5).abs() < 1e-9);
        // One degree of freedom is Cauchy's distribution.
        assert!((upper_tail(1e3, 1.0) / ((1e-3f64).atan() / std::f64::consts::PI) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn pairs_count_not_levels() {
        // Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom; that one's tail is closed:
        // 1/2 - t / (2 sqrt(2 + t^2)).
        let t = 12f64.sqrt();
        let exact = 0.5 - t / (2.0 * (2.0 + t * t).sqrt());
        let p = paired_one_sided(&[100.0, 5.0, -7.0], &[101.0, 7.0, -4.0]);
        assert!((p - exact).abs() < 1e-9, "{p}, expected {exact}");
        assert!((paired_one_sided(&[101.0, 7.0, -4.0], &[100.0, 5.0, -7.0]) - (1.0 - exact)).abs() < 1e-9);
        assert_eq!(paired_one_sided(&[1.0], &[2.0]), 0.5);
        assert_eq!(paired_one_sided(&[1.0, 2.0], &[1.0, 2.0]), 0.5);
    }
}
