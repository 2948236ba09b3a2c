//! Memory on the device.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Driver;
use crate::cache::KvDtype;
use crate::error::Result;

/// Elements in device memory, which goes back in the stream's order.
pub(super) struct Buffer<T> {
    driver: Arc<Driver>,
    address: u64,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T: Copy> Buffer<T> {
    /// Room for `len` elements, whatever is there.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when there is no memory.
    pub(super) fn new(driver: &Arc<Driver>, len: usize) -> Result<Self> {
        let address = driver.allocate(len * size_of::<T>())?;
        Ok(Self { driver: Arc::clone(driver), address, len, element: PhantomData })
    }

    /// A copy of some elements.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn from_slice(driver: &Arc<Driver>, data: &[T]) -> Result<Self> {
        let buffer = Self::new(driver, data.len())?;
        // SAFETY: the buffer is as long as the data.
        unsafe { driver.upload(buffer.address, data) }?;
        Ok(buffer)
    }

    /// Address of the first element.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Waits, and reads the first `count` elements.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) for whatever went wrong on the device.
    pub(super) fn read(&self, count: usize) -> Result<Vec<T>>
    where
        T: Default,
    {
        let mut out = vec![T::default(); count.min(self.len)];
        // SAFETY: the buffer has so many.
        unsafe { self.driver.download(self.address, &mut out) }?;
        Ok(out)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: it came from `allocate`, and whoever enqueues work with it borrows it.
        unsafe { self.driver.free(self.address) }
    }
}

/// K or V on the device: elements of a cache's dtype.
pub struct Rows {
    bytes: Buffer<u8>,
    dtype: KvDtype,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rows({:?}, {} bytes)", self.dtype, self.bytes.len)
    }
}

impl Rows {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when there is no memory.
    pub(crate) fn new(driver: &Arc<Driver>, dtype: KvDtype, len: usize) -> Result<Self> {
        let bytes = Buffer::new(driver, len * dtype.bytes())?;
        if len > 0 {
            // SAFETY: the buffer has so many bytes.
            unsafe { driver.clear(bytes.address, bytes.len) }?;
        }
        Ok(Self { bytes, dtype })
    }

    /// `len` zeros of the same dtype on the same device.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn fresh(&self, len: usize) -> Result<Self> {
        Self::new(&self.bytes.driver, self.dtype, len)
    }

    /// Type of the elements.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len / self.dtype.bytes()
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.bytes.len
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.bytes.address
    }

    /// Address of `len` elements from `at` on.
    fn part(&self, at: usize, len: usize) -> u64 {
        assert!(at + len <= self.len(), "elements {at}..{} of {}", at + len, self.len());
        self.bytes.address + (at * self.dtype.bytes()) as u64
    }

    /// Enqueues a copy of elements of another buffer.
    pub(crate) fn copy_from(&mut self, at: usize, from: &Self, start: usize, len: usize) -> Result<()> {
        // SAFETY: both parts are there, in buffers of their own.
        unsafe { self.bytes.driver.copy(self.part(at, len), from.part(start, len), len * self.dtype.bytes()) }
    }

    /// Enqueues a copy of elements to others that do not overlap with them.
    pub(crate) fn copy_within(&mut self, at: usize, start: usize, len: usize) -> Result<()> {
        assert!(at + len <= start || start + len <= at, "{len} elements from {start} to {at}");
        // SAFETY: both parts are there, and do not overlap.
        unsafe { self.bytes.driver.copy(self.part(at, len), self.part(start, len), len * self.dtype.bytes()) }
    }

    /// Enqueues the storing of values, rounded to the dtype.
    pub(crate) fn write(&mut self, at: usize, values: &[f32]) -> Result<()> {
        let (to, driver) = (self.part(at, values.len()), &self.bytes.driver);
        // SAFETY: the part is there.
        unsafe {
            match self.dtype {
                KvDtype::F32 => driver.upload(to, values),
                KvDtype::F16 => {
                    driver.upload(to, &values.iter().map(|value| f16::from_f32(*value)).collect::<Vec<_>>())
                }
                KvDtype::Bf16 => {
                    driver.upload(to, &values.iter().map(|value| bf16::from_f32(*value)).collect::<Vec<_>>())
                }
            }
        }
    }

    /// Waits, and loads elements.
    pub(crate) fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        let (from, driver) = (self.part(at, out.len()), &self.bytes.driver);
        // SAFETY: the part is there, and all of these are plain numbers.
        unsafe {
            match self.dtype {
                KvDtype::F32 => driver.download(from, out),
                KvDtype::F16 => {
                    let mut halves = vec![f16::ZERO; out.len()];
                    driver.download(from, &mut halves)?;
                    halves.convert_to_f32_slice(out);
                    Ok(())
                }
                KvDtype::Bf16 => {
                    let mut halves = vec![bf16::ZERO; out.len()];
                    driver.download(from, &mut halves)?;
                    halves.convert_to_f32_slice(out);
                    Ok(())
                }
            }
        }
    }
}

/// Block tables of a cache on the device, one behind the other.
pub(crate) struct Tables {
    entries: Buffer<u32>,
}

impl Tables {
    /// Enqueues a copy of the tables; where each lies.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when there is no memory.
    pub(crate) fn new<'a>(driver: &Arc<Driver>, tables: impl Iterator<Item = &'a [u32]>) -> Result<(Self, Vec<u64>)> {
        let (mut entries, mut starts) = (Vec::new(), Vec::new());
        for table in tables {
            starts.push(entries.len());
            entries.extend_from_slice(table);
        }
        let entries = Buffer::from_slice(driver, &entries)?;
        let addresses = starts.iter().map(|start| entries.address + (start * size_of::<u32>()) as u64).collect();
        Ok((Self { entries }, addresses))
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tables({} entries)", self.entries.len)
    }
}
