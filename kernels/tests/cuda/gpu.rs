//! A device, memory on it between guards, and caches copied to it.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::{result, sys};
use half::{bf16, f16};
use kvhook_kernels::cuda::{Device, DeviceSlice, Outcome, Rows, Stream, Verdict};
use kvhook_kernels::{BlockTable, Dtype, IndexKind};

use crate::common::{Cache, Random, Shape};

/// Bytes around memory that nobody may touch, and what they hold.
const GUARD: usize = 4096;
const GUARD_BYTE: u8 = 0xa5;

thread_local! {
    /// One test at a time: to free memory is to wait for all streams, and one test blocks its own.
    static TURN: MutexGuard<'static, ()> = {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    };
}

/// The device that all tests share, for the thread of a test; `None`, and a line that says so, without one.
pub fn device() -> Option<&'static Device> {
    TURN.with(|_| ());
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| match Device::adopt(0, std::ptr::null_mut()) {
        Ok(device) => Some(device),
        Err(kvhook_kernels::cuda::CudaError::NoDriver | kvhook_kernels::cuda::CudaError::NoDevice { .. }) => None,
        Err(error) => panic!("{error}"),
    });
    match device {
        Some(device) => {
            enter();
            Some(device)
        }
        None => {
            println!("skipped: no CUDA device");
            None
        }
    }
}

/// Rounds of a test: `most`, or fewer where `KVHOOK_TEST_ROUNDS` says so, as compute-sanitizer is slow.
pub fn rounds(most: usize) -> usize {
    let wanted = std::env::var("KVHOOK_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    wanted.unwrap_or(most).min(most)
}

/// Makes the primary context current on this thread, for the calls of the tests themselves.
pub fn enter() {
    let device = result::device::get(0).unwrap();
    // SAFETY: the device exists; the context is kept for the process.
    unsafe {
        let context = result::primary_ctx::retain(device).unwrap();
        result::ctx::set_current(context).unwrap();
    }
}

/// A stream of the test's own.
pub struct OwnStream(sys::CUstream);

impl OwnStream {
    pub fn new() -> Self {
        Self(result::stream::create(result::stream::StreamKind::NonBlocking).unwrap())
    }

    pub fn stream(&self) -> Stream {
        // SAFETY: it lives as long as `self`, which outlives its use.
        unsafe { Stream::borrow(self.0.cast::<c_void>()) }
    }

    pub fn raw(&self) -> sys::CUstream {
        self.0
    }

    pub fn wait(&self) {
        // SAFETY: the stream is ours.
        unsafe { result::stream::synchronize(self.0) }.unwrap();
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: the stream is ours, and not used any more.
        unsafe { result::stream::destroy(self.0) }.unwrap();
    }
}

/// Device memory between guards, which are compared when it is dropped.
pub struct Memory {
    allocation: u64,
    len: usize,
    /// From a multiple of 256 to the first byte.
    shift: usize,
}

impl Memory {
    pub fn new(bytes: &[u8]) -> Self {
        Self::shifted(bytes, 0)
    }

    /// `len` bytes of no meaning.
    pub fn poisoned(len: usize) -> Self {
        Self::new(&vec![0x5a; len])
    }

    pub fn of<T: Copy>(values: &[T]) -> Self {
        // SAFETY: plain numbers, read as bytes.
        Self::new(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) })
    }

    pub fn shifted(bytes: &[u8], shift: usize) -> Self {
        let mut all = vec![GUARD_BYTE; bytes.len() + 2 * GUARD + 256];
        all[GUARD + shift..][..bytes.len()].copy_from_slice(bytes);
        // SAFETY: a fresh allocation of that many bytes; null is the default stream.
        unsafe {
            let allocation = result::malloc_sync(all.len()).unwrap();
            result::memcpy_htod_sync(allocation, &all).unwrap();
            // That call may return before pageable memory has arrived, and the tests' streams do not wait for it.
            result::stream::synchronize(std::ptr::null_mut()).unwrap();
            Self { allocation, len: bytes.len(), shift }
        }
    }

    pub fn address(&self) -> u64 {
        self.allocation + (GUARD + self.shift) as u64
    }

    pub fn slice<T>(&self) -> DeviceSlice<T> {
        // SAFETY: the tests wait for their work before the memory goes.
        unsafe { DeviceSlice::new(self.address(), self.len / size_of::<T>()) }.unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: the memory is that long.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, self.address()) }.unwrap();
        bytes
    }

    pub fn values<T: Copy>(&self) -> Vec<T> {
        let bytes = self.bytes();
        // SAFETY: plain numbers, for which any bytes are valid.
        bytes.chunks_exact(size_of::<T>()).map(|one| unsafe { one.as_ptr().cast::<T>().read_unaligned() }).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut all = vec![0; self.len + 2 * GUARD + 256];
        // SAFETY: the allocation is that long, and nothing uses it any more.
        unsafe {
            result::memcpy_dtoh_sync(&mut all, self.allocation).unwrap();
            result::free_sync(self.allocation).unwrap();
        }
        let start = GUARD + self.shift;
        let intact = all[..start].iter().chain(&all[start + self.len..]).all(|&byte| byte == GUARD_BYTE);
        if !std::thread::panicking() {
            assert!(intact, "a guard was overwritten");
        }
    }
}

