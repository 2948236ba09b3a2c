//! Rows that the host lends for a rewrite.

use core::ffi::c_void;

use kvhook_abi::raw::*;

use crate::error::HostError;
use crate::memory::{Allocator, Block};
use crate::model::Model;

/// Alignment of K and of V behind it.
const ALIGNMENT: u64 = 64;

/// Rows of one layer in memory of the ticket: K `[kv_heads, count, k_head_dim]`, then V.
pub struct LentLayer {
    block: Block,
    view: KvhLayer,
}

// SAFETY: the view points into the block, which the struct owns.
unsafe impl Send for LentLayer {}
// SAFETY: as above.
unsafe impl Sync for LentLayer {}

impl LentLayer {
    /// Rows for `count` tokens; none for 0.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn new(
        model: &Model,
        layer: usize,
        count: u64,
        allocator: Allocator,
        stream: *mut c_void,
    ) -> Result<Option<Self>, HostError> {
        if count == 0 {
            return Ok(None);
        }
        let info = &model.layers()[layer];
        let element = u64::from(model.dtype().bits / 8);
        let bytes = |head_dim: u32| u64::from(info.kv_heads) * count * u64::from(head_dim) * element;
        let k = bytes(info.k_head_dim).next_multiple_of(ALIGNMENT);
        let inside = info.flags & KVH_LAYER_FLAG_V_INSIDE_K != 0;
        let v = if inside { 0 } else { bytes(info.v_head_dim) };
        let block = Block::new(allocator, k + v, ALIGNMENT, stream, "lent rows")?;
        let rows = |base: *mut u8, head_dim: u32| {
            let row = (u64::from(head_dim) * element) as i64;
            KvhRows {
                base: base.cast(),
                stride_block: 0,
                stride_token: row,
                stride_head: row * count as i64,
                stride_element: element as i64,
                head_dim,
                dtype: model.dtype(),
            }
        };
        let mut view = Self::none(model, layer);
        view.length = count;
        view.k = rows(block.data(), info.k_head_dim);
        if !inside {
            view.v = rows(block.data().wrapping_add(k as usize), info.v_head_dim);
        }
        Ok(Some(Self { block, view }))
    }

    /// The view of a layer in which nothing is lent.
    pub fn none(model: &Model, layer: usize) -> KvhLayer {
        let info = &model.layers()[layer];
        let rows = |head_dim| KvhRows {
            base: core::ptr::null_mut(),
            stride_block: 0,
            stride_token: 0,
            stride_head: 0,
            stride_element: 0,
            head_dim,
            dtype: model.dtype(),
        };
        KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: layer as u32,
            kind: info.kind,
            flags: info.flags,
            window: info.window,
            shared_with: info.shared_with,
            kv_heads: info.kv_heads,
            block_size: 0,
            reserved0: 0,
            length: 0,
            k: rows(info.k_head_dim),
            v: rows(info.v_head_dim),
            table: KvhBlockTable {
                data: core::ptr::null(),
                stride_head: 0,
                count: 0,
                dtype: KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 },
            },
            positions: KvhPositions { data: core::ptr::null(), stride_head: 0, count: 0 },
        }
    }

    /// As [`Block::release_on`].
    pub fn release_on(&self, stream: *mut c_void) {
        self.block.release_on(stream);
    }

    /// The rows.
    pub fn view(&self) -> KvhLayer {
        crate::view::copy(&self.view)
    }
}
