//! Memory for K or V in one of three types.

use std::ffi::c_void;

use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

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
#[derive(Debug, Clone, PartialEq)]
pub enum KvBuffer {
    /// f32 elements.
    F32(Vec<f32>),
    /// f16 elements.
    F16(Vec<f16>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
}

impl KvBuffer {
    /// A zeroed buffer of `len` elements.
    pub fn new(dtype: KvDtype, len: usize) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(vec![0.0; len]),
            // Zeros as integers come from the system as they are used; zeros as halves would be written at once.
            KvDtype::F16 => Self::F16(vec![0u16; len].reinterpret_into()),
            KvDtype::Bf16 => Self::Bf16(vec![0u16; len].reinterpret_into()),
        }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> KvDtype {
        match self {
            Self::F32(_) => KvDtype::F32,
            Self::F16(_) => KvDtype::F16,
            Self::Bf16(_) => KvDtype::Bf16,
        }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(data) => data.capacity() * 4,
            Self::F16(data) => data.capacity() * 2,
            Self::Bf16(data) => data.capacity() * 2,
        }
    }

    /// Stores values from element `at` on, rounding them to the buffer's type.
    pub fn write(&mut self, at: usize, values: &[f32]) {
        match self {
            Self::F32(data) => data[at..at + values.len()].copy_from_slice(values),
            Self::F16(data) => data[at..at + values.len()].convert_from_f32_slice(values),
            Self::Bf16(data) => data[at..at + values.len()].convert_from_f32_slice(values),
        }
    }

    /// Loads `out.len()` values from element `at` on.
    pub fn read(&self, at: usize, out: &mut [f32]) {
        match self {
            Self::F32(data) => out.copy_from_slice(&data[at..at + out.len()]),
            Self::F16(data) => data[at..at + out.len()].convert_to_f32_slice(out),
            Self::Bf16(data) => data[at..at + out.len()].convert_to_f32_slice(out),
        }
    }

    /// Copies elements from another buffer of the same type; a buffer of another type is left as it was.
    pub fn copy_from(&mut self, at: usize, from: &Self, start: usize, len: usize) {
        match (self, from) {
            (Self::F32(to), Self::F32(from)) => to[at..at + len].copy_from_slice(&from[start..start + len]),
            (Self::F16(to), Self::F16(from)) => to[at..at + len].copy_from_slice(&from[start..start + len]),
            (Self::Bf16(to), Self::Bf16(from)) => to[at..at + len].copy_from_slice(&from[start..start + len]),
            _ => {}
        }
    }

    /// Copies `len` elements from element `start` on to element `at`, within the buffer.
    pub fn copy_within(&mut self, at: usize, start: usize, len: usize) {
        match self {
            Self::F32(data) => data.copy_within(start..start + len, at),
            Self::F16(data) => data.copy_within(start..start + len, at),
            Self::Bf16(data) => data.copy_within(start..start + len, at),
        }
    }

    /// Address of the first element, to read from.
    pub fn as_ptr(&self) -> *const c_void {
        match self {
            Self::F32(data) => data.as_ptr().cast(),
            Self::F16(data) => data.as_ptr().cast(),
            Self::Bf16(data) => data.as_ptr().cast(),
        }
    }

    /// Address of the first element, for describing the cache to the host. Valid until the buffer is replaced.
    pub fn as_mut_ptr(&mut self) -> *mut c_void {
        match self {
            Self::F32(data) => data.as_mut_ptr().cast(),
            Self::F16(data) => data.as_mut_ptr().cast(),
            Self::Bf16(data) => data.as_mut_ptr().cast(),
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
