//! Moving runs of rows from one view to another.

use std::ops::Range;

use crate::error::KernelError;
use crate::rows::{BlockTable, Rows};

/// Bytes from which on a general memmove is faster than rows copied in line.
const RUN_BYTES: usize = 8 << 10;

/// Bytes of one move from which on stores go around the caches.
const STREAM_BYTES: usize = 1 << 20;

/// Bytes between the row that is copied and the row that is fetched.
const AHEAD_BYTES: usize = 8 << 10;

/// Bytes between two rows from which on a sweep leaves out what lies between: the processor's prefetch follows a stream
/// no further than a page.
const GAP_BYTES: usize = 4 << 10;

/// Two views of which rows move from the first to the second.
///
/// Passed by value, with the views in it: the stores of a move could change what a reference points to, for all that the
/// compiler knows, and then each row would load the layouts again.
#[derive(Clone, Copy)]
pub(crate) struct Mover {
    source: Rows,
    destination: Rows,
    /// Heads to move one by one; where one token's heads are moved together, the first of them.
    heads: (usize, usize),
    /// Bytes that move together: a row, or a token's rows of all heads.
    unit: usize,
    /// Whether the elements of a row are adjacent in both views.
    dense: bool,
    /// Whether what moves together is adjacent from token to token in both views.
    adjacent: bool,
    /// Whether much moves: more than fits the caches beside other things.
    large: bool,
    /// Whether stores go around the caches.
    stream: bool,
}

impl Mover {
    /// For `count` rows of each head; `shared`: all heads move the same ones.
    pub(crate) fn new(
        source: &Rows,
        destination: &Rows,
        heads: Range<usize>,
        count: usize,
        shared: bool,
    ) -> Result<Self, KernelError> {
        let (from, to) = (source.layout(), destination.layout());
        if from.dtype != to.dtype {
            return Err(KernelError::DtypeMismatch { source_dtype: from.dtype, destination_dtype: to.dtype });
        }
        if from.head_dim != to.head_dim {
            return Err(KernelError::HeadDimMismatch {
                what: "destination",
                found: to.head_dim,
                expected: from.head_dim,
            });
        }
        source.check(heads.clone(), 0..0)?;
        destination.check(heads.clone(), 0..0)?;
        let row = from.row_bytes();
        let dense = from.dense_rows() && to.dense_rows();
        let adjacent_heads = |rows: &Rows| {
            rows.layout().stride_head == row as isize
                && rows.table().is_none_or(|table: &BlockTable| table.stride_head == 0)
        };
        let together = shared && dense && !heads.is_empty() && adjacent_heads(source) && adjacent_heads(destination);
        let bytes = count.saturating_mul(row).saturating_mul(heads.len());
        let (heads, unit) = if together { (heads.start..heads.start + 1, row * heads.len()) } else { (heads, row) };
        let adjacent = dense && from.stride_token == unit as isize && to.stride_token == unit as isize;
        let large = dense && bytes >= STREAM_BYTES;
        let stream = large && lines_are_whole(destination, unit);
        let (source, destination, heads) = (*source, *destination, (heads.start, heads.end));
        Ok(Self { source, destination, heads, unit, dense, adjacent, large, stream })
    }

    /// Heads to move one by one.
    pub(crate) fn heads(&self) -> Range<usize> {
        self.heads.0..self.heads.1
    }

    /// Adjacent tokens from which on moving them as one piece is faster than row by row; `None`: it never is.
    pub(crate) fn worthwhile_run(&self) -> Option<usize> {
        let run = RUN_BYTES.div_ceil(self.unit).max(2);
        let fits = |rows: &Rows| rows.layout().block_size == 0 || rows.layout().block_size >= run;
        (self.adjacent && fits(&self.source) && fits(&self.destination)).then_some(run)
    }

    /// How many rows ahead of the one that is copied to call [`Mover::fetch_ahead`].
    pub(crate) fn ahead(&self) -> usize {
        (AHEAD_BYTES / self.unit).max(1)
    }

    /// Most adjacent rows between two kept ones that are worth fetching just to keep the processor's own prefetch going;
    /// `None`: it never is, as for little that moves, and for long rows, each of which is a stream of its own.
    pub(crate) fn widest_gap(&self) -> Option<usize> {
        let rows = GAP_BYTES / self.unit;
        (cfg!(target_arch = "x86_64") && self.large && rows > 3).then_some(rows)
    }

    /// Starts loading a row that will be moved some rows later: into the second-level cache, which takes more requests
    /// at once than the first.
    ///
    /// # Safety
    /// The row must be inside the source, and the head among `heads`.
    #[inline(always)]
    pub(crate) unsafe fn fetch_ahead(self, token: usize, head: usize) {
        // SAFETY: the caller's promise.
        let row = unsafe { self.source.locate(token, head) };
        prefetch::<false>(row, self.unit);
    }

