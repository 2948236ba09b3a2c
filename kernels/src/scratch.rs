//! Working memory, whose allocation may fail without ending the process.

use crate::error::KernelError;

/// A vector of `len` copies of `value`.
pub(crate) fn filled<T: Copy>(len: usize, value: T) -> Result<Vec<T>, KernelError> {
    let mut vector = Vec::new();
    vector
        .try_reserve_exact(len)
        .map_err(|_| KernelError::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) })?;
    vector.resize(len, value);
    Ok(vector)
}
