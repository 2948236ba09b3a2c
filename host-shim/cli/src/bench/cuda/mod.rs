//! A CUDA device: memory, a stream, and times between events.

mod capture;
mod moves;
mod pool;

use core::ffi::c_void;
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUdevice_attribute, CUevent, CUevent_flags, CUresult, CUstream};
use cudarc::driver::{DriverError, result};
use kvhook_abi::raw::{KVH_DEVICE_CUDA, KvhDevice};
use kvhook_host::raw::KvhookCallbacks;
use kvhook_kernels::cuda::{Device, Stream};

use super::cache::Cache;
use super::cpu::random_bytes;
use super::error::BenchError;
use super::machine::{Machine, Measured, Memory, PATIENCE_SECONDS, RUNS, Spread, WARM_UP, Work};
use super::report::Hardware;
use super::rows::Row;
use pool::Pool;

/// Bytes of random numbers that caches are filled from, and that are read to bring other rows out of the second-level
/// cache. No multiple of a row's bytes, so that rows further on differ.
const PATTERN: usize = (128 << 20) + 112;
/// Bytes of the copy that the bandwidth is taken of.
const COPY: usize = 2 << 30;
/// The pattern is read in parts of this size, all to the same place.
const PART: usize = 4 << 20;
/// Exponentials of a multiprocessor in each cycle.
const EXPONENTIALS: f64 = 16.0;

/// Names what was called for.
trait Called<T> {
    fn called(self, call: &'static str) -> Result<T, BenchError>;
}

impl<T> Called<T> for Result<T, DriverError> {
    fn called(self, call: &'static str) -> Result<T, BenchError> {
        self.map_err(|error| BenchError::Driver { call, answer: format!("{error:?}") })
    }
}

impl Called<()> for CUresult {
    fn called(self, call: &'static str) -> Result<(), BenchError> {
        self.result().called(call)
    }
}

/// Device 0, its primary context current on the thread that opened it.
pub struct Cuda {
    kernels: Device,
    ordinal: sys::CUdevice,
    stream: CUstream,
    pattern: u64,
    /// Where the pattern is read to.
    sink: u64,
    pool: Box<Pool>,
}

impl Cuda {
    /// Opens device 0.
    ///
    /// # Errors
    /// [`BenchError::NoDevice`], [`BenchError::Driver`].
    pub fn open() -> Result<Self, BenchError> {
        let kernels =
            Device::adopt(0, core::ptr::null_mut()).map_err(|error| BenchError::NoDevice(error.to_string()))?;
        let ordinal = result::device::get(0).called("a device")?;
        // SAFETY: the device exists; its context is kept for the process.
        unsafe {
            let context = result::primary_ctx::retain(ordinal).called("the primary context")?;
            result::ctx::set_current(context).called("the primary context")?;
        }
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).called("a stream")?;
        let cuda = Self {
            kernels,
            ordinal,
            stream,
            pattern: memory(PATTERN)?,
            sink: memory(PART)?,
            pool: Pool::new(ordinal)?,
        };
        // SAFETY: the memory is that long.
        unsafe { result::memcpy_htod_sync(cuda.pattern, &random_bytes(PATTERN)) }.called("a copy")?;
        Ok(cuda)
    }

    fn attribute(&self, attribute: CUdevice_attribute) -> Option<i32> {
        // SAFETY: the device exists.
        unsafe { result::device::get_attribute(self.ordinal, attribute) }.ok()
    }

    fn synchronize(&self) -> Result<(), BenchError> {
        // SAFETY: the stream is ours.
        unsafe { result::stream::synchronize(self.stream) }.called("waiting for the stream")
    }

    fn record(&self, event: &Event) -> Result<(), BenchError> {
        // SAFETY: event and stream are ours.
        unsafe { result::event::record(event.0, self.stream) }.called("an event")
    }

