//! The engine's rows of one sequence: checked against the model, then moved through the kernels' view.

use kvhook_abi::boundary::Structs;
use kvhook_abi::raw::*;
use kvhook_abi::view::{self, LayerView};
use kvhook_kernels::Rows;

use crate::error::HostError;
use crate::model::Model;

/// K and V of a layer.
#[derive(Clone, Copy)]
pub struct LayerRows {
    /// K rows.
    pub k: Rows,
    /// V rows; none where V lies inside K.
    pub v: Option<Rows>,
}

/// The layers of a sequence on one rank, in order, each one checked.
pub struct Layers(Vec<KvhLayer>);

// SAFETY: a description of the engine's rows; the engine promises them for the call that it made.
unsafe impl Send for Layers {}
// SAFETY: as above.
unsafe impl Sync for Layers {}

impl Layers {
    /// Copies the descriptions and compares them with the model. `block_size` is the engine's offer.
    ///
    /// # Errors
    /// `InvalidArgument` when the array is not what it should be; `View`, naming the layer, when a layer differs from
    /// the model, or its rows do not fit its table.
    ///
    /// # Safety
    /// The array is valid for reading.
    pub unsafe fn read(array: KvhArray, name: &'static str, model: &Model, block_size: u32) -> Result<Self, HostError> {
        // SAFETY: passed on from the caller.
        let layers = unsafe { Structs::<KvhLayer>::new(array, name)? };
        if layers.len() != model.layers().len() {
            return Err(HostError::Argument(format!(
                "`{name}` has {} elements; the model has {} layers",
                layers.len(),
                model.layers().len()
            )));
        }
        // Collecting results would not reserve.
        let mut checked = Vec::with_capacity(layers.len());
        for index in 0..layers.len() {
            let mut layer: KvhLayer = layers.get(index)?;
            layer.struct_size = size_of::<KvhLayer>();
            layer.positions = KvhPositions { data: core::ptr::null(), stride_head: 0, count: 0 };
            check(&layer, index, model, block_size)
                .map_err(|problem| HostError::View { layer: index as u32, problem })?;
            checked.push(layer);
        }
        Ok(Self(checked))
    }

    /// Rows that are stored in each layer.
    pub fn lengths(&self) -> Vec<u64> {
        self.0.iter().map(|layer| layer.length).collect()
    }

    /// The descriptions.
    pub fn as_slice(&self) -> &[KvhLayer] {
        &self.0
    }

    /// K and V of a layer, as the kernels see them.
    ///
    /// # Errors
    /// `View` when the kernels do not take the layout.
    ///
    /// # Safety
    /// The engine's rows are as described, and used by nobody else as long as the result is.
    pub unsafe fn rows(&self, index: usize) -> Result<LayerRows, HostError> {
        // SAFETY: passed on from the caller.
        unsafe { rows(&self.0[index]) }
    }
}

/// K and V of a layer, as the kernels see them.
///
/// # Errors
/// `View` when the kernels do not take the layout.
///
/// # Safety
/// As [`Layers::rows`].
pub unsafe fn rows(layer: &KvhLayer) -> Result<LayerRows, HostError> {
    let refuse = |problem: String| HostError::View { layer: layer.layer, problem };
    let mut layer = copy(layer);
    for (name, rows) in [("k", &mut layer.k), ("v", &mut layer.v)] {
        if rows.dtype.bits == 8 && !rows.base.is_null() {
            *rows = in_pairs(rows).ok_or_else(|| {
                refuse(format!(
                    "`{name}` has elements of one byte; expected an even head_dim, adjacent elements, and rows and strides \
                     at even addresses"
                ))
            })?;
        }
    }
    // SAFETY: passed on from the caller.
    let view = unsafe { LayerView::from_raw(layer, 0) };
    let k = view.k().map_err(|error| refuse(error.to_string()))?;
    let v = match view.v_inside_k() {
        true => None,
        false => Some(view.v().map_err(|error| refuse(error.to_string()))?),
    };
    Ok(LayerRows { k, v })
}

/// Rows of one-byte elements as rows of half as many two-byte ones: what is moved is the same.
fn in_pairs(rows: &KvhRows) -> Option<KvhRows> {
    let strides = [rows.stride_token, rows.stride_head, rows.stride_block];
    let even = rows.head_dim.is_multiple_of(2) && (rows.base as usize).is_multiple_of(2);
    if !even || rows.stride_element != 1 || strides.iter().any(|stride| stride % 2 != 0) {
        return None;
    }
    let dtype = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 16, lanes: 1 };
    Some(KvhRows { stride_element: 2, head_dim: rows.head_dim / 2, dtype, ..*rows })
}

/// A copy of a description.
pub fn copy(layer: &KvhLayer) -> KvhLayer {
    KvhLayer { ..*layer }
}

fn check(layer: &KvhLayer, index: usize, model: &Model, block_size: u32) -> Result<(), String> {
    let info = &model.layers()[index];
    let differs = |field: &str, found: i64, expected: i64| match found == expected {
        true => Ok(()),
        false => Err(format!("`{field}` is {found}; the model says {expected}")),
    };
    differs("layer", layer.layer.into(), index as i64)?;
    differs("kind", layer.kind.into(), info.kind.into())?;
    differs("flags", layer.flags.into(), info.flags.into())?;
    differs("shared_with", layer.shared_with.into(), info.shared_with.into())?;
    if matches!(layer.kind, KVH_LAYER_LINEAR | KVH_LAYER_NONE) {
        return Ok(());
    }
    differs("kv_heads", layer.kv_heads.into(), info.kv_heads.into())?;
    if layer.length > u64::from(u32::MAX) {
        return Err(format!("`length` is {}; indices have 32 bits", layer.length));
    }
    if layer.block_size != block_size {
        return Err(format!("`block_size` is {}; the engine offered {block_size}", layer.block_size));
    }
    check_rows("k", &layer.k, info.k_head_dim, layer, model)?;
    if layer.flags & KVH_LAYER_FLAG_V_INSIDE_K == 0 {
        check_rows("v", &layer.v, info.v_head_dim, layer, model)?;
    }
    let table = &layer.table;
    if !table.data.is_null() {
        if layer.block_size == 0 {
            return Err("there is a block table, but `block_size` is 0".to_owned());
        }
        if view::index_kind(table.dtype).is_none() {
            return Err(format!("a block table of {}; expected i32, u32 or i64", view::dtype_name(table.dtype)));
        }
        let room = u64::from(table.count) * u64::from(layer.block_size);
        if room < layer.length {
            return Err(format!(
                "the block table has {} blocks of {} tokens, for {} rows",
                table.count, layer.block_size, layer.length
            ));
        }
    }
    Ok(())
}

fn check_rows(name: &str, rows: &KvhRows, head_dim: u32, layer: &KvhLayer, model: &Model) -> Result<(), String> {
    if rows.head_dim != head_dim {
        return Err(format!("`{name}.head_dim` is {}; the model says {head_dim}", rows.head_dim));
    }
    let (found, expected) = (rows.dtype, model.dtype());
    if (found.code, found.bits, found.lanes) != (expected.code, expected.bits, expected.lanes) {
        return Err(format!(
            "`{name}` is {}; the model's cache is {}",
            view::dtype_name(found),
            view::dtype_name(expected)
        ));
    }
    if rows.base.is_null() && layer.length > 0 {
        return Err(format!("`{name}.base` is null for {} rows", layer.length));
    }
    Ok(())
}