/// A cache copied to the device.
pub struct DeviceCache {
    pub memory: Memory,
    table: Memory,
    rows: Rows,
}

impl DeviceCache {
    /// Row 0 begins at a multiple of 256 bytes, or one element behind it.
    pub fn new(cache: &Cache, odd: bool) -> Self {
        let element = cache.shape.dtype.size();
        let wanted = if odd { element } else { 0 };
        let shift = (256 + wanted - cache.start() % 256) % 256;
        let memory = Memory::shifted(&cache.bytes, shift);
        let table = Memory::new(cache.table_bytes());
        let entries = cache.table().map(|host| BlockTable { data: table.address() as *const u8, ..host });
        // SAFETY: the rows lie inside `memory`, and the table inside `table`, which live as long.
        let rows = unsafe { Rows::new(memory.address() + cache.start() as u64, *cache.layout(), entries) }.unwrap();
        Self { memory, table, rows }
    }

    pub fn rows(&self) -> Rows {
        self.rows
    }
}

/// The word of a verdict, and pinned memory for it.
pub struct Judge {
    memory: Memory,
    host: *mut u64,
}

impl Judge {
    pub fn new() -> Self {
        // SAFETY: an allocation of 8 bytes, written here.
        unsafe {
            let host = result::malloc_host(8, 0).unwrap().cast::<u64>();
            *host = Verdict::PENDING;
            Self { memory: Memory::poisoned(8), host }
        }
    }

    pub fn verdict(&self) -> Verdict {
        Verdict::new(self.memory.slice()).unwrap()
    }

    /// Fetches the verdict and waits for it.
    pub fn outcome(&self, device: &Device, stream: &OwnStream) -> Outcome {
        // SAFETY: `host` is ours, pinned, and lives on.
        unsafe {
            self.host.write(Verdict::PENDING);
            self.verdict().fetch(device, stream.stream(), self.host).unwrap();
            stream.wait();
            Outcome::decode(self.host.read_volatile())
        }
    }

    /// The pinned word as it is now.
    pub fn peek(&self) -> Outcome {
        // SAFETY: `host` is ours.
        Outcome::decode(unsafe { self.host.read_volatile() })
    }

    pub fn host(&self) -> *mut u64 {
        self.host
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and no copy is under way.
        unsafe { result::free_host(self.host.cast()) }.unwrap();
    }
}

/// A shape that a kernel may meet: all dtypes and layouts, common head dimensions and others.
pub fn shape(random: &mut Random, capacity: usize) -> Shape {
    let dims = [8, 24, 40, 64, 64, 80, 96, 128, 128, 128, 192, 256];
    any_shape(random, capacity, &dims)
}

/// A shape with one of these head dimensions.
pub fn any_shape(random: &mut Random, capacity: usize, dims: &[usize]) -> Shape {
    let block_size = [0, 0, 1, 3, 16, 16, 64, 256][random.below(8)];
    Shape {
        dtype: [Dtype::F32, Dtype::F16, Dtype::Bf16][random.below(3)],
        kv_heads: 1 + random.below(9),
        capacity,
        head_dim: dims[random.below(dims.len())],
        block_size,
        token_major: random.below(2) == 0,
        element_step: 1 + usize::from(random.below(6) == 0),
        table_per_head: block_size > 0 && random.below(3) == 0,
        kind: [IndexKind::U32, IndexKind::I32, IndexKind::I64][random.below(3)],
        seed: random.next() & !1,
    }
}

/// Units in the last place of a dtype at 1.
pub fn epsilon(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(f32::EPSILON),
        Dtype::F16 => f16::EPSILON.to_f64(),
        Dtype::Bf16 => bf16::EPSILON.to_f64(),
    }
}
