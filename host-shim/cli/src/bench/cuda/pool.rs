//! The memory that a host gets: the driver's own allocator in the stream's order, as an engine may have it.

use core::ffi::c_void;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cudarc::driver::sys::{self, CUmemPool_attribute};
use kvhook_host::raw::KvhookCallbacks;

use super::super::error::BenchError;
use super::{Called, memory};

/// Bytes for what is asked for during a capture, whose work never runs.
const ARENA: u64 = 4 << 30;

/// Lent to a host as the context of its callbacks: stays where it is.
pub(super) struct Pool {
    /// While a stream is captured, memory comes from the arena, and what goes back is kept: allocations would become a
    /// part of the graph.
    capturing: AtomicBool,
    arena: u64,
    used: AtomicU64,
    /// Given back during a capture.
    returned: Mutex<Vec<(u64, usize)>>,
}

impl Pool {
    pub(super) fn new(device: sys::CUdevice) -> Result<Box<Self>, BenchError> {
        // What goes back stays in the pool. Without this each wait for the device gives it to the system.
        let mut threshold = u64::MAX;
        let mut pool = core::ptr::null_mut();
        // SAFETY: the device exists; the attribute is a u64.
        unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, device).called("the device's pool")?;
            let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).called("the device's pool")?;
        }
        Ok(Box::new(Self {
            capturing: AtomicBool::new(false),
            arena: memory(ARENA as usize)?,
            used: AtomicU64::new(0),
            returned: Mutex::default(),
        }))
    }

    pub(super) fn callbacks(&self) -> KvhookCallbacks {
        KvhookCallbacks {
            struct_size: size_of::<KvhookCallbacks>(),
            context: core::ptr::from_ref(self).cast_mut().cast(),
            log: None,
            log_max_level: None,
            allocate: Some(allocate),
            free: Some(free),
        }
    }

    /// A stream is captured from now on.
    pub(super) fn begin_capture(&self) {
        self.used.store(0, Ordering::Relaxed);
        self.capturing.store(true, Ordering::Relaxed);
    }

    /// No stream is captured any more.
    pub(super) fn end_capture(&self) {
        self.capturing.store(false, Ordering::Relaxed);
        for (address, stream) in self.returned.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: it came from `cuMemAllocAsync`, and its owner gave it back.
            let _ = unsafe { sys::cuMemFreeAsync(address, stream as sys::CUstream) };
        }
    }

    fn owns(&self, address: u64) -> bool {
        (self.arena..self.arena + ARENA).contains(&address)
    }
}

unsafe extern "C" fn allocate(pool: *mut c_void, _: u32, bytes: u64, _: u64, stream: *mut c_void) -> *mut c_void {
    // SAFETY: the host hands back its context, which lives as long as the machine.
    let pool = unsafe { &*pool.cast::<Pool>() };
    if pool.capturing.load(Ordering::Relaxed) {
        let start = pool.used.fetch_add(bytes.next_multiple_of(512), Ordering::Relaxed);
        return if start + bytes <= ARENA { (pool.arena + start) as *mut c_void } else { core::ptr::null_mut() };
    }
    let mut address = 0;
    // SAFETY: the host names the stream that it was given. What it gets is aligned to 256 bytes, more than it asks for.
    match unsafe { sys::cuMemAllocAsync(&mut address, bytes as usize, stream.cast()) }.result() {
        Ok(()) => address as *mut c_void,
        Err(_) => core::ptr::null_mut(),
    }
}

unsafe extern "C" fn free(pool: *mut c_void, _: u32, data: *mut c_void, _: u64, _: u64, stream: *mut c_void) {
    // SAFETY: as above.
    let pool = unsafe { &*pool.cast::<Pool>() };
    let address = data as u64;
    if pool.owns(address) {
        return;
    }
    if pool.capturing.load(Ordering::Relaxed) {
        pool.returned.lock().unwrap_or_else(PoisonError::into_inner).push((address, stream as usize));
        return;
    }
    // SAFETY: it came from `cuMemAllocAsync`. An error is told by the next call.
    let _ = unsafe { sys::cuMemFreeAsync(address, stream.cast()) };
}
