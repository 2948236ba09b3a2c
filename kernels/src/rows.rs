//! The view of one layer's K or V cache that every operation works on.

use std::ops::Range;

use crate::dtype::{self, Dtype};
use crate::error::KernelError;

/// Element type of a block table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexKind {
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 32 bits.
    I32,
    /// Signed, 64 bits.
    I64,
}

/// The blocks of a paged sequence, in order: entry `i` is the pool's block that holds tokens `i * block_size ..`.
///
/// Head `h` reads entry `h * stride_head + i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockTable {
    /// First entry; need not be aligned.
    pub data: *const u8,
    /// Type of an entry.
    pub kind: IndexKind,
    /// Distance between two heads' tables, in entries; 0: shared by all heads.
    pub stride_head: isize,
    /// Entries of each head's table.
    pub blocks: usize,
}

impl BlockTable {
    /// # Safety
    /// `entry` must be below `blocks` and `head` below the view's KV heads.
    #[inline]
    unsafe fn block(&self, entry: usize, head: usize) -> isize {
        let offset = entry as isize + head as isize * self.stride_head;
        // SAFETY: `Rows::new`'s caller promised that the table of each head is readable.
        unsafe {
            match self.kind {
                IndexKind::U32 => self.data.cast::<u32>().offset(offset).read_unaligned() as isize,
                IndexKind::I32 => self.data.cast::<i32>().offset(offset).read_unaligned() as isize,
                IndexKind::I64 => self.data.cast::<i64>().offset(offset).read_unaligned() as isize,
            }
        }
    }
}

/// Shape and strides of a view. Strides are in **bytes** and may be negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Element type.
    pub dtype: Dtype,
    /// Elements of a row.
    pub head_dim: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Tokens that may be addressed, for each head.
    pub capacity: usize,
    /// Distance between two elements of a row.
    pub stride_element: isize,
    /// Distance between two blocks of the pool; not read where `block_size` is 0.
    pub stride_block: isize,
    /// Distance between two tokens of a block.
    pub stride_token: isize,
    /// Distance between two heads.
    pub stride_head: isize,
    /// Tokens of a block; 0: contiguous.
    pub block_size: usize,
}

impl Layout {
    /// Contiguous `[kv_heads, capacity, head_dim]`: the rows of a head are adjacent.
    pub fn head_major(dtype: Dtype, kv_heads: usize, capacity: usize, head_dim: usize) -> Self {
        let row = (head_dim * dtype.size()) as isize;
        Self {
            dtype,
            head_dim,
            kv_heads,
            capacity,
            stride_element: dtype.size() as isize,
            stride_block: 0,
            stride_token: row,
            stride_head: row * capacity as isize,
            block_size: 0,
        }
    }

    /// Contiguous `[capacity, kv_heads, head_dim]`: the rows of a token are adjacent.
    pub fn token_major(dtype: Dtype, kv_heads: usize, capacity: usize, head_dim: usize) -> Self {
        let row = (head_dim * dtype.size()) as isize;
        Self {
            stride_token: row * kv_heads as isize,
            stride_head: row,
            ..Self::head_major(dtype, kv_heads, capacity, head_dim)
        }
    }

    /// Paged `[blocks, kv_heads, block_size, head_dim]`, `capacity` tokens of which may be addressed.
    pub fn paged_head_major(
        dtype: Dtype,
        kv_heads: usize,
        capacity: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Self {
        let row = (head_dim * dtype.size()) as isize;
        let head = row * block_size as isize;
        Self {
            stride_block: head * kv_heads as isize,
            stride_head: head,
            block_size,
            ..Self::head_major(dtype, kv_heads, capacity, head_dim)
        }
    }

    /// Paged `[blocks, block_size, kv_heads, head_dim]`, `capacity` tokens of which may be addressed.
    pub fn paged_token_major(
        dtype: Dtype,
        kv_heads: usize,
        capacity: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Self {
        let token = (head_dim * dtype.size() * kv_heads) as isize;
        Self {
            stride_block: token * block_size as isize,
            block_size,
            ..Self::token_major(dtype, kv_heads, capacity, head_dim)
        }
    }

    /// Bytes of the elements of one row.
    pub fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.size()
    }

    /// Tokens whose rows of one head are at one distance: those of a block, or all.
    pub(crate) fn block_or_all(&self) -> usize {
        if self.block_size == 0 { usize::MAX } else { self.block_size }
    }

    /// Whether the elements of a row are adjacent.
    #[inline]
    pub(crate) fn dense_rows(&self) -> bool {
        self.stride_element == self.dtype.size() as isize
    }
}

/// A view of one layer's K or V: `kv_heads` x `capacity` rows of `head_dim` elements, where
///
/// ```text
/// row(token t, head h) = base + block(t / block_size, h) * stride_block
///                             + (t % block_size) * stride_token + h * stride_head
/// ```
///
/// with `block(i, h)` from the block table, or `i` where there is none. Contiguous (`block_size` 0):
/// `base + t * stride_token + h * stride_head`.
///
/// It is a description, like a pointer: it may be copied and sent to other threads freely. The promises that make its
/// use sound are made once, at [`Rows::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    base: *mut u8,
    layout: Layout,
    table: Option<BlockTable>,
}

