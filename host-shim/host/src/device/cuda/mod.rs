//! A CUDA device: everything is enqueued on the engine's stream, and nothing waits for it.

use core::ffi::c_void;
use core::marker::PhantomData;
use core::ops::Range;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::memory::SCRATCH_ALIGNMENT;
use kvhook_kernels::cuda::select::{self, Gather};
use kvhook_kernels::cuda::{self, CudaError, DeviceSlice, Rows, Stream, Verdict};

use crate::callbacks::Callbacks;
use crate::commit::Task;
use crate::error::HostError;
use crate::memory::{Allocator, Block};
use crate::plan::{Kept, KeptRows, Plan};
use crate::raw::*;

mod adopt;
mod pulse;
mod words;

use pulse::Pulse;
pub use words::Word;
use words::Words;

/// The primary context of a device with the host's kernels.
pub struct Device {
    ordinal: i32,
    kernels: cuda::Device,
    words: Arc<Words>,
    context: Arc<Context>,
}

/// A retained primary context.
struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: the driver lets any thread use a context.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Device {
    /// Adopts the primary context of a device.
    ///
    /// # Errors
    /// As [`super::Device::open`].
    pub fn open(ordinal: i32, callbacks: &Callbacks) -> Result<Self, HostError> {
        if !callbacks.give_memory() {
            return Err(HostError::InvalidArgument {
                argument: "callbacks",
                problem: "has no `allocate`; a cache on a CUDA device needs memory of that device".to_owned(),
            });
        }
        let kernels = cuda::Device::adopt(ordinal, current_context(ordinal)).map_err(refused)?;
        let context = Arc::new(Context::retain(ordinal)?);
        let words = Arc::new(Words::new(context.clone())?);
        Ok(Self { ordinal, kernels, words, context })
    }

    /// Takes a stream into use.
    ///
    /// # Errors
    /// As [`super::Device::queue`].
    pub fn queue(&self, stream: *mut c_void) -> Result<Queue<'_>, HostError> {
        let entered = self.context.enter()?;
        if !stream.is_null() {
            let mut context = core::ptr::null_mut();
            // SAFETY: the engine vouches that it is a stream.
            let status = unsafe { sys::cuStreamGetCtx(stream.cast(), &raw mut context) };
            status.result().map_err(driver("asking for the stream's context"))?;
            if context != self.context.raw {
                return Err(HostError::Argument(format!(
                    "`stream` belongs to another context than the primary one of CUDA device {}: use a stream of that",
                    self.ordinal
                )));
            }
        }
        // SAFETY: the engine vouches for the stream, whose context was compared.
        Ok(Queue { device: self, stream: unsafe { Stream::borrow(stream) }, raw: stream, _entered: entered })
    }
}

/// The context that is current on this thread, if it is one of the device's: an engine that does not use the primary one
/// is told so when its host is made. Else null.
fn current_context(ordinal: i32) -> *mut c_void {
    // SAFETY: it only tries to open the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return core::ptr::null_mut();
    }
    let (mut context, mut device) = (core::ptr::null_mut(), -1);
    // SAFETY: both only write their answer. A driver that is not initialised answers an error.
    let known = unsafe {
        sys::cuCtxGetCurrent(&raw mut context).result().is_ok() && sys::cuCtxGetDevice(&raw mut device).result().is_ok()
    };
    if known && result::device::get(ordinal).is_ok_and(|asked| asked == device) {
        context.cast()
    } else {
        core::ptr::null_mut()
    }
}

impl Context {
    fn retain(ordinal: i32) -> Result<Self, HostError> {
        let device = result::device::get(ordinal).map_err(driver("finding the device"))?;
        // SAFETY: the device is one of the driver's; it is released on drop.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(driver("retaining the primary context"))?;
        Ok(Self { device, raw })
    }

    /// Makes the context current on this thread as long as the value lives.
    fn enter(&self) -> Result<Entered, HostError> {
        // SAFETY: the context is retained.
        let status = unsafe { sys::cuCtxPushCurrent_v2(self.raw) };
        status.result().map_err(driver("making the context current"))?;
        Ok(Entered(PhantomData))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained when it was made. A failure can be told to nobody here.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A context is current on this thread, which the value does not leave.
struct Entered(PhantomData<*mut c_void>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut context = core::ptr::null_mut();
        // SAFETY: `enter` pushed a context on this thread.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
    }
}

/// A stream of the engine's, in use by this thread.
pub struct Queue<'a> {
    device: &'a Device,
    stream: Stream,
    raw: *mut c_void,
    _entered: Entered,
}

