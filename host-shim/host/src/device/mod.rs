//! Where a rank's cache lies, and all in which ordinary memory and a CUDA device differ: how a plan's lists are read and
//! checked, and how rows move. Everything else of a compression is the same on both.

use core::ffi::c_void;

use kvhook_abi::raw::*;

use crate::callbacks::Callbacks;
use crate::commit::Task;
use crate::error::HostError;
use crate::memory::Allocator;
use crate::plan::{Draft, LayerPlan, Plan, Refusal, Terms};

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The device of one rank.
pub enum Device {
    /// Ordinary memory: what is asked for is done when the call returns.
    Cpu,
    /// A CUDA device: what is asked for is enqueued on a stream of the engine's.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Device),
}

/// A stream of a device, in use by this thread.
pub enum Queue<'a> {
    /// There are no streams.
    Cpu(core::marker::PhantomData<&'a Device>),
    /// The device's context is current as long as the value lives.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Queue<'a>),
}

/// Whether a plan's lists are good.
pub enum Check {
    /// They are.
    Good,
    /// The device writes a word about it.
    #[cfg(feature = "cuda")]
    Word(cuda::Word),
}

/// What a [`Check`] says so far.
#[derive(Debug)]
pub enum Checked {
    /// The device has not written it.
    Pending,
    /// They are good.
    Good,
    /// What is wrong.
    Bad(Refusal),
}

impl Device {
    /// Opens the device of a rank.
    ///
    /// # Errors
    /// `Unsupported` for a device that this host does not know or was built without, or that has no usable driver;
    /// `Device` when a call of the driver fails; `InvalidArgument` when the engine gives no memory of the device.
    pub fn open(device: KvhDevice, callbacks: &Callbacks) -> Result<Self, HostError> {
        match device.device_type {
            KVH_DEVICE_CPU => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            KVH_DEVICE_CUDA => cuda::Device::open(device.device_id, callbacks).map(Self::Cuda),
            other => {
                let _ = callbacks;
                let cuda = if cfg!(feature = "cuda") { " and on CUDA devices (2)" } else { ", built without CUDA" };
                Err(HostError::Unsupported(format!(
                    "device type {other}; this host moves rows in ordinary memory (1){cuda}"
                )))
            }
        }
    }

    /// Whether what is asked for is done when the call returns.
    pub fn is_immediate(&self) -> bool {
        matches!(self, Self::Cpu)
    }

    /// Takes a stream of the engine's into use. Nothing waits for it.
    ///
    /// # Errors
    /// `Argument` for a stream of another context; `Device` when the driver reports an error, of whatever work before.
    pub fn queue(&self, stream: *mut c_void) -> Result<Queue<'_>, HostError> {
        match self {
            Self::Cpu => {
                let _ = stream;
                Ok(Queue::Cpu(core::marker::PhantomData))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => device.queue(stream).map(Queue::Cuda),
        }
    }

    /// Whether the rank's work can be enqueued on a stream: not on one of another device.
    pub fn takes(&self, stream: *mut c_void) -> bool {
        self.queue(stream).is_ok()
    }
}

impl Queue<'_> {
    /// Copies a plan's lists, checks the copies, and makes the kept rows' positions. `limit` is above every position of a
    /// rewrite.
    ///
    /// # Errors
    /// What is wrong with a list, as far as it is known now; memory was refused; the driver failed.
    ///
    /// # Safety
    /// The lists are readable on the rank's device, for work that is enqueued now.
    pub unsafe fn adopt(
        &self,
        drafts: Vec<Draft>,
        limit: u64,
        terms: &Terms<'_>,
    ) -> Result<(Vec<LayerPlan>, Check), Refusal> {
        match self {
            // SAFETY: passed on from the caller.
            Self::Cpu(_) => Ok((unsafe { cpu::adopt(drafts, limit, terms)? }, Check::Good)),
            #[cfg(feature = "cuda")]
            // SAFETY: as above.
            Self::Cuda(queue) => unsafe { queue.adopt(drafts, limit, terms) },
        }
    }

    /// Moves rows as a plan says. Everything that can be refused was checked before.
    ///
    /// # Errors
    /// `Internal` for what was not; `Device` when the driver fails.
    ///
    /// # Safety
    /// The tasks' rows are as described, and used by nobody else until the work enqueued now is done.
    pub unsafe fn move_rows(&self, plan: &Plan, tasks: Vec<Task<'_>>, allocator: Allocator) -> Result<(), HostError> {
        match self {
            Self::Cpu(_) => {
                let _ = (plan, allocator);
                cpu::move_rows(tasks)
            }
            #[cfg(feature = "cuda")]
            // SAFETY: passed on from the caller.
            Self::Cuda(queue) => unsafe { queue.move_rows(plan, &tasks, allocator) },
        }
    }
}

impl Check {
    /// As [`Block::release_on`](crate::memory::Block::release_on).
    pub fn release_on(&self, stream: *mut c_void) {
        match self {
            Self::Good => {
                let _ = stream;
            }
            #[cfg(feature = "cuda")]
            Self::Word(word) => word.release_on(stream),
        }
    }

    /// What is known now. Never waits.
    pub fn poll(&self) -> Checked {
        match self {
            Self::Good => Checked::Good,
            #[cfg(feature = "cuda")]
            Self::Word(word) => word.poll(),
        }
    }
}
