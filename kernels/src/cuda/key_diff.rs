//! KeyDiff: the importance `key_diff`.

use super::batch::{Batch, Layouts, Place};
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::{DeviceSlice, SCRATCH_ALIGNMENT};
use super::rows::Rows;
use super::tile::{Names, RawTiles, TILE_ROWS, Tiling, VARIANTS, check_scores};

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/key_diff.fatbin")),
    kernels: &[
        Kernel { name: "key_diff_f32", shared: 0 },
        Kernel { name: "key_diff_f16", shared: 0 },
        Kernel { name: "key_diff_bf16", shared: 0 },
        Kernel { name: "key_diff_any_f32", shared: 0 },
        Kernel { name: "key_diff_any_f16", shared: 0 },
        Kernel { name: "key_diff_any_bf16", shared: 0 },
    ],
};

const NAMES: Names = Names {
    in_words: ["key_diff_f32", "key_diff_f16", "key_diff_bf16"],
    any: ["key_diff_any_f32", "key_diff_any_f16", "key_diff_any_bf16"],
};

/// The keys of one layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct KeyDiff {
    /// Keys read, in all KV heads.
    pub keys: Rows,
    /// Keys of each head, from the first on.
    pub length: usize,
    /// The scores, `[kv_heads, length]`.
    pub out: DeviceSlice<f32>,
}

/// [`crate::key_diff::key_diff`]'s scores, of all items in a launch for each 258 of one dtype, and one more in all (it clears
/// a part of the working memory).
///
/// Floor: reads K twice, `2 * heads * length * head_dim * dtype` bytes. Sums are in f32 in tiles of 256 tokens (512
/// in long sequences), and over tiles in f64, in one order.
///
/// # Errors
/// `length` outside the view; `out` of another length; a head_dim above 1,024, where rows are not whole 16-byte words at
/// multiples of 16 bytes, or more than 351 KV heads whose rows lie apart; [`CudaError::TooShort`] for less than
/// [`scratch_bytes`] of `scratch`; [`CudaError::Driver`].
pub fn key_diff(device: &Device, stream: Stream, items: &[KeyDiff], scratch: DeviceSlice<u8>) -> Result<(), CudaError> {
    let (tasks, needed) = plan(items)?;
    let scratch = scratch.scratch(needed.bytes())?;
    for task in &tasks {
        check_scores(&task.keys, task.length, task.out.len())?;
    }
    let _entered = device.enter()?;
    // SAFETY: the working memory is lent.
    unsafe { device.fill(stream, scratch, 0, needed.counters) }?;
    let floats = scratch + needed.counter_bytes() as u64;
    let mut launches = 0;
    for variant in VARIANTS {
        let chosen: Vec<_> = tasks.iter().filter(|task| (task.keys.dtype(), task.tiling.in_words) == variant).collect();
        for part in split_by_chains(&chosen) {
            let encode = |task: &&Task, layouts: &mut Layouts, place: Place| {
                let item = Item {
                    tiles: task.tiling.encode(&task.keys, layouts)?,
                    out: task.out.address(),
                    sums: floats + 4 * task.sums as u64,
                    directions: floats + 4 * task.directions as u64,
                    progress: scratch + 4 * task.progress as u64,
                    first_tile: place.first_tile,
                    chains: task.tiling.chains as u16,
                    heads_of_chain: task.tiling.heads as u16,
                    tiles_of_chain: task.tiling.tiles_of_chain(),
                    unused: 0,
                };
                Some((item, task.tiling.tiles))
            };
            let empty = Head { ticket: 0, segments: 0, unused: 0, order: [Segment::default(); SEGMENTS] };
            Batch::<Head, Item, ITEMS>::for_each(empty, part, encode, |batch| {
                batch.head.ticket = scratch + 4 * launches;
                launches += 1;
                let tickets = order(batch);
                // SAFETY: the kernel takes this batch; keys, scores and working memory are lent until it has run.
                unsafe { device.launch(stream, NAMES.of(variant), Grid::new(tickets, TILE_ROWS), batch) }
            })?;
        }
    }
    Ok(())
}

/// Bytes of working memory for [`key_diff`]: about 4 * head_dim for each 256 rows (512 in long sequences).
///
/// # Errors
/// As [`key_diff`].
pub fn scratch_bytes(items: &[KeyDiff]) -> Result<usize, CudaError> {
    Ok(plan(items)?.1.bytes())
}

/// Items, and segments of tickets, of one launch.
const ITEMS: usize = 258;
const SEGMENTS: usize = 1408;

/// Sequences with more tokens have tiles of twice the rows, to save working memory.
const LONG: usize = 32_768;

