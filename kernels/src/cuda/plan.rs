//! A plan's lists: copied and checked, with the positions that the kept rows stand for; and lists that follow a formula.

use super::batch::{Batch, Place, try_map};
use super::check::Indices;
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::MOST_HEADS;
use super::verdict::{Verdict, check_items};

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/plan.fatbin")),
    kernels: &[
        Kernel { name: "adopt_u32", shared: 0 },
        Kernel { name: "spaced_u32", shared: 0 },
        Kernel { name: "progressions_u32", shared: 0 },
    ],
};

/// Positions of the rows that one layer of one sequence stores.
#[derive(Debug, Clone, Copy)]
pub struct Positions {
    /// Those of the first rows; rows behind them stand for the positions up to `next_position`.
    pub table: DeviceSlice<u32>,
    /// Distance between two heads' positions, in elements; 0: heads agree.
    pub stride_head: usize,
    /// Rows that the table covers.
    pub count: usize,
    /// Rows stored.
    pub length: usize,
    /// Position behind the last row's.
    pub next_position: u32,
}

/// What one layer of one sequence keeps.
#[derive(Debug, Clone, Copy)]
pub enum List {
    /// Rows by their indices, which must be strictly ascending, each below the number of rows.
    Rows(Indices, Positions),
    /// `count` rows from `start` on, which stand at `place` and behind of the lists that are written.
    Range {
        /// First row.
        start: usize,
        /// Rows.
        count: usize,
        /// Place of the first.
        place: usize,
        /// Positions of all rows.
        old: Positions,
    },
    /// New rows by the positions that they stand for, which must be ascending, each below `limit`. `u32::MAX` says that
    /// the row could not be computed: [`FaultKind::TooLarge`](super::FaultKind::TooLarge).
    NewRows {
        /// The positions.
        positions: Indices,
        /// Above all of them.
        limit: u32,
    },
}

/// A list, and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Adoption {
    /// The list.
    pub list: List,
    /// KV heads for which something is written: 1 where neither lists nor positions differ between heads.
    pub heads: usize,
    /// Copies of the lists; a `stride_head` of 0: one that all heads share. None: not wanted.
    pub kept: Option<Indices>,
    /// Positions of the kept rows, likewise.
    pub positions: Option<Indices>,
}

/// Copies lists, checks what was copied, and writes the positions of the kept rows. The first fault goes into `verdict`,
/// which must be cleared: by item, head and place. A list with a fault gives a copy with that fault, and any positions.
///
/// Floor: reads 4 bytes for each index, and writes 4 for it and 4 for its position. 363 items fit one launch.
///
/// # Errors
/// Lists that end behind their buffer; more heads or items than a verdict can name; [`CudaError::Driver`].
pub fn adopt(device: &Device, stream: Stream, adoptions: &[Adoption], verdict: &Verdict) -> Result<(), CudaError> {
    check_items(adoptions.len())?;
    let items = try_map(adoptions, Item::new)?;
    let encode = |&(item, heads): &(Item, u32), _: &mut _, place: Place| {
        let tiles_of_list = item.count.div_ceil(TILE);
        let item = Item { first_tile: place.first_tile, item: place.item, tiles_of_list, ..item };
        Some((item, heads.saturating_mul(tiles_of_list)))
    };
    let _entered = device.enter()?;
    Batch::<u64, Item, 363>::for_each(verdict.address(), &items, encode, |batch| {
        // SAFETY: the kernel takes this batch; lists, tables and verdict are lent until the stream has run it.
        unsafe { device.launch(stream, "adopt_u32", Grid::new(batch.tiles(), 256), batch) }
    })
}

/// Evenly spaced rows of one layer of one sequence, for all heads: the first `sinks`, `chosen` of those between, the last
/// `recent`.
#[derive(Debug, Clone, Copy)]
pub struct Spaced {
    /// Rows at the front.
    pub sinks: usize,
    /// Rows of those between, each from the middle of its share.
    pub chosen: usize,
    /// Rows at the end.
    pub recent: usize,
    /// Rows there are.
    pub length: usize,
    /// `sinks + chosen + recent` indices.
    pub out: DeviceSlice<u32>,
}

/// Writes lists of evenly spaced rows: place `i` of the chosen ones is row `sinks + (2 i + 1) h / (2 chosen)`, rounded
/// down, of the `h` rows between. 998 items fit one launch.
///
/// # Errors
/// [`CudaError::TooShort`] for `out`; [`CudaError::TooLarge`] for more rows than there are; [`CudaError::Driver`].
pub fn spaced(device: &Device, stream: Stream, items: &[Spaced]) -> Result<(), CudaError> {
    let encoded = try_map(items, |item| {
        let count = item.sinks.saturating_add(item.chosen).saturating_add(item.recent);
        if count > item.length || item.length > u32::MAX as usize {
            let most = item.length.min(u32::MAX as usize);
            return Err(CudaError::TooLarge { what: "the number of kept rows", found: count, most });
        }
        Ok(SpacedItem {
            out: item.out.at_least("a list of rows", count)?,
            sinks: item.sinks as u32,
            chosen: item.chosen as u32,
            recent: item.recent as u32,
            length: item.length as u32,
            first_tile: 0,
            unused: 0,
        })
    })?;
    let encode = |item: &SpacedItem, _: &mut _, place: Place| {
        let tiles = (item.sinks + item.chosen + item.recent).div_ceil(TILE);
        Some((SpacedItem { first_tile: place.first_tile, ..*item }, tiles))
    };
    let _entered = device.enter()?;
    Batch::<u64, SpacedItem, 998>::for_each(0, &encoded, encode, |batch| {
        // SAFETY: the kernel takes this batch; the lists are lent until the stream has run it.
        unsafe { device.launch(stream, "spaced_u32", Grid::new(batch.tiles(), 256), batch) }
    })
}

