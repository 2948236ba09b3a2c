//! SnapKV's score: the importance `attention`.

use super::batch::{Batch, Layouts, Place, try_map};
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::{DeviceSlice, SCRATCH_ALIGNMENT};
use super::rows::{RawView, Rows};
use crate::dtype::Dtype;
use crate::error::KernelError;

/// Shared memory of the kernels with tensor cores at head_dim 256, the most: 128 query rows, and what is known of them.
const MOST_SHARED: u32 = 128 * 512 + 16 * 4 * 256;

const fn kernel(name: &'static str) -> Kernel {
    Kernel { name, shared: MOST_SHARED }
}

/// Shared memory of the kernels for Hopper at head_dim 96 and 128: 256 query rows, and two times 64 keys of each of four
/// groups of warps.
const MOST_SHARED_WIDE: u32 = (256 + 8 * 64) * 256 + ALIGNMENT_WIDE;
const ALIGNMENT_WIDE: u32 = 1024;

const fn wide(name: &'static str) -> Kernel {
    Kernel { name, shared: MOST_SHARED_WIDE }
}

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/window_attention.fatbin")),
    kernels: &[
        kernel("window_sums_f16_64"),
        kernel("window_sums_f16_96"),
        kernel("window_sums_f16_128"),
        kernel("window_sums_f16_256"),
        kernel("window_sums_bf16_64"),
        kernel("window_sums_bf16_96"),
        kernel("window_sums_bf16_128"),
        kernel("window_sums_bf16_256"),
        kernel("window_columns_f16_64"),
        kernel("window_columns_f16_96"),
        kernel("window_columns_f16_128"),
        kernel("window_columns_f16_256"),
        kernel("window_columns_bf16_64"),
        kernel("window_columns_bf16_96"),
        kernel("window_columns_bf16_128"),
        kernel("window_columns_bf16_256"),
        wide("window_wide_sums_f16_64"),
        wide("window_wide_sums_f16_96"),
        wide("window_wide_sums_f16_128"),
        wide("window_wide_sums_bf16_64"),
        wide("window_wide_sums_bf16_96"),
        wide("window_wide_sums_bf16_128"),
        wide("window_wide_columns_f16_64"),
        wide("window_wide_columns_f16_96"),
        wide("window_wide_columns_f16_128"),
        wide("window_wide_columns_bf16_64"),
        wide("window_wide_columns_bf16_96"),
        wide("window_wide_columns_bf16_128"),
        Kernel { name: "window_sums_f32", shared: 0 },
        Kernel { name: "window_sums_f16", shared: 0 },
        Kernel { name: "window_sums_bf16", shared: 0 },
        Kernel { name: "window_columns_f32", shared: 0 },
        Kernel { name: "window_columns_f16", shared: 0 },
        Kernel { name: "window_columns_bf16", shared: 0 },
        Kernel { name: "window_merge", shared: 0 },
        Kernel { name: "window_stored", shared: 0 },
        Kernel { name: "window_pool", shared: 0 },
    ],
};

/// The queries of the last positions of a sequence, after RoPE.
#[derive(Debug, Clone, Copy)]
pub struct WindowQueries {
    /// Bytes; `head_dim` adjacent elements for each position and query head.
    pub data: DeviceSlice<u8>,
    /// Element type: the keys'.
    pub dtype: Dtype,
    /// Positions; position `w` is that of key `length - window + w`.
    pub window: usize,
    /// Query heads: a multiple of the view's KV heads. KV head `h` serves the `h`-th group of them.
    pub query_heads: usize,
    /// Distance between two positions, in elements.
    pub stride_position: usize,
    /// Distance between two query heads, in elements.
    pub stride_head: usize,
    /// Factor on the scalar products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// The natural logarithm of the softmax's sum for each of the window's queries, over scaled products with the keys that it
/// sees, as flash attention returns it.
#[derive(Debug, Clone, Copy)]
pub struct LogSumExp {
    /// One for each position and query head.
    pub data: DeviceSlice<f32>,
    /// Distance between two positions, in elements.
    pub stride_position: usize,
    /// Distance between two query heads, in elements.
    pub stride_head: usize,
}

/// One layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct WindowAttention {
    /// Keys, of all KV heads.
    pub keys: Rows,
    /// Queries of the window.
    pub queries: WindowQueries,
    /// Saves the first pass over the keys, where the engine has it.
    pub log_sum_exp: Option<LogSumExp>,
    /// Keys that count.
    pub length: usize,
    /// The scores, `[kv_heads, length]`.
    pub scores: DeviceSlice<f32>,
}

