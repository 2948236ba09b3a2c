//! KV caches: keys after RoPE, and values, of one rank's KV heads.
//!
//! The bytes belong to the ranks ([`RankCache`], contiguous or paged); who owns which block is kept once for all ranks
//! ([`BlockPool`]), since every rank keeps as many rows of a sequence as every other. What a sequence holds in each
//! layer is its [`SequenceCache`].
//!
//! One formula finds a row in both kinds (a contiguous cache is one large block):
//!
//! ```text
//! row(token t, head h) = base + block(t / block_size) * stride_block + (t % block_size) * stride_token + h * stride_head
//! ```

mod blocks;
mod buffer;
mod contiguous;
mod paged;
mod prefix;
mod sequence;

pub use blocks::BlockPool;
pub use buffer::{KvBuffer, KvDtype};
pub use contiguous::ContiguousCache;
pub use paged::PagedCache;
pub use sequence::{LayerCache, SequenceCache, SequenceId};

use crate::device::{Backend, Device};
use crate::error::Result;

/// Which kind of cache, and how large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheKind {
    /// One buffer for each sequence and layer, which grows by doubling.
    Contiguous,
    /// One pool for each rank and layer, handed out in blocks.
    Paged {
        /// Rows of a block.
        block_size: usize,
        /// Blocks of each layer's pool.
        blocks: usize,
    },
}

/// How KV is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheConfig {
    /// Contiguous or paged.
    pub kind: CacheKind,
    /// Type of the stored K and V; attention computes in f32.
    pub dtype: KvDtype,
    /// Ranks over which the KV heads are split; more ranks than KV heads replicate heads.
    pub ranks: usize,
    /// Whether requests with the same beginning share full blocks (paged only).
    pub prefix_sharing: bool,
    /// Where the cache and the model's weights lie and steps run.
    pub device: Device,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { kind: CacheKind::Contiguous, dtype: KvDtype::F32, ranks: 1, prefix_sharing: true, device: Device::Cpu }
    }
}

/// Where rows lie in a layer's buffer, in elements. K and V have the same layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowLayout {
    /// Rows of a block; for a contiguous cache its capacity.
    pub block_size: usize,
    /// From one block to the next.
    pub stride_block: usize,
    /// From one row to the next in a block.
    pub stride_token: usize,
    /// From one KV head to the next.
    pub stride_head: usize,
    /// Channels of a row.
    pub head_dim: usize,
}

impl RowLayout {
    /// Blocks laid out as `[blocks, kv_heads, block_size, head_dim]`.
    pub fn blocked(kv_heads: usize, block_size: usize, head_dim: usize) -> Self {
        Self {
            block_size,
            stride_block: kv_heads * block_size * head_dim,
            stride_token: head_dim,
            stride_head: block_size * head_dim,
            head_dim,
        }
    }

    /// Where the row of a token and head begins. An empty table means block `i` is at place `i`.
    #[inline]
    pub fn row(&self, table: &[u32], token: usize, head: usize) -> usize {
        let index = token / self.block_size;
        let block = if table.is_empty() { index } else { table[index] as usize };
        block * self.stride_block + token % self.block_size * self.stride_token + head * self.stride_head
    }
}

/// K and V of one layer of one sequence on one rank, to read and write rows.
#[derive(Debug)]
pub struct LayerView<'a> {
    /// Keys.
    pub k: &'a mut KvBuffer,
    /// Values.
    pub v: &'a mut KvBuffer,
    /// Where rows lie.
    pub layout: RowLayout,
}

/// K and V of one layer of one sequence on one rank, to look at.
#[derive(Debug)]
pub struct LayerPeek<'a> {
    /// Keys.
    pub k: &'a KvBuffer,
    /// Values.
    pub v: &'a KvBuffer,
    /// Where rows lie.
    pub layout: RowLayout,
}

impl LayerView<'_> {
    /// Writes one row of K and V, `[head_dim]` each.
    pub fn write(&mut self, table: &[u32], token: usize, head: usize, k: &[f32], v: &[f32]) {
        let at = self.layout.row(table, token, head);
        self.k.write(at, k);
        self.v.write(at, v);
    }
}

/// Copies `out.len() / head_dim` rows from token `start` on into `out`, as f32.
pub fn read_rows(buffer: &KvBuffer, layout: &RowLayout, table: &[u32], head: usize, start: usize, out: &mut [f32]) {
    let (mut token, mut out) = (start, out);
    while !out.is_empty() {
        // Rows of one block lie side by side.
        let rows = (layout.block_size - token % layout.block_size).min(out.len() / layout.head_dim);
        let (now, later) = out.split_at_mut(rows * layout.head_dim);
        buffer.read(layout.row(table, token, head), now);
        token += rows;
        out = later;
    }
}

/// One rank's KV bytes.
#[derive(Debug)]
pub enum RankCache {
    /// A buffer for each sequence and layer.
    Contiguous(ContiguousCache),
    /// A pool for each layer.
    Paged(PagedCache),
}

impl RankCache {
    /// Makes the cache of a rank that holds `kv_heads` heads.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU has no memory left.
    pub fn new(
        backend: &Backend,
        config: &CacheConfig,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let empty = KvBuffer::on(backend, config.dtype, 0)?;
        Ok(match config.kind {
            CacheKind::Contiguous => Self::Contiguous(ContiguousCache::new(empty, layers, kv_heads, head_dim)?),
            CacheKind::Paged { block_size, blocks } => {
                let layout = RowLayout::blocked(kv_heads, block_size, head_dim);
                Self::Paged(PagedCache::new(&empty, layers, blocks, layout)?)
            }
        })
    }

    /// The layer's buffers for a sequence, with room for `rows` rows of it of which `kept` are filled.
    ///
    /// A contiguous buffer may move here. In a paged cache the room is in the sequence's block table.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU has no memory left.
    pub fn layer(&mut self, sequence: SequenceId, layer: usize, kept: usize, rows: usize) -> Result<LayerView<'_>> {
        match self {
            Self::Contiguous(cache) => cache.layer(sequence, layer, kept, rows),
            Self::Paged(cache) => Ok(cache.layer(layer)),
        }
    }

    /// The layer's buffers for a sequence, to look at.
    pub fn peek(&self, sequence: SequenceId, layer: usize) -> LayerPeek<'_> {
        match self {
            Self::Contiguous(cache) => cache.peek(sequence, layer),
            Self::Paged(cache) => cache.peek(layer),
        }
    }

    /// Rows of a block; `None` for a contiguous cache.
    pub fn block_size(&self) -> Option<usize> {
        match self {
            Self::Contiguous(_) => None,
            Self::Paged(cache) => Some(cache.block_size()),
        }
    }

    /// Whether rows lie in blocks.
    pub fn is_paged(&self) -> bool {
        self.block_size().is_some()
    }

    /// Drops what a sequence holds outside the pool.
    pub fn free(&mut self, sequence: SequenceId) {
        if let Self::Contiguous(cache) = self {
            cache.free(sequence);
        }
    }

    /// Bytes allocated for K and V now.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Contiguous(cache) => cache.bytes(),
            Self::Paged(cache) => cache.bytes(),
        }
    }
}
