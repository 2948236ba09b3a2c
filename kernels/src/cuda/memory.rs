//! Memory on the device, lent by the caller.

use std::marker::PhantomData;
use std::ops::Range;

use super::error::CudaError;

/// Elements in device memory of the caller's: a description, like a pointer, that may be copied and sent freely.
#[derive(Debug)]
pub struct DeviceSlice<T> {
    address: u64,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for DeviceSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<T> {}

impl<T> DeviceSlice<T> {
    /// Describes `len` elements at a device address.
    ///
    /// # Safety
    /// Until the work that was enqueued with the slice is done, the elements must be memory that the device may read,
    /// and write where an operation writes; nobody else writes them then, or reads what is written. An operation states
    /// what it reads before it has written it.
    ///
    /// # Errors
    /// [`CudaError::Address`] unless the address is aligned for `T`, and not null where `len` is not 0.
    pub unsafe fn new(address: u64, len: usize) -> Result<Self, CudaError> {
        let alignment = align_of::<T>();
        if !address.is_multiple_of(alignment as u64) || (address == 0 && len > 0) {
            return Err(CudaError::Address { what: "device memory", address, alignment });
        }
        Ok(Self { address, len, element: PhantomData })
    }

    /// No elements.
    pub fn empty() -> Self {
        Self { address: 0, len: 0, element: PhantomData }
    }

    /// Device address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the elements.
    ///
    /// # Errors
    /// [`CudaError::TooShort`] when the slice ends before the part does.
    pub fn part(&self, range: Range<usize>) -> Result<Self, CudaError> {
        if range.start > range.end || range.end > self.len {
            return Err(CudaError::TooShort { what: "device memory", found: self.len, needed: range.end });
        }
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Ok(Self { address, len: range.len(), element: PhantomData })
    }

    /// Refuses a slice of fewer elements.
    pub(crate) fn at_least(&self, what: &'static str, needed: usize) -> Result<u64, CudaError> {
        if self.len < needed { Err(CudaError::TooShort { what, found: self.len, needed }) } else { Ok(self.address) }
    }
}

impl DeviceSlice<u8> {
    /// The address of working memory of at least `needed` bytes.
    pub(crate) fn scratch(&self, needed: usize) -> Result<u64, CudaError> {
        let address = self.at_least("working memory", needed)?;
        if address.is_multiple_of(SCRATCH_ALIGNMENT) {
            Ok(address)
        } else {
            Err(CudaError::Address { what: "working memory", address, alignment: SCRATCH_ALIGNMENT as usize })
        }
    }
}

/// Working memory begins at a multiple of this.
pub const SCRATCH_ALIGNMENT: u64 = 256;
