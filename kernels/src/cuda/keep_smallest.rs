//! What top-k and sampling share: a selection by one cluster of blocks for each head.

use super::batch::{Batch, Place, try_map};
use super::device::{Device, Grid, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::MOST_HEADS;
use super::verdict::{Verdict, check_items};
use crate::check::check_len;
use crate::error::KernelError;
use crate::sample::Draw;
use crate::top_k::Protected;

/// The most keys that are held in shared memory, in bytes.
pub(crate) const MOST_SHARED: u32 = 128 << 10;

/// Threads of a block, as in keep_smallest.cuh.
const THREADS: u32 = 512;

/// Tokens that a block takes at least: longer heads are shared by up to eight blocks.
const TOKENS_OF_BLOCK: usize = 8192;

/// Values of the heads of one layer of one sequence, and what is kept of them.
pub(crate) struct Task {
    /// `[heads, length]`
    pub(crate) values: DeviceSlice<f32>,
    /// `[heads, keep]`
    pub(crate) out: DeviceSlice<u32>,
    pub(crate) heads: usize,
    pub(crate) protected: Protected,
    pub(crate) draw: Draw,
}

impl Task {
    /// Length and kept tokens of a head.
    fn check(&self) -> Result<(usize, usize), CudaError> {
        if self.heads >= MOST_HEADS {
            return Err(CudaError::TooLarge { what: "kv_heads", found: self.heads, most: MOST_HEADS - 1 });
        }
        let heads = self.heads.max(1);
        let (length, keep) = (self.values.len() / heads, self.out.len() / heads);
        check_len("scores", self.values.len(), length * self.heads)?;
        check_len("kept tokens", self.out.len(), keep * self.heads)?;
        if length > u32::MAX as usize {
            return Err(CudaError::TooLarge { what: "the length", found: length, most: u32::MAX as usize });
        }
        let protected = self.protected.count(length);
        if keep < protected || keep > length {
            return Err(KernelError::Keep { keep, protected, length }.into());
        }
        Ok((length, keep))
    }
}

/// Enqueues `kernel`, whose keys have `key_bytes`.
pub(crate) fn launch(
    device: &Device,
    stream: Stream,
    kernel: &'static str,
    key_bytes: u32,
    tasks: &[Task],
    verdict: &Verdict,
) -> Result<(), CudaError> {
    check_items(tasks.len())?;
    let sizes = try_map(tasks, Task::check)?;
    let longest = sizes.iter().map(|&(length, _)| length).max().unwrap_or(0);
    // The kept tokens are the same however many blocks share a head.
    let wanted = longest.div_ceil(TOKENS_OF_BLOCK).next_power_of_two().min(8) as u32;
    let cluster = if device.has_clusters() { wanted } else { 1 };
    // The histograms take 16 KiB and a little more.
    let room = MOST_SHARED.min(device.shared_per_block().saturating_sub(20 << 10));
    let cached = (longest.div_ceil(cluster as usize) as u32).min(room / key_bytes);

    let encode = |task: &Task, _: &mut _, place: Place| {
        let (length, keep) = sizes[place.item as usize];
        let sinks = task.protected.sinks.min(length);
        let item = Item {
            values: task.values.address(),
            out: task.out.address(),
            stream: task.draw.round_stream(),
            length: length as u32,
            keep: keep as u32,
            sinks: sinks as u32,
            open: (length - task.protected.count(length)) as u32,
            first_tile: place.first_tile,
            item: place.item,
            layer: task.draw.layer,
            first_head: task.draw.head,
        };
        Some((item, if keep == 0 { 0 } else { task.heads as u32 }))
    };
    let _entered = device.enter()?;
    let head = Head { verdict: verdict.address(), cluster, cached };
    Batch::<Head, Item, 568>::for_each(head, tasks, encode, |batch| {
        let grid = Grid { blocks: batch.tiles() * cluster, threads: THREADS, shared: cached * key_bytes, cluster };
        // SAFETY: the kernel takes this batch; values, kept tokens and verdict are lent until the stream has run it.
        unsafe { device.launch(stream, kernel, grid, batch) }
    })
}

/// `KeepHead` of keep_smallest.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    verdict: u64,
    cluster: u32,
    cached: u32,
}

/// `KeepItem` of keep_smallest.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    values: u64,
    out: u64,
    stream: u64,
    length: u32,
    keep: u32,
    sinks: u32,
    open: u32,
    first_tile: u32,
    item: u32,
    layer: u32,
    first_head: u32,
}