    /// Starts loading a row that is not moved, as one link in a stream of adjacent rows.
    #[inline(always)]
    pub(crate) fn fetch_between(self, row: *const u8) {
        prefetch::<true>(row, self.unit);
    }

    /// The rows of a head around a token, as far as its block reaches.
    ///
    /// # Safety
    /// The row must be inside the source, and the head among `heads`.
    #[inline(always)]
    pub(crate) unsafe fn window(self, token: usize, head: usize) -> Window {
        // SAFETY: the caller's promise.
        let row = unsafe { self.source.locate(token, head) };
        Window { row, token, stride: self.source.layout().stride_token }
    }

    /// Moves a row of the source, or a token's rows of all heads.
    ///
    /// # Safety
    /// `source` must be such a row, `to` inside the destination, and the head among `heads`.
    #[inline(always)]
    pub(crate) unsafe fn move_from(self, source: *const u8, to: usize, head: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.move_unit(source, self.destination.locate(to, head)) };
    }

    /// Whether both views describe the same rows, so that a move is in place.
    pub(crate) fn in_place(&self) -> bool {
        let (from, to) = (&self.source, &self.destination);
        let strides = |rows: &Rows| {
            let layout = rows.layout();
            let block = if layout.block_size == 0 { 0 } else { layout.stride_block };
            (rows.base(), block, layout.stride_token, layout.stride_head, layout.block_size)
        };
        let table = |rows: &Rows| rows.table().map(|table| (table.data, table.kind, table.stride_head));
        strides(from) == strides(to) && table(from) == table(to)
    }

    /// Moves rows `from .. from + count` of a head to `to ..`; where both are the same memory, as if through a buffer.
    ///
    /// # Safety
    /// The rows must be inside both views, and the head among `heads`.
    #[inline]
    pub(crate) unsafe fn move_run(self, from: usize, to: usize, count: usize, head: usize) {
        let upwards = to > from && self.in_place();
        let mut done = 0;
        while done < count {
            // Upwards the last rows move first, so that none is overwritten before it was read.
            let (from, to, chunk) = if upwards {
                let left = count - done;
                let chunk =
                    left.min(last_of_block(&self.source, from + left)).min(last_of_block(&self.destination, to + left));
                (from + left - chunk, to + left - chunk, chunk)
            } else {
                let chunk = (count - done)
                    .min(rest_of_block(&self.source, from + done))
                    .min(rest_of_block(&self.destination, to + done));
                (from + done, to + done, chunk)
            };
            // SAFETY: the caller promises the rows; the chunk stays within one block of each view.
            unsafe {
                self.move_chunk(self.source.locate(from, head), self.destination.locate(to, head), chunk, upwards);
            }
            done += chunk;
        }
    }

    /// # Safety
    /// `count` rows from each address on must be inside one block of the views.
    #[inline]
    unsafe fn move_chunk(&self, source: *const u8, destination: *mut u8, count: usize, upwards: bool) {
        if self.adjacent {
            let bytes = count * self.unit;
            // SAFETY: the rows are adjacent in both views. In line only downwards, as `copy_row` asks.
            unsafe {
                if upwards || (bytes >= RUN_BYTES && !self.stream) {
                    std::ptr::copy(source, destination, bytes);
                } else {
                    self.copy_row(source, destination, bytes);
                }
            }
            return;
        }
        let (from_stride, to_stride) = (self.source.layout().stride_token, self.destination.layout().stride_token);
        for place in 0..count {
            let place = if upwards { count - 1 - place } else { place } as isize;
            // SAFETY: the caller promises both rows.
            unsafe {
                self.move_unit(
                    source.wrapping_offset(place * from_stride),
                    destination.wrapping_offset(place * to_stride),
                );
            }
        }
    }

    /// Moves one row, or a token's rows of all heads.
    ///
    /// # Safety
    /// The rows must be inside both views, and the head among `heads`.
    #[inline(always)]
    pub(crate) unsafe fn move_one(self, from: usize, to: usize, head: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.move_unit(self.source.locate(from, head), self.destination.locate(to, head)) };
    }

    /// # Safety
    /// A row at each address must be inside the views.
    #[inline(always)]
    unsafe fn move_unit(self, source: *const u8, destination: *mut u8) {
        if source == destination {
            return;
        }
        // SAFETY: the caller promises both rows; two different rows do not overlap.
        unsafe {
            if self.dense {
                self.copy_row(source, destination, self.unit);
            } else {
                self.move_elements(source, destination);
            }
        }
    }

    /// # Safety
    /// As [`copy_row`].
    #[inline(always)]
    unsafe fn copy_row(self, source: *const u8, destination: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise; `stream` is set for aligned rows only.
        unsafe {
            // A size that the compiler knows unrolls the loop.
            match (self.stream, bytes) {
                (true, 128) => copy_row::<true>(source, destination, 128),
                (true, 256) => copy_row::<true>(source, destination, 256),
                (true, _) => copy_row::<true>(source, destination, bytes),
                (false, 128) => copy_row::<false>(source, destination, 128),
                (false, 256) => copy_row::<false>(source, destination, 256),
                (false, _) => copy_row::<false>(source, destination, bytes),
            }
        }
    }

    /// Orders stores around the caches before all later ones, as other threads expect.
    pub(crate) fn finish(&self) {
        #[cfg(target_arch = "x86_64")]
        if self.stream {
            // SAFETY: each processor of this architecture has SSE.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }

    /// # Safety
    /// A row at each address must be inside the views.
    unsafe fn move_elements(self, source: *const u8, destination: *mut u8) {
        let (from, to) = (self.source.layout(), self.destination.layout());
        for element in 0..from.head_dim as isize {
            let source = source.wrapping_offset(element * from.stride_element);
            let destination = destination.wrapping_offset(element * to.stride_element);
            // SAFETY: the caller promises all elements of the row.
            unsafe { std::ptr::copy(source, destination, from.dtype.size()) };
        }
    }
}

/// Rows of one head in one block, at one distance.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    row: *const u8,
    /// The token of `row`.
    token: usize,
    stride: isize,
}

