//! Who owns which block: reference counts, free lists, published prefixes.
//!
//! Each layer has a pool and a table of its own, because layers may keep different counts after a compression; a block
//! freed in one layer is usable in that layer. As long as nothing is compressed, the layers move in step.

use std::collections::BTreeMap;

use super::prefix::{PrefixMap, ROOT};
use super::sequence::SequenceCache;
use crate::error::{Error, Result};

/// The blocks of all layers. The same numbers hold on every rank.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    layers: Vec<LayerBlocks>,
    /// `None`: sharing is off.
    prefixes: Option<PrefixMap>,
    clock: u64,
}

#[derive(Debug)]
struct LayerBlocks {
    blocks: Vec<Block>,
    /// Unused and unpublished blocks; the last is handed out next.
    free: Vec<u32>,
    /// Published blocks that nobody uses, the longest unused first. They are taken when `free` is empty.
    evictable: BTreeMap<u64, u32>,
}

#[derive(Debug, Clone, Default)]
struct Block {
    references: u32,
    /// The prefix entry under which it can be found.
    entry: Option<u64>,
    /// Key in `evictable`, while there.
    stamp: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks of `block_size` rows for each layer.
    pub fn new(layers: usize, blocks: usize, block_size: usize, prefix_sharing: bool) -> Self {
        let layer = || LayerBlocks {
            blocks: vec![Block::default(); blocks],
            free: (0..blocks as u32).rev().collect(),
            evictable: BTreeMap::new(),
        };
        Self {
            block_size,
            layers: (0..layers).map(|_| layer()).collect(),
            prefixes: prefix_sharing.then(PrefixMap::default),
            clock: 0,
        }
    }

    /// Rows of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that a new sequence could get in every layer: free ones and published ones that nobody uses.
    pub fn usable_blocks(&self) -> usize {
        (0..self.layers.len()).map(|layer| self.usable_blocks_in(layer)).min().unwrap_or(0)
    }

    /// Blocks free or evictable in one layer.
    pub fn usable_blocks_in(&self, layer: usize) -> usize {
        self.layers[layer].free.len() + self.layers[layer].evictable.len()
    }

    /// How many sequences use a block.
    pub fn references(&self, layer: usize, block: u32) -> u32 {
        self.layers[layer].blocks[block as usize].references
    }

    /// Whether one sequence alone uses the block and nobody else can find it: its rows may then be written.
    pub fn is_private(&self, layer: usize, block: u32) -> bool {
        let block = &self.layers[layer].blocks[block as usize];
        block.references == 1 && block.entry.is_none()
    }

    /// Takes `count` blocks of a layer, each with one reference.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`], with nothing taken.
    pub fn allocate(&mut self, layer: usize, count: usize) -> Result<Vec<u32>> {
        let usable = self.usable_blocks_in(layer);
        if count > usable {
            return Err(Error::OutOfBlocks { layer, needed: count, usable });
        }
        while self.layers[layer].free.len() < count {
            let Some((_, &block)) = self.layers[layer].evictable.first_key_value() else { break };
            self.evict(layer, block);
        }
        let pool = &mut self.layers[layer];
        let taken = pool.free.split_off(pool.free.len() - count);
        for &block in &taken {
            pool.blocks[block as usize].references = 1;
        }
        Ok(taken.into_iter().rev().collect())
    }

    /// Forgets the prefix that a block belongs to; its unused blocks become free in all layers.
    fn evict(&mut self, layer: usize, block: u32) {
        let entry = self.layers[layer].blocks[block as usize].entry;
        let blocks = entry.and_then(|entry| self.prefixes.as_mut()?.remove(entry)).unwrap_or_default();
        for (pool, block) in self.layers.iter_mut().zip(blocks) {
            let state = &mut pool.blocks[block as usize];
            state.entry = None;
            if state.references == 0 {
                pool.evictable.remove(&state.stamp);
                pool.free.push(block);
            }
        }
    }

    /// Adds a reference to a block of a layer.
    pub fn retain(&mut self, layer: usize, block: u32) {
        let pool = &mut self.layers[layer];
        let state = &mut pool.blocks[block as usize];
        if state.references == 0 {
            pool.evictable.remove(&state.stamp);
        }
        state.references += 1;
    }

    /// Drops a reference to each block, the last block first, so that a prefix is evicted from its end.
    ///
    /// Returns how many blocks became usable by it.
    pub fn release(&mut self, layer: usize, blocks: &[u32]) -> usize {
        let mut freed = 0;
        for &block in blocks.iter().rev() {
            let pool = &mut self.layers[layer];
            let state = &mut pool.blocks[block as usize];
            state.references = state.references.saturating_sub(1);
            if state.references > 0 {
                continue;
            }
            freed += 1;
            if state.entry.is_some() {
                self.clock += 1;
                state.stamp = self.clock;
                pool.evictable.insert(self.clock, block);
            } else {
                pool.free.push(block);
            }
        }
        freed
    }

