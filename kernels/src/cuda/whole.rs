//! Rows that were chosen of those that may be dropped, put among the rows that are kept whole.

use std::ops::Range;

use super::batch::{Batch, Place, try_map};
use super::check::Indices;
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::MOST_HEADS;

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/whole.fatbin")),
    kernels: &[Kernel { name: "merge_whole_u32", shared: 0 }],
};

/// The most stretches of one layer.
pub const MOST_STRETCHES: usize = 1024;

/// The choice of one layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Merge<'a> {
    /// Ascending rows that may be dropped, in stretches that do not touch: at most [`MOST_STRETCHES`], none empty.
    pub open: &'a [Range<usize>],
    /// Rows there are.
    pub length: usize,
    /// Rows that were chosen, by their numbers among those that may be dropped, ascending.
    pub chosen: Indices,
    /// Lists to write; 1 where all heads share one.
    pub lists: usize,
    /// The lists, `[lists, chosen.count + rows kept whole]`.
    pub out: DeviceSlice<u32>,
}

/// Writes ascending lists of the chosen rows and all that are kept whole. Lists whose chosen rows are none (a score had no
/// order) are written, with any rows. Up to 417 items with 1,024 stretches fit one launch.
///
/// Floor: reads 4 bytes for each chosen row, writes 4 for each.
///
/// # Errors
/// [`CudaError::TooLarge`] for stretches, rows and heads that are too many, or more chosen rows than may be dropped;
/// [`CudaError::TooShort`] for lists; [`CudaError::Driver`].
pub fn merge_whole(device: &Device, stream: Stream, merges: &[Merge<'_>]) -> Result<(), CudaError> {
    let items = try_map(merges, Item::new)?;
    let _entered = device.enter()?;
    let mut rest = merges.iter().zip(items).peekable();
    while rest.peek().is_some() {
        let (mut head, mut used, mut batch) = (Head::default(), 0, Vec::new());
        while let Some((merge, item)) = rest.next_if(|(merge, _)| used + merge.open.len() <= MOST_STRETCHES) {
            let mut before = 0;
            for (range, stretch) in merge.open.iter().zip(&mut head.stretches[used..]) {
                *stretch = Stretch { start: range.start as u32, before };
                before += range.len() as u32;
            }
            batch.push((Item { first_stretch: used as u32, ..item }, merge.lists));
            used += merge.open.len();
        }
        let encode = |&(item, lists): &(Item, usize), _: &mut _, place: Place| {
            let tiles_of_list = (item.count + item.whole).div_ceil(TILE);
            let tiles = tiles_of_list.saturating_mul(lists as u32);
            Some((Item { first_tile: place.first_tile, tiles_of_list, ..item }, tiles))
        };
        Batch::<Head, Item, 417>::for_each(head, &batch, encode, |batch| {
            // SAFETY: the kernel takes this batch; lists are lent until the stream has run it.
            unsafe { device.launch(stream, "merge_whole_u32", Grid::new(batch.tiles(), 256), batch) }
        })?;
    }
    Ok(())
}

/// Places of a tile.
const TILE: u32 = 1024;

/// `Stretch` of whole.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Stretch {
    start: u32,
    before: u32,
}

/// `Head` of whole.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    stretches: [Stretch; MOST_STRETCHES],
}

impl Default for Head {
    fn default() -> Self {
        Self { stretches: [Stretch::default(); MOST_STRETCHES] }
    }
}

/// `Item` of whole.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    chosen: u64,
    out: u64,
    chosen_stride: u32,
    out_stride: u32,
    count: u32,
    open: u32,
    whole: u32,
    first_stretch: u32,
    stretches: u32,
    first_tile: u32,
    tiles_of_list: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Item>() == 56);

impl Item {
    fn new(merge: &Merge<'_>) -> Result<Self, CudaError> {
        let &Merge { open: stretches, length, chosen, lists, out } = merge;
        let most = |what, found: usize, most: usize| match found <= most {
            true => Ok(found),
            false => Err(CudaError::TooLarge { what, found, most }),
        };
        most("the number of stretches", stretches.len(), MOST_STRETCHES)?;
        most("the number of rows", length, u32::MAX as usize)?;
        most("kv_heads", lists, MOST_HEADS - 1)?;
        let mut end = 0;
        for stretch in stretches {
            if stretch.is_empty() || stretch.start < end || stretch.end > length {
                return Err(CudaError::TooLarge { what: "a stretch's rows", found: stretch.end, most: length });
            }
            end = stretch.end;
        }
        let open: usize = stretches.iter().map(Range::len).sum();
        let count = most("the number of chosen rows", chosen.count, open)?;
        let whole = length - open;
        let (address, chosen_stride) = chosen.address(lists)?;
        Ok(Self {
            chosen: address,
            out: out.at_least("lists of kept rows", lists * (count + whole))?,
            chosen_stride,
            out_stride: (count + whole) as u32,
            count: count as u32,
            open: open as u32,
            whole: whole as u32,
            stretches: stretches.len() as u32,
            ..Self::default()
        })
    }
}
