//! What the device found out about an operation's data.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::device::{Device, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;

/// A word of device memory into which operations write the first fault that they find, by item, head and place: the
/// same one whatever the order of the device's threads.
///
/// [`Verdict::clear`] comes before the first operation, [`Verdict::fetch`] behind the last.
#[derive(Debug, Clone, Copy)]
pub struct Verdict {
    word: DeviceSlice<u64>,
}

/// Read on the host, a fetched verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The device has not written it yet.
    Pending,
    /// No fault.
    Good,
    /// The first fault.
    Bad(Fault),
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("item {item}, head {head}, place {place}: {kind}")]
pub struct Fault {
    /// Item of the batch: a layer of a sequence.
    pub item: usize,
    /// KV head.
    pub head: usize,
    /// Place in a list of indices, or token, as the kind says.
    pub place: usize,
    /// What is wrong.
    pub kind: FaultKind,
}

/// What is wrong with one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// An index is not below the number of rows.
    #[error("the token is out of range, expected less than the number of rows")]
    OutOfRange,
    /// An index is lower than the one before it.
    #[error("the token is lower than the one before it, expected ascending order")]
    Descending,
    /// An index is equal to the one before it.
    #[error("the token is repeated, expected each token once")]
    Repeated,
    /// In place, a row would be written before it was read.
    #[error("the row cannot move up in place; in place, rows move towards the front only")]
    Overtakes,
    /// A token's score is NaN.
    #[error("the token's score is NaN: scores must be ordered")]
    NotANumber,
    /// A token's weight is no probability's weight.
    #[error("the token's weight is negative or not finite: expected a finite number, zero or more")]
    Weight,
    /// A computed row cannot be stored.
    #[error("a result is not a number or above the most that the cache's dtype holds")]
    TooLarge,
    /// A number that this version does not know.
    #[error("an unknown fault")]
    Unknown,
}

impl Verdict {
    /// What the host puts into a word before it is fetched into.
    pub const PENDING: u64 = 0;

    const GOOD: u64 = u64::MAX;

    /// Uses the first word of `word`.
    ///
    /// # Errors
    /// [`CudaError::TooShort`] when there is none.
    pub fn new(word: DeviceSlice<u64>) -> Result<Self, CudaError> {
        Ok(Self { word: word.part(0..1)? })
    }

    /// Enqueues that there is no fault yet.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn clear(&self, device: &Device, stream: Stream) -> Result<(), CudaError> {
        let _entered = device.enter()?;
        // SAFETY: the word is lent, two halves long.
        unsafe { device.fill(stream, self.word.address(), u32::MAX, 2) }
    }

    /// Enqueues the copy of the verdict into `host`, for [`Outcome::decode`]. The word arrives as a whole.
    ///
    /// # Safety
    /// `host` must be valid for writing until the stream has done it. It must be page-locked (`cuMemHostAlloc`,
    /// `cudaHostAlloc`): else the call may wait for the stream.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub unsafe fn fetch(&self, device: &Device, stream: Stream, host: *mut u64) -> Result<(), CudaError> {
        let _entered = device.enter()?;
        // SAFETY: the caller promises `host`; the word is lent.
        let status = unsafe {
            sys::cuMemcpyDtoHAsync_v2(host.cast::<c_void>(), self.word.address(), size_of::<u64>(), stream.raw())
        };
        CudaError::check("copying a verdict", status)
    }

    pub(crate) fn address(&self) -> u64 {
        self.word.address()
    }

    /// The address, or 0 for none: an operation without a verdict always runs.
    pub(crate) fn address_of(verdict: Option<&Self>) -> u64 {
        verdict.map_or(0, Self::address)
    }
}

impl Outcome {
    /// Reads a word that was set to [`Verdict::PENDING`] and then fetched into.
    pub fn decode(word: u64) -> Self {
        match word {
            Verdict::PENDING => Self::Pending,
            Verdict::GOOD => Self::Good,
            word => Self::Bad(Fault {
                item: (word >> 50) as usize,
                head: (word >> 36 & 0x3fff) as usize,
                place: (word >> 4 & 0xffff_ffff) as usize,
                kind: match word & 0xf {
                    1 => FaultKind::OutOfRange,
                    2 => FaultKind::Descending,
                    3 => FaultKind::Repeated,
                    4 => FaultKind::Overtakes,
                    5 => FaultKind::NotANumber,
                    6 => FaultKind::Weight,
                    7 => FaultKind::TooLarge,
                    _ => FaultKind::Unknown,
                },
            }),
        }
    }
}

/// Items of an operation that reports faults are fewer, so that a verdict can name one in 14 bits.
pub(crate) const MOST_ITEMS: usize = 1 << 14;

/// Refuses more items than a verdict can name.
pub(crate) fn check_items(count: usize) -> Result<(), CudaError> {
    if count < MOST_ITEMS {
        Ok(())
    } else {
        Err(CudaError::TooLarge { what: "the number of items", found: count, most: MOST_ITEMS - 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::{Fault, FaultKind, Outcome, Verdict};

    #[test]
    fn words_are_decoded() {
        assert_eq!(Outcome::decode(Verdict::PENDING), Outcome::Pending);
        assert_eq!(Outcome::decode(u64::MAX), Outcome::Good);
        let word = 16_382 << 50 | 31 << 36 | 131_071 << 4 | 3;
        let fault = Fault { item: 16_382, head: 31, place: 131_071, kind: FaultKind::Repeated };
        assert_eq!(Outcome::decode(word), Outcome::Bad(fault));
    }
}