/// SnapKV's score of each key, as [`crate::window_attention::window_attention`] defines it, which holds the formula; with
/// `kernel` neighbours in the mean.
///
/// f16 and bf16 at head_dim 64, 96, 128 and 256, in 16-byte words, take tensor cores: products are exact, sums f32. Others
/// take f32 throughout, many times slower. Scores differ from the CPU's by the rounding of sums and exponentials, at most
/// 1e-4 of the head's largest score in the tests. From 129 to 256 query rows of a KV head, Hopper takes products of its own,
/// which may round sums otherwise. At most five launches for each 224 items of one dtype, head_dim and path.
///
/// Floor: reads K once, `heads * length * head_dim * dtype` bytes, where a KV head has at most 8 query rows (`window` times
/// its query heads) or the log-sum-exp is given; twice otherwise. Each reading multiplies `2 * rows * head_dim` operations
/// for a key and head; from some 100 rows on they take longer than the reading.
///
/// # Errors
/// `length` outside the view; window, kernel, query heads or slices that do not fit; [`CudaError::TooShort`] for less than
/// [`scratch_bytes`] of `scratch`; [`CudaError::Driver`].
pub fn window_attention(
    device: &Device,
    stream: Stream,
    items: &[WindowAttention],
    kernel: usize,
    scratch: DeviceSlice<u8>,
) -> Result<(), CudaError> {
    if kernel.is_multiple_of(2) || kernel > MOST_TOKENS {
        return Err(KernelError::PoolingKernel { kernel }.into());
    }
    let mut tasks = try_map(items, Task::new)?;
    let mut working = scratch.scratch(tasks.iter().map(Task::scratch_bytes).sum())?;
    for task in &mut tasks {
        task.path.wide = device.has_wide_products() && task.fills_wide_products();
        task.lend(working);
        working += task.scratch_bytes() as u64;
    }
    let _entered = device.enter()?;
    while let Some(first) = tasks.first() {
        let (path, head_dim) = (first.path, first.keys.head_dim());
        let (chosen, others): (Vec<_>, Vec<_>) =
            tasks.into_iter().partition(|task| (task.path, task.keys.head_dim()) == (path, head_dim));
        launch_all(device, stream, path, Head { head_dim: head_dim as u32, kernel: kernel as u32 }, &chosen)?;
        tasks = others;
    }
    Ok(())
}

/// Bytes of working memory for [`window_attention`], all items together. With `rows` the query rows of a KV head, each item
/// takes for each KV head 4 for a key, 12 for each row, 8 for each row and 1,024 keys; and where there are at most 8 rows
/// and no log-sum-exp, 4 for each row and key.
///
/// # Errors
/// As [`window_attention`].
pub fn scratch_bytes(items: &[WindowAttention]) -> Result<usize, CudaError> {
    items.iter().map(|item| Task::new(item).map(|task| task.scratch_bytes())).sum()
}

/// Keys of a tile, as in window_attention.cu.
const SPLIT: usize = 1024;

/// Most query rows of a KV head whose logits are kept for the second pass.
const MOST_KEPT_ROWS: usize = 8;

/// The kernels add two numbers of tokens in 31 bits.
const MOST_TOKENS: usize = 1 << 30;

const THREADS: u32 = 256;

/// Threads of a block of Hopper's kernels: four groups of four warps.
const THREADS_WIDE: u32 = 512;

/// Which kernels do the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Path {
    dtype: Dtype,
    tensor_cores: bool,
    /// Hopper's products.
    wide: bool,
}

impl Path {
    fn names(self, head_dim: u32) -> [&'static str; 2] {
        if self.wide {
            return match (self.dtype, head_dim) {
                (Dtype::F16, 64) => ["window_wide_sums_f16_64", "window_wide_columns_f16_64"],
                (Dtype::F16, 96) => ["window_wide_sums_f16_96", "window_wide_columns_f16_96"],
                (Dtype::F16, _) => ["window_wide_sums_f16_128", "window_wide_columns_f16_128"],
                (_, 64) => ["window_wide_sums_bf16_64", "window_wide_columns_bf16_64"],
                (_, 96) => ["window_wide_sums_bf16_96", "window_wide_columns_bf16_96"],
                _ => ["window_wide_sums_bf16_128", "window_wide_columns_bf16_128"],
            };
        }
        match (self.dtype, self.tensor_cores, head_dim) {
            (Dtype::F16, true, 64) => ["window_sums_f16_64", "window_columns_f16_64"],
            (Dtype::F16, true, 96) => ["window_sums_f16_96", "window_columns_f16_96"],
            (Dtype::F16, true, 128) => ["window_sums_f16_128", "window_columns_f16_128"],
            (Dtype::F16, true, _) => ["window_sums_f16_256", "window_columns_f16_256"],
            (Dtype::Bf16, true, 64) => ["window_sums_bf16_64", "window_columns_bf16_64"],
            (Dtype::Bf16, true, 96) => ["window_sums_bf16_96", "window_columns_bf16_96"],
            (Dtype::Bf16, true, 128) => ["window_sums_bf16_128", "window_columns_bf16_128"],
            (Dtype::Bf16, true, _) => ["window_sums_bf16_256", "window_columns_bf16_256"],
            (Dtype::F32, ..) => ["window_sums_f32", "window_columns_f32"],
            (Dtype::F16, false, _) => ["window_sums_f16", "window_columns_f16"],
            (Dtype::Bf16, false, _) => ["window_sums_bf16", "window_columns_bf16"],
        }
    }

