//! Memory that the host takes from the engine, and who owns it.
//!
//! Everything of a tensor's scale (position tables, copies of indices, lent rows, what plugins ask for) is a
//! [`Block`]: it comes from the engine's `allocate` and goes back, in the stream's order, when its owner drops it.
//! The three kinds of a plugin's memory differ only in their owner: the call, the ticket, or the sequence.

use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::callbacks::Callbacks;
use crate::error::HostError;

/// Where a rank's memory comes from.
#[derive(Clone, Copy)]
pub struct Allocator {
    callbacks: Callbacks,
    rank: u32,
}

impl Allocator {
    /// The memory of one rank.
    pub fn new(callbacks: Callbacks, rank: u32) -> Self {
        Self { callbacks, rank }
    }
}

/// One allocation, given back on drop.
pub struct Block {
    data: NonNull<u8>,
    bytes: u64,
    alignment: u64,
    allocator: Allocator,
    /// In whose order it goes back.
    stream: AtomicPtr<c_void>,
}

// SAFETY: a block owns its memory, and the engine's callbacks may be called from any thread.
unsafe impl Send for Block {}
// SAFETY: `&Block` gives out an address only; the stream is atomic.
unsafe impl Sync for Block {}

impl Block {
    /// Allocates at least one byte in the stream's order. `what` is for the message.
    ///
    /// # Errors
    /// `OutOfMemory` when the engine refuses, or answers an address that is not aligned.
    pub fn new(
        allocator: Allocator,
        bytes: u64,
        alignment: u64,
        stream: *mut c_void,
        what: &'static str,
    ) -> Result<Self, HostError> {
        let bytes = bytes.max(1);
        let data = allocator
            .callbacks
            .allocate(allocator.rank, bytes, alignment, stream)
            .ok_or(HostError::OutOfMemory { bytes, what })?;
        let block = Self { data, bytes, alignment, allocator, stream: AtomicPtr::new(stream) };
        if !(data.as_ptr() as u64).is_multiple_of(alignment) {
            return Err(HostError::OutOfMemory { bytes, what });
        }
        Ok(block)
    }

    /// First byte.
    pub fn data(&self) -> *mut u8 {
        self.data.as_ptr()
    }

    /// From now on the block goes back in the order of this stream, in which it was used last.
    pub fn release_on(&self, stream: *mut c_void) {
        self.stream.store(stream, Ordering::Relaxed);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let stream = *self.stream.get_mut();
        // SAFETY: allocated in `new` with the same arguments, and nobody else owns it.
        unsafe { self.allocator.callbacks.free(self.allocator.rank, self.data, self.bytes, self.alignment, stream) };
    }
}

/// `u32` elements in a block, which lists of several layers may share. Never written again once they are filled.
#[derive(Clone)]
pub struct U32s {
    block: Arc<Block>,
    /// First element.
    start: usize,
    length: usize,
    /// Whether the block is ordinary memory, so that this thread may read it.
    readable: bool,
}

impl U32s {
    /// Allocates `length` elements in ordinary memory and fills them.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub fn filled(
        allocator: Allocator,
        length: usize,
        stream: *mut c_void,
        what: &'static str,
        fill: impl FnOnce(&mut [u32]),
    ) -> Result<Self, HostError> {
        let block = Self::block(allocator, length, stream, what)?;
        // SAFETY: the block has room for `length` elements and is aligned; zeroes are initialised elements.
        let elements = unsafe {
            block.data().write_bytes(0, length * size_of::<u32>());
            core::slice::from_raw_parts_mut(block.data().cast(), length)
        };
        fill(elements);
        Ok(Self { block: Arc::new(block), start: 0, length, readable: true })
    }

    /// A block for `length` elements.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub fn block(
        allocator: Allocator,
        length: usize,
        stream: *mut c_void,
        what: &'static str,
    ) -> Result<Block, HostError> {
        let bytes = length as u64 * size_of::<u32>() as u64;
        Block::new(allocator, bytes, align_of::<u32>() as u64, stream, what)
    }

    /// `length` elements of a device's memory, from element `start` of a [`block`](Self::block) on.
    #[cfg(feature = "cuda")]
    pub fn on_device(block: Arc<Block>, start: usize, length: usize) -> Self {
        Self { block, start, length, readable: false }
    }

    /// How many there are.
    #[cfg(feature = "cuda")]
    pub fn count(&self) -> usize {
        self.length
    }

    /// Address of the first element.
    pub fn data(&self) -> *mut u32 {
        self.block.data().cast::<u32>().wrapping_add(self.start)
    }

    /// The elements; none where they lie on a device.
    pub fn as_slice(&self) -> &[u32] {
        if !self.readable {
            return &[];
        }
        // SAFETY: `filled` initialised them, and they are not written any more.
        unsafe { core::slice::from_raw_parts(self.data(), self.length) }
    }

    /// As [`Block::release_on`].
    pub fn release_on(&self, stream: *mut c_void) {
        self.block.release_on(stream);
    }
}

/// Memory of one sequence on one rank, which plugins fill while they are called and `free` empties.
#[derive(Clone, Default)]
pub struct SequenceMemory(Arc<Mutex<Vec<Block>>>);

impl SequenceMemory {
    /// Adds a block.
    pub fn push(&self, block: Block) {
        self.0.lock().push(block);
    }

    /// Whether a plugin holds memory for the sequence.
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Gives everything back, in the order of a stream.
    pub fn release(&self, stream: *mut c_void) {
        let blocks = core::mem::take(&mut *self.0.lock());
        blocks.iter().for_each(|block| block.release_on(stream));
    }
}
