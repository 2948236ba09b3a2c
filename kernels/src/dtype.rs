//! Element types of a cache, and conversion of rows to f32 and back.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::KernelError;
use crate::simd::{self, Body};

/// Element type of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name that [`Dtype::from_str`] reads: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Dtype {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Self, KernelError> {
        [Self::F32, Self::F16, Self::Bf16]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| KernelError::DtypeName { found: name.to_owned() })
    }
}

/// Reads `out.len()` adjacent elements as f32. Exact: each f16 and bf16 is an f32.
///
/// # Safety
/// `source` must be valid for reading `out.len()` elements of `dtype`. It need not be aligned.
pub(crate) unsafe fn widen(dtype: Dtype, source: *const u8, out: &mut [f32]) {
    match dtype {
        // SAFETY: the caller promises the bytes; `out` is another allocation.
        Dtype::F32 => unsafe { source.copy_to_nonoverlapping(out.as_mut_ptr().cast(), size_of_val(out)) },
        Dtype::F16 => {
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("f16c") {
                // SAFETY: the processor has F16C; the caller promises the bytes.
                return unsafe { x86::widen_f16(source, out) };
            }
            // SAFETY: the caller promises the bytes.
            unsafe { widen_strided(dtype, source, 2, out) }
        }
        Dtype::Bf16 => simd::run(WidenBf16 { source, out }),
    }
}

struct WidenBf16<'a> {
    source: *const u8,
    out: &'a mut [f32],
}

impl Body for WidenBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let source = self.source.cast::<u16>();
        for (place, out) in self.out.iter_mut().enumerate() {
            // SAFETY: `widen`'s caller promises `out.len()` elements.
            let bits = unsafe { source.add(place).read_unaligned() };
            *out = f32::from_bits(u32::from(bits) << 16);
        }
    }
}

/// As [`widen`], with elements `stride` bytes apart.
///
/// # Safety
/// Each of the elements must be valid for reading.
pub(crate) unsafe fn widen_strided(dtype: Dtype, source: *const u8, stride: isize, out: &mut [f32]) {
    for (place, out) in out.iter_mut().enumerate() {
        let element = source.wrapping_offset(stride * place as isize);
        // SAFETY: the caller promises the element.
        *out = unsafe {
            match dtype {
                Dtype::F32 => element.cast::<f32>().read_unaligned(),
                Dtype::F16 => element.cast::<f16>().read_unaligned().to_f32(),
                Dtype::Bf16 => element.cast::<bf16>().read_unaligned().to_f32(),
            }
        };
    }
}

/// Writes `values` as adjacent elements, rounded to nearest, ties to even.
///
/// # Safety
/// `target` must be valid for writing `values.len()` elements of `dtype`. It need not be aligned.
pub(crate) unsafe fn narrow(dtype: Dtype, values: &[f32], target: *mut u8) {
    match dtype {
        // SAFETY: the caller promises the bytes; `values` is borrowed, so they are another allocation's.
        Dtype::F32 => unsafe { target.copy_from_nonoverlapping(values.as_ptr().cast(), size_of_val(values)) },
        Dtype::F16 => {
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("f16c") {
                // SAFETY: the processor has F16C; the caller promises the bytes.
                return unsafe { x86::narrow_f16(values, target) };
            }
            // SAFETY: the caller promises the bytes.
            unsafe { narrow_strided(dtype, values, target, 2) }
        }
        Dtype::Bf16 => simd::run(NarrowBf16 { values, target }),
    }
}

struct NarrowBf16<'a> {
    values: &'a [f32],
    target: *mut u8,
}

impl Body for NarrowBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let target = self.target.cast::<u16>();
        for (place, value) in self.values.iter().enumerate() {
            let bits = value.to_bits();
            // Half of the last place, and one less where that makes the tie even. A NaN stays one: its top bit is set.
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let bits = if value.is_nan() { bits >> 16 | 0x40 } else { rounded };
            // SAFETY: `narrow`'s caller promises `values.len()` elements.
            unsafe { target.add(place).write_unaligned(bits as u16) };
        }
    }
}

/// As [`narrow`], with elements `stride` bytes apart.
///
/// # Safety
/// Each of the elements must be valid for writing.
pub(crate) unsafe fn narrow_strided(dtype: Dtype, values: &[f32], target: *mut u8, stride: isize) {
    for (place, &value) in values.iter().enumerate() {
        let element = target.wrapping_offset(stride * place as isize);
        // SAFETY: the caller promises the element.
        unsafe {
            match dtype {
                Dtype::F32 => element.cast::<f32>().write_unaligned(value),
                Dtype::F16 => element.cast::<f16>().write_unaligned(f16::from_f32(value)),
                Dtype::Bf16 => element.cast::<bf16>().write_unaligned(bf16::from_f32(value)),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph,
        _mm256_loadu_ps, _mm256_storeu_ps,
    };

    use super::{Dtype, narrow_strided, widen_strided};

    /// # Safety
    /// As [`super::widen`].
    #[target_feature(enable = "f16c")]
    pub(super) unsafe fn widen_f16(source: *const u8, out: &mut [f32]) {
        let (eights, rest) = out.as_chunks_mut::<8>();
        let done = eights.len() * 16;
        for (place, eight) in eights.iter_mut().enumerate() {
            // SAFETY: the caller promises 16 bytes for each eight elements; loads and stores are unaligned ones.
            unsafe {
                let halves = _mm_loadu_si128(source.add(place * 16).cast());
                _mm256_storeu_ps(eight.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        // SAFETY: the caller promises the rest too.
        unsafe { widen_strided(Dtype::F16, source.add(done), 2, rest) }
    }

    /// # Safety
    /// As [`super::narrow`].
    #[target_feature(enable = "f16c")]
    pub(super) unsafe fn narrow_f16(values: &[f32], target: *mut u8) {
        let (eights, rest) = values.as_chunks::<8>();
        let done = eights.len() * 16;
        for (place, eight) in eights.iter().enumerate() {
            // SAFETY: the caller promises 16 bytes for each eight elements; loads and stores are unaligned ones.
            unsafe {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(eight.as_ptr()));
                _mm_storeu_si128(target.add(place * 16).cast(), halves);
            }
        }
        // SAFETY: the caller promises the rest too.
        unsafe { narrow_strided(Dtype::F16, rest, target.add(done), 2) }
    }
}
