//! Memory for K or V in one of three types.

use std::ffi::c_void;

use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use crate::device::Backend;
use crate::error::Result;

/// Type of the stored keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// 32-bit floats: rows are kept as computed.
    #[default]
    F32,
    /// 16-bit floats, rounded to nearest even.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A buffer of K or V. Offsets and lengths are in elements.
///
/// On another device than the CPU what changes it is enqueued there.
#[derive(Debug)]
pub enum KvBuffer {
    /// f32 elements.
    F32(Vec<f32>),
    /// f16 elements.
    F16(Vec<f16>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
    /// On a CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(crate::device::cuda::Rows),
}

impl KvBuffer {
    /// A zeroed buffer of `len` elements in ordinary memory.
    pub fn new(dtype: KvDtype, len: usize) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(vec![0.0; len]),
            // Zeros as integers come from the system as they are used; zeros as halves would be written at once.
            KvDtype::F16 => Self::F16(vec![0u16; len].reinterpret_into()),
            KvDtype::Bf16 => Self::Bf16(vec![0u16; len].reinterpret_into()),
        }
    }

    /// The same on a device.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU has no memory left.
    pub fn on(backend: &Backend, dtype: KvDtype, len: usize) -> Result<Self> {
        match backend {
            Backend::Cpu => Ok(Self::new(dtype, len)),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => crate::device::cuda::Rows::new(cuda.driver(), dtype, len).map(Self::Cuda),
        }
    }

    /// A zeroed buffer of `len` elements of the same type on the same device.
    ///
    /// # Errors
    /// As [`on`](Self::on).
    pub fn fresh(&self, len: usize) -> Result<Self> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => rows.fresh(len).map(Self::Cuda),
            _ => Ok(Self::new(self.dtype(), len)),
        }
    }

    /// The same elements once more.
    ///
    /// # Errors
    /// As [`on`](Self::on).
    pub fn copy(&self) -> Result<Self> {
        match self {
            Self::F32(data) => Ok(Self::F32(data.clone())),
            Self::F16(data) => Ok(Self::F16(data.clone())),
            Self::Bf16(data) => Ok(Self::Bf16(data.clone())),
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => {
                let mut copy = self.fresh(rows.len())?;
                copy.copy_from(0, self, 0, rows.len())?;
                Ok(copy)
            }
        }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> KvDtype {
        match self {
            Self::F32(_) => KvDtype::F32,
            Self::F16(_) => KvDtype::F16,
            Self::Bf16(_) => KvDtype::Bf16,
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => rows.dtype(),
        }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(data) => data.capacity() * 4,
            Self::F16(data) => data.capacity() * 2,
            Self::Bf16(data) => data.capacity() * 2,
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => rows.bytes(),
        }
    }

    /// Stores values from element `at` on, rounding them to the buffer's type. That a CUDA device fails is logged.
    pub fn write(&mut self, at: usize, values: &[f32]) {
        match self {
            Self::F32(data) => data[at..at + values.len()].copy_from_slice(values),
            Self::F16(data) => data[at..at + values.len()].convert_from_f32_slice(values),
            Self::Bf16(data) => data[at..at + values.len()].convert_from_f32_slice(values),
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => {
                if let Err(error) = rows.write(at, values) {
                    tracing::error!(target: "kvhook", "rows are not written: {error}");
                }
            }
        }
    }

    /// Loads `out.len()` values from element `at` on. From a CUDA device this waits; should that fail, they are NaN.
    pub fn read(&self, at: usize, out: &mut [f32]) {
        match self {
            Self::F32(data) => out.copy_from_slice(&data[at..at + out.len()]),
            Self::F16(data) => data[at..at + out.len()].convert_to_f32_slice(out),
            Self::Bf16(data) => data[at..at + out.len()].convert_to_f32_slice(out),
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => {
                if let Err(error) = rows.read(at, out) {
                    tracing::error!(target: "kvhook", "rows cannot be read: {error}");
                    out.fill(f32::NAN);
                }
            }
        }
    }

    /// Copies elements from another buffer of the same type and device; any other is left as it was.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where another device than the CPU fails.
    pub fn copy_from(&mut self, at: usize, from: &Self, start: usize, len: usize) -> Result<()> {
        match (self, from) {
            (Self::F32(to), Self::F32(from)) => to[at..at + len].copy_from_slice(&from[start..start + len]),
            (Self::F16(to), Self::F16(from)) => to[at..at + len].copy_from_slice(&from[start..start + len]),
            (Self::Bf16(to), Self::Bf16(from)) => to[at..at + len].copy_from_slice(&from[start..start + len]),
            #[cfg(feature = "cuda")]
            (Self::Cuda(to), Self::Cuda(from)) => return to.copy_from(at, from, start, len),
            _ => {}
        }
        Ok(())
    }

    /// Copies `len` elements from element `start` on to element `at`, within the buffer; on a CUDA device they must not
    /// overlap.
    ///
    /// # Errors
    /// As [`copy_from`](Self::copy_from).
    pub fn copy_within(&mut self, at: usize, start: usize, len: usize) -> Result<()> {
        match self {
            Self::F32(data) => data.copy_within(start..start + len, at),
            Self::F16(data) => data.copy_within(start..start + len, at),
            Self::Bf16(data) => data.copy_within(start..start + len, at),
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => return rows.copy_within(at, start, len),
        }
        Ok(())
    }

    /// Address of the first element, on the buffer's device, to read from.
    pub fn as_ptr(&self) -> *const c_void {
        match self {
            Self::F32(data) => data.as_ptr().cast(),
            Self::F16(data) => data.as_ptr().cast(),
            Self::Bf16(data) => data.as_ptr().cast(),
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => rows.address() as *const c_void,
        }
    }

    /// Address of the first element, on the buffer's device, for describing the cache to the host. Valid until the buffer
    /// is replaced.
    pub fn as_mut_ptr(&mut self) -> *mut c_void {
        match self {
            Self::F32(data) => data.as_mut_ptr().cast(),
            Self::F16(data) => data.as_mut_ptr().cast(),
            Self::Bf16(data) => data.as_mut_ptr().cast(),
            #[cfg(feature = "cuda")]
            Self::Cuda(rows) => rows.address() as *mut c_void,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_to_the_type() {
        let values = [1.0f32, -0.333_333_34, 1e-3, 70_000.0, 0.0, 3.25, -2.5, 8.0];
        for (dtype, relative) in [(KvDtype::F32, 0.0), (KvDtype::F16, 4.9e-4), (KvDtype::Bf16, 3.91e-3)] {
            let mut buffer = KvBuffer::new(dtype, 24);
            assert_eq!(buffer.bytes(), 24 * dtype.bytes());
            buffer.write(8, &values);
            let mut out = [9.0; 8];
            buffer.read(8, &mut out);
            for (value, out) in values.iter().zip(out) {
                if dtype == KvDtype::F16 && *value > 65_504.0 {
                    assert_eq!(out, f32::INFINITY);
                } else {
                    assert!((value - out).abs() <= relative * value.abs(), "{value} became {out}");
                }
            }
        }
    }
}
