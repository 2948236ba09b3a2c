//! Data that is the same in every run.

/// A generator of test data from a seed (xorshift64*; Vigna 2016, "An experimental exploration of Marsaglia's xorshift
/// generators, scrambled").
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that gives the same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number of `0..end`; 0 where that is empty.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(end)) >> 64) as u64
    }

    /// From -1 to 1.
    pub fn float(&mut self) -> f32 {
        ((self.bits() >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    /// Values `[heads][tokens][dim]` with a common direction for each head and norms that differ, as real keys have.
    pub fn rows(&mut self, heads: usize, tokens: usize, dim: usize) -> crate::PerHead {
        let head = |random: &mut Self| {
            let mean: Vec<f32> = (0..dim).map(|_| random.float()).collect();
            let row = |random: &mut Self| {
                let scale = 0.5 + random.float().abs();
                mean.iter().map(|mean| scale * (mean + random.float())).collect()
            };
            (0..tokens).map(|_| row(random)).collect()
        };
        (0..heads).map(|_| head(self)).collect()
    }
}