impl Window {
    /// Address of the row of a token, not before the first and in its block.
    #[inline(always)]
    pub(crate) fn row(self, token: usize) -> *const u8 {
        self.row.wrapping_offset((token - self.token) as isize * self.stride)
    }
}

/// Copies a row by pieces of 64 and 16 bytes, in line: for a row of some hundred bytes the call of a general memcpy costs
/// as much as the copy. `STREAM`: around the caches.
///
/// # Safety
/// `bytes` bytes must be readable and writable. They may overlap where `destination` is the lower address. With `STREAM`
/// `destination` must be aligned to 16 bytes.
#[inline(always)]
unsafe fn copy_row<const STREAM: bool>(source: *const u8, destination: *mut u8, bytes: usize) {
    let mut done = 0;
    // SAFETY: each piece ends at or before `bytes`.
    unsafe {
        while done + 64 <= bytes {
            let piece: [Piece; 4] = source.add(done).cast::<[Piece; 4]>().read_unaligned();
            for (place, piece) in piece.into_iter().enumerate() {
                store::<STREAM>(destination.add(done + 16 * place), piece);
            }
            done += 64;
        }
        while done + 16 <= bytes {
            let piece: Piece = source.add(done).cast::<Piece>().read_unaligned();
            store::<STREAM>(destination.add(done), piece);
            done += 16;
        }
        if done < bytes {
            destination.add(done).copy_from(source.add(done), bytes - done);
        }
    }
}

/// Sixteen bytes in a register.
#[cfg(target_arch = "x86_64")]
type Piece = std::arch::x86_64::__m128i;
/// Sixteen bytes in a register.
#[cfg(not(target_arch = "x86_64"))]
type Piece = u128;

/// # Safety
/// 16 bytes must be writable, and with `STREAM` aligned.
#[inline(always)]
unsafe fn store<const STREAM: bool>(destination: *mut u8, piece: Piece) {
    #[cfg(target_arch = "x86_64")]
    if STREAM {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm_stream_si128(destination.cast(), piece) };
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { destination.cast::<Piece>().write_unaligned(piece) };
}

/// Starts loading `bytes` bytes into the cache: the first level with `FIRST`, else the second.
#[inline(always)]
fn prefetch<const FIRST: bool>(row: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        for line in (0..bytes).step_by(64) {
            let line = row.wrapping_add(line).cast();
            // SAFETY: a prefetch reads nothing that the program sees, and never faults.
            unsafe { if FIRST { _mm_prefetch::<_MM_HINT_T0>(line) } else { _mm_prefetch::<_MM_HINT_T1>(line) } };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (row, bytes);
}

/// Whether rows of `unit` bytes fill whole cache lines, as stores around the caches need to be worth it.
fn lines_are_whole(rows: &Rows, unit: usize) -> bool {
    let layout = rows.layout();
    let strides = [layout.stride_block * isize::from(layout.block_size > 0), layout.stride_token, layout.stride_head];
    cfg!(target_arch = "x86_64")
        && (rows.base().addr() | unit).is_multiple_of(64)
        && strides.iter().all(|stride| stride % 64 == 0)
}

/// Rows from `token` to the end of its block, itself included.
#[inline]
fn rest_of_block(rows: &Rows, token: usize) -> usize {
    match rows.layout().block_size {
        0 => usize::MAX,
        size => size - token % size,
    }
}

/// Rows from the start of its block to `end`, the block being that of the row before `end`.
#[inline]
fn last_of_block(rows: &Rows, end: usize) -> usize {
    match rows.layout().block_size {
        0 => usize::MAX,
        size => (end - 1) % size + 1,
    }
}
