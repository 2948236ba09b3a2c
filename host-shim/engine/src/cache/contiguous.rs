//! One buffer of K and one of V for each sequence and layer.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::{KvBuffer, LayerPeek, LayerView, RowLayout, SequenceId};
use crate::error::Result;

/// Rows that a new buffer has room for, and the granule to which a shrunk one is rounded.
const MIN_ROWS: usize = 16;

/// The contiguous cache of one rank: buffers `[kv_heads, capacity, head_dim]`.
#[derive(Debug)]
pub struct ContiguousCache {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    sequences: HashMap<SequenceId, Vec<Buffers>>,
    /// What a sequence has before its first row.
    empty: Buffers,
}

#[derive(Debug)]
struct Buffers {
    k: KvBuffer,
    v: KvBuffer,
    capacity: usize,
}

impl ContiguousCache {
    /// An empty cache, of the dtype and on the device of `like`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU fails.
    pub fn new(like: KvBuffer, layers: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        let empty = Buffers { k: like.fresh(0)?, v: like, capacity: 0 };
        Ok(Self { layers, kv_heads, head_dim, sequences: HashMap::new(), empty })
    }

    /// A layer's buffers of a sequence, with room for `rows` rows; `kept` rows survive if they must move.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU has no memory left.
    pub fn layer(&mut self, sequence: SequenceId, layer: usize, kept: usize, rows: usize) -> Result<LayerView<'_>> {
        let (heads, head_dim) = (self.kv_heads, self.head_dim);
        let buffers = match self.sequences.entry(sequence) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(place) => {
                place.insert((0..self.layers).map(|_| self.empty.copy()).collect::<Result<Vec<_>>>()?)
            }
        };
        let buffers = &mut buffers[layer];
        if rows > buffers.capacity {
            let capacity = rows.max(2 * buffers.capacity).max(MIN_ROWS);
            buffers.reallocate(capacity, kept, heads, head_dim)?;
        }
        // One block that holds the whole sequence; max(1) keeps the formula's division defined while it is empty.
        let layout = RowLayout::blocked(heads, buffers.capacity.max(1), head_dim);
        Ok(LayerView { k: &mut buffers.k, v: &mut buffers.v, layout })
    }

    /// A layer's buffers of a sequence, to look at: empty ones before its first row.
    pub fn peek(&self, sequence: SequenceId, layer: usize) -> LayerPeek<'_> {
        let (heads, head_dim) = (self.kv_heads, self.head_dim);
        let buffers = self.sequences.get(&sequence).and_then(|layers| layers.get(layer)).unwrap_or(&self.empty);
        let layout = RowLayout::blocked(heads, buffers.capacity.max(1), head_dim);
        LayerPeek { k: &buffers.k, v: &buffers.v, layout }
    }

    /// Gives a sequence copies of another one's buffers.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU has no memory left.
    pub fn fork(&mut self, sequence: SequenceId, fork: SequenceId) -> Result<()> {
        if let Some(layers) = self.sequences.get(&sequence) {
            let copies = layers.iter().map(Buffers::copy).collect::<Result<_>>()?;
            self.sequences.insert(fork, copies);
        }
        Ok(())
    }

    /// Gives back the room beyond the first `rows` rows of a layer, and returns the bytes freed. Where another device than
    /// the CPU has no memory for the smaller buffer, the larger one stays.
    pub fn shrink(&mut self, sequence: SequenceId, layer: usize, rows: usize) -> usize {
        let (heads, head_dim) = (self.kv_heads, self.head_dim);
        let Some(buffers) = self.sequences.get_mut(&sequence).and_then(|layers| layers.get_mut(layer)) else {
            return 0;
        };
        let before = buffers.bytes();
        let capacity = rows.next_multiple_of(MIN_ROWS);
        if capacity < buffers.capacity
            && let Err(error) = buffers.reallocate(capacity, rows, heads, head_dim)
        {
            tracing::warn!(target: "kvhook", %sequence, layer, "the room of dropped rows stays: {error}");
        }
        before - buffers.bytes()
    }

    /// Drops a sequence's buffers.
    pub fn free(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    /// Bytes allocated now.
    pub fn bytes(&self) -> usize {
        self.sequences.values().flatten().map(Buffers::bytes).sum()
    }
}

impl Buffers {
    fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// Moves the first `kept` rows of each head to new buffers.
    fn reallocate(&mut self, capacity: usize, kept: usize, heads: usize, head_dim: usize) -> Result<()> {
        let moved = |buffer: &KvBuffer| {
            let mut fresh = buffer.fresh(heads * capacity * head_dim)?;
            for head in 0..heads {
                let (to, from) = (head * capacity * head_dim, head * self.capacity * head_dim);
                fresh.copy_from(to, buffer, from, kept * head_dim)?;
            }
            Ok(fresh)
        };
        let (k, v) = (moved(&self.k)?, moved(&self.v)?);
        *self = Self { k, v, capacity };
        Ok(())
    }

    fn copy(&self) -> Result<Self> {
        Ok(Self { k: self.k.copy()?, v: self.v.copy()?, capacity: self.capacity })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::KvDtype;

    fn fill(cache: &mut ContiguousCache, id: SequenceId, from: usize, to: usize) {
        for t in from..to {
            let mut view = cache.layer(id, 1, t, t + 1).unwrap();
            for h in 0..2 {
                let value = (t * 10 + h) as f32;
                view.write(&[], t, h, &[value; 8], &[-value; 8]);
            }
        }
    }

    fn check(cache: &mut ContiguousCache, id: SequenceId, rows: usize) {
        let view = cache.layer(id, 1, rows, rows).unwrap();
        for t in 0..rows {
            for h in 0..2 {
                let at = view.layout.row(&[], t, h);
                let (mut k, mut v) = ([0.0; 8], [0.0; 8]);
                view.k.read(at, &mut k);
                view.v.read(at, &mut v);
                assert_eq!((k, v), ([(t * 10 + h) as f32; 8], [-((t * 10 + h) as f32); 8]));
            }
        }
    }

    #[test]
    fn grows_and_shrinks_with_its_rows() {
        let id = SequenceId::unused();
        let mut cache = ContiguousCache::new(KvBuffer::new(KvDtype::F32, 0), 2, 2, 8).unwrap();
        fill(&mut cache, id, 0, 100);
        check(&mut cache, id, 100);
        // 16, doubled until it holds 100; K and V of two heads of eight channels.
        assert_eq!(cache.bytes(), 2 * 128 * 2 * 8 * 4);
        assert_eq!(cache.shrink(id, 1, 20), 2 * (128 - 32) * 2 * 8 * 4);
        assert_eq!(cache.bytes(), 2 * 32 * 2 * 8 * 4);
        check(&mut cache, id, 20);
        fill(&mut cache, id, 20, 40);
        check(&mut cache, id, 40);
        cache.free(id);
        assert_eq!(cache.bytes(), 0);
    }
}
