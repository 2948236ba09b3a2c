//! The view of one layer's K or V cache in device memory.

use std::ops::Range;

use super::error::CudaError;
use crate::dtype::Dtype;
use crate::error::KernelError;
use crate::rows::{BlockTable, IndexKind, Layout};

/// [`crate::Rows`] in device memory: the same row formula, layouts and block tables (device memory, too).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Holds device addresses: only its shape is used here.
    view: crate::Rows,
    raw: RawLayout,
}

impl Rows {
    /// Describes rows at a device address; `table.data` is a device address, too.
    ///
    /// # Safety
    /// As [`crate::Rows::new`], for memory that the device reads and writes, until the work that was enqueued with the
    /// view or a copy of it is done.
    ///
    /// # Errors
    /// As [`crate::Rows::new`]; [`CudaError::Address`] unless the table and all rows are aligned for their elements;
    /// [`CudaError::TooLarge`] for strides and counts that the kernels hold in fewer bits.
    pub unsafe fn new(base: u64, layout: Layout, table: Option<BlockTable>) -> Result<Self, CudaError> {
        // SAFETY: the view's rows are never read or written through it, so nothing is promised of them.
        let view = unsafe { crate::Rows::new(base as *mut u8, layout, table) }?;
        let element = layout.dtype.size();
        let strides = [layout.stride_element, layout.stride_token, layout.stride_head, layout.stride_block];
        let odd = strides.iter().find(|stride| stride.unsigned_abs() % element != 0);
        if odd.is_some() || !base.is_multiple_of(element as u64) {
            let address = odd.map_or(base, |&stride| stride as u64);
            return Err(CudaError::Address { what: "a row or a stride", address, alignment: element });
        }
        if let Some(table) = table {
            let (address, alignment) = (table.data as u64, if table.kind == IndexKind::I64 { 8 } else { 4 });
            if !address.is_multiple_of(alignment as u64) {
                return Err(CudaError::Address { what: "the block table", address, alignment });
            }
        }
        Ok(Self { view, raw: RawLayout::new(&layout, table.as_ref())? })
    }

    /// Shape and strides.
    pub fn layout(&self) -> &Layout {
        self.view.layout()
    }

    /// Device address of the first row.
    pub fn base(&self) -> u64 {
        self.view.base() as u64
    }

    /// The block table.
    pub fn table(&self) -> Option<&BlockTable> {
        self.view.table()
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    /// Elements of a row.
    pub fn head_dim(&self) -> usize {
        self.view.head_dim()
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.view.kv_heads()
    }

    /// Tokens that may be addressed.
    pub fn capacity(&self) -> usize {
        self.view.capacity()
    }

    /// Refuses heads and tokens outside the view.
    pub(crate) fn check(&self, heads: Range<usize>, tokens: Range<usize>) -> Result<(), KernelError> {
        self.view.check(heads, tokens)
    }

    /// Whether rows are adjacent elements at multiples of 16 bytes, and of whole 16-byte words: the fast path of most
    /// kernels.
    pub(crate) fn in_words(&self) -> bool {
        let layout = self.layout();
        let strides = [layout.stride_token, layout.stride_head, layout.stride_block];
        layout.dense_rows()
            && layout.row_bytes().is_multiple_of(16)
            && self.base().is_multiple_of(16)
            && strides.iter().all(|stride| stride % 16 == 0)
    }

    /// Whether a token's heads lie closer than a head's tokens.
    pub(crate) fn token_major(&self) -> bool {
        let layout = self.layout();
        layout.stride_head.unsigned_abs() < layout.stride_token.unsigned_abs()
    }

    pub(crate) fn raw(&self) -> &RawLayout {
        &self.raw
    }

    pub(crate) fn raw_view(&self) -> RawView {
        RawView { base: self.base(), table: self.table().map_or(0, |table| table.data as u64) }
    }
}

/// `View` of common.cuh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawView {
    base: u64,
    table: u64,
}

/// `Layout` of common.cuh. The capacity is left out, so that sequences of all lengths share one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawLayout {
    stride_block: i64,
    stride_token: i64,
    stride_head: i64,
    table_stride_head: i32,
    stride_element: i32,
    block_size: u32,
    block_shift: u32,
    head_dim: u32,
    kv_heads: u16,
    dtype: u8,
    index_kind: u8,
}

const _: () = assert!(size_of::<RawLayout>() == 48);

impl RawLayout {
    fn new(layout: &Layout, table: Option<&BlockTable>) -> Result<Self, CudaError> {
        let signed = |what, value: isize| {
            i32::try_from(value).map_err(|_| CudaError::TooLarge {
                what,
                found: value.unsigned_abs(),
                most: i32::MAX as usize,
            })
        };
        let unsigned = |what, value: usize| {
            u32::try_from(value).map_err(|_| CudaError::TooLarge { what, found: value, most: u32::MAX as usize })
        };
        let kv_heads = u16::try_from(layout.kv_heads).ok().filter(|&heads| usize::from(heads) < MOST_HEADS);
        Ok(Self {
            stride_block: layout.stride_block as i64,
            stride_token: layout.stride_token as i64,
            stride_head: layout.stride_head as i64,
            table_stride_head: signed("the table's stride over heads", table.map_or(0, |table| table.stride_head))?,
            stride_element: signed("the stride of elements", layout.stride_element)?,
            block_size: unsigned("block_size", layout.block_size)?,
            block_shift: if layout.block_size.is_power_of_two() {
                layout.block_size.trailing_zeros()
            } else {
                u32::MAX
            },
            head_dim: unsigned("head_dim", layout.head_dim)?,
            kv_heads: kv_heads.ok_or(CudaError::TooLarge {
                what: "kv_heads",
                found: layout.kv_heads,
                most: MOST_HEADS - 1,
            })?,
            dtype: match layout.dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::Bf16 => 2,
            },
            index_kind: match table.map_or(IndexKind::U32, |table| table.kind) {
                IndexKind::U32 => 0,
                IndexKind::I32 => 1,
                IndexKind::I64 => 2,
            },
        })
    }
}

/// KV heads are fewer, so that a verdict can name one in 14 bits.
pub(crate) const MOST_HEADS: usize = 1 << 14;
