//! A device, its loaded kernels, and the caller's streams.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::marker::PhantomData;

use cudarc::driver::{result, sys};

use super::error::CudaError;
use super::memory::DeviceSlice;
use super::{
    check, grouped_mlp, key_diff, norms, plan, rotate, sample, scores, select, top_k, whole, window_attention,
};

/// A CUDA stream of the caller's, borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(sys::CUstream);

// SAFETY: the driver lets any thread use a stream.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Borrows a stream: a `CUstream`, or a `cudaStream_t` of the runtime's, which is the same. Null is the device's
    /// default stream.
    ///
    /// # Safety
    /// It must be a stream of the context that the [`Device`] used with it has adopted, and live as long as it is used.
    pub unsafe fn borrow(raw: *mut c_void) -> Self {
        Self(raw.cast())
    }

    pub(crate) fn raw(self) -> sys::CUstream {
        self.0
    }
}

/// Kernels that are compiled together.
pub(crate) struct Family {
    /// The fatbin.
    pub(crate) image: &'static Image<[u8]>,
    /// Its kernels.
    pub(crate) kernels: &'static [Kernel],
}

/// A fatbin, aligned as the driver reads it.
#[repr(align(16))]
pub(crate) struct Image<T: ?Sized>(pub(crate) T);

/// One kernel. It takes one struct by value, and does nothing where that is all zeros.
pub(crate) struct Kernel {
    /// Its name in the fatbin.
    pub(crate) name: &'static str,
    /// The most dynamic shared memory that it is launched with, in bytes; a device with less gives what it has.
    pub(crate) shared: u32,
}

const FAMILIES: &[&Family] = &[
    &check::FAMILY,
    &grouped_mlp::FAMILY,
    &key_diff::FAMILY,
    &norms::FAMILY,
    &plan::FAMILY,
    &rotate::FAMILY,
    &sample::FAMILY,
    &scores::FAMILY,
    &select::FAMILY,
    &top_k::FAMILY,
    &whole::FAMILY,
    &window_attention::FAMILY,
];

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Blocks.
    pub(crate) blocks: u32,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory, in bytes.
    pub(crate) shared: u32,
    /// Blocks of a cluster; 1 where the device has none.
    pub(crate) cluster: u32,
}

impl Grid {
    /// Without dynamic shared memory and clusters.
    pub(crate) fn new(blocks: u32, threads: u32) -> Self {
        Self { blocks, threads, shared: 0, cluster: 1 }
    }
}

/// A device whose primary context the engine has made, with all kernels loaded.
///
/// Any thread may use it, several at a time. Dropping it unloads the kernels, and waits for all work on the device before.
#[derive(Debug)]
pub struct Device {
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    kept: Vec<sys::CUdeviceptr>,
    functions: HashMap<&'static str, sys::CUfunction>,
    compute_capability: (i32, i32),
    shared_per_block: u32,
    multiprocessors: u32,
    /// Whether the code for compute capability 9.0a runs, which alone has the wide products.
    wide_products: bool,
}