    /// The kernels' view of the stream.
    fn queue(&self) -> Stream {
        // SAFETY: the stream lives as long as the process.
        unsafe { Stream::borrow(self.stream.cast::<c_void>()) }
    }

    /// Copies on the device, in the stream's order.
    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), BenchError> {
        // SAFETY: callers name memory of their own that is that long.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.called("a copy")
    }

    /// Brings what was read and written before out of the second-level cache, and leaves little there to be written back.
    fn cool(&self) -> Result<(), BenchError> {
        for start in (0..PATTERN - PART).step_by(PART) {
            self.copy(self.sink, self.pattern + start as u64, PART)?;
        }
        Ok(())
    }

    /// Holds the stream until the value is dropped: what is enqueued meanwhile begins together.
    fn hold(&self) -> Result<Held, BenchError> {
        unsafe extern "C" fn wait(open: *mut c_void) {
            // SAFETY: this was made of an `Arc` below, for this call.
            let open = unsafe { Arc::from_raw(open.cast_const().cast::<AtomicBool>()) };
            while !open.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
        }
        let held = Held(Arc::new(AtomicBool::new(false)));
        let argument = Arc::into_raw(held.0.clone()).cast_mut().cast();
        // SAFETY: the function takes that argument, and calls nothing of CUDA.
        unsafe { sys::cuLaunchHostFunc(self.stream, Some(wait), argument) }.called("a host function")?;
        Ok(held)
    }

    /// Waits for the verdict; the time of the look that found it.
    fn wait(&self, work: &mut dyn Work) -> Result<Duration, BenchError> {
        let start = Instant::now();
        loop {
            let look = Instant::now();
            if work.is_ready()? {
                return Ok(look.elapsed());
            }
            if start.elapsed() > Duration::from_secs(PATIENCE_SECONDS) {
                return Err(BenchError::NoVerdict { seconds: PATIENCE_SECONDS });
            }
            std::hint::spin_loop();
        }
    }

    /// One call with the stream held: seconds of the device, of the host, and of the host for the second half.
    fn held_call(&self, work: &mut dyn Work, events: &[Event; 4]) -> Result<[f64; 3], BenchError> {
        let held = self.hold()?;
        self.record(&events[0])?;
        let start = Instant::now();
        work.prepare()?;
        let first = start.elapsed();
        self.record(&events[1])?;
        drop(held);
        let look = self.wait(work)?;
        let held = self.hold()?;
        self.record(&events[2])?;
        let start = Instant::now();
        work.commit()?;
        let second = start.elapsed();
        self.record(&events[3])?;
        drop(held);
        self.synchronize()?;
        let device = elapsed(&events[0], &events[1])? + elapsed(&events[2], &events[3])?;
        Ok([device, (first + look + second).as_secs_f64(), second.as_secs_f64()])
    }

    /// One call with nothing held: seconds from its begin to its end on the device.
    fn free_call(&self, work: &mut dyn Work, events: &[Event; 4]) -> Result<f64, BenchError> {
        self.record(&events[0])?;
        work.prepare()?;
        self.wait(work)?;
        work.commit()?;
        self.record(&events[1])?;
        self.synchronize()?;
        elapsed(&events[0], &events[1])
    }

    fn ready_call(&self, work: &mut dyn Work) -> Result<(), BenchError> {
        work.set_up()?;
        self.cool()?;
        self.synchronize()
    }
}

/// Fresh memory of the device.
fn memory(bytes: usize) -> Result<u64, BenchError> {
    // SAFETY: a fresh allocation.
    unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|_| BenchError::Memory { bytes })
}

