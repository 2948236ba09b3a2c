//! Moving the rows that a plan keeps.

use std::ops::Range;

use super::batch::{Batch, Layouts, Place, try_map};
use super::check::Indices;
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::{RawView, Rows};
use super::verdict::Verdict;
use crate::dtype::Dtype;
use crate::error::KernelError;

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/select.fatbin")),
    kernels: &[
        Kernel { name: "gather_u128", shared: 0 },
        Kernel { name: "gather_u32", shared: 0 },
        Kernel { name: "gather_u16", shared: 0 },
        Kernel { name: "compact_u128", shared: 0 },
        Kernel { name: "compact_u32", shared: 0 },
        Kernel { name: "compact_u16", shared: 0 },
    ],
};

/// What one K or V of one layer of one sequence keeps, in all its KV heads: the selected rows, and behind them, unchanged,
/// the rows of `tail`.
#[derive(Debug, Clone)]
pub struct Gather {
    /// Rows read.
    pub source: Rows,
    /// Rows written; equal to `source` in place.
    pub destination: Rows,
    /// Rows selected.
    pub indices: Indices,
    /// Adjacent rows moved behind them: those appended since the selection was planned. May be empty.
    pub tail: Range<usize>,
    /// Where the first row goes.
    pub destination_start: usize,
}

/// Moves selected rows: row `indices[h][j]` to row `destination_start + j`, then the rows of the tail. All items together
/// take one launch for each 443 of them, in place one more in all (it clears the working memory).
///
/// In place, rows move towards the front only: `indices[h][j] >= destination_start + j`, which
/// [`check_indices`](super::check::check_indices) finds out (`least`), and the tail begins at or behind its destination.
/// Otherwise, views that are written must overlap no other view. Where `verdict` holds a fault, nothing is read or written:
/// indices that were never checked may fault the device.
///
/// In place it is race-free without a launch for each step: tiles of rows are taken in order by ticket, read into
/// registers, and written when those tiles before them have been read whose rows they overwrite. With half of the rows kept
/// that are the tiles up to half as far from the front, so hardly any tile waits; and it waits only for tiles that run.
///
/// Floor: reads and writes each kept row once, `2 * heads * count * head_dim * dtype` bytes. The fast path is for rows of
/// whole 16-byte words at multiples of 16 bytes.
///
/// # Errors
/// Dtypes, head dimensions and heads that differ; a tail outside the source; destinations outside the view; a tail that
/// would move up; lists that end behind their buffer; [`CudaError::TooShort`] for less than [`scratch_bytes`] of
/// `scratch`; [`CudaError::Driver`].
pub fn gather(
    device: &Device,
    stream: Stream,
    gathers: &[Gather],
    verdict: Option<&Verdict>,
    scratch: DeviceSlice<u8>,
) -> Result<(), CudaError> {
    let tasks = try_map(gathers, Task::new)?;
    let words = state_words(&tasks);
    let mut state = scratch.scratch(words * 4)?;
    let verdict = Verdict::address_of(verdict);
    let _entered = device.enter()?;
    // SAFETY: the working memory is lent.
    unsafe { device.fill(stream, state, 0, words) }?;
    for word in [Word::U128, Word::U32, Word::U16] {
        for in_place in [false, true] {
            let chosen: Vec<&Task> =
                tasks.iter().filter(|task| (task.word, task.in_place) == (word, in_place)).collect();
            let encode = |task: &&Task, layouts: &mut Layouts, place| task.encode(layouts, place);
            Batch::<Head, Item, 443>::for_each(Head { state, verdict }, &chosen, encode, |batch| {
                if in_place {
                    batch.head.state = state;
                    state += 4 * (1 + u64::from(batch.tiles().div_ceil(32)));
                }
                // SAFETY: the kernel takes this batch; rows, lists and working memory are lent until it has run.
                unsafe { device.launch(stream, word.kernel(in_place), Grid::new(batch.tiles(), THREADS), batch) }
            })?;
        }
    }
    Ok(())
}

/// Bytes of working memory for [`gather`]: 4 for each mebibyte that moves in place, and up to 8 for each item.
///
/// # Errors
/// As [`gather`].
pub fn scratch_bytes(gathers: &[Gather]) -> Result<usize, CudaError> {
    let tasks = try_map(gathers, Task::new)?;
    Ok(state_words(&tasks) * 4)
}

/// Words of 32 bits: a bit for each tile, and a word for the ticket of each launch, which has one item at least.
fn state_words(tasks: &[Task]) -> usize {
    let moving = tasks.iter().filter(|task| task.in_place && task.tiles > 0);
    moving.map(|task| task.tiles.div_ceil(32) as usize + 1).sum()
}

