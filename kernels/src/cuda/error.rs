//! The error type of all CUDA operations.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::dtype::Dtype;
use crate::error::KernelError;

/// Why a CUDA operation was refused. Nothing was enqueued, [`Self::Driver`] apart.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not on this machine.
    #[error("libcuda is not found: install the NVIDIA driver (580 or later), or use the CPU")]
    NoDriver,
    /// The driver has no such device.
    #[error(
        "CUDA device {ordinal} is asked for, but the driver has {count} devices, counted from 0: name another one, or use the CPU"
    )]
    NoDevice {
        /// Device asked for.
        ordinal: i32,
        /// Devices there are.
        count: i32,
    },
    /// The engine's context is not its device's primary context.
    #[error("the engine's CUDA context is not the primary context of device {ordinal}: use the primary one")]
    ForeignContext {
        /// The device.
        ordinal: i32,
    },
    /// The device runs none of the kernels' code.
    #[error("device {ordinal} has compute capability {major}.{minor}, expected 8.0 or later: use the CPU")]
    ComputeCapability {
        /// The device.
        ordinal: i32,
        /// Its compute capability.
        major: i32,
        /// Its compute capability.
        minor: i32,
    },
    /// The driver refused a call. Faults of work enqueued before may be reported here, too.
    #[error("{what}: the driver says {name} ({code})")]
    Driver {
        /// What was tried.
        what: &'static str,
        /// The driver's number.
        code: u32,
        /// Its name for that.
        name: String,
    },
    /// The device has no memory left for what stays as long as its kernels do.
    #[error("the device gives no {bytes} bytes more for {what}")]
    OutOfMemory {
        /// What they are for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// Queries have another element type than the keys.
    #[error("queries of {queries} over keys of {keys}: on a device both must have one dtype")]
    QueryDtype {
        /// The queries'.
        queries: Dtype,
        /// The keys'.
        keys: Dtype,
    },
    /// The arguments are refused for the reason that the CPU body gives.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Memory of the caller's is too short.
    #[error("{what} has {found} elements, expected at least {needed}")]
    TooShort {
        /// The memory.
        what: &'static str,
        /// Its elements.
        found: usize,
        /// Elements needed.
        needed: usize,
    },
    /// An address that is null or not aligned.
    #[error("{what} is at address {address:#x}, expected a multiple of {alignment} that is not 0")]
    Address {
        /// The memory.
        what: &'static str,
        /// Its address.
        address: u64,
        /// Alignment needed.
        alignment: usize,
    },
    /// A number that the kernels hold in fewer bits.
    #[error("{what} is {found}, expected at most {most}")]
    TooLarge {
        /// The number.
        what: &'static str,
        /// Its value.
        found: usize,
        /// The most that fits.
        most: usize,
    },
}

impl CudaError {
    /// For `map_err`: the driver's error with what was tried.
    pub(crate) fn driver(what: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| {
            let name = error.error_name().map_or_else(|_| "an unknown error".into(), |name| name.to_string_lossy());
            Self::Driver { what, code: error.0 as u32, name: name.into_owned() }
        }
    }

    /// As [`CudaError::driver`], for a call of the driver's that returns its status.
    pub(crate) fn check(what: &'static str, status: CUresult) -> Result<(), Self> {
        status.result().map_err(Self::driver(what))
    }
}
