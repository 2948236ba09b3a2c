//! Row norms: the importance `key_norm`.

use std::ops::Range;

use super::batch::{Batch, Layouts, Place};
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::Rows;
use super::tile::{Names, RawTiles, TILE_ROWS, Tiling, VARIANTS, check_scores};

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/norms.fatbin")),
    kernels: &[
        Kernel { name: "row_norms_f32", shared: 0 },
        Kernel { name: "row_norms_f16", shared: 0 },
        Kernel { name: "row_norms_bf16", shared: 0 },
        Kernel { name: "row_norms_any_f32", shared: 0 },
        Kernel { name: "row_norms_any_f16", shared: 0 },
        Kernel { name: "row_norms_any_bf16", shared: 0 },
    ],
};

const NAMES: Names = Names {
    in_words: ["row_norms_f32", "row_norms_f16", "row_norms_bf16"],
    any: ["row_norms_any_f32", "row_norms_any_f16", "row_norms_any_bf16"],
};

/// The K or V of one layer of one sequence.
#[derive(Debug, Clone)]
pub struct RowNorms {
    /// Rows read, in all KV heads.
    pub rows: Rows,
    /// Tokens.
    pub tokens: Range<usize>,
    /// The norms, `[kv_heads, tokens]`.
    pub out: DeviceSlice<f32>,
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// The norms.
    Positive,
    /// The norms negated: the score of Knorm, which keeps the rows with the lowest norms.
    Negative,
}

/// The Euclidean norm of each row, of all items in a launch for each 664 of one dtype.
///
/// Floor: reads each row once, `heads * tokens * head_dim * dtype` bytes.
///
/// # Errors
/// Tokens outside the view; `out` of another length; a head_dim above 1,024, where rows are not whole 16-byte words at
/// multiples of 16 bytes; [`CudaError::Driver`].
pub fn row_norms(device: &Device, stream: Stream, items: &[RowNorms], sign: Sign) -> Result<(), CudaError> {
    let mut tasks = Vec::with_capacity(items.len());
    for item in items {
        check_scores(&item.rows, item.tokens.len(), item.out.len())?;
        tasks.push((item, Tiling::new(&item.rows, item.tokens.clone(), 8, 1)?));
    }
    let _entered = device.enter()?;
    let head = Head { sign: if sign == Sign::Positive { 1.0 } else { -1.0 }, unused: 0.0 };
    for variant in VARIANTS {
        let chosen: Vec<_> =
            tasks.iter().filter(|(item, tiling)| (item.rows.dtype(), tiling.in_words) == variant).collect();
        let encode = |&&(item, tiling): &&(&RowNorms, Tiling), layouts: &mut Layouts, place: Place| {
            let tiles = tiling.encode(&item.rows, layouts)?;
            let item = Item { tiles, out: item.out.address(), first_tile: place.first_tile, unused: 0 };
            Some((item, tiling.tiles))
        };
        Batch::<Head, Item, 664>::for_each(head, &chosen, encode, |batch| {
            // SAFETY: the kernel takes this batch; rows and norms are lent until the stream has run it.
            unsafe { device.launch(stream, NAMES.of(variant), Grid::new(batch.tiles(), TILE_ROWS), batch) }
        })?;
    }
    Ok(())
}

/// `Head` of norms.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    sign: f32,
    unused: f32,
}

/// `Item` of norms.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    tiles: RawTiles,
    out: u64,
    first_tile: u32,
    unused: u32,
}