/// An arithmetic progression, like the positions of rows that stand for evenly spaced tokens.
#[derive(Debug, Clone, Copy)]
pub struct Progression {
    /// The first number.
    pub first: u32,
    /// From one number to the next.
    pub step: u32,
    /// The numbers.
    pub out: DeviceSlice<u32>,
}

/// Writes arithmetic progressions: place `i` is `first + i * step`. 1,332 items fit one launch.
///
/// # Errors
/// [`CudaError::TooLarge`] for a last number above `u32::MAX`; [`CudaError::Driver`].
pub fn progressions(device: &Device, stream: Stream, items: &[Progression]) -> Result<(), CudaError> {
    let encoded = try_map(items, |&Progression { first, step, out }| {
        let last = (out.len().saturating_sub(1)).saturating_mul(step as usize).saturating_add(first as usize);
        if last > u32::MAX as usize || out.len() > u32::MAX as usize {
            return Err(CudaError::TooLarge { what: "the last number", found: last, most: u32::MAX as usize });
        }
        Ok(ProgressionItem { out: out.address(), first, step, count: out.len() as u32, first_tile: 0 })
    })?;
    let encode = |item: &ProgressionItem, _: &mut _, place: Place| {
        Some((ProgressionItem { first_tile: place.first_tile, ..*item }, item.count.div_ceil(TILE)))
    };
    let _entered = device.enter()?;
    Batch::<u64, ProgressionItem, 1332>::for_each(0, &encoded, encode, |batch| {
        // SAFETY: the kernel takes this batch; the lists are lent until the stream has run it.
        unsafe { device.launch(stream, "progressions_u32", Grid::new(batch.tiles(), 256), batch) }
    })
}

/// Places of a tile.
const TILE: u32 = 1024;

/// `Item` of plan.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    list: u64,
    kept: u64,
    positions: u64,
    old: u64,
    list_stride: u32,
    kept_stride: u32,
    positions_stride: u32,
    old_stride: u32,
    count: u32,
    start: u32,
    length: u32,
    next_position: u32,
    old_count: u32,
    is_positions: u32,
    first_tile: u32,
    item: u32,
    tiles_of_list: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Item>() == 88);

impl Item {
    /// The item, and the heads that are written.
    fn new(adoption: &Adoption) -> Result<(Self, u32), CudaError> {
        let &Adoption { list, heads, kept, positions } = adoption;
        let narrow = |what, found: usize| {
            u32::try_from(found).map_err(|_| CudaError::TooLarge { what, found, most: u32::MAX as usize })
        };
        if heads >= MOST_HEADS {
            return Err(CudaError::TooLarge { what: "kv_heads", found: heads, most: MOST_HEADS - 1 });
        }
        let mut item = Self::default();
        let mut place = 0;
        let count = match list {
            List::Rows(indices, old) => {
                (item.list, item.list_stride) = indices.address(heads)?;
                item.set_old(&old, heads)?;
                indices.count
            }
            List::Range { start, count, place: first, old } => {
                item.set_old(&old, heads)?;
                item.start = narrow("the first row of a range", start)?;
                place = first;
                count
            }
            List::NewRows { positions, limit } => {
                (item.list, item.list_stride) = positions.address(heads)?;
                (item.length, item.is_positions) = (limit, 1);
                positions.count
            }
        };
        item.count = narrow("the number of kept rows", count)?;
        let target = |target: Option<Indices>| match target {
            None => Ok((0, 0)),
            Some(target) if target.count < place + count => {
                Err(CudaError::TooShort { what: "a list of kept rows", found: target.count, needed: place + count })
            }
            Some(target) => {
                let (address, stride) = target.address(heads)?;
                Ok((address + 4 * place as u64, stride))
            }
        };
        (item.kept, item.kept_stride) = target(kept)?;
        (item.positions, item.positions_stride) = target(positions)?;
        Ok((item, heads as u32))
    }

    fn set_old(&mut self, old: &Positions, heads: usize) -> Result<(), CudaError> {
        let table = Indices { data: old.table, stride_head: old.stride_head, count: old.count };
        (self.old, self.old_stride) = table.address(heads)?;
        self.old_count = old.count.min(u32::MAX as usize) as u32;
        self.length = u32::try_from(old.length).map_err(|_| CudaError::TooLarge {
            what: "the number of rows",
            found: old.length,
            most: u32::MAX as usize,
        })?;
        self.next_position = old.next_position;
        Ok(())
    }
}

/// `Spaced` of plan.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct SpacedItem {
    out: u64,
    sinks: u32,
    chosen: u32,
    recent: u32,
    length: u32,
    first_tile: u32,
    unused: u32,
}

/// `Progression` of plan.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ProgressionItem {
    out: u64,
    first: u32,
    step: u32,
    count: u32,
    first_tile: u32,
}
