//! The kernels of `cuda/`, their parameters, and how each is launched.

use super::driver::{Driver, Grid};
use super::weights::Matrix;
use crate::cache::KvDtype;
use crate::error::Result;

/// Kernels that are compiled together.
pub(super) struct Family {
    /// The fatbin.
    pub(super) image: &'static Image<[u8]>,
    /// Name of each kernel, and the most dynamic shared memory that it takes, in bytes.
    pub(super) kernels: &'static [(&'static str, usize)],
}

/// A fatbin, aligned as the driver reads it.
#[repr(align(16))]
pub(super) struct Image<T: ?Sized>(pub(super) T);

/// Pairs of a query row and a head of a block of attention, keys in shared memory at a time, and keys of a split.
const PAIRS: usize = 32;
const KEYS: usize = 32;
pub(super) const SPLIT: usize = 128;

/// Shared memory of a block of attention.
const fn attention_shared(head_dim: usize) -> usize {
    size_of::<f32>() * ((PAIRS + KEYS) * (head_dim + 4) + PAIRS * (SPLIT + 4) + 2 * PAIRS)
}

pub(super) const FAMILIES: &[Family] = &[
    Family {
        image: &Image(*include_bytes!("../../../prebuilt/rows.fatbin")),
        kernels: &[
            ("embed", 0),
            ("rms_norm", 0),
            ("rope_angles", 0),
            ("rope_f32", 0),
            ("rope_f16", 0),
            ("rope_bf16", 0),
            ("swiglu", 0),
        ],
    },
    Family {
        image: &Image(*include_bytes!("../../../prebuilt/matmul.fatbin")),
        kernels: &[("matmul_few_1", 0), ("matmul_few_2", 0), ("matmul_few_4", 0), ("matmul_many", 0)],
    },
    Family {
        image: &Image(*include_bytes!("../../../prebuilt/cache.fatbin")),
        kernels: &[("cache_write_16", 0), ("cache_write_32", 0)],
    },
    Family {
        image: &Image(*include_bytes!("../../../prebuilt/attention.fatbin")),
        kernels: &[
            ("attention_64_f32", attention_shared(64)),
            ("attention_64_f16", attention_shared(64)),
            ("attention_64_bf16", attention_shared(64)),
            ("attention_128_f32", attention_shared(128)),
            ("attention_128_f16", attention_shared(128)),
            ("attention_128_bf16", attention_shared(128)),
            ("attention_256_f32", attention_shared(256)),
            ("attention_256_f16", attention_shared(256)),
            ("attention_256_bf16", attention_shared(256)),
            ("combine", 0),
        ],
    },
];

/// A kernel's parameters. Addresses are of device memory.
pub(super) trait Parameters {
    /// The kernel and the sizes of its launch; `None`: there is no work.
    fn kernel(&self) -> Option<(&'static str, Grid)>;
}

/// Enqueues a kernel.
///
/// # Safety
/// All memory that the parameters name is what the kernel expects, until the stream has run it.
pub(super) unsafe fn enqueue<P: Parameters>(driver: &Driver, parameters: &P) -> Result<()> {
    match parameters.kernel() {
        // SAFETY: the parameters are those of the kernel that they name; the rest is passed on from the caller.
        Some((name, grid)) => unsafe { driver.launch(name, grid, parameters) },
        None => Ok(()),
    }
}

/// A block of `threads` for each row.
fn rows(rows: u32, threads: usize) -> Option<Grid> {
    (rows > 0).then_some(Grid { blocks: [rows as usize, 1, 1], threads, shared: 0 })
}

/// `Embed` of rows.cu.
#[repr(C)]
pub(super) struct Embed {
    pub(super) panels: u64,
    pub(super) tokens: u64,
    pub(super) out: u64,
    pub(super) rows: u32,
    pub(super) hidden: u32,
}

impl Parameters for Embed {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        Some(("embed", rows(self.rows, 256)?))
    }
}

/// `Norm` of rows.cu.
#[repr(C)]
pub(super) struct Norm {
    pub(super) x: u64,
    pub(super) chosen: u64,
    pub(super) weight: u64,
    pub(super) out: u64,
    pub(super) rows: u32,
    pub(super) hidden: u32,
    pub(super) epsilon: f32,
}

impl Parameters for Norm {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        Some(("rms_norm", rows(self.rows, 256)?))
    }
}

/// `Angles` of rows.cu.
#[repr(C)]
pub(super) struct Angles {
    pub(super) positions: u64,
    pub(super) frequencies: u64,
    pub(super) out: u64,
    pub(super) rows: u32,
    pub(super) pairs: u32,
}

impl Parameters for Angles {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        let blocks = [(self.rows as usize * self.pairs as usize).div_ceil(256), 1, 1];
        (blocks[0] > 0).then_some(("rope_angles", Grid { blocks, threads: 256, shared: 0 }))
    }
}

/// `Rope` of rows.cu, and the dtype of what it writes.
#[repr(C)]
pub(super) struct Rope {
    pub(super) x: u64,
    pub(super) angles: u64,
    pub(super) out: u64,
    pub(super) rows: u32,
    pub(super) heads: u32,
    pub(super) turned: u32,
    pub(super) pairs: u32,
    pub(super) dtype: KvDtype,
}

impl Parameters for Rope {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        let name = match self.dtype {
            KvDtype::F32 => "rope_f32",
            KvDtype::F16 => "rope_f16",
            KvDtype::Bf16 => "rope_bf16",
        };
        Some((name, rows(self.rows, 256)?))
    }
}

/// `Swiglu` of rows.cu.
#[repr(C)]
pub(super) struct Swiglu {
    pub(super) gate_up: u64,
    pub(super) out: u64,
    pub(super) rows: u32,
    pub(super) width: u32,
}

