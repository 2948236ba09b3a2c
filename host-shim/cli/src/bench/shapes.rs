//! The caches: models' shapes, layouts, and lengths of sequences.

/// Bytes of a bf16, the dtype of every cache here.
pub const ELEMENT: usize = 2;
/// The most bytes of a row's cache.
pub const MOST_BYTES: usize = 24_000_000_000;

/// What of a model decides the size of its cache.
#[derive(Debug, PartialEq, Eq)]
pub struct Shape {
    /// Name in the rows' names.
    pub name: &'static str,
    /// Layers.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Query heads of a layer.
    pub q_heads: usize,
    /// Channels of a row of K and of V.
    pub head_dim: usize,
}

/// Llama-3.1-8B.
pub static LLAMA: Shape = Shape { name: "llama-3.1-8b", layers: 32, kv_heads: 8, q_heads: 32, head_dim: 128 };
/// Qwen3-8B.
pub static QWEN: Shape = Shape { name: "qwen3-8b", layers: 36, kv_heads: 8, q_heads: 32, head_dim: 128 };
/// SmolLM2-135M.
pub static SMOLLM: Shape = Shape { name: "smollm2-135m", layers: 30, kv_heads: 3, q_heads: 9, head_dim: 64 };
/// LLaVA-1.5-7B: as many KV heads as query heads.
pub static LLAVA: Shape = Shape { name: "llava-1.5-7b", layers: 32, kv_heads: 32, q_heads: 32, head_dim: 128 };

impl Shape {
    /// Bytes of K of one layer, or of V.
    pub fn tensor_bytes(&self, tokens: usize) -> usize {
        tokens * self.kv_heads * self.row_bytes()
    }

    /// Bytes of K and V of all layers.
    pub fn cache_bytes(&self, tokens: usize) -> usize {
        2 * self.layers * self.tensor_bytes(tokens)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.head_dim * ELEMENT
    }
}

/// How rows lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `[kv_heads, tokens, head_dim]` in each layer, for each sequence.
    Contiguous,
    /// `[blocks, block_size, kv_heads, head_dim]` in each layer; the blocks of a sequence lie in a shuffled order.
    Paged(usize),
}

impl Form {
    /// Name in the rows' names.
    pub fn name(self) -> String {
        match self {
            Self::Contiguous => "contiguous".into(),
            Self::Paged(block) => format!("paged-{block}"),
        }
    }

    /// Tokens of a block; 0 without blocks.
    pub fn block_size(self) -> usize {
        match self {
            Self::Contiguous => 0,
            Self::Paged(block) => block,
        }
    }

    /// Rows that a sequence's memory holds in each layer.
    pub fn room(self, tokens: usize) -> usize {
        tokens.next_multiple_of(self.block_size().max(1))
    }
}

/// Lengths of the sequences that are compressed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    /// One sequence.
    One(usize),
    /// 32 sequences of [`mixed`] lengths.
    Mixed,
}

impl Batch {
    /// Name in the rows' names.
    pub fn name(self) -> String {
        match self {
            Self::One(tokens) => tokens.to_string(),
            Self::Mixed => "mixed-32".into(),
        }
    }

    /// Tokens of each sequence.
    pub fn lengths(self) -> Vec<usize> {
        match self {
            Self::One(tokens) => vec![tokens],
            Self::Mixed => mixed(),
        }
    }
}

/// 32 lengths from 256 to 32,768, log-uniform: draws of a generator whose seed is one of those at which the cache of
/// Llama-3.1-8B has at most [`MOST_BYTES`]. On average such a batch has 28 GB.
pub fn mixed() -> Vec<usize> {
    let mut random = Random::new(MIXED_SEED);
    (0..32).map(|_| (256.0 * 128f64.powf(random.unit())).round() as usize).collect()
}

const MIXED_SEED: u64 = 8;

/// Repeatable numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    /// Numbers named by `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform from 0 to below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.number()) * end as u128) >> 64) as usize
    }

    /// 0 to below `count`, in a shuffled order (Fisher and Yates).
    pub fn permutation(&mut self, count: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..count as u32).collect();
        for place in (1..count).rev() {
            all.swap(place, self.below(place + 1));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_known_caches() {
        // Llama-3.1-8B has 128 KiB of K and V in bf16 for each token.
        assert_eq!(LLAMA.cache_bytes(1), 128 << 10);
        assert_eq!(LLAMA.cache_bytes(131_072), 16 << 30);
        assert_eq!(Form::Paged(16).room(17), 32);
        assert_eq!(Form::Contiguous.room(17), 17);
    }

    #[test]
    fn a_mixed_batch_fits_and_spreads_over_all_lengths() {
        let lengths = mixed();
        assert_eq!(lengths.len(), 32);
        assert!(lengths.iter().all(|length| (256..=32_768).contains(length)));
        let tokens: usize = lengths.iter().map(|&length| Form::Paged(16).room(length)).sum();
        assert!(LLAMA.cache_bytes(tokens) <= MOST_BYTES, "{tokens} tokens");
        // Half of the draws of a log-uniform one lie below the geometric mean of its ends, 2,896.
        let short = lengths.iter().filter(|&&length| length < 2896).count();
        assert!((10..=22).contains(&short), "{short} of 32 are short");
        assert!(lengths.iter().any(|&length| length > 16_384) && lengths.iter().any(|&length| length < 512));
    }

    #[test]
    fn permutations_have_each_number_once() {
        let mut all = Random::new(3).permutation(1000);
        assert_ne!(all[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        all.sort_unstable();
        assert!(all.iter().enumerate().all(|(place, &number)| place as u32 == number));
    }
}
