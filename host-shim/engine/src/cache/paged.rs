//! A pool of blocks for each layer.

use super::{KvBuffer, LayerPeek, LayerView, RowLayout};
use crate::error::Result;

/// The paged cache of one rank: for each layer K and V of `[blocks, kv_heads, block_size, head_dim]`.
#[derive(Debug)]
pub struct PagedCache {
    layers: Vec<(KvBuffer, KvBuffer)>,
    layout: RowLayout,
}

impl PagedCache {
    /// A zeroed pool of `blocks` blocks for each layer, of the dtype and on the device of `like`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU has no memory left.
    pub fn new(like: &KvBuffer, layers: usize, blocks: usize, layout: RowLayout) -> Result<Self> {
        let len = blocks * layout.stride_block;
        let layers = (0..layers).map(|_| Ok((like.fresh(len)?, like.fresh(len)?))).collect::<Result<_>>()?;
        Ok(Self { layers, layout })
    }

    /// A layer's pool.
    pub fn layer(&mut self, layer: usize) -> LayerView<'_> {
        let (k, v) = &mut self.layers[layer];
        LayerView { k, v, layout: self.layout }
    }

    /// A layer's pool, to look at.
    pub fn peek(&self, layer: usize) -> LayerPeek<'_> {
        let (k, v) = &self.layers[layer];
        LayerPeek { k, v, layout: self.layout }
    }

    /// Copies the rows of a block of a layer to another block.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU fails.
    pub fn copy_block(&mut self, layer: usize, from: u32, to: u32) -> Result<()> {
        let (k, v) = &mut self.layers[layer];
        let size = self.layout.stride_block;
        [k, v].into_iter().try_for_each(|buffer| buffer.copy_within(to as usize * size, from as usize * size, size))
    }

    /// Rows of a block.
    pub fn block_size(&self) -> usize {
        self.layout.block_size
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|(k, v)| k.bytes() + v.bytes()).sum()
    }
}
