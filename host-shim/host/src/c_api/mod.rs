//! The C API: what every engine uses. One module for each topic.
//!
//! Rules for all functions:
//!
//! * Arguments are checked: null, a `struct_size` that is too small, an array that is too short give
//!   `KVHOOK_ERR_INVALID_ARGUMENT`, with the argument named. That, `KVHOOK_ERR_INTERNAL` for a defect of the host,
//!   and `KVHOOK_OK` may come back from each; other statuses are listed with each function.
//! * `error` is the caller's buffer for a message, or null. It is written only when the status is not `KVHOOK_OK`.
//! * What is passed in is read during the call and not kept, unless a function says otherwise. Outputs are structs and
//!   arrays of the caller's; a lent array may be empty (`count` 0) where its content is not wanted.
//! * Threads: any, concurrently, unless a function says otherwise. Functions with a `rank` are called by the thread that
//!   drives that rank, one call for each rank at a time.
//! * No function unwinds, and none waits for another rank.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvhook_abi::boundary::{self, Growing};
use kvhook_abi::raw::*;

use crate::callbacks::one_line;
use crate::error::HostError;
use crate::host::Host;
use crate::raw::*;

mod arms;
mod attention;
mod compress;
mod create;
mod figures;
mod names;
mod sequences;

pub use arms::*;
pub use attention::*;
pub use compress::*;
pub use create::*;
pub use figures::*;
pub use names::*;
pub use sequences::*;

macro_rules! growing {
    ($($name:ident)+) => {$(
        // SAFETY: `struct_size` comes first; every field is an integer, a float, a raw pointer, an optional function or
        // a struct of these, laid out without padding.
        unsafe impl Growing for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = size_of::<$name>();
        }
    )+};
}

growing! {
    KvhookCallbacks KvhookHostConfig KvhookArm KvhookBegin KvhookSequence KvhookAsk KvhookAnswer
    KvhookPrepareSequence KvhookVerdict KvhookCommit KvhookTableEdit KvhookStep KvhookFigures
}

/// Runs a function's body: no panic passes the boundary, an error becomes its number and its text.
///
/// # Safety
/// `error` is null or a text buffer.
unsafe fn guard(error: *mut KvhText, body: impl FnOnce() -> Result<(), HostError>) -> KvhookStatus {
    let result = catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|_| Err(HostError::Internal("a function of the C API panicked".to_owned())));
    match result {
        Ok(()) => KVHOOK_OK,
        Err(failure) => {
            // SAFETY: passed on from the caller.
            unsafe { boundary::write_text(error, &one_line(&failure.to_string())) };
            failure.status()
        }
    }
}

/// The host behind a handle.
///
/// # Safety
/// `host` is null or a live host.
unsafe fn host_of<'a>(host: *mut KvhookHost) -> Result<&'a Host, HostError> {
    // SAFETY: passed on from the caller; hosts are only ever shared.
    unsafe { host.cast::<Host>().as_ref() }
        .ok_or_else(|| HostError::InvalidArgument { argument: "host", problem: "is null".to_owned() })
}

/// Writes a whole text or nothing.
///
/// # Safety
/// `out` is null or a text buffer.
unsafe fn give(out: *mut KvhText, text: &str) -> Result<(), HostError> {
    // SAFETY: passed on from the caller.
    let given = unsafe { boundary::read(out, "out")? }.capacity;
    if given < text.len() {
        // SAFETY: `read` found the struct to be there.
        unsafe { (&raw mut (*out).length).write(text.len()) };
        return Err(HostError::BufferTooSmall { needed: text.len(), given });
    }
    // SAFETY: passed on from the caller.
    unsafe { boundary::write_text(out, text) };
    Ok(())
}

/// An array of `uint64_t` to be filled, checked before anything is done.
struct Numbers {
    data: *mut u8,
    stride: usize,
    wanted: bool,
}

impl Numbers {
    /// # Errors
    /// `Argument` when the array is neither empty nor long enough.
    fn new(array: KvhArrayMut, needed: usize, name: &str) -> Result<Self, HostError> {
        let wanted = array.count != 0;
        let (data, stride) = (array.data.cast::<u8>(), array.stride as usize);
        let aligned = data.cast::<u64>().is_aligned() && stride.is_multiple_of(align_of::<u64>());
        if wanted && (data.is_null() || !aligned || stride < size_of::<u64>() || array.count < needed as u64) {
            return Err(HostError::Argument(format!(
                "`{name}` has {} elements with a stride of {stride} bytes; expected {needed} uint64_t, or none",
                array.count
            )));
        }
        Ok(Self { data, stride, wanted })
    }

    /// # Safety
    /// The array is writable, and `values` are as many as were needed.
    unsafe fn write(&self, values: &[u64]) {
        for (place, &value) in values.iter().enumerate().filter(|_| self.wanted) {
            // SAFETY: passed on from the caller; `new` checked length, stride and alignment.
            unsafe { self.data.add(place * self.stride).cast::<u64>().write(value) };
        }
    }
}

/// Addresses of an array's elements that the host fills.
///
/// # Errors
/// `Argument` for null, misaligned or too short elements.
fn slots<T: Growing>(array: KvhArrayMut, name: &str) -> Result<Vec<*mut T>, HostError> {
    let (count, stride) = (array.count as usize, array.stride as usize);
    let (data, align) = (array.data.cast::<u8>(), align_of::<T>());
    let bad =
        data.is_null() || !data.cast::<T>().is_aligned() || !stride.is_multiple_of(align) || stride < T::FIRST_SIZE;
    if count > 0 && (bad || count.checked_mul(stride).is_none_or(|bytes| bytes > isize::MAX as usize)) {
        return Err(HostError::Argument(format!(
            "`{name}` is null or misaligned, or its stride of {stride} bytes is less than a {}'s {}",
            T::NAME,
            T::FIRST_SIZE
        )));
    }
    Ok((0..count).map(|index| data.wrapping_add(index * stride).cast()).collect())
}
