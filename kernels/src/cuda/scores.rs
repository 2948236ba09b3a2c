//! What comes between scores and a selection: weights of a draw, and the refusal of scores that have no order.

use super::batch::{Batch, Place, try_map};
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use crate::check::check_len;
use crate::top_k::Protected;

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/scores.fatbin")),
    kernels: &[Kernel { name: "weigh_f32", shared: 0 }, Kernel { name: "refuse_f32", shared: 0 }],
};

/// How a score becomes a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// A norm negated: its inverse; the largest weight is that of the smallest normal f32.
    OfNorm,
    /// A cosine negated: 1 minus the cosine, from 0 to 2.
    OfDirection,
    /// 1, whatever the score.
    One,
}

/// The heads of one layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    /// Scores, `[heads, length]`.
    pub scores: DeviceSlice<f32>,
    /// KV heads.
    pub heads: usize,
}

/// Turns scores into the weights of a draw, in place. A NaN stays one. 798 items fit one launch.
///
/// # Errors
/// `scores` that do not divide into `heads` rows; [`CudaError::Driver`].
pub fn weigh(device: &Device, stream: Stream, items: &[Scores], weight: Weight) -> Result<(), CudaError> {
    let items = try_map(items, |item| {
        let length = length_of(item)?;
        let selection = Item { scores: item.scores.address(), length: length as u32, ..Item::default() };
        Ok::<_, CudaError>((selection, item.heads, length))
    })?;
    let kind = match weight {
        Weight::OfNorm => 0,
        Weight::OfDirection => 1,
        Weight::One => 2,
    };
    launch(device, stream, "weigh_f32", kind, items)
}

/// A selection by scores, which has been enqueued.
#[derive(Debug, Clone, Copy)]
pub struct Selection {
    /// What was selected by.
    pub scores: Scores,
    /// Tokens whose score does not matter.
    pub protected: Protected,
    /// The kept tokens, `[heads, keep]`.
    pub kept: DeviceSlice<u32>,
}

/// Spoils the selection of each head with a score that is NaN (`weights`: negative, infinite or NaN) and not protected:
/// its first kept token becomes `u32::MAX`, which no check of indices lets pass. 798 items fit one launch.
///
/// Floor: reads 4 bytes a token.
///
/// # Errors
/// `scores` or `kept` that do not divide into `heads` rows; [`CudaError::Driver`].
pub fn refuse(device: &Device, stream: Stream, items: &[Selection], weights: bool) -> Result<(), CudaError> {
    let items = try_map(items, |item| {
        let length = length_of(&item.scores)?;
        let keep = item.kept.len() / item.scores.heads.max(1);
        check_len("kept tokens", item.kept.len(), keep * item.scores.heads)?;
        let open = if keep == 0 { 0 } else { length - item.protected.count(length) };
        let selection = Item {
            scores: item.scores.scores.address(),
            kept: item.kept.address(),
            length: length as u32,
            keep: keep as u32,
            sinks: item.protected.sinks.min(length) as u32,
            open: open as u32,
            ..Item::default()
        };
        Ok::<_, CudaError>((selection, item.scores.heads, open))
    })?;
    launch(device, stream, "refuse_f32", weights.into(), items)
}

/// Tokens of a head.
fn length_of(item: &Scores) -> Result<usize, CudaError> {
    let length = item.scores.len() / item.heads.max(1);
    check_len("scores", item.scores.len(), length * item.heads)?;
    if length > u32::MAX as usize {
        return Err(CudaError::TooLarge { what: "the length", found: length, most: u32::MAX as usize });
    }
    Ok(length)
}

/// Enqueues a kernel over items with their heads and the tokens that it looks at in each.
fn launch(
    device: &Device,
    stream: Stream,
    kernel: &'static str,
    kind: u32,
    items: Vec<(Item, usize, usize)>,
) -> Result<(), CudaError> {
    let encode = |&(item, heads, tokens): &(Item, usize, usize), _: &mut _, place: Place| {
        let tiles_of_head = tokens.div_ceil(TILE);
        let item = Item { first_tile: place.first_tile, tiles_of_head: tiles_of_head as u32, ..item };
        Some((item, u32::try_from(heads * tiles_of_head).unwrap_or(u32::MAX)))
    };
    let _entered = device.enter()?;
    Batch::<Head, Item, 798>::for_each(Head { kind, unused: 0 }, &items, encode, |batch| {
        // SAFETY: the kernel takes this batch; scores and kept tokens are lent until the stream has run it.
        unsafe { device.launch(stream, kernel, Grid::new(batch.tiles(), 256), batch) }
    })
}

/// Tokens of a tile.
const TILE: usize = 4096;

/// `Head` of scores.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    kind: u32,
    unused: u32,
}

/// `Item` of scores.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    scores: u64,
    kept: u64,
    length: u32,
    keep: u32,
    sinks: u32,
    open: u32,
    first_tile: u32,
    tiles_of_head: u32,
}