/// See [`Cuda::hold`].
struct Held(Arc<AtomicBool>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

struct Event(CUevent);

impl Event {
    fn new() -> Result<Self, BenchError> {
        result::event::create(CUevent_flags::CU_EVENT_DEFAULT).called("an event").map(Self)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: ours. That it cannot be ended is told by the next call.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Seconds between two events that have happened.
fn elapsed(from: &Event, to: &Event) -> Result<f64, BenchError> {
    // SAFETY: both events are ours.
    unsafe { result::event::elapsed(from.0, to.0) }.called("the time between events").map(|ms| f64::from(ms) / 1e3)
}

impl Machine for Cuda {
    fn describe(&self) -> Hardware {
        let mut name = [0 as core::ffi::c_char; 128];
        let mut version = 0;
        // SAFETY: both are written within their sizes; the name ends with a zero.
        let name = unsafe {
            let _ = sys::cuDriverGetVersion(&mut version);
            let _ = sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, self.ordinal);
            CStr::from_ptr(name.as_ptr())
        };
        let driver = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
        Hardware { device: "cuda".into(), name: name.to_string_lossy().into_owned(), driver: Some(driver) }
    }

    fn device(&self) -> KvhDevice {
        KvhDevice { device_type: KVH_DEVICE_CUDA, device_id: 0 }
    }

    fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    fn callbacks(&self) -> KvhookCallbacks {
        self.pool.callbacks()
    }

    fn exponentials(&self) -> Option<f64> {
        let processors = self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let kilohertz = self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        Some(EXPONENTIALS * f64::from(processors) * f64::from(kilohertz) * 1e3)
    }

    fn copy_bandwidth(&self) -> Result<f64, BenchError> {
        let (from, to) = (Memory::new(self, COPY)?, Memory::new(self, COPY)?);
        self.refill(&from)?;
        let events = [Event::new()?, Event::new()?];
        let mut samples = Vec::new();
        for run in 0..WARM_UP + RUNS {
            self.record(&events[0])?;
            self.copy(to.address, from.address, COPY)?;
            self.record(&events[1])?;
            self.synchronize()?;
            if run >= WARM_UP {
                samples.push(elapsed(&events[0], &events[1])?);
            }
        }
        Ok(2.0 * COPY as f64 / Spread::of(samples).median)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, BenchError> {
        memory(bytes)
    }

    fn free(&self, address: u64, _: usize) {
        // SAFETY: ours; `cuMemFree` waits for what uses it. That it cannot be given back is told by the next call.
        let _ = unsafe { result::free_sync(address) };
    }

    fn write(&self, memory: &Memory<'_>, bytes: &[u8]) -> Result<(), BenchError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the memory is as long as the bytes, or longer.
        unsafe { result::memcpy_htod_sync(memory.address, &bytes[..bytes.len().min(memory.bytes)]) }.called("a copy")
    }

    fn refill(&self, memory: &Memory<'_>) -> Result<(), BenchError> {
        for start in (0..memory.bytes).step_by(PATTERN) {
            self.copy(memory.address + start as u64, self.pattern, PATTERN.min(memory.bytes - start))?;
        }
        Ok(())
    }

    fn moves<'a>(&'a self, cache: &'a Cache<'a>, row: &Row, top_k: bool) -> Result<Box<dyn Work + 'a>, BenchError> {
        Ok(Box::new(moves::Moves::new(self, cache, row, top_k)?))
    }

    fn measure(&self, work: &mut dyn Work) -> Result<Measured, BenchError> {
        let events = [Event::new()?, Event::new()?, Event::new()?, Event::new()?];
        let mut samples: [Vec<f64>; 4] = Default::default();
        for run in 0..WARM_UP + RUNS {
            self.ready_call(work)?;
            let [device, host, host_commit] = self.held_call(work, &events)?;
            work.tear_down()?;
            self.ready_call(work)?;
            let whole = self.free_call(work, &events)?;
            work.tear_down()?;
            if run >= WARM_UP {
                let all = [device, whole, host, host_commit];
                samples.iter_mut().zip(all).for_each(|(samples, time)| samples.push(time));
            }
        }
        let launches = self.count(work)?;
        let [device, whole, host, host_commit] = samples.map(Spread::of);
        Ok(Measured { device, whole, host, host_commit, launches })
    }
}