// SAFETY: the driver lets any thread use a context, its modules and functions.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Adopts the engine's primary context of a device, loads every kernel and launches each once (with no work), so
    /// that the first operation costs what the tenth does. It synchronises with a stream of its own: call it when the
    /// engine starts, not while a stream is captured.
    ///
    /// `context` is the engine's `CUcontext`; null stands for the primary one, which the CUDA runtime uses.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], [`CudaError::ComputeCapability`] below 8.0,
    /// [`CudaError::ForeignContext`] for a context that is not the primary one, [`CudaError::Driver`].
    pub fn adopt(ordinal: i32, context: *mut c_void) -> Result<Self, CudaError> {
        let (device, compute_capability) = find(ordinal)?;
        let attribute = |attribute| attribute_of(device, attribute);
        let shared = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: the device is one of the driver's; its context is released when this is dropped.
        let primary = unsafe { result::primary_ctx::retain(device) }
            .map_err(CudaError::driver("retaining the primary context"))?;
        let mut adopted = Self {
            device,
            context: primary,
            modules: Vec::new(),
            kept: Vec::new(),
            functions: HashMap::new(),
            compute_capability,
            shared_per_block: shared as u32,
            multiprocessors: multiprocessors as u32,
            wide_products: compute_capability == (9, 0),
        };
        if !context.is_null() && context != primary.cast() {
            return Err(CudaError::ForeignContext { ordinal });
        }
        adopted.load()?;
        Ok(adopted)
    }

    /// Major and minor number of the device's instruction set.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.compute_capability
    }

    /// Whether blocks can form clusters.
    pub(crate) fn has_clusters(&self) -> bool {
        self.compute_capability.0 >= 9
    }

    /// The most dynamic shared memory of a block, in bytes.
    pub(crate) fn shared_per_block(&self) -> u32 {
        self.shared_per_block
    }

    /// Multiprocessors; no result may depend on their number.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Whether kernels with Hopper's products can be chosen.
    pub(crate) fn has_wide_products(&self) -> bool {
        self.wide_products
    }

    /// Makes the context current on this thread until the guard is dropped.
    pub(crate) fn enter(&self) -> Result<Entered, CudaError> {
        // SAFETY: the context is retained.
        CudaError::check("making the context current", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        Ok(Entered(PhantomData))
    }

    /// Copies bytes that stay as long as this does, like its kernels: weights. They begin at a multiple of 256. It waits
    /// for the copy: call it when the engine starts, not while a stream is captured.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Driver`].
    pub fn keep(&mut self, bytes: &[u8]) -> Result<DeviceSlice<u8>, CudaError> {
        let _entered = self.enter()?;
        // SAFETY: the memory is freed when this is dropped.
        let address = unsafe { result::malloc_sync(bytes.len().max(1)) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { what: "weights", bytes: bytes.len() },
            _ => CudaError::driver("allocating memory")(error),
        })?;
        self.kept.push(address);
        with_stream("copying to the device", |stream| {
            // SAFETY: the memory is that long, and `bytes` outlives the wait.
            unsafe { result::memcpy_htod_async(address, bytes, stream.raw()) }
                .map_err(CudaError::driver("copying to the device"))
        })?;
        // SAFETY: nobody else has the memory, and it lives as long as the device, whose kernels alone use it.
        unsafe { DeviceSlice::new(address, bytes.len()) }
    }

    fn load(&mut self) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        with_stream("launching the kernels once", |stream| self.load_all(stream))
    }

    fn load_all(&mut self, stream: Stream) -> Result<(), CudaError> {
        // Every kernel reads its own parameters' size from here, none more than that.
        let no_work = [0u64; super::batch::PARAMETER_BYTES.div_ceil(8)];
        for family in FAMILIES {
            // SAFETY: the image is a whole fatbin, which says its own size.
            let module = unsafe { result::module::load_data(family.image.0.as_ptr().cast()) }
                .map_err(CudaError::driver("loading a module of kernels"))?;
            self.modules.push(module);
            for kernel in family.kernels {
                let name = CString::new(kernel.name).unwrap_or_default();
                // SAFETY: the module was just loaded.
                let function = unsafe { result::module::get_function(module, name) }
                    .map_err(CudaError::driver("finding a kernel"))?;
                if kernel.shared > 0 {
                    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    let fixed = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
                    // SAFETY: the function is one of the module's.
                    let fixed = unsafe { result::function::get_function_attribute(function, fixed) }
                        .map_err(CudaError::driver("reading a kernel's shared memory"))?;
                    let bytes = kernel.shared.min(self.shared_per_block.saturating_sub(fixed as u32)) as i32;
                    // SAFETY: the function is one of the module's.
                    unsafe { result::function::set_function_attribute(function, attribute, bytes) }
                        .map_err(CudaError::driver("raising a kernel's shared memory"))?;
                }
                self.functions.insert(kernel.name, function);
                // SAFETY: parameters of zeros are no work, and longer than any kernel's.
                unsafe { self.launch(stream, kernel.name, Grid::new(1, 32), &no_work) }?;
            }
        }
        Ok(())
    }

    /// Enqueues a kernel. The context must be current.
    ///
    /// # Safety
    /// `parameters` must be the struct that the kernel takes, and all memory that it names what the kernel expects until
    /// the stream has run it.
    pub(crate) unsafe fn launch<P>(
        &self,
        stream: Stream,
        name: &'static str,
        grid: Grid,
        parameters: &P,
    ) -> Result<(), CudaError> {
        let function = *self.functions.get(name).ok_or(CudaError::Driver {
            what: "finding a kernel",
            code: sys::CUresult::CUDA_ERROR_NOT_FOUND as u32,
            name: name.to_owned(),
        })?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 },
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: stream.raw(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(grid.cluster > 1),
        };
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the caller promises parameters and memory; the driver copies the parameters before it returns.
        let status = unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) };
        CudaError::check(name, status)
    }

    /// Enqueues the filling of memory with a 32-bit value. The context must be current.
    ///
    /// # Safety
    /// `address` must be `count` words of device memory that nobody else uses.
    pub(crate) unsafe fn fill(&self, stream: Stream, address: u64, value: u32, count: usize) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        // SAFETY: passed on from the caller.
        CudaError::check("filling memory", unsafe { sys::cuMemsetD32Async(address, value, count, stream.raw()) })
    }
}

