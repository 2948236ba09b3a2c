//! The small operations between the matrix products, each row by itself.

use rayon::prelude::*;

use crate::simd::{Kernel, LANES, dispatch, dot, exp_nonpositive};

/// Root-mean-square norm of each row, times a weight (Zhang and Sennrich 2019, arXiv 1910.07467):
/// `y = x / sqrt(mean(x^2) + eps) * weight`.
///
/// `x` is `[rows, weight.len()]`; the row length must be a multiple of eight.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(weight.len()).zip(x.par_chunks(weight.len())).with_min_len(16).for_each(|(out, x)| {
        dispatch(NormRow { x, weight, eps, out });
    });
    out
}

struct NormRow<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mean = dot(self.x, self.x) / self.x.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * scale * weight;
        }
    }
}

/// The gate of a SwiGLU block (Shazeer 2020, arXiv 2002.05202): `silu(gate) * up`.
///
/// `gate_up` is `[rows, 2 * width]`, a row holding the gate and then up; the result is `[rows, width]`.
pub fn swiglu(gate_up: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    out.par_chunks_mut(width).zip(gate_up.par_chunks(2 * width)).with_min_len(16).for_each(|(out, row)| {
        let (gate, up) = row.split_at(width);
        dispatch(SwigluRow { gate, up, out });
    });
    out
}

struct SwigluRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SwigluRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((out, &g), &u) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            // The logistic function, by an exponential that cannot overflow.
            let e = exp_nonpositive(-g.abs());
            let numerator = if g < 0.0 { e } else { 1.0 };
            *out = g * (numerator / (1.0 + e)) * u;
        }
    }
}

/// `x += y`, element by element.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Turns scores of one row into exponentials of their distance to the largest, and returns the sum.
///
/// The sum runs over lanes `i % 8` in order, then over the lanes as a tree: it depends on the row alone.
#[inline(always)]
pub(crate) fn exponentials(scores: &mut [f32]) -> f32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp_nonpositive(chunk[lane] - max);
            sums[lane] += chunk[lane];
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp_nonpositive(*score - max);
        *sum += *score;
    }
    crate::simd::sum_lanes(sums)
}

/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) over adjacent pairs, which is how a GGUF of the
/// `llama` architecture stores q and k: channels `2i` and `2i + 1` turn by `position * frequency[i]`.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Angle per position of each pair, `[head_dim / 2]`.
    pub frequencies: Vec<f64>,
}

impl Rope {
    /// Rotates the heads of some rows in place: row `r` of `x` begins at `r * stride`, and its first
    /// `heads * head_dim` values are the heads. `positions` has one entry for each row.
    pub fn rotate(&self, x: &mut [f32], stride: usize, heads: usize, positions: &[u32]) {
        let head_dim = 2 * self.frequencies.len();
        x.par_chunks_mut(stride).zip(positions).with_min_len(16).for_each(|(row, &position)| {
            let angles: Vec<(f32, f32)> = self
                .frequencies
                .iter()
                .map(|f| (f64::from(position) * f).sin_cos())
                .map(|(sin, cos)| (sin as f32, cos as f32))
                .collect();
            for head in row[..heads * head_dim].chunks_exact_mut(head_dim) {
                for (pair, &(sin, cos)) in head.as_chunks_mut::<2>().0.iter_mut().zip(&angles) {
                    let [a, b] = *pair;
                    *pair = [a * cos - b * sin, a * sin + b * cos];
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_norm_has_unit_mean_square() {
        let x: Vec<f32> = (0..32).map(|i| i as f32 - 11.0).collect();
        let y = rms_norm(&x, &[1.0; 16], 0.0);
        for row in y.chunks_exact(16) {
            let mean: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 16.0;
            assert!((mean - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn swiglu_matches_its_formula() {
        let gate: Vec<f32> = (0..40).map(|i| (i as f32 - 20.0) * 0.9).collect();
        let mut row = gate.clone();
        row.extend((0..40).map(|i| i as f32 * 0.1));
        for (i, y) in swiglu(&row, 40).into_iter().enumerate() {
            let g = f64::from(gate[i]);
            let exact = g / (1.0 + (-g).exp()) * f64::from(row[40 + i]);
            assert!((f64::from(y) - exact).abs() < 1e-5);
        }
    }

    #[test]
    fn rotation_keeps_norms_and_depends_on_distance_only() {
        let rope = Rope { frequencies: vec![1.0, 0.1, 0.01, 0.001] };
        let vector: Vec<f32> = (1..=8).map(|i| i as f32 * 0.3).collect();
        let turned = |position: u32| {
            let mut x = vector.clone();
            rope.rotate(&mut x, 8, 1, &[position]);
            x
        };
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        assert!((product(&turned(5), &turned(5)) - product(&vector, &vector)).abs() < 1e-4);
        assert!((product(&turned(7), &turned(3)) - product(&turned(104), &turned(100))).abs() < 1e-4);
        // A quarter turn of the first pair, by hand.
        let quarter = Rope { frequencies: vec![std::f64::consts::FRAC_PI_2] };
        let mut x = [2.0, 3.0];
        quarter.rotate(&mut x, 2, 1, &[1]);
        assert!((x[0] + 3.0).abs() < 1e-6 && (x[1] - 2.0).abs() < 1e-6);
    }

    #[test]
    fn exponentials_sum_over_any_length() {
        for n in [1, 7, 8, 9, 100] {
            let mut scores: Vec<f32> = (0..n).map(|i| (i as f32 * 0.77).sin() * 5.0).collect();
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            let exact: f64 = scores.iter().map(|&s| f64::from(s - max).exp()).sum();
            assert!((f64::from(exponentials(&mut scores)) - exact).abs() < 1e-5 * exact);
        }
    }
}
