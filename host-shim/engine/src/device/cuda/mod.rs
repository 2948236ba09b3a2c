//! A CUDA device: a few kernels of the engine's own (`cuda/`), one stream, memory from a pool in that stream's order.
//!
//! `libcuda` is opened when a runner is made, and nothing is linked.

mod driver;
mod kernels;
mod memory;
mod step;
mod weights;

use std::fmt;
use std::sync::Arc;

use kvhook_abi::raw::{KVH_DEVICE_CUDA, KvhDevice};

use super::Device;
use crate::error::{Error, Result};
use crate::model::Model;

pub(crate) use driver::Driver;
pub use memory::Rows;
pub(crate) use memory::Tables;
pub(crate) use step::forward;

/// The most channels of a head that the attention kernels take.
const MOST_CHANNELS: usize = 256;

/// A device with the kernels and a model's weights.
pub struct Cuda {
    ordinal: i32,
    driver: Arc<Driver>,
    weights: weights::Weights,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda({}, {})", self.ordinal, self.driver.name())
    }
}

impl Cuda {
    /// Opens a device and copies the weights there.
    ///
    /// # Errors
    /// As [`Backend::open`](super::Backend::open).
    pub(super) fn open(ordinal: i32, model: &Model) -> Result<Self> {
        if model.config.head_dim > MOST_CHANNELS {
            let what = format!("heads of {} channels, above {MOST_CHANNELS} on CUDA", model.config.head_dim);
            return Err(Error::UnsupportedModel { what });
        }
        let driver = Arc::new(Driver::open(ordinal)?);
        let weights = weights::Weights::upload(&driver, model)?;
        Ok(Self { ordinal, driver, weights })
    }

    pub(super) fn device(&self) -> KvhDevice {
        KvhDevice { device_type: KVH_DEVICE_CUDA, device_id: self.ordinal }
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        self.driver.name()
    }

    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }
}

/// An error of a device.
fn failed(ordinal: i32, reason: String) -> Error {
    Error::Device { device: Device::Cuda(ordinal), reason }
}