/// Segments of a chain at most.
const SEGMENTS_OF_CHAIN: usize = 4;

/// Tiles of the first pass between the end of a chain and the second pass over it: twice as many as run at once, so that the
/// second pass does not wait.
const LEAD: u32 = 1024;

/// An item, and where its working memory begins: floats, or counters of 32 bits.
struct Task {
    keys: Rows,
    length: usize,
    out: DeviceSlice<f32>,
    tiling: Tiling,
    sums: usize,
    directions: usize,
    progress: usize,
}

/// Working memory: counters, then floats.
#[derive(Default)]
struct Needed {
    counters: usize,
    floats: usize,
}

impl Needed {
    fn counter_bytes(&self) -> usize {
        (self.counters * 4).next_multiple_of(SCRATCH_ALIGNMENT as usize)
    }

    fn bytes(&self) -> usize {
        self.counter_bytes() + self.floats * 4
    }
}

fn plan(items: &[KeyDiff]) -> Result<(Vec<Task>, Needed), CudaError> {
    // The first counters are tickets, one for each launch, which has one item at least.
    let mut needed = Needed { counters: items.len(), floats: 0 };
    let mut tasks = Vec::with_capacity(items.len());
    for &KeyDiff { keys, length, out } in items {
        // 256 or 512 tokens a tile, of one or two heads.
        let heads = if keys.token_major() { keys.kv_heads().min(2) } else { 1 };
        let steps = heads as u32 * if length > LONG { 2 } else { 1 };
        let tiling = Tiling::new(&keys, 0..length, 2, steps)?;
        let most = SEGMENTS / SEGMENTS_OF_CHAIN - 1;
        if tiling.chains as usize > most {
            return Err(CudaError::TooLarge { what: "kv_heads", found: keys.kv_heads(), most });
        }
        let row = tiling.heads as usize * keys.head_dim();
        let sums = needed.floats;
        let directions = sums + tiling.tiles as usize * row;
        needed.floats = directions + tiling.chains as usize * row;
        tasks.push(Task { keys, length, out, tiling, sums, directions, progress: needed.counters });
        needed.counters += 2 * tiling.chains as usize;
    }
    Ok((tasks, needed))
}

/// Parts whose chains have segments enough.
fn split_by_chains<'a, 'b>(mut tasks: &'a [&'b Task]) -> Vec<&'a [&'b Task]> {
    let mut parts = Vec::new();
    while !tasks.is_empty() {
        let mut chains = 0;
        let fitting = tasks.iter().take_while(|task| {
            chains += task.tiling.chains as usize;
            chains * SEGMENTS_OF_CHAIN < SEGMENTS
        });
        let (part, rest) = tasks.split_at(fitting.count().max(1));
        parts.push(part);
        tasks = rest;
    }
    parts
}

/// Writes the order of a launch's tickets, and says how many there are.
fn order(batch: &mut Batch<Head, Item, ITEMS>) -> u32 {
    let all = batch.tiles();
    let (mut segments, mut tickets, mut summed) = ([Segment::default(); SEGMENTS], 0, 0);
    let mut count = 0;
    let mut push = |pass, tile, len: u32| {
        if len > 0 {
            segments[count] = Segment { first_ticket: tickets, tile_and_pass: tile | pass << 30 };
            count += 1;
            tickets += len;
        }
    };
    let mut sum_up_to = |push: &mut dyn FnMut(u32, u32, u32), end: u32| {
        let end = end.min(all);
        if end > summed {
            push(SUM, summed, end - summed);
            summed = end;
        }
    };
    for item in batch.items() {
        for chain in 0..u32::from(item.chains) {
            let first = item.first_tile + chain * item.tiles_of_chain;
            let end = first + item.tiles_of_chain;
            sum_up_to(&mut push, end + LEAD / 2);
            push(DIRECTION, first, u32::from(item.heads_of_chain));
            sum_up_to(&mut push, end + LEAD);
            push(SCORE, end - 1, item.tiles_of_chain);
        }
    }
    batch.head.order = segments;
    batch.head.segments = count as u32;
    tickets
}

const SUM: u32 = 0;
const DIRECTION: u32 = 1;
const SCORE: u32 = 2;

/// `Segment` of key_diff.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Segment {
    first_ticket: u32,
    tile_and_pass: u32,
}

/// `Head` of key_diff.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    ticket: u64,
    segments: u32,
    unused: u32,
    order: [Segment; SEGMENTS],
}

/// `Item` of key_diff.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    tiles: RawTiles,
    out: u64,
    sums: u64,
    directions: u64,
    progress: u64,
    first_tile: u32,
    tiles_of_chain: u32,
    chains: u16,
    heads_of_chain: u16,
    unused: u32,
}