    /// Dynamic shared memory of the two passes: the query rows that fit, in sixteens, and the numbers known of them.
    fn shared(self, head_dim: u32, most_rows: u32) -> [u32; 2] {
        if !self.tensor_cores {
            return [0; 2];
        }
        if self.wide {
            // Rows of 64 channels: 4 tiles of 128 keys, or as MOST_SHARED_WIDE says.
            let panels = head_dim.div_ceil(64);
            return [4 * 128, 256 + 8 * 64].map(|rows| rows * panels * 128 + ALIGNMENT_WIDE);
        }
        let at_a_time = if head_dim > 128 { 128 } else { 256 };
        let rows = most_rows.next_multiple_of(16).min(at_a_time);
        [rows * (head_dim * 2 + 2 * 4 * THREADS / 32), rows * (head_dim * 2 + 4)]
    }
}

fn launch_all(device: &Device, stream: Stream, path: Path, head: Head, tasks: &[Task]) -> Result<(), CudaError> {
    let most_rows = tasks.iter().map(|task| task.item.rows).max().unwrap_or(0);
    let [sums, columns] = path.names(head.head_dim);
    let [sums_shared, columns_shared] = path.shared(head.head_dim, most_rows);
    let any = |wanted: fn(&Task) -> bool| tasks.iter().any(wanted);
    let steps = [
        (sums, sums_shared, any(|task| task.item.log_sum_exp == 0)),
        ("window_merge", 0, true),
        (columns, columns_shared, any(|task| task.item.logits == 0)),
        ("window_stored", 0, any(|task| task.item.logits != 0)),
        ("window_pool", 0, true),
    ];
    Batch::<Head, Item, 224>::for_each(head, tasks, Task::encode, |batch| {
        for (name, shared, wanted) in steps {
            if wanted {
                let grid = if path.wide && [sums, columns].contains(&name) {
                    Grid { shared, ..Grid::new(batch.tiles().min(device.multiprocessors()), THREADS_WIDE) }
                } else {
                    Grid { shared, ..Grid::new(batch.tiles(), THREADS) }
                };
                // SAFETY: the kernels take this batch; keys, queries, scores and working memory are lent until the stream
                // has run them.
                unsafe { device.launch(stream, name, grid, batch) }?;
            }
        }
        Ok(())
    })
}

/// An item that was checked.
#[derive(Clone, Copy)]
struct Task {
    path: Path,
    keys: Rows,
    item: Item,
}

