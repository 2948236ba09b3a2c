//! What an author uses on a CUDA device: a stream, memory, rows, and the kernels' operations.
//!
//! A plugin opens its device in `create` ([`CreateContext::cuda_device`]) and enqueues all its work on the call's stream
//! ([`Call::cuda_stream`]); it never waits for it. Working memory comes from the host ([`Call::device_memory`]). Rows are
//! read through [`LayerView::k_device`](crate::LayerView::k_device), plans filled through
//! [`Plan::select_on_device`](crate::Plan::select_on_device); the host checks the indices behind that work, and a bad one
//! never touches the cache. A kernel that faults takes the device's context with it, and so the engine's process.
//!
//! [`choose`] is the commonest plan: score the entries, keep the best. [`Windows`] keeps the last queries for it.

mod choose;
mod scored;
mod window;

pub use choose::{How, Job, Scratch, choose};
pub use kvhook_kernels::cuda::*;
pub(crate) use scored::OnDevice;
pub use window::{Window, Windows};

use crate::call::{Call, Element, Memory};
use crate::error::PluginError;
use crate::plugin::CreateContext;
use crate::raw::KVH_DEVICE_CUDA;

impl CreateContext<'_> {
    /// Opens the instance's CUDA device with every kernel loaded. For `create`: it may wait for the device.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when the cache lies elsewhere, the driver is missing or too old, or the engine's
    /// context is not the primary one; [`PluginError::Device`] when the driver fails.
    pub fn cuda_device(&self) -> Result<Device, PluginError> {
        if self.model.device_type != KVH_DEVICE_CUDA {
            return Err(PluginError::Unsupported(format!(
                "the cache lies on a device of type {}; expected a CUDA device (2)",
                self.model.device_type
            )));
        }
        Ok(Device::adopt(self.model.device_id, core::ptr::null_mut())?)
    }
}

impl Call<'_> {
    /// The engine's stream.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] where the cache lies in ordinary memory.
    pub fn cuda_stream(&self) -> Result<Stream, PluginError> {
        if self.on_cpu() {
            return Err(PluginError::Unsupported("the cache lies in ordinary memory; there is no stream".into()));
        }
        // SAFETY: the contract makes it a stream of the device's primary context, during the call.
        Ok(unsafe { Stream::borrow(self.stream()) })
    }

    /// Borrows memory of the device from the host, not initialised, for work that is enqueued during the call. It is
    /// aligned for working memory, and valid as long as `memory` says.
    ///
    /// # Errors
    /// As [`Call::allocate_raw`]; [`PluginError::Unsupported`] where the cache lies in ordinary memory.
    pub fn device_memory<T: Element>(&self, memory: Memory, count: usize) -> Result<DeviceSlice<T>, PluginError> {
        if self.on_cpu() {
            return Err(PluginError::Unsupported("the cache lies in ordinary memory, not on a device".into()));
        }
        let bytes = count
            .checked_mul(size_of::<T>())
            .ok_or_else(|| PluginError::OutOfMemory(format!("{count} values do not fit the address space")))?;
        let address = self.allocate_raw(memory, bytes, memory::SCRATCH_ALIGNMENT as usize)?;
        // SAFETY: the host lends so many bytes to this plugin, behind whose work they go back.
        Ok(unsafe { DeviceSlice::new(address.as_ptr() as u64, count)? })
    }
}
