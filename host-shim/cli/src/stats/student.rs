//! Student's t distribution.

use std::f64::consts::FRAC_2_PI;

/// From here on the normal distribution's quantile differs by less than 0.003.
const LARGE: usize = 1000;
/// The normal distribution's.
const Z: f64 = 1.959_963_984_540_054;

/// The value that |t| exceeds with probability 0.05; None without a degree of freedom.
pub fn t_quantile(degrees: usize) -> Option<f64> {
    match degrees {
        0 => None,
        LARGE.. => Some(Z),
        _ => {
            // 12.71 for one degree, less for more.
            let (mut low, mut high) = (Z, 13.0);
            for _ in 0..60 {
                let middle = (low + high) / 2.0;
                if within(middle, degrees) < 0.95 { low = middle } else { high = middle }
            }
            Some((low + high) / 2.0)
        }
    }
}

/// Probability that |t| is below `limit`: finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4).
fn within(limit: f64, degrees: usize) -> f64 {
    let angle = (limit / (degrees as f64).sqrt()).atan();
    let (sine, cosine) = angle.sin_cos();
    let odd = degrees % 2 == 1;
    // Terms are cos^k times a product of ratios: k = 1, 3, ... for odd degrees, 0, 2, ... for even ones.
    let mut term = if odd { cosine } else { 1.0 };
    let mut sum = 0.0;
    let mut power = usize::from(odd);
    while power + 1 < degrees {
        sum += term;
        term *= cosine * cosine * (power + 1) as f64 / (power + 2) as f64;
        power += 2;
    }
    if odd { FRAC_2_PI * (angle + sine * sum) } else { sine * sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_the_printed_tables() {
        for (degrees, printed) in
            [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (23, 2.069), (30, 2.042), (120, 1.980)]
        {
            let found = t_quantile(degrees).unwrap();
            assert!((found - printed).abs() < 5e-4, "{degrees}: {found}");
        }
        assert_eq!(t_quantile(0), None);
        assert!((t_quantile(999).unwrap() - t_quantile(1000).unwrap()).abs() < 3e-3);
    }

    #[test]
    fn one_and_two_degrees_have_closed_forms() {
        // t is a tangent for one degree, and p = t / sqrt(2 + t^2) for two.
        assert!((within(1.0, 1) - 0.5).abs() < 1e-12);
        assert!((within(3.0, 2) - 3.0 / 11f64.sqrt()).abs() < 1e-12);
    }
}