/// Threads of a block, as in select.cu; also the most rows of a tile.
const THREADS: u32 = 256;

/// Words of a tile, as in select.cu.
const TILE_WORDS: usize = 2048;

/// Words of a row at most.
const MOST_WORDS: usize = 1024;

/// What rows are moved in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    /// 16 bytes.
    U128,
    /// Elements of 4 bytes.
    U32,
    /// Elements of 2 bytes.
    U16,
}

impl Word {
    fn of(source: &Rows, destination: &Rows) -> Self {
        match source.dtype() {
            _ if source.in_words() && destination.in_words() => Self::U128,
            Dtype::F32 => Self::U32,
            Dtype::F16 | Dtype::Bf16 => Self::U16,
        }
    }

    fn kernel(self, in_place: bool) -> &'static str {
        match (self, in_place) {
            (Self::U128, false) => "gather_u128",
            (Self::U32, false) => "gather_u32",
            (Self::U16, false) => "gather_u16",
            (Self::U128, true) => "compact_u128",
            (Self::U32, true) => "compact_u32",
            (Self::U16, true) => "compact_u16",
        }
    }
}

/// An item that was checked.
struct Task<'a> {
    word: Word,
    in_place: bool,
    tiles: u32,
    source: &'a Rows,
    destination: &'a Rows,
    item: Item,
}

impl<'a> Task<'a> {
    fn new(gather: &'a Gather) -> Result<Self, CudaError> {
        let Gather { source, destination, indices, tail, destination_start } = gather;
        let heads = source.kv_heads();
        if source.dtype() != destination.dtype() {
            let (source_dtype, destination_dtype) = (source.dtype(), destination.dtype());
            return Err(KernelError::DtypeMismatch { source_dtype, destination_dtype }.into());
        }
        if source.head_dim() != destination.head_dim() {
            let (found, expected) = (destination.head_dim(), source.head_dim());
            return Err(KernelError::HeadDimMismatch { what: "destination", found, expected }.into());
        }
        destination.check(0..heads, 0..0)?;
        source.check(0..0, tail.clone())?;
        let total = indices.count.saturating_add(tail.len());
        destination.check(0..0, *destination_start..destination_start.saturating_add(total))?;
        let (list, stride_head) = indices.address(heads)?;
        let (raw, raw_destination) = (source.raw_view(), destination.raw_view());
        let in_place = raw == raw_destination && source.raw() == destination.raw();
        let tail_destination = destination_start + indices.count;
        if in_place && !tail.is_empty() && tail.start < tail_destination {
            let (place, source_row, destination_row) = (indices.count, tail.start, tail_destination);
            return Err(KernelError::Overtakes { head: 0, place, source_row, destination_row }.into());
        }

        let word = Word::of(source, destination);
        let words = if word == Word::U128 { source.layout().row_bytes() / 16 } else { source.head_dim() };
        if words > MOST_WORDS {
            return Err(CudaError::TooLarge { what: "the words of a row", found: words, most: MOST_WORDS });
        }
        let rows = (TILE_WORDS / words).min(THREADS as usize);
        // Rows that lie close together are moved by one block: else blocks tear open the memory's pages in turn.
        let heads_of_tile = if source.token_major() { rows.min(heads).max(1) } else { 1 };
        let tiles_of_chain = total.div_ceil(rows / heads_of_tile);
        let tiles = tiles_of_chain * heads.div_ceil(heads_of_tile);
        Ok(Self {
            word,
            in_place,
            tiles: u32::try_from(tiles).unwrap_or(u32::MAX),
            source,
            destination,
            item: Item {
                source: raw,
                destination: raw_destination,
                indices: list,
                stride_head,
                count: indices.count as u32,
                tail_start: tail.start as u32,
                total: total as u32,
                destination_start: *destination_start as u32,
                first_tile: 0,
                tiles_of_chain: tiles_of_chain as u32,
                heads_of_tile: heads_of_tile as u16,
                source_layout: 0,
                destination_layout: 0,
            },
        })
    }

    fn encode(&self, layouts: &mut Layouts, place: Place) -> Option<(Item, u32)> {
        let source_layout = layouts.number(self.source.raw())?;
        let destination_layout = layouts.number(self.destination.raw())?;
        Some((Item { source_layout, destination_layout, first_tile: place.first_tile, ..self.item }, self.tiles))
    }
}

/// `Head` of select.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    state: u64,
    verdict: u64,
}

/// `Item` of select.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    source: RawView,
    destination: RawView,
    indices: u64,
    stride_head: u32,
    count: u32,
    tail_start: u32,
    total: u32,
    destination_start: u32,
    first_tile: u32,
    tiles_of_chain: u32,
    heads_of_tile: u16,
    source_layout: u8,
    destination_layout: u8,
}
