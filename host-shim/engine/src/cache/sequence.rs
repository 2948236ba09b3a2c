//! What a sequence holds, apart from the bytes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A sequence's id, never used again in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(u64);

impl SequenceId {
    /// An id that no sequence of this process has had.
    pub(crate) fn unused() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The number, for messages.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One layer's share of a sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerCache {
    /// Rows in the cache.
    pub len: usize,
    /// Blocks that hold them, in order (paged only). The last may be partly filled.
    pub blocks: Vec<u32>,
}

/// A sequence: its rows in each layer and, apart from them, the position of its next token.
#[derive(Debug, Clone)]
pub struct SequenceCache {
    /// Each layer's length and blocks. Layers differ only after a compression that keeps different counts.
    pub layers: Vec<LayerCache>,
    /// Position of the next token. It never goes back when rows are dropped.
    pub next_position: u32,
    /// Rows at the beginning that came from another request's prefix and may be in use by it.
    pub shared: usize,
    /// Whether rows were dropped or rewritten: from then on no block of it is published.
    pub compressed: bool,
    /// The prompt's tokens, by which its full blocks are published.
    pub(crate) prompt: Vec<u32>,
    /// Full blocks of the prompt that were looked at for publishing.
    pub(crate) published: usize,
    /// The prefix entry of the last of those blocks.
    pub(crate) entry: u64,
}

impl SequenceCache {
    /// A sequence without rows.
    pub fn new(layers: usize, prompt: &[u32]) -> Self {
        Self {
            layers: vec![LayerCache::default(); layers],
            next_position: 0,
            shared: 0,
            compressed: false,
            prompt: prompt.to_vec(),
            published: 0,
            entry: super::prefix::ROOT,
        }
    }

    /// Whether all layers hold the same number of rows in the same blocks.
    pub fn uniform(&self) -> bool {
        self.layers.windows(2).all(|pair| pair[0] == pair[1])
    }
}
