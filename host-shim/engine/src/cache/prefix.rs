//! Which full blocks of prompts are in the cache, so that a request with the same beginning can use them.
//!
//! An entry is found by its parent entry and its own tokens: a chain of such steps stands for the whole beginning, and
//! since the map compares tokens, a hash collision cannot give another prompt's rows.

use std::collections::HashMap;

/// The entry before any prompt's first block.
pub(crate) const ROOT: u64 = 0;

type Key = (u64, Box<[u32]>);

/// The published blocks, by what they hold.
#[derive(Debug, Default)]
pub(crate) struct PrefixMap {
    by_tokens: HashMap<Key, u64>,
    entries: HashMap<u64, Entry>,
    last: u64,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    /// The block of each layer.
    blocks: Vec<u32>,
}

impl PrefixMap {
    /// The entry for these tokens behind `parent`, with its block in each layer.
    pub(crate) fn find(&self, parent: u64, tokens: &[u32]) -> Option<(u64, &[u32])> {
        let id = *self.by_tokens.get(&(parent, tokens.into()))?;
        self.entries.get(&id).map(|entry| (id, entry.blocks.as_slice()))
    }

    /// Adds an entry and returns its id, which is never used again.
    pub(crate) fn insert(&mut self, parent: u64, tokens: &[u32], blocks: Vec<u32>) -> u64 {
        self.last += 1;
        let key: Key = (parent, tokens.into());
        self.by_tokens.insert(key.clone(), self.last);
        self.entries.insert(self.last, Entry { key, blocks });
        self.last
    }

    /// Removes an entry and returns its blocks. Entries behind it are no longer found.
    pub(crate) fn remove(&mut self, id: u64) -> Option<Vec<u32>> {
        let entry = self.entries.remove(&id)?;
        self.by_tokens.remove(&entry.key);
        Some(entry.blocks)
    }
}
