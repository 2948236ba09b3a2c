//! Memory with guard bands.

use std::ffi::c_void;

/// Bytes of a guard band.
const BAND: usize = 64;
/// What guard bands are filled with.
const GUARD: u8 = 0xa5;

/// Bytes that are lent to a plugin, between two bands that nobody may write.
#[derive(Debug)]
pub struct Guarded {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Guarded {
    /// Memory of `length` bytes, each `fill`, aligned to `alignment`, a power of two.
    pub fn new(length: usize, alignment: usize, fill: u8) -> Self {
        let mut bytes = vec![GUARD; length + alignment + 2 * BAND];
        let start = BAND + bytes[BAND..].as_ptr().align_offset(alignment);
        bytes[start..start + length].fill(fill);
        Self { bytes, start, length }
    }

    /// The bytes between the bands.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// The same, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }

    /// First byte between the bands, for a plugin that only reads.
    pub fn address(&self) -> *const c_void {
        self.bytes.as_ptr().wrapping_add(self.start).cast()
    }

    /// First byte between the bands, for a plugin that writes.
    pub fn address_mut(&mut self) -> *mut c_void {
        self.bytes.as_mut_ptr().wrapping_add(self.start).cast()
    }

    /// Where a band was written: bytes from [`Guarded::address`], negative before it.
    pub fn damage(&self) -> Option<i64> {
        let end = self.start + self.length;
        let outside = (0..self.start).chain(end..self.bytes.len());
        let written = |place: &usize| self.bytes[*place] != GUARD;
        outside.into_iter().find(written).map(|place| place as i64 - self.start as i64)
    }
}

impl Clone for Guarded {
    /// Other memory with the same bytes; aligned to 64 bytes.
    fn clone(&self) -> Self {
        let mut copy = Self::new(self.length, 64, 0);
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }
}