impl Task {
    fn new(attention: &WindowAttention) -> Result<Self, CudaError> {
        let &WindowAttention { keys, queries, log_sum_exp, length, scores } = attention;
        let WindowQueries { data, dtype, window, query_heads, stride_position, stride_head, scale } = queries;
        let kv_heads = keys.kv_heads();
        keys.check(0..kv_heads, 0..length)?;
        if dtype != keys.dtype() {
            return Err(CudaError::QueryDtype { queries: dtype, keys: keys.dtype() });
        }
        if window == 0 || window > length {
            return Err(KernelError::Window { window, length }.into());
        }
        if kv_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            return Err(KernelError::QueryHeads { query_heads, kv_heads }.into());
        }
        if scores.len() != kv_heads * length {
            let (found, expected) = (scores.len(), kv_heads * length);
            return Err(KernelError::SliceLength { what: "scores", found, expected }.into());
        }
        let rows = query_heads / kv_heads * window;
        for (what, found) in [("the number of keys", length), ("the query rows of a KV head", rows)] {
            if found > MOST_TOKENS {
                return Err(CudaError::TooLarge { what, found, most: MOST_TOKENS });
            }
        }
        // Of the last position's last query head, behind everything else.
        let last = |stride_position: usize, stride_head: usize| {
            (window - 1).saturating_mul(stride_position).saturating_add((query_heads - 1).saturating_mul(stride_head))
        };
        let element = keys.dtype().size();
        let needed = last(stride_position, stride_head).saturating_add(keys.head_dim()).saturating_mul(element);
        let address = data.at_least("the memory of the queries, in bytes,", needed)?;
        if !address.is_multiple_of(element as u64) {
            return Err(CudaError::Address { what: "the queries' memory", address, alignment: element });
        }
        let lse = match log_sum_exp {
            Some(lse) => {
                lse.data.at_least("the log-sum-exp", last(lse.stride_position, lse.stride_head).saturating_add(1))?
            }
            None => 0,
        };
        let in_words = [address, (stride_position * element) as u64, (stride_head * element) as u64]
            .iter()
            .all(|number| number.is_multiple_of(16));
        let tensor_cores =
            keys.dtype() != Dtype::F32 && matches!(keys.head_dim(), 64 | 96 | 128 | 256) && keys.in_words() && in_words;
        Ok(Self {
            path: Path { dtype: keys.dtype(), tensor_cores, wide: false },
            keys,
            item: Item {
                keys: keys.raw_view(),
                queries: address,
                query_stride_position: (stride_position * element) as i64,
                query_stride_head: (stride_head * element) as i64,
                log_sum_exp: lse,
                lse_stride_position: log_sum_exp.map_or(0, |lse| lse.stride_position as i64),
                lse_stride_head: log_sum_exp.map_or(0, |lse| lse.stride_head as i64),
                scores: scores.address(),
                stats: 0,
                row_lse: 0,
                means: 0,
                logits: 0,
                progress: 0,
                scale: scale * std::f32::consts::LOG2_E,
                first_tile: 0,
                length: length as u32,
                window: window as u32,
                rows: rows as u32,
                heads: kv_heads as u16,
                layout: 0,
            },
        })
    }

    /// Whether Hopper's kernels take the item, and are faster: where most of four groups of warps have 64 query rows each.
    fn fills_wide_products(&self) -> bool {
        self.path.tensor_cores && self.keys.head_dim() <= 128 && (129..=256).contains(&self.item.rows)
    }

    fn splits(&self) -> usize {
        (self.item.length as usize).div_ceil(SPLIT)
    }

    fn keeps_logits(&self) -> bool {
        self.item.rows as usize <= MOST_KEPT_ROWS && self.item.log_sum_exp == 0
    }

    /// Bytes of each part of the working memory: `stats`, `row_lse`, `means`, `logits`, `progress`.
    fn parts(&self) -> [usize; 5] {
        let (heads, rows) = (usize::from(self.item.heads), self.item.rows as usize);
        let length = self.item.length as usize;
        let splits = if self.item.log_sum_exp == 0 { self.splits() } else { 0 };
        let kept_rows = if self.keeps_logits() { rows } else { 0 };
        [heads * splits * rows * 8, heads * rows * 4, heads * length * 4, heads * kept_rows * length * 4, heads * 8]
            .map(|bytes| bytes.next_multiple_of(SCRATCH_ALIGNMENT as usize))
    }

    fn scratch_bytes(&self) -> usize {
        self.parts().iter().sum()
    }

    /// Takes the working memory from an address on.
    fn lend(&mut self, mut address: u64) {
        let [stats, row_lse, means, logits, progress] = self.parts().map(|bytes| {
            let part = address;
            address += bytes as u64;
            part
        });
        let logits = if self.keeps_logits() { logits } else { 0 };
        self.item = Item { stats, row_lse, means, logits, progress, ..self.item };
    }

    fn encode(&self, layouts: &mut Layouts, place: Place) -> Option<(Item, u32)> {
        let layout = u16::from(layouts.number(self.keys.raw())?);
        let tiles = u32::from(self.item.heads).saturating_mul(self.splits() as u32);
        Some((Item { layout, first_tile: place.first_tile, ..self.item }, tiles))
    }
}

/// `Head` of window_attention.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    head_dim: u32,
    kernel: u32,
}

/// `Item` of window_attention.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    keys: RawView,
    queries: u64,
    query_stride_position: i64,
    query_stride_head: i64,
    log_sum_exp: u64,
    lse_stride_position: i64,
    lse_stride_head: i64,
    scores: u64,
    stats: u64,
    row_lse: u64,
    means: u64,
    logits: u64,
    progress: u64,
    scale: f32,
    first_tile: u32,
    length: u32,
    window: u32,
    rows: u32,
    heads: u16,
    layout: u16,
}

const _: () = assert!(size_of::<Item>() == 136);