impl Queue<'_> {
    /// Enqueues the tasks' moves: a few launches, however many there are. The working memory that moves in place need was
    /// reserved with the plan for as many appended rows as it drops; for more it is allocated here.
    ///
    /// # Errors
    /// As [`super::Queue::move_rows`]; `OutOfMemory`.
    ///
    /// # Safety
    /// As [`super::Queue::move_rows`].
    pub unsafe fn move_rows(&self, plan: &Plan, tasks: &[Task<'_>], allocator: Allocator) -> Result<(), HostError> {
        // SAFETY: passed on from the caller.
        let gathers = unsafe { gathers(tasks) }.map_err(refused)?;
        let needed = select::scratch_bytes(&gathers).map_err(refused)?;
        let reserved = match &plan.check {
            super::Check::Word(word) => word.scratch(),
            super::Check::Good => DeviceSlice::empty(),
        };
        let block = match needed > reserved.len() {
            true => Some(Block::new(allocator, needed as u64, SCRATCH_ALIGNMENT, self.raw, "moving rows in place")?),
            false => None,
        };
        let scratch = match &block {
            // SAFETY: the block goes back in the stream's order, behind the work that uses it.
            Some(block) => unsafe { DeviceSlice::new(block.data() as u64, needed) }.map_err(refused)?,
            None => reserved,
        };
        select::gather(&self.device.kernels, self.stream, &gathers, None, scratch).map_err(refused)
    }
}

/// What the kernels move for the tasks.
///
/// # Safety
/// As [`super::Queue::move_rows`].
unsafe fn gathers(tasks: &[Task<'_>]) -> Result<Vec<Gather>, CudaError> {
    let mut gathers = Vec::with_capacity(tasks.len());
    for task in tasks {
        let (planned, count) = (task.plan.planned as usize, task.plan.count as usize);
        // SAFETY: passed on from the caller.
        let (source, destination) = unsafe { (rows(&task.source)?, rows(&task.destination)?) };
        let mut add = |source, indices, tail: Range<usize>, destination_start| {
            gathers.push(Gather { source, destination, indices, tail, destination_start });
        };
        let all = planned + task.appended;
        match &task.plan.kept {
            Kept::All => add(source, Indices::none(), 0..all, 0),
            // SAFETY: as above.
            Kept::Rows(kept) | Kept::Ranges(_, Some(kept)) => add(source, unsafe { indices(kept)? }, planned..all, 0),
            Kept::Ranges(ranges, None) => {
                let mut to = 0;
                for range in ranges {
                    let (start, length) = (range.start as usize, range.length as usize);
                    add(source, Indices::none(), start..start + length, to);
                    to += length;
                }
                add(source, Indices::none(), planned..all, count);
            }
            Kept::Lent(_) => {
                if let Some(lent) = &task.lent {
                    // SAFETY: as above.
                    add(unsafe { rows(lent)? }, Indices::none(), 0..count, 0);
                }
                add(source, Indices::none(), planned..all, count);
            }
        }
    }
    Ok(gathers)
}

/// Rows as the device's kernels see them.
///
/// # Safety
/// They describe the device's memory, which nobody else uses until the work enqueued with them is done.
unsafe fn rows(rows: &kvhook_kernels::Rows) -> Result<Rows, CudaError> {
    // SAFETY: passed on from the caller.
    unsafe { Rows::new(rows.base() as u64, *rows.layout(), rows.table().copied()) }
}

/// # Safety
/// The lists lie in the device's memory, and live until the work enqueued with them is done.
unsafe fn indices(kept: &KeptRows) -> Result<Indices, CudaError> {
    // SAFETY: passed on from the caller.
    let data = unsafe { DeviceSlice::new(kept.data.data() as u64, kept.data.count())? };
    Ok(Indices { data, stride_head: kept.stride_head, count: kept.count })
}

/// An error of the kernels as one of the host's.
fn refused(error: CudaError) -> HostError {
    match error {
        CudaError::Driver { .. } => HostError::Device(error.to_string()),
        _ => HostError::Unsupported(error.to_string()),
    }
}

/// For `map_err`: the driver's error with what was tried.
fn driver(what: &'static str) -> impl Fn(cudarc::driver::DriverError) -> HostError {
    move |error| {
        let name = error.error_name().map_or_else(|_| "an unknown error".into(), |name| name.to_string_lossy());
        HostError::Device(format!("{what}: the driver says {name} ({})", error.0 as u32))
    }
}