    /// Gives a sequence room for `rows` more rows in every layer.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`], with nothing taken.
    pub fn reserve(&mut self, sequence: &mut SequenceCache, rows: usize) -> Result<()> {
        let missing = |layer: &super::LayerCache, size: usize| {
            (layer.len + rows).div_ceil(size).saturating_sub(layer.blocks.len())
        };
        for (layer, cache) in sequence.layers.iter().enumerate() {
            let (needed, usable) = (missing(cache, self.block_size), self.usable_blocks_in(layer));
            if needed > usable {
                return Err(Error::OutOfBlocks { layer, needed, usable });
            }
        }
        for (layer, cache) in sequence.layers.iter_mut().enumerate() {
            let count = missing(cache, self.block_size);
            cache.blocks.extend(self.allocate(layer, count)?);
        }
        Ok(())
    }

    /// Gives a new sequence the longest published beginning of its prompt, of at most `limit` rows.
    pub fn share_prefix(&mut self, sequence: &mut SequenceCache, limit: usize) {
        let Some(prefixes) = &self.prefixes else { return };
        let mut found: Vec<Vec<u32>> = Vec::new();
        for tokens in sequence.prompt[..limit.min(sequence.prompt.len())].chunks_exact(self.block_size) {
            let Some((entry, blocks)) = prefixes.find(sequence.entry, tokens) else { break };
            sequence.entry = entry;
            found.push(blocks.to_vec());
        }
        for blocks in &found {
            for (layer, &block) in blocks.iter().enumerate() {
                self.retain(layer, block);
                sequence.layers[layer].blocks.push(block);
            }
        }
        let rows = found.len() * self.block_size;
        for layer in &mut sequence.layers {
            layer.len = rows;
        }
        sequence.shared = rows;
        sequence.published = found.len();
        sequence.next_position = rows as u32;
    }

    /// Makes the full blocks of a sequence's prompt findable. A compressed sequence publishes nothing.
    ///
    /// A block that can already be found, which holds the same bits, takes the place of the sequence's own: prompts that
    /// had to be computed again, so that plugins saw their queries, come to share them all the same.
    pub fn publish(&mut self, sequence: &mut SequenceCache) {
        if self.prefixes.is_none() || sequence.compressed {
            return;
        }
        let rows = (sequence.next_position as usize).min(sequence.prompt.len());
        while (sequence.published + 1) * self.block_size <= rows {
            let index = sequence.published;
            let tokens = &sequence.prompt[index * self.block_size..][..self.block_size];
            sequence.published += 1;
            let prefixes = self.prefixes.as_ref();
            let found = prefixes.and_then(|prefixes| prefixes.find(sequence.entry, tokens));
            if let Some((entry, blocks)) = found.map(|(entry, blocks)| (entry, blocks.to_vec())) {
                sequence.entry = entry;
                for (layer, block) in blocks.into_iter().enumerate() {
                    let own = std::mem::replace(&mut sequence.layers[layer].blocks[index], block);
                    self.retain(layer, block);
                    self.release(layer, &[own]);
                }
                continue;
            }
            let blocks: Vec<u32> = sequence.layers.iter().map(|layer| layer.blocks[index]).collect();
            // The parent may have been evicted: nobody can reach what would hang behind it, yet it can be evicted too.
            let Some(prefixes) = &mut self.prefixes else { return };
            sequence.entry = prefixes.insert(sequence.entry, tokens, blocks.clone());
            for (pool, block) in self.layers.iter_mut().zip(blocks) {
                pool.blocks[block as usize].entry = Some(sequence.entry);
            }
        }
    }

    /// Leading rows of a sequence that others use, and leading rows that others can find, in any layer.
    pub fn protected_rows(&self, sequence: &SequenceCache) -> (usize, usize) {
        let (mut shared, mut published) = (0, 0);
        for (pool, layer) in self.layers.iter().zip(&sequence.layers) {
            let blocks = || layer.blocks.iter().map(|block| &pool.blocks[*block as usize]);
            let end = |last: Option<usize>| last.map_or(0, |last| ((last + 1) * self.block_size).min(layer.len));
            shared = shared.max(end(blocks().rposition(|block| block.references > 1)));
            published = published.max(end(blocks().rposition(|block| block.entry.is_some())));
        }
        (shared, published)
    }

