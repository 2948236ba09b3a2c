//! The driver's part of a device: context, stream, kernels, memory.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::mem::{size_of_val, zeroed};
use std::ptr;
use std::sync::Mutex;

use cudarc::driver::{DriverError, result, sys};
use kvhook_kernels::cuda::device;

use super::failed;
use super::kernels::FAMILIES;
use crate::error::{Error, Result};

/// The primary context of a device with a stream, a memory pool and the engine's kernels. Any thread may use it; all work
/// is enqueued on the one stream.
pub(crate) struct Driver {
    ordinal: i32,
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    pool: sys::CUmemoryPool,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
    /// Page-locked memory through which bytes go to the device.
    staging: Mutex<Vec<Staging>>,
}

// SAFETY: the driver lets any thread use a context and what belongs to it.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// A block of page-locked memory, in use until its event has passed.
struct Staging {
    data: *mut c_void,
    bytes: usize,
    event: sys::CUevent,
}

/// Sizes of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// Blocks in each direction.
    pub(super) blocks: [usize; 3],
    /// Threads of a block.
    pub(super) threads: usize,
    /// Dynamic shared memory, in bytes.
    pub(super) shared: usize,
}

impl Driver {
    /// Opens a device, loads the kernels and launches each once, with no work.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(super) fn open(ordinal: i32) -> Result<Self> {
        let (device, _) = device::find(ordinal).map_err(|error| failed(ordinal, error.to_string()))?;
        let told = |what| told(ordinal, what);
        // SAFETY: the device is one of the driver's; it is released on drop.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(told("retaining the primary context"))?;
        let mut driver = Self {
            ordinal,
            name: result::device::get_name(device).unwrap_or_default(),
            device,
            context,
            stream: ptr::null_mut(),
            pool: ptr::null_mut(),
            modules: Vec::new(),
            functions: HashMap::new(),
            staging: Mutex::default(),
        };
        driver.load()?;
        Ok(driver)
    }

    fn load(&mut self) -> Result<()> {
        let ordinal = self.ordinal;
        let told = |what| told(ordinal, what);
        let _entered = self.enter()?;
        self.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(told("making a stream"))?;
        // SAFETY: plain numbers, of which zero is valid for each.
        let mut properties: sys::CUmemPoolProps = unsafe { zeroed() };
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = self.ordinal;
        let (mut keep, threshold) = (u64::MAX, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD);
        // SAFETY: properties and value are read and the pool is written during the calls.
        unsafe {
            sys::cuMemPoolCreate(&raw mut self.pool, &raw const properties).result().map_err(told("making a pool"))?;
            // Freed memory stays with the pool, so that an allocation does not wait for the system.
            let status = sys::cuMemPoolSetAttribute(self.pool, threshold, (&raw mut keep).cast());
            status.result().map_err(told("setting up the pool"))?;
        }
        for family in FAMILIES {
            // SAFETY: the image is a whole fatbin, which says its own size.
            let module = unsafe { result::module::load_data(family.image.0.as_ptr().cast()) }
                .map_err(told("loading the engine's kernels"))?;
            self.modules.push(module);
            for &(name, shared) in family.kernels {
                // SAFETY: the module was just loaded.
                let function = unsafe { result::module::get_function(module, CString::new(name).unwrap_or_default()) }
                    .map_err(told("finding a kernel"))?;
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is one of the module's.
                unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }
                    .map_err(told("raising a kernel's shared memory"))?;
                self.functions.insert(name, function);
                let grid = Grid { blocks: [1; 3], threads: 32, shared };
                // SAFETY: zeros are no work, and longer than any kernel's parameters.
                unsafe { self.launch(name, grid, &[0u64; 32]) }?;
            }
        }
        self.wait()
    }

    /// The device's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The stream.
    pub(crate) fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// For `map_err`: the driver's error with what was tried.
    fn told(&self, what: &'static str) -> impl Fn(DriverError) -> Error + use<> {
        told(self.ordinal, what)
    }

    /// Makes the context current on this thread until the guard is dropped.
    fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is retained.
        unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result().map_err(self.told("making the context current"))?;
        Ok(Entered(PhantomData))
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `parameters` is the struct that the kernel takes, and all memory that it names is what the kernel expects, until the
    /// stream has run it.
    pub(super) unsafe fn launch<P>(&self, name: &'static str, grid: Grid, parameters: &P) -> Result<()> {
        let missing = DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND);
        let function = *self.functions.get(name).ok_or_else(|| self.told(name)(missing))?;
        let [x, y, z] = grid.blocks.map(|blocks| blocks as u32);
        let mut arguments = [ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        let _entered = self.enter()?;
        // SAFETY: the caller promises parameters and memory; the driver copies the parameters before it returns.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (grid.threads as u32, 1, 1),
                grid.shared as u32,
                self.stream,
                &mut arguments,
            )
        }
        .map_err(self.told(name))
    }

    /// Memory in the stream's order, at a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Device`] when there is none.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let _entered = self.enter()?;
        let mut address = 0;
        // SAFETY: the pool and the stream are ours.
        let status = unsafe { sys::cuMemAllocFromPoolAsync(&raw mut address, bytes.max(1), self.pool, self.stream) };
        match status {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let reason =
                    format!("{bytes} more bytes do not fit its memory; use a smaller cache or a shorter prompt");
                Err(failed(self.ordinal, reason))
            }
            status => status.result().map(|()| address).map_err(self.told("allocating memory")),
        }
    }

    /// Gives memory back in the stream's order.
    ///
    /// # Safety
    /// It came from [`allocate`](Self::allocate), and no work is enqueued with it from now on.
    pub(super) unsafe fn free(&self, address: u64) {
        // A failure can be told to nobody here; the next call reports a device that is lost.
        if let Ok(_entered) = self.enter() {
            // SAFETY: passed on from the caller.
            let _ = unsafe { sys::cuMemFreeAsync(address, self.stream) };
        }
    }

    /// Memory for the host's and the plugins' use; null when there is none.
    pub(crate) fn lend(&self, bytes: u64, alignment: u64) -> *mut c_void {
        match usize::try_from(bytes) {
            // Every allocation of the pool begins at a multiple of 256.
            Ok(bytes) if alignment <= 256 => {
                self.allocate(bytes).map_or(ptr::null_mut(), |address| address as *mut c_void)
            }
            _ => ptr::null_mut(),
        }
    }

    /// Takes it back.
    ///
    /// # Safety
    /// It came from [`lend`](Self::lend), and no work is enqueued with it from now on.
    pub(crate) unsafe fn take_back(&self, data: *mut c_void) {
        // SAFETY: passed on from the caller.
        unsafe { self.free(data as u64) }
    }

    /// Enqueues the filling of memory with zeros.
    ///
    /// # Safety
    /// There are so many bytes at the address.
    pub(super) unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: passed on from the caller.
        unsafe { sys::cuMemsetD8Async(address, 0, bytes, self.stream) }.result().map_err(self.told("clearing memory"))
    }

    /// Enqueues a copy within the device's memory.
    ///
    /// # Safety
    /// There are so many bytes at both addresses, and they do not overlap.
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: passed on from the caller.
        unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) }.result().map_err(self.told("copying memory"))
    }

    /// Enqueues a copy to the device; `data` may go when the call returns. It does not wait, but where it needs more
    /// page-locked memory than any copy before.
    ///
    /// # Safety
    /// There is so much memory at the address.
    pub(super) unsafe fn upload<T: Copy>(&self, to: u64, data: &[T]) -> Result<()> {
        let bytes = size_of_val(data);
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.enter()?;
        let mut staging = self.staging.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let passed = |block: &Staging| {
            // SAFETY: the event is ours.
            bytes <= block.bytes && unsafe { sys::cuEventQuery(block.event) } == sys::CUresult::CUDA_SUCCESS
        };
        let place = match staging.iter().position(passed) {
            Some(place) => place,
            None => {
                let bytes = bytes.next_power_of_two().max(64 << 10);
                let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(self.told("making an event"))?;
                let mut data = ptr::null_mut();
                // SAFETY: the address is written during the call; memory and event are given back on drop.
                let allocated = unsafe { sys::cuMemHostAlloc(&raw mut data, bytes, 0) }.result();
                if let Err(error) = allocated {
                    // SAFETY: the event was just made. What went wrong before is told.
                    let _ = unsafe { result::event::destroy(event) };
                    return Err(self.told("allocating page-locked memory")(error));
                }
                staging.push(Staging { data, bytes, event });
                staging.len() - 1
            }
        };
        let block = &staging[place];
        // SAFETY: the block is as long as the data, nobody else has it while the lock is held, and the device has read what
        // was there before. The caller promises the memory on the device.
        unsafe {
            ptr::copy_nonoverlapping(data.as_ptr().cast::<u8>(), block.data.cast(), bytes);
            sys::cuMemcpyHtoDAsync_v2(to, block.data, bytes, self.stream)
                .result()
                .map_err(self.told("copying to the device"))?;
            result::event::record(block.event, self.stream).map_err(self.told("recording an event"))
        }
    }

    /// Copies to the device, and waits.
    ///
    /// # Safety
    /// There is so much memory at the address.
    pub(super) unsafe fn upload_and_wait<T: Copy>(&self, to: u64, data: &[T]) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: passed on from the caller; the data stays until the wait below is over.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, data.as_ptr().cast(), size_of_val(data), self.stream) }
            .result()
            .map_err(self.told("copying to the device"))?;
        self.wait()
    }

    /// Waits for what was enqueued, and reads elements from the device.
    ///
    /// # Safety
    /// There are so many at the address; `T` is a plain number.
    pub(crate) unsafe fn download<T: Copy>(&self, from: u64, out: &mut [T]) -> Result<()> {
        if !out.is_empty() {
            let _entered = self.enter()?;
            // SAFETY: passed on from the caller; the wait below comes before anybody reads.
            unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), from, size_of_val(out), self.stream) }
                .result()
                .map_err(self.told("copying from the device"))?;
        }
        self.wait()
    }

    /// Waits for what was enqueued.
    ///
    /// # Errors
    /// [`Error::Device`] for whatever went wrong in it.
    pub(crate) fn wait(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the stream is ours.
        unsafe { result::stream::synchronize(self.stream) }.map_err(self.told("waiting for the device"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.wait();
        if let Ok(_entered) = self.enter() {
            let staging = self.staging.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
            // SAFETY: all of it is ours, and its work is done. Failures can be told to nobody here.
            unsafe {
                for block in staging {
                    let _ = sys::cuEventDestroy_v2(block.event);
                    let _ = sys::cuMemFreeHost(block.data);
                }
                for &module in &self.modules {
                    let _ = result::module::unload(module);
                }
                if !self.pool.is_null() {
                    let _ = sys::cuMemPoolDestroy(self.pool);
                }
                if !self.stream.is_null() {
                    let _ = result::stream::destroy(self.stream);
                }
            }
        }
        // SAFETY: retained by `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// While it lives, the context is current on the thread that made it.
struct Entered(PhantomData<*const ()>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: `enter` pushed a context on this thread.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
    }
}

/// For `map_err`: the driver's error with what was tried.
fn told(ordinal: i32, what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let name = error.error_name().map_or_else(|_| "an unknown error".into(), |name| name.to_string_lossy());
        let after = "errors of earlier work may show here, and the process may have to begin anew";
        failed(ordinal, format!("{what}: the driver says {name} ({}); {after}", error.0 as u32))
    }
}
