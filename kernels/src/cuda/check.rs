//! Checking the indices of a selection before anything moves.

use super::batch::{Batch, Place};
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::MOST_HEADS;
use super::verdict::{Verdict, check_items};
use crate::check::{BadIndex, IndexFault};
use crate::error::KernelError;

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/check.fatbin")),
    kernels: &[Kernel { name: "check_indices_u32", shared: 0 }],
};

/// The token indices that a selection keeps in one layer, for each KV head: [`crate::Indices`] in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Indices {
    /// Token indices.
    pub data: DeviceSlice<u32>,
    /// Distance between two heads' lists, in elements; 0: shared by all heads.
    pub stride_head: usize,
    /// Indices in each list.
    pub count: usize,
}

impl Indices {
    /// One list that all heads share.
    pub fn shared(data: DeviceSlice<u32>) -> Self {
        Self { data, stride_head: 0, count: data.len() }
    }

    /// Lists of `count` indices, one after the other, one for each head.
    pub fn per_head(data: DeviceSlice<u32>, count: usize) -> Self {
        Self { data, stride_head: count, count }
    }

    /// None: for an operation that only moves a tail.
    pub fn none() -> Self {
        Self::shared(DeviceSlice::empty())
    }

    /// The address of the first list and the stride, for the lists of `heads` heads.
    pub(crate) fn address(&self, heads: usize) -> Result<(u64, u32), CudaError> {
        let last = if self.count == 0 { 0 } else { heads.saturating_sub(1) };
        let needed = last.saturating_mul(self.stride_head).saturating_add(self.count);
        if needed > self.data.len() {
            let fault = IndexFault::BufferTooShort { needed, found: self.data.len() };
            return Err(KernelError::Index(BadIndex { head: last, place: 0, value: 0, fault }).into());
        }
        let stride = u32::try_from(self.stride_head).map_err(|_| CudaError::TooLarge {
            what: "the stride of the lists of indices",
            found: self.stride_head,
            most: u32::MAX as usize,
        })?;
        Ok((self.data.address(), stride))
    }
}

/// The lists of one layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// The lists.
    pub indices: Indices,
    /// KV heads.
    pub heads: usize,
    /// Rows there are.
    pub length: usize,
    /// The least index allowed: the first row's destination where rows move in place, else 0.
    pub least: usize,
}

/// Checks lists: each index in range, strictly ascending, and none below `least`. The first fault goes into `verdict`,
/// which must be cleared: by item, head and place of the list.
///
/// Floor: reads 4 bytes for each index. 797 items fit one launch.
///
/// # Errors
/// A list that ends behind its buffer; more heads or items than a verdict can name; [`CudaError::Driver`].
pub fn check_indices(device: &Device, stream: Stream, checks: &[Check], verdict: &Verdict) -> Result<(), CudaError> {
    check_items(checks.len())?;
    let mut addresses = Vec::with_capacity(checks.len());
    for check in checks {
        if check.heads >= MOST_HEADS {
            return Err(CudaError::TooLarge { what: "kv_heads", found: check.heads, most: MOST_HEADS - 1 });
        }
        addresses.push(check.indices.address(check.heads)?);
    }
    let encode = |check: &Check, _: &mut _, place: Place| {
        let (indices, stride_head) = addresses[place.item as usize];
        let lists = if stride_head == 0 { check.heads.min(1) } else { check.heads };
        let tiles_of_list = check.indices.count.div_ceil(TILE);
        let item = Item {
            indices,
            stride_head,
            count: check.indices.count as u32,
            length: check.length.min(u32::MAX as usize) as u32,
            least: check.least.min(u32::MAX as usize) as u32,
            first_tile: place.first_tile,
            item: place.item,
            tiles_of_list: tiles_of_list as u32,
            unused: 0,
        };
        Some((item, u32::try_from(lists * tiles_of_list).unwrap_or(u32::MAX)))
    };
    let _entered = device.enter()?;
    Batch::<u64, Item, 797>::for_each(verdict.address(), checks, encode, |batch| {
        // SAFETY: the kernel takes this batch; lists and verdict are lent until the stream has run it.
        unsafe { device.launch(stream, "check_indices_u32", Grid::new(batch.tiles(), 256), batch) }
    })
}

/// Indices of a tile.
const TILE: usize = 2048;

/// `Item` of check.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    indices: u64,
    stride_head: u32,
    count: u32,
    length: u32,
    least: u32,
    first_tile: u32,
    item: u32,
    tiles_of_list: u32,
    unused: u32,
}