    /// Returns all blocks of a sequence; how many became usable, over all layers.
    pub fn free(&mut self, sequence: &mut SequenceCache) -> usize {
        let mut freed = 0;
        for (layer, cache) in sequence.layers.iter_mut().enumerate() {
            freed += self.release(layer, &std::mem::take(&mut cache.blocks));
            cache.len = 0;
        }
        sequence.entry = ROOT;
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pool: &mut BlockPool, prompt: &[u32]) -> SequenceCache {
        let mut sequence = SequenceCache::new(2, prompt);
        pool.share_prefix(&mut sequence, prompt.len() - 1);
        let rest = prompt.len() - sequence.shared;
        pool.reserve(&mut sequence, rest).unwrap();
        for layer in &mut sequence.layers {
            layer.len = prompt.len();
        }
        sequence.next_position = prompt.len() as u32;
        pool.publish(&mut sequence);
        sequence
    }

    #[test]
    fn references_count_sharers_and_blocks_come_back() {
        let mut pool = BlockPool::new(2, 10, 4, true);
        let prompt: Vec<u32> = (0..10).collect();
        let mut a = filled(&mut pool, &prompt);
        assert_eq!((a.shared, pool.usable_blocks()), (0, 7));
        let mut b = filled(&mut pool, &prompt);
        assert_eq!((b.shared, pool.usable_blocks()), (8, 6));
        let first = a.layers[0].blocks[0];
        assert_eq!(b.layers[0].blocks[0], first);
        assert_eq!(pool.references(0, first), 2);
        assert!(!pool.is_private(0, first));
        assert!(pool.is_private(0, b.layers[0].blocks[2]));
        // Of a's six blocks (three in two layers) b goes on using four.
        assert_eq!(pool.free(&mut a), 2);
        assert_eq!((pool.references(0, first), pool.usable_blocks()), (1, 7));
        assert_eq!(pool.free(&mut b), 6);
        assert_eq!(pool.usable_blocks(), 10);
        // Unused but still published: found again.
        assert_eq!(filled(&mut pool, &prompt).shared, 8);
    }

    #[test]
    fn only_equal_beginnings_are_shared() {
        let mut pool = BlockPool::new(2, 20, 4, true);
        let _a = filled(&mut pool, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(filled(&mut pool, &[1, 2, 3, 4, 5, 6, 7, 0, 9]).shared, 4);
        assert_eq!(filled(&mut pool, &[5, 6, 7, 8, 9, 9]).shared, 0);
        let mut off = BlockPool::new(2, 20, 4, false);
        let _a = filled(&mut off, &[1, 2, 3, 4, 5]);
        assert_eq!(filled(&mut off, &[1, 2, 3, 4, 5]).shared, 0);
    }

    #[test]
    fn unused_prefixes_are_evicted_when_blocks_are_needed() {
        let mut pool = BlockPool::new(2, 4, 4, true);
        let mut a = filled(&mut pool, &(0..16).collect::<Vec<_>>());
        assert!(matches!(pool.allocate(1, 1), Err(Error::OutOfBlocks { layer: 1, needed: 1, usable: 0 })));
        pool.free(&mut a);
        // Three new blocks evict from the end of the prefix; its first block stays.
        let mut b = filled(&mut pool, &(100..112).collect::<Vec<_>>());
        assert_eq!(pool.usable_blocks(), 1);
        pool.free(&mut b);
        let c = filled(&mut pool, &[0, 1, 2, 3, 4]);
        assert_eq!(c.shared, 4);
    }

    #[test]
    fn a_failed_reservation_takes_nothing() {
        let mut pool = BlockPool::new(2, 4, 4, true);
        let mut sequence = SequenceCache::new(2, &[1]);
        sequence.layers[1].len = 8;
        sequence.layers[1].blocks = pool.allocate(1, 2).unwrap();
        assert!(matches!(pool.reserve(&mut sequence, 12), Err(Error::OutOfBlocks { layer: 1, needed: 3, usable: 2 })));
        assert_eq!((pool.usable_blocks_in(0), pool.usable_blocks_in(1)), (4, 2));
        pool.reserve(&mut sequence, 8).unwrap();
        assert_eq!((pool.usable_blocks_in(0), pool.usable_blocks_in(1)), (2, 0));
    }

    #[test]
    fn a_compressed_sequence_publishes_nothing() {
        let mut pool = BlockPool::new(2, 8, 4, true);
        let mut a = SequenceCache::new(2, &[1, 2, 3, 4, 5]);
        pool.reserve(&mut a, 5).unwrap();
        a.next_position = 5;
        a.compressed = true;
        pool.publish(&mut a);
        assert_eq!(filled(&mut pool, &[1, 2, 3, 4, 5]).shared, 0);
    }
}
