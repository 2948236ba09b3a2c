//! Rows by the contract's formula, without the kernels, and what may not happen to them.

use core::ops::Range;

use kvhook_abi::raw::{KvhLayer, KvhRows};

use crate::mock::{Cache, Store};

/// Rows that there is room for in every layer of a rank: an edit of a block table takes room away.
pub fn room(cache: &Cache, rank: usize) -> u64 {
    let blocks = cache.stores[rank].iter().map(|store| store.table.len() * cache.shape.block_size);
    let room = if cache.shape.block_size == 0 { None } else { blocks.min() };
    room.unwrap_or(cache.capacity) as u64
}

/// Bytes of K and V of some rows of one layer on one rank, in all heads.
pub fn bytes(cache: &Cache, rank: usize, layer: usize, tokens: Range<u64>) -> Vec<u8> {
    let described = &cache.layers(rank)[layer];
    let mut bytes = Vec::new();
    for rows in [&described.k, &described.v] {
        for head in 0..described.kv_heads {
            for token in tokens.clone() {
                // SAFETY: the tokens are within the cache's room; else the sanitizer stops us.
                bytes.extend_from_slice(unsafe { row(described, rows, token, head) });
            }
        }
    }
    bytes
}

/// # Safety
/// The row is one of the layer's.
unsafe fn row<'a>(layer: &'a KvhLayer, rows: &KvhRows, token: u64, head: u32) -> &'a [u8] {
    let size = u64::from(layer.block_size).max(1);
    let (block, within) = match layer.block_size {
        0 => (0, token),
        // SAFETY: the mock's tables hold i32, one for each block of its capacity, the same for all heads.
        _ => (unsafe { layer.table.data.cast::<i32>().add((token / size) as usize).read() }, token % size),
    };
    let offset =
        i64::from(block) * rows.stride_block + within as i64 * rows.stride_token + i64::from(head) * rows.stride_head;
    let length = rows.head_dim as usize * usize::from(rows.dtype.bits / 8);
    // SAFETY: passed on from the caller.
    unsafe { core::slice::from_raw_parts(rows.base.cast::<u8>().offset(offset as isize), length) }
}

/// A cache as it was.
pub struct Before {
    stores: Vec<Vec<Store>>,
    cache: Cache,
}

impl Before {
    /// Remembers every byte.
    pub fn of(cache: &Cache) -> Self {
        Self { stores: cache.stores.clone(), cache: cache.clone() }
    }

    /// Not one byte and no table has changed.
    pub fn assert_unchanged(&self, cache: &Cache, why: &str) {
        assert!(self.stores == cache.stores, "{why}: the cache was changed");
    }

    /// Rows moved in place on one rank: those in front that others use, and those behind the sequence's, are as they were.
    pub fn assert_only_own_rows_changed(&self, cache: &Cache, rank: usize, protected: u64) {
        for (layer, length) in self.cache.lengths(rank).into_iter().enumerate() {
            for guarded in [0..protected.min(length), length..room(cache, rank)] {
                let (then, now) =
                    (bytes(&self.cache, rank, layer, guarded.clone()), bytes(cache, rank, layer, guarded));
                assert!(then == now, "rank {rank}, layer {layer}: rows were written that are not the sequence's own");
            }
        }
    }

    /// As [`Before::of`] fresh rows: those behind the rows of `cache` were not written.
    pub fn assert_unused_behind(&self, cache: &Cache) {
        for rank in 0..cache.shape.ranks {
            for (layer, length) in cache.lengths(rank).into_iter().enumerate() {
                let behind = length..room(cache, rank);
                let (then, now) = (bytes(&self.cache, rank, layer, behind.clone()), bytes(cache, rank, layer, behind));
                assert!(then == now, "rank {rank}, layer {layer}: fresh rows were written that are not needed");
            }
        }
    }

    /// Rows of a layer on a rank.
    pub fn length(&self, rank: usize, layer: usize) -> usize {
        self.cache.rows[rank][layer][0].len()
    }
}