// SAFETY: what `Rows::new`'s caller promises does not depend on the thread.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Describes rows in memory of the caller's. A `table` is for paged views; a paged view without one has its blocks in
    /// the pool's order.
    ///
    /// # Safety
    /// As long as the view or a copy of it is used:
    /// - for each head below `kv_heads` and token below `capacity`, all elements of the row are valid for reading, and
    ///   for writing where the view is given to an operation that writes;
    /// - a table's entries are readable for each head, do not change, and name blocks for which this holds
    ///   ([`Rows::check_blocks`] compares them with the size of the pool);
    /// - nobody else writes a row while an operation reads it, or touches a row while an operation writes it; this
    ///   includes operations on copies of the view in other threads;
    /// - rows that an operation writes do not overlap each other.
    ///
    /// # Errors
    /// [`KernelError::Layout`] or [`KernelError::TableTooShort`] when the fields contradict each other.
    pub unsafe fn new(base: *mut u8, layout: Layout, table: Option<BlockTable>) -> Result<Self, KernelError> {
        let refuse = |reason: String| Err(KernelError::Layout { reason });
        if layout.head_dim == 0 {
            return refuse("head_dim is 0, expected at least 1".to_owned());
        }
        if base.is_null() && layout.capacity > 0 && layout.kv_heads > 0 {
            return refuse(format!("base is null for {} rows, expected an address", layout.capacity));
        }
        if layout.capacity > u32::MAX as usize {
            return refuse(format!("capacity {} does not fit a 32-bit token index", layout.capacity));
        }
        if let Some(table) = table {
            if layout.block_size == 0 {
                return refuse("a block table with block_size 0, expected the tokens of a block".to_owned());
            }
            let needed = layout.capacity.div_ceil(layout.block_size);
            if table.blocks < needed {
                return Err(KernelError::TableTooShort {
                    found: table.blocks,
                    needed,
                    capacity: layout.capacity,
                    block_size: layout.block_size,
                });
            }
            if table.data.is_null() && needed > 0 {
                return refuse("the block table's address is null, expected its first entry".to_owned());
            }
        }
        Ok(Self { base, layout, table })
    }

    /// Shape and strides.
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The block table of a paged view that has one.
    pub fn table(&self) -> Option<&BlockTable> {
        self.table.as_ref()
    }

    /// First byte of the memory described.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Element type.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Elements of a row.
    #[inline]
    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }

    /// KV heads.
    #[inline]
    pub fn kv_heads(&self) -> usize {
        self.layout.kv_heads
    }

    /// Tokens that may be addressed.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.layout.capacity
    }

    /// Compares the table's entries with the size of the pool.
    ///
    /// # Errors
    /// [`KernelError::BlockOutOfPool`] with the first entry outside `0..pool_blocks`.
    pub fn check_blocks(&self, pool_blocks: usize) -> Result<(), KernelError> {
        let Some(table) = &self.table else {
            return Ok(());
        };
        let heads = if table.stride_head == 0 { self.layout.kv_heads.min(1) } else { self.layout.kv_heads };
        for head in 0..heads {
            for entry in 0..self.layout.capacity.div_ceil(self.layout.block_size) {
                // SAFETY: `new` compared the table's length with the capacity.
                let found = unsafe { table.block(entry, head) };
                if usize::try_from(found).map_or(true, |block| block >= pool_blocks) {
                    return Err(KernelError::BlockOutOfPool { head, entry, found, pool_blocks });
                }
            }
        }
        Ok(())
    }

    /// Address of a row's first element.
    ///
    /// # Errors
    /// [`KernelError::HeadRange`], [`KernelError::TokenRange`] outside the view.
    pub fn row_ptr(&self, token: usize, head: usize) -> Result<*mut u8, KernelError> {
        self.check(head..head.saturating_add(1), token..token.saturating_add(1))?;
        // SAFETY: checked.
        Ok(unsafe { self.locate(token, head) })
    }

    /// Reads a row as f32. Exact.
    ///
    /// # Errors
    /// As [`Rows::row_ptr`]; [`KernelError::SliceLength`] unless `out` holds `head_dim` elements.
    pub fn load(&self, token: usize, head: usize, out: &mut [f32]) -> Result<(), KernelError> {
        self.load_many(head, token..token.saturating_add(1), out)
    }

    /// Reads the rows of adjacent tokens as f32 into `out`, `[tokens, head_dim]`. Exact.
    ///
    /// # Errors
    /// As [`Rows::load`].
    pub fn load_many(&self, head: usize, tokens: Range<usize>, out: &mut [f32]) -> Result<(), KernelError> {
        self.check(head..head.saturating_add(1), tokens.clone())?;
        crate::check::check_len("buffer for rows", out.len(), tokens.len() * self.layout.head_dim)?;
        for (token, row) in tokens.zip(out.chunks_exact_mut(self.layout.head_dim)) {
            // SAFETY: head and token were checked, so the row is valid for reading by `new`'s contract.
            unsafe {
                let source = self.locate(token, head);
                if self.layout.dense_rows() {
                    dtype::widen(self.layout.dtype, source, row);
                } else {
                    dtype::widen_strided(self.layout.dtype, source, self.layout.stride_element, row);
                }
            }
        }
        Ok(())
    }

    /// Writes a row, rounded to nearest, ties to even.
    ///
    /// # Errors
    /// As [`Rows::load`].
    pub fn store(&self, token: usize, head: usize, values: &[f32]) -> Result<(), KernelError> {
        self.check(head..head.saturating_add(1), token..token.saturating_add(1))?;
        crate::check::check_len("row", values.len(), self.layout.head_dim)?;
        // SAFETY: head and token were checked, so the row is valid for writing by `new`'s contract.
        unsafe {
            let target = self.locate(token, head);
            if self.layout.dense_rows() {
                dtype::narrow(self.layout.dtype, values, target);
            } else {
                dtype::narrow_strided(self.layout.dtype, values, target, self.layout.stride_element);
            }
        }
        Ok(())
    }

    /// Refuses heads and tokens outside the view.
    pub(crate) fn check(&self, heads: Range<usize>, tokens: Range<usize>) -> Result<(), KernelError> {
        if heads.end > self.layout.kv_heads || heads.start > heads.end {
            return Err(KernelError::HeadRange { heads, kv_heads: self.layout.kv_heads });
        }
        if tokens.end > self.layout.capacity || tokens.start > tokens.end {
            return Err(KernelError::TokenRange { tokens, capacity: self.layout.capacity });
        }
        Ok(())
    }

    /// The row formula.
    ///
    /// # Safety
    /// `token` must be below `capacity` and `head` below `kv_heads`.
    #[inline]
    pub(crate) unsafe fn locate(&self, token: usize, head: usize) -> *mut u8 {
        let Layout { stride_block, stride_token, stride_head, block_size, .. } = self.layout;
        let row = match block_size {
            0 => token as isize * stride_token,
            size => {
                // A division costs as much as the copy of a short row; sizes of blocks mostly are powers of two.
                let (entry, slot) = if size & (size - 1) == 0 {
                    (token >> size.trailing_zeros(), token & (size - 1))
                } else {
                    (token / size, token % size)
                };
                let block = match &self.table {
                    // SAFETY: token and head are in range, and `new` compared the table's length with the capacity.
                    Some(table) => unsafe { table.block(entry, head) },
                    None => entry as isize,
                };
                block * stride_block + slot as isize * stride_token
            }
        };
        self.base.wrapping_offset(row + head as isize * stride_head)
    }
}