impl Parameters for Swiglu {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        Some(("swiglu", rows(self.rows, 256)?))
    }
}

/// `Product` of matmul.cu.
#[repr(C)]
pub(super) struct Product {
    x: u64,
    panels: u64,
    out: u64,
    rows: u32,
    inputs: u32,
    outputs: u32,
    adds: u32,
}

/// Up to so many rows are multiplied by the kernels for few.
const FEW: usize = 32;
/// Inputs of a segment, and the most warps of a block, of the kernels for few rows.
const SEGMENT: usize = 64;
const MOST_WARPS: usize = 24;
/// Rows and outputs of a block of the kernel for many.
const TILE: usize = 64;

impl Product {
    /// `rows` rows of `x` times the transposed matrix, into `out` or added to it.
    pub(super) fn new(x: u64, matrix: &Matrix, out: u64, rows: u32, adds: bool) -> Self {
        let (inputs, outputs) = (matrix.inputs as u32, matrix.outputs as u32);
        Self { x, panels: matrix.panels.address(), out, rows, inputs, outputs, adds: adds.into() }
    }
}

impl Parameters for Product {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        let (rows, outputs) = (self.rows as usize, self.outputs as usize);
        if rows == 0 {
            return None;
        }
        if rows > FEW {
            let blocks = [outputs.div_ceil(TILE), rows.div_ceil(TILE), 1];
            return Some(("matmul_many", Grid { blocks, threads: 256, shared: 0 }));
        }
        let (name, of_block) = match rows {
            1 => ("matmul_few_1", 1),
            2 => ("matmul_few_2", 2),
            _ => ("matmul_few_4", 4),
        };
        let warps = (self.inputs as usize).div_ceil(SEGMENT).min(MOST_WARPS);
        Some((
            name,
            Grid { blocks: [outputs.div_ceil(32), rows.div_ceil(of_block), 1], threads: 32 * warps, shared: 0 },
        ))
    }
}

/// `Item` of engine.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Item {
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) table: u64,
    pub(super) stride_block: u64,
    pub(super) stride_head: u64,
    pub(super) block_size: u32,
    pub(super) cached: u32,
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) first_kv_head: u32,
    pub(super) kv_heads: u32,
    pub(super) first_query_head: u32,
    pub(super) query_heads: u32,
}

/// `Write` of cache.cu, and what the launch needs to know.
#[repr(C)]
pub(super) struct Write {
    pub(super) qkv: u64,
    pub(super) items: u64,
    pub(super) sequence_of_row: u64,
    pub(super) rows: u32,
    pub(super) sequences: u32,
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) ranks: u32,
    pub(super) dtype: KvDtype,
}

impl Parameters for Write {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        let name = if self.dtype == KvDtype::F32 { "cache_write_32" } else { "cache_write_16" };
        let blocks = [self.rows as usize, self.ranks as usize, 1];
        (self.rows > 0).then_some((name, Grid { blocks, threads: 128, shared: 0 }))
    }
}

/// `Attention` of attention.cu, and what the launch needs to know.
#[repr(C)]
pub(super) struct Attention {
    pub(super) qkv: u64,
    pub(super) items: u64,
    pub(super) out: u64,
    pub(super) partial: u64,
    pub(super) partial_sums: u64,
    pub(super) heads: u32,
    pub(super) columns: u32,
    pub(super) head_dim: u32,
    pub(super) group: u32,
    pub(super) kv_heads: u32,
    pub(super) splits: u32,
    pub(super) scale: f32,
    /// Rows of the sequence with the most, and items.
    pub(super) most_rows: u32,
    pub(super) item_count: u32,
    pub(super) dtype: KvDtype,
}

impl Parameters for Attention {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        let (name, channels) = match (self.head_dim, self.dtype) {
            (..=64, KvDtype::F32) => ("attention_64_f32", 64),
            (..=64, KvDtype::F16) => ("attention_64_f16", 64),
            (..=64, KvDtype::Bf16) => ("attention_64_bf16", 64),
            (..=128, KvDtype::F32) => ("attention_128_f32", 128),
            (..=128, KvDtype::F16) => ("attention_128_f16", 128),
            (..=128, KvDtype::Bf16) => ("attention_128_bf16", 128),
            (_, KvDtype::F32) => ("attention_256_f32", 256),
            (_, KvDtype::F16) => ("attention_256_f16", 256),
            (_, KvDtype::Bf16) => ("attention_256_bf16", 256),
        };
        let tiles = (self.most_rows as usize * self.group as usize).div_ceil(PAIRS);
        let splits = if self.partial == 0 { 1 } else { self.splits as usize };
        let blocks = [splits, tiles * self.kv_heads as usize, self.item_count as usize];
        let shared = attention_shared(channels);
        (self.most_rows > 0).then_some((name, Grid { blocks, threads: 256, shared }))
    }
}

/// `Combine` of attention.cu.
#[repr(C)]
pub(super) struct Combine {
    pub(super) partial: u64,
    pub(super) partial_sums: u64,
    pub(super) items: u64,
    pub(super) sequence_of_row: u64,
    pub(super) out: u64,
    pub(super) rows: u32,
    pub(super) heads: u32,
    pub(super) head_dim: u32,
    pub(super) splits: u32,
}

impl Parameters for Combine {
    fn kernel(&self) -> Option<(&'static str, Grid)> {
        let blocks = [self.heads as usize, self.rows as usize, 1];
        let threads = (self.head_dim as usize).next_multiple_of(32);
        (self.rows > 0 && self.partial != 0).then_some(("combine", Grid { blocks, threads, shared: 0 }))
    }
}
