//! Memory that the host takes for plugins and plans: counted, and refused on request.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts what the host allocates, so that a test can show that everything goes back, and refuses one allocation, so that
/// it can show what happens then.
#[derive(Debug, Default)]
pub struct Allocations {
    asked: AtomicU64,
    live_bytes: AtomicU64,
    /// Number of the allocation to refuse; 0: none.
    refused: AtomicU64,
}

impl Allocations {
    /// How often memory was asked for.
    pub fn asked(&self) -> u64 {
        self.asked.load(Relaxed)
    }

    /// Bytes that were given and have not come back.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Relaxed)
    }

    /// Refuses the allocation number `number`, counted from 1 over all; 0: refuses none.
    pub fn refuse(&self, number: u64) {
        self.refused.store(number, Relaxed);
    }

    pub(super) fn allocate(&self, bytes: u64, alignment: u64) -> *mut c_void {
        let number = self.asked.fetch_add(1, Relaxed) + 1;
        let Some(layout) = layout(bytes, alignment).filter(|_| number != self.refused.load(Relaxed)) else {
            return ptr::null_mut();
        };
        // SAFETY: `layout` refuses a size of 0.
        let data = unsafe { alloc(layout) };
        if !data.is_null() {
            self.live_bytes.fetch_add(bytes, Relaxed);
        }
        data.cast()
    }

    /// # Safety
    /// `data` came from [`allocate`](Self::allocate) with the same size and alignment, and is not used any more.
    pub(super) unsafe fn free(&self, data: *mut c_void, bytes: u64, alignment: u64) {
        if let Some(layout) = layout(bytes, alignment) {
            // SAFETY: passed on from the caller.
            unsafe { dealloc(data.cast(), layout) };
            self.live_bytes.fetch_sub(bytes, Relaxed);
        }
    }
}

fn layout(bytes: u64, alignment: u64) -> Option<Layout> {
    let layout = Layout::from_size_align(bytes.try_into().ok()?, alignment.try_into().ok()?).ok()?;
    Some(layout).filter(|layout| layout.size() > 0)
}
