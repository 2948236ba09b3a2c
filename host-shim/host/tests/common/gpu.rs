//! The device's memory and streams, for tests on a GPU: with guards around every allocation.

use core::ffi::c_void;
use core::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUcontext, CUstream_flags};
use cudarc::driver::{DriverError, result};

/// Bytes before and behind each allocation.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// Page-locked memory that copies to the device start from, used in turn: copies are done long before it comes round.
const ARENA: usize = 256 << 20;

/// Device 0.
pub struct Gpu {
    pub context: CUcontext,
    arena: usize,
    used: AtomicUsize,
}

// SAFETY: the driver lets any thread use a context, and the arena's place is an atomic.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// Device 0, if there is one; then its primary context is current on this thread. Else the test says that it is skipped.
pub fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| unsafe {
        if !sys::is_culib_present() || result::init().is_err() || result::device::get_count().unwrap_or(0) == 0 {
            return None;
        }
        let context = result::primary_ctx::retain(result::device::get(0).unwrap()).unwrap();
        result::ctx::set_current(context).unwrap();
        let mut arena = null_mut();
        sys::cuMemHostAlloc(&mut arena, ARENA, sys::CU_MEMHOSTALLOC_PORTABLE).result().unwrap();
        Some(Gpu { context, arena: arena as usize, used: AtomicUsize::new(0) })
    });
    match gpu {
        Some(gpu) => unsafe { result::ctx::set_current(gpu.context).unwrap() },
        None => println!("skipped: no CUDA device"),
    }
    gpu.as_ref()
}

/// As [`gpu`], with no other test beside it: what one enqueues may block another's calls, and a capture forbids them.
pub fn alone() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    gpu().map(|_| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn here() -> &'static Gpu {
    gpu().expect("a test on the GPU began without one")
}

pub fn stream() -> *mut c_void {
    here();
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap().cast()
}

pub fn end(stream: *mut c_void) {
    here();
    unsafe { result::stream::destroy(stream.cast()) }.unwrap();
}

pub fn sync(stream: *mut c_void) {
    here();
    unsafe { result::stream::synchronize(stream.cast()) }.unwrap();
}

/// Everything enqueued so far, on every stream.
pub fn sync_all() -> Result<(), DriverError> {
    here();
    result::ctx::synchronize()
}

/// Memory with guards. Waits for nothing.
pub fn alloc(bytes: usize, stream: *mut c_void) -> *mut c_void {
    here();
    let mut data = 0;
    unsafe {
        sys::cuMemAllocAsync(&mut data, bytes + 2 * GUARD, stream.cast()).result().unwrap();
        sys::cuMemsetD8Async(data, GUARD_BYTE, bytes + 2 * GUARD, stream.cast()).result().unwrap();
    }
    (data + GUARD as u64) as *mut c_void
}

/// Whoever reads it from now on, in the stream's order, reads nonsense.
pub fn poison(data: *mut c_void, bytes: usize, stream: *mut c_void) {
    here();
    unsafe { sys::cuMemsetD8Async(data as u64, 0xdd, bytes, stream.cast()) }.result().unwrap();
}

/// Checks the guards and gives the memory back. Everything that used it is done.
pub fn release(data: *mut c_void, bytes: usize) {
    let start = (data as usize - GUARD) as *const u8;
    let intact = |at: *const u8| get(at, GUARD).iter().all(|&byte| byte == GUARD_BYTE);
    assert!(intact(start), "something wrote before an allocation of {bytes} bytes");
    assert!(intact(start.wrapping_add(GUARD + bytes)), "something wrote behind an allocation of {bytes} bytes");
    // A plain free would wait for every stream, blocked ones too.
    unsafe { sys::cuMemFreeAsync(start as u64, null_mut()) }.result().unwrap();
}

/// Copies to the device, in the stream's order; waits for nothing.
pub fn put(data: *mut u8, bytes: &[u8], stream: *mut c_void) {
    let gpu = here();
    let length = bytes.len().next_multiple_of(16);
    let next = |used: usize| if used + length > ARENA { length } else { used + length };
    let start =
        next(gpu.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| Some(next(used))).unwrap()) - length;
    let staged = (gpu.arena + start) as *mut u8;
    unsafe {
        staged.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        sys::cuMemcpyHtoDAsync_v2(data as u64, staged.cast(), bytes.len(), stream.cast()).result().unwrap();
    }
}

/// Copies from the device.
pub fn get(data: *const u8, length: usize) -> Vec<u8> {
    here();
    let mut bytes = vec![0; length];
    if length > 0 {
        unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), data as u64, length) }.result().unwrap();
    }
    bytes
}

/// No test may hang: a blocked stream goes on by itself after this time, and the test fails.
const LONGEST: Duration = Duration::from_secs(20);

/// A stream that waits until this is dropped.
pub struct Blocked(Arc<AtomicBool>);

pub fn block(stream: *mut c_void) -> Blocked {
    unsafe extern "C" fn wait(opened: *mut c_void) {
        let opened = unsafe { Arc::from_raw(opened.cast_const().cast::<AtomicBool>()) };
        let start = Instant::now();
        while !opened.load(Ordering::SeqCst) && start.elapsed() < LONGEST {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    here();
    let opened = Arc::new(AtomicBool::new(false));
    let argument = Arc::into_raw(opened.clone()).cast_mut().cast();
    unsafe { sys::cuLaunchHostFunc(stream.cast(), Some(wait), argument) }.result().unwrap();
    Blocked(opened)
}

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs with a context of its own current, which is not the primary one.
pub fn in_foreign_context<T>(run: impl FnOnce() -> T) -> T {
    let gpu = here();
    let mut context = null_mut();
    let device = result::device::get(0).unwrap();
    unsafe { sys::cuCtxCreate_v4(&mut context, null_mut(), 0, device) }.result().unwrap();
    let done = run();
    unsafe { result::ctx::set_current(gpu.context) }.unwrap();
    done
}

/// A stream of a context of its own.
pub fn foreign_stream() -> *mut c_void {
    in_foreign_context(|| {
        let mut stream = null_mut();
        unsafe { sys::cuStreamCreate(&mut stream, CUstream_flags::CU_STREAM_NON_BLOCKING as u32) }.result().unwrap();
        stream.cast()
    })
}

/// Work that was captured instead of run.
pub struct Graph(sys::CUgraphExec);

/// Captures what is enqueued on the stream, and forbids what may not be called by any thread meanwhile.
pub fn capture<T>(stream: *mut c_void, enqueue: impl FnOnce() -> T) -> (Graph, T) {
    here();
    let (mut graph, mut exec) = (null_mut(), null_mut());
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    unsafe { sys::cuStreamBeginCapture_v2(stream.cast(), mode) }.result().unwrap();
    let done = enqueue();
    unsafe {
        sys::cuStreamEndCapture(stream.cast(), &mut graph).result().unwrap();
        sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result().unwrap();
        sys::cuGraphDestroy(graph).result().unwrap();
    }
    (Graph(exec), done)
}

impl Graph {
    /// Runs it, and waits for it.
    pub fn replay(&self, stream: *mut c_void) {
        here();
        unsafe { sys::cuGraphLaunch(self.0, stream.cast()) }.result().unwrap();
        sync(stream);
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        unsafe { sys::cuGraphExecDestroy(self.0) }.result().unwrap();
    }
}