/// Finds a device on which kernels of compute capability 8.0 run: the driver's handle, and the device's capability.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::NoDevice`], [`CudaError::ComputeCapability`], [`CudaError::Driver`].
pub fn find(ordinal: i32) -> Result<(sys::CUdevice, (i32, i32)), CudaError> {
    // SAFETY: it only tries to open the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let count = match result::init() {
        // So says a driver without devices.
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => 0,
        Err(error) => return Err(CudaError::driver("initialising the driver")(error)),
        Ok(()) => result::device::get_count().map_err(CudaError::driver("counting devices"))?,
    };
    if ordinal < 0 || ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let device = result::device::get(ordinal).map_err(CudaError::driver("finding the device"))?;
    let major = attribute_of(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute_of(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < 8 {
        return Err(CudaError::ComputeCapability { ordinal, major, minor });
    }
    Ok((device, (major, minor)))
}

fn attribute_of(device: sys::CUdevice, attribute: sys::CUdevice_attribute) -> Result<i32, CudaError> {
    // SAFETY: the device is one of the driver's.
    unsafe { result::device::get_attribute(device, attribute) }
        .map_err(CudaError::driver("reading an attribute of the device"))
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Ok(_entered) = self.enter() {
            // SAFETY: the context is current. Kernels of this device may be under way; a failure cannot be told here.
            let _ = unsafe { sys::cuCtxSynchronize() };
            for &address in &self.kept {
                // SAFETY: allocated by `keep`, and the work that uses it is done, as is that of the modules.
                let _ = unsafe { result::free_sync(address) };
            }
            for &module in &self.modules {
                // SAFETY: the module is ours, and its work is done. A failure cannot be told to anybody here.
                let _ = unsafe { result::module::unload(module) };
            }
        }
        // SAFETY: retained by `adopt`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Runs work on a stream of its own and waits for it. The context must be current.
fn with_stream(what: &'static str, work: impl FnOnce(Stream) -> Result<(), CudaError>) -> Result<(), CudaError> {
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
        .map_err(CudaError::driver("creating a stream"))?;
    let worked = work(Stream(stream));
    // SAFETY: the stream is ours; nothing was enqueued on it that outlives this.
    let done = unsafe { result::stream::synchronize(stream) };
    // SAFETY: as above.
    let destroyed = unsafe { result::stream::destroy(stream) };
    worked.and(done.and(destroyed).map_err(CudaError::driver(what)))
}

/// While it lives, the device's context is current on the thread that made it.
pub(crate) struct Entered(PhantomData<*const ()>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: `enter` pushed a context on this thread.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
    }
}
