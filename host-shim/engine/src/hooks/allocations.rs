//! Memory that the host takes for plugins and plans: counted, and refused on request.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::device::Backend;

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

    /// Counts an allocation that `give` makes, unless it is the one to be refused; null then.
    pub(super) fn allocate(&self, bytes: u64, give: impl FnOnce() -> *mut c_void) -> *mut c_void {
        let number = self.asked.fetch_add(1, Relaxed) + 1;
        if number == self.refused.load(Relaxed) {
            return ptr::null_mut();
        }
        let data = give();
        if !data.is_null() {
            self.live_bytes.fetch_add(bytes, Relaxed);
        }
        data
    }

    /// So many bytes have come back.
    pub(super) fn freed(&self, bytes: u64) {
        self.live_bytes.fetch_sub(bytes, Relaxed);
    }
}

/// Memory of a device; null when there is none.
pub(super) fn give(backend: &Backend, bytes: u64, alignment: u64) -> *mut c_void {
    match backend {
        // SAFETY: `layout` refuses a size of 0.
        Backend::Cpu => layout(bytes, alignment).map_or(ptr::null_mut(), |layout| unsafe { alloc(layout) }.cast()),
        #[cfg(feature = "cuda")]
        Backend::Cuda(cuda) => cuda.driver().lend(bytes, alignment),
    }
}

/// Takes it back; on a CUDA device in the stream's order.
///
/// # Safety
/// `data` came from [`give`] with the same size, alignment and device, and no work is enqueued with it from now on.
pub(super) unsafe fn take_back(backend: &Backend, data: *mut c_void, bytes: u64, alignment: u64) {
    match backend {
        Backend::Cpu => {
            if let Some(layout) = layout(bytes, alignment) {
                // SAFETY: passed on from the caller.
                unsafe { dealloc(data.cast(), layout) };
            }
        }
        #[cfg(feature = "cuda")]
        // SAFETY: as above.
        Backend::Cuda(cuda) => unsafe { cuda.driver().take_back(data) },
    }
}

fn layout(bytes: u64, alignment: u64) -> Option<Layout> {
    let layout = Layout::from_size_align(bytes.try_into().ok()?, alignment.try_into().ok()?).ok()?;
    Some(layout).filter(|layout| layout.size() > 0)
}
