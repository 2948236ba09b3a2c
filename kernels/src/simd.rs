//! One body, compiled twice: for any processor, and for those with AVX2.
//!
//! Bodies are plain loops over fixed lanes. The compiler never fuses a multiplication with an addition by itself and
//! keeps the order of summation as written, so both versions give the same bytes.

/// A computation to be compiled for each instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Body {
    /// What it returns.
    type Output;
    /// The computation.
    fn run(self) -> Self::Output;
}

/// Runs `body` in the version for this processor.
#[inline]
pub(crate) fn run<B: Body>(body: B) -> B::Output {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { with_avx2(body) };
    }
    body.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<B: Body>(body: B) -> B::Output {
    body.run()
}

/// Lanes that sums are kept in.
pub(crate) const LANES: usize = 8;

/// Adds the lanes in a fixed tree.
#[inline(always)]
pub(crate) fn add_lanes(lanes: [f32; LANES]) -> f32 {
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

/// The scalar product of two slices of one length: eight running sums, then the tree; a rest that fills no eight
/// lanes is added to the first ones.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a * b;
    }
    add_lanes(sums)
}

#[cfg(test)]
mod tests {
    use super::{Body, dot, run};

    struct Dots<'a>(&'a [f32]);

    impl Body for Dots<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn run(self) -> Vec<u32> {
            (0..self.0.len()).map(|start| dot(&self.0[start..], &self.0[start..]).to_bits()).collect()
        }
    }

    /// On a processor with AVX2 this compares the two versions, elsewhere one with itself.
    #[test]
    fn both_versions_give_the_same_bytes() {
        let values: Vec<f32> = (1..400).map(|n| 1.0 / n as f32).collect();
        assert_eq!(run(Dots(&values)), Dots(&values).run());
    }
}
