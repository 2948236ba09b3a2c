//! The cache as the host sees it: addresses and strides in bytes.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

use kvhook_abi::raw::*;

use crate::cache::{KvDtype, LayerCache, RankCache, RowLayout};
use crate::device::Backend;
use crate::error::Result;
use crate::rank::RankState;

/// The host's name of an element type.
pub(super) fn dtype(dtype: KvDtype) -> KvhDtype {
    let (code, bits) = match dtype {
        KvDtype::F32 => (KVH_DTYPE_FLOAT, 32),
        KvDtype::F16 => (KVH_DTYPE_FLOAT, 16),
        KvDtype::Bf16 => (KVH_DTYPE_BFLOAT, 16),
    };
    KvhDtype { code, bits, lanes: 1 }
}

/// An array of the elements of a slice.
pub(super) fn array<T>(elements: &[T]) -> KvhArray {
    KvhArray { data: elements.as_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

/// An array of the elements of a slice, to be filled.
pub(super) fn array_mut<T>(elements: &mut [T]) -> KvhArrayMut {
    KvhArrayMut { data: elements.as_mut_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

/// One layer's buffers on one rank.
pub(super) struct Buffers {
    pub(super) k: *mut c_void,
    pub(super) v: *mut c_void,
    pub(super) layout: RowLayout,
    pub(super) dtype: KvDtype,
    pub(super) paged: bool,
}

impl Buffers {
    /// Describes `length` rows in these buffers; `blocks` is the table of a paged cache. The description is valid as long
    /// as buffers and table stay where they are.
    pub(super) fn describe(&self, layer: usize, kv_heads: usize, length: usize, blocks: &[u32]) -> KvhLayer {
        let bytes = |elements: usize| (elements * self.dtype.bytes()) as i64;
        let rows = |base: *mut c_void| KvhRows {
            base,
            stride_block: if self.paged { bytes(self.layout.stride_block) } else { 0 },
            stride_token: bytes(self.layout.stride_token),
            stride_head: bytes(self.layout.stride_head),
            stride_element: bytes(1),
            head_dim: self.layout.head_dim as u32,
            dtype: dtype(self.dtype),
        };
        let (data, count) = if self.paged { (blocks.as_ptr().cast(), blocks.len() as u32) } else { (ptr::null(), 0) };
        KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: layer as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: kv_heads as u32,
            block_size: if self.paged { self.layout.block_size as u32 } else { 0 },
            reserved0: 0,
            length: length as u64,
            k: rows(self.k),
            v: rows(self.v),
            table: KvhBlockTable {
                data,
                stride_head: 0,
                count,
                dtype: KvhDtype { code: KVH_DTYPE_UINT, bits: 32, lanes: 1 },
            },
            positions: KvhPositions { data: ptr::null(), stride_head: 0, count: 0 },
        }
    }
}

/// All layers of a sequence on a rank, and the block tables that they lead to. Valid until the rank's cache changes.
pub(super) struct Described<'a> {
    layers: Vec<KvhLayer>,
    tables: PhantomData<&'a [LayerCache]>,
    /// Copies of the tables, which go back in the stream's order.
    #[cfg(feature = "cuda")]
    _on_device: Option<crate::device::cuda::Tables>,
}

impl Described<'_> {
    /// For the host, during this borrow.
    pub(super) fn array(&self) -> KvhArray {
        array(&self.layers)
    }
}

/// Describes all layers of a sequence on a rank.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) where a CUDA device has no memory for the tables.
pub(super) fn describe_all<'a>(
    backend: &Backend,
    rank: &mut RankState,
    id: crate::SequenceId,
    layers: &'a [LayerCache],
) -> Result<Described<'a>> {
    let kv_heads = rank.shard.kv_heads.len();
    let paged = matches!(rank.cache, RankCache::Paged(_));
    let describe = |(index, layer): (usize, &LayerCache)| {
        let view = rank.cache.layer(id, index, layer.len, layer.len)?;
        let (dtype, layout) = (view.k.dtype(), view.layout);
        let buffers = Buffers { k: view.k.as_mut_ptr(), v: view.v.as_mut_ptr(), layout, dtype, paged };
        Ok(buffers.describe(index, kv_heads, layer.len, &layer.blocks))
    };
    let described = layers.iter().enumerate().map(describe).collect::<Result<Vec<_>>>()?;
    match backend {
        Backend::Cpu => Ok(Described {
            layers: described,
            tables: PhantomData,
            #[cfg(feature = "cuda")]
            _on_device: None,
        }),
        #[cfg(feature = "cuda")]
        Backend::Cuda(cuda) => {
            let mut described = described;
            let mut on_device = None;
            if paged && !layers.is_empty() {
                let tables = layers.iter().map(|layer| layer.blocks.as_slice());
                let (tables, addresses) = crate::device::cuda::Tables::new(cuda.driver(), tables)?;
                for (layer, address) in described.iter_mut().zip(addresses) {
                    layer.table.data = address as *const c_void;
                }
                on_device = Some(tables);
            }
            Ok(Described { layers: described, tables: PhantomData, _on_device: on_device })
        }
    }
}
