//! Where weights and caches lie and steps run: the CPU, or a CUDA device.
//!
//! Both give each row of every result one order of summation, so that what the [crate] promises of its bits holds on
//! either; between the two, logits differ by rounding.

use std::ffi::c_void;
use std::fmt;
use std::str::FromStr;

use kvhook_abi::raw::{KVH_DEVICE_CPU, KvhDevice};

#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;
use crate::model::Model;

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

/// A device, as one asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The CPU and ordinary memory.
    #[default]
    Cpu,
    /// The CUDA device of this number. All ranks have it.
    Cuda(i32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    /// `cpu`, `cuda` (the first one) or `cuda:N`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let cuda = |number: &str| number.parse::<u16>().ok().map(|ordinal| Self::Cuda(ordinal.into()));
        match text.split_once(':') {
            None if text == "cpu" => Some(Self::Cpu),
            None if text == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", number)) => cuda(number),
            _ => None,
        }
        .ok_or_else(|| "expected cpu, cuda or cuda:N".into())
    }
}

/// A device in use.
#[derive(Debug, Clone)]
pub enum Backend {
    /// The CPU.
    Cpu,
    /// A CUDA device with the model's weights.
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<cuda::Cuda>),
}

/// Copies of a model's weights on other devices than the CPU; they stay as long as the model.
#[derive(Debug, Default)]
pub struct Copies {
    #[cfg(feature = "cuda")]
    cuda: std::sync::Mutex<std::collections::HashMap<i32, std::sync::Arc<cuda::Cuda>>>,
}

impl Backend {
    /// Opens a device for a model. The first time, its weights are copied there.
    ///
    /// # Errors
    /// [`Error::Device`] for a device that this build or this machine does not have, or that has too little memory;
    /// [`Error::UnsupportedModel`] for a model that runs on the CPU alone.
    pub(crate) fn open(device: Device, model: &Model) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                let mut copies = model.copies.cuda.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if let Some(cuda) = copies.get(&ordinal) {
                    return Ok(Self::Cuda(std::sync::Arc::clone(cuda)));
                }
                let cuda = std::sync::Arc::new(cuda::Cuda::open(ordinal, model)?);
                copies.insert(ordinal, std::sync::Arc::clone(&cuda));
                Ok(Self::Cuda(cuda))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => {
                let _ = &model.copies;
                Err(Error::Device {
                    device,
                    reason: "this program was built without CUDA; build it with `--features cuda`, or use the CPU"
                        .into(),
                })
            }
        }
    }

    /// The host's name of the device.
    pub(crate) fn device(&self) -> KvhDevice {
        match self {
            Self::Cpu => KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => cuda.device(),
        }
    }

    /// The device's name, to be read; `None` for the CPU.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Cpu => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => Some(cuda.name()),
        }
    }

    /// The stream that all work of the engine and its plugins is enqueued on; null on the CPU.
    pub(crate) fn stream(&self) -> *mut c_void {
        match self {
            Self::Cpu => std::ptr::null_mut(),
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => cuda.driver().stream(),
        }
    }

    /// Waits until the device has done what was enqueued.
    ///
    /// # Errors
    /// [`Error::Device`] for whatever went wrong there.
    pub(crate) fn wait(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => cuda.driver().wait(),
        }
    }

    /// Reads `u32` elements from the device's memory.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// There are so many at the address, and nobody writes them meanwhile.
    pub(crate) unsafe fn read(&self, address: *const u32, count: usize) -> Result<Vec<u32>> {
        match self {
            // SAFETY: passed on from the caller.
            Self::Cpu => Ok(unsafe { std::slice::from_raw_parts(address, count) }.to_vec()),
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => {
                let mut out = vec![0u32; count];
                // SAFETY: as above.
                unsafe { cuda.driver().download(address as u64, &mut out) }?;
                Ok(out)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_they_are_written() {
        for (text, device) in [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:7", Device::Cuda(7))] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:-1", "cpu:0", ""] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
