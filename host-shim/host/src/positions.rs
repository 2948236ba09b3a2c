//! Which position each stored row stands for.

use core::ffi::c_void;
use kvhook_abi::raw::KvhPositions;

use crate::error::HostError;
use crate::memory::{Allocator, U32s};

/// Positions of the rows of one layer on one rank. The first [`count`](Positions::count) rows stand in a table;
/// row `t` behind them stands for `next_position - (length - t)`. Tables are never written again, so forks and calls
/// that are under way share them.
#[derive(Clone, Default)]
pub struct Positions {
    table: Option<U32s>,
    stride_head: usize,
    count: usize,
}

impl Positions {
    /// A table: head `h`'s `count` positions start at `h * stride_head`; 0: heads agree.
    pub fn new(table: U32s, stride_head: usize, count: usize) -> Self {
        Self { table: Some(table), stride_head, count }
    }

    /// A table in ordinary memory of `count` rows for each of `heads` heads (1: heads agree), filled by `position(head, row)`.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn filled(
        heads: usize,
        count: usize,
        allocator: Allocator,
        stream: *mut c_void,
        position: impl Fn(usize, usize) -> u32,
    ) -> Result<Self, HostError> {
        let table = U32s::filled(allocator, heads * count, stream, "a position table", |table| {
            for (place, value) in table.iter_mut().enumerate() {
                *value = position(place / count, place % count);
            }
        })?;
        Ok(Self::new(table, if heads == 1 { 0 } else { count }, count))
    }

    /// Rows that the table covers.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether all heads have the same positions.
    pub fn heads_agree(&self) -> bool {
        self.stride_head == 0
    }

    /// Position of a row in a layer of `length` rows, where the table lies in ordinary memory.
    pub fn of(&self, head: usize, row: usize, length: u64, next_position: u64) -> u64 {
        match self.head(head).get(row) {
            Some(&position) => position.into(),
            None => (next_position + row as u64).saturating_sub(length),
        }
    }

    /// Forgets rows from `length` on.
    pub fn cut(&mut self, length: u64) {
        self.count = self.count.min(usize::try_from(length).unwrap_or(usize::MAX));
        if self.count == 0 {
            *self = Self::default();
        }
    }

    /// The largest position in the table, of `heads` heads; none where it lies on a device.
    pub fn last(&self, heads: usize) -> Option<u32> {
        (0..if self.heads_agree() { 1 } else { heads }).filter_map(|head| self.head(head).last().copied()).max()
    }

    /// As plugins and engines see it. Valid as long as the value or a clone of it.
    pub fn raw(&self) -> KvhPositions {
        KvhPositions {
            data: self.table.as_ref().map_or(core::ptr::null(), |table| table.data().cast_const()),
            stride_head: self.stride_head as i64,
            count: self.count as u64,
        }
    }

    /// The table goes back in the order of this stream, in which it was used last.
    pub fn release_on(&self, stream: *mut c_void) {
        if let Some(table) = &self.table {
            table.release_on(stream);
        }
    }

    fn head(&self, head: usize) -> &[u32] {
        let start = head * self.stride_head;
        self.table.as_ref().and_then(|table| table.as_slice().get(start..start + self.count)).unwrap_or(&[])
    }
}
