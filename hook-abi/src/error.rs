//! What a plugin's own code answers when it fails.

use kvhook_kernels::KernelError;

use crate::config::ConfigError;
use crate::raw::{
    KVH_ERR_CONFIG, KVH_ERR_DEVICE, KVH_ERR_INTERNAL, KVH_ERR_INVALID_ARGUMENT, KVH_ERR_OUT_OF_MEMORY,
    KVH_ERR_UNSUPPORTED, KvhStatus,
};

/// Why a plugin, or a call into the host on its behalf, failed. Its text goes to the host's error buffer.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The config is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host broke the contract: an argument is null, too small or out of range.
    #[error("{0}")]
    InvalidArgument(String),
    /// The model, device, dtype or layout is not one that the plugin takes.
    #[error("{0}")]
    Unsupported(String),
    /// The host refused memory.
    #[error("{0}")]
    OutOfMemory(String),
    /// A device call failed.
    #[error("{0}")]
    Device(String),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The plugin's own code asked for something that cannot be, or failed in a way of its own.
    #[error("{0}")]
    Internal(String),
}

/// A fault of the driver's is the device's; what is neither memory nor the arguments is what the kernels do not take.
#[cfg(feature = "cuda")]
impl From<kvhook_kernels::cuda::CudaError> for PluginError {
    fn from(error: kvhook_kernels::cuda::CudaError) -> Self {
        match error {
            kvhook_kernels::cuda::CudaError::Driver { .. } => Self::Device(error.to_string()),
            kvhook_kernels::cuda::CudaError::OutOfMemory { .. } => Self::OutOfMemory(error.to_string()),
            kvhook_kernels::cuda::CudaError::Kernel(error) => Self::Kernel(error),
            _ => Self::Unsupported(error.to_string()),
        }
    }
}

impl PluginError {
    /// The status that crosses the boundary.
    pub fn status(&self) -> KvhStatus {
        match self {
            Self::Config(_) => KVH_ERR_CONFIG,
            Self::InvalidArgument(_) => KVH_ERR_INVALID_ARGUMENT,
            Self::Unsupported(_) => KVH_ERR_UNSUPPORTED,
            Self::OutOfMemory(_) => KVH_ERR_OUT_OF_MEMORY,
            Self::Device(_) => KVH_ERR_DEVICE,
            Self::Kernel(_) | Self::Internal(_) => KVH_ERR_INTERNAL,
        }
    }

    /// The error of a service that answered `status` with `message`.
    pub(crate) fn from_service(service: &str, status: KvhStatus, message: &str) -> Self {
        let text = format!("{service} answered status {status}: {message}");
        match status {
            KVH_ERR_OUT_OF_MEMORY => Self::OutOfMemory(text),
            KVH_ERR_UNSUPPORTED => Self::Unsupported(text),
            KVH_ERR_DEVICE => Self::Device(text),
            KVH_ERR_INVALID_ARGUMENT => Self::InvalidArgument(text),
            _ => Self::Internal(text),
        }
    }
}
