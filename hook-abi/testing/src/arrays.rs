//! Arrays and text buffers as a host lends them.

use std::marker::PhantomData;

use kvhook_abi::raw::*;

use crate::fault::Fault;

/// What fills bytes that nobody may write.
const CANARY: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// An array over elements as this side knows them.
pub fn array<T>(elements: &[T]) -> KvhArray {
    KvhArray { data: elements.as_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

/// As [`array()`], to be filled.
pub fn array_mut<T>(elements: &mut [T]) -> KvhArrayMut {
    KvhArrayMut { data: elements.as_mut_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

/// An array whose elements are larger than `T`, as a newer host's are.
pub struct Array<T> {
    words: Vec<u64>,
    stride: usize,
    count: usize,
    marker: PhantomData<T>,
}

impl<T> Array<T> {
    /// Elements of `size_of::<T>() + extra` bytes. Both are multiples of 8.
    ///
    /// # Panics
    /// Where they are not.
    pub fn new(extra: usize, values: Vec<T>) -> Self {
        let stride = size_of::<T>() + extra;
        assert!(stride.is_multiple_of(8) && align_of::<T>() <= 8, "elements of {stride} bytes");
        let count = values.len();
        let mut array = Self { words: vec![CANARY; count * stride / 8], stride, count, marker: PhantomData };
        for (index, value) in values.into_iter().enumerate() {
            // SAFETY: element `index` has `stride` bytes, aligned to 8.
            unsafe { array.at(index).write(value) };
        }
        array
    }

    /// The same for structs that begin with `struct_size`, which says the larger size.
    pub fn sized(extra: usize, values: Vec<T>) -> Self {
        let mut array = Self::new(extra, values);
        for index in 0..array.count {
            // SAFETY: the struct begins with its size.
            unsafe { array.at(index).cast::<usize>().write(size_of::<T>() + extra) };
        }
        array
    }

    fn at(&mut self, index: usize) -> *mut T {
        self.words.as_mut_ptr().wrapping_byte_add(index * self.stride).cast()
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let first = self.words.as_ptr();
        // SAFETY: written by `new`; whoever filled it since wrote plain C data.
        (0..self.count).map(move |index| unsafe { &*first.wrapping_byte_add(index * self.stride).cast::<T>() })
    }

    /// The elements, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        // SAFETY: as for `iter`; each element is handed out once.
        (0..self.count).map(|index| unsafe { &mut *self.at(index) })
    }

    /// As it crosses the boundary.
    pub fn raw(&self) -> KvhArray {
        KvhArray { data: self.words.as_ptr().cast(), count: self.count as u64, stride: self.stride as u64 }
    }

    /// As it crosses the boundary, to be filled.
    pub fn raw_mut(&mut self) -> KvhArrayMut {
        KvhArrayMut { data: self.words.as_mut_ptr().cast(), count: self.count as u64, stride: self.stride as u64 }
    }

    /// Looks for writes behind the elements.
    ///
    /// # Errors
    /// [`Fault::TailWritten`] with the array's `name`.
    pub fn check_tails(&self, name: &'static str) -> Result<(), Fault> {
        let untouched = |element: &[u64]| element[size_of::<T>() / 8..].iter().all(|word| *word == CANARY);
        let all = self.words.chunks(self.stride / 8).all(untouched);
        if all { Ok(()) } else { Err(Fault::TailWritten { array: name }) }
    }
}

/// Room for a message of 1 KiB.
pub struct Message {
    bytes: Vec<u8>,
    raw: KvhText,
}

impl Default for Message {
    fn default() -> Self {
        Self::new()
    }
}

impl Message {
    /// An empty message.
    pub fn new() -> Self {
        let mut bytes = vec![0; 1024];
        let raw = KvhText::over(&mut bytes);
        Self { bytes, raw }
    }

    /// To be handed to a plugin.
    pub fn raw(&mut self) -> *mut KvhText {
        &raw mut self.raw
    }

    /// What was written.
    ///
    /// # Errors
    /// [`Fault::Text`].
    pub fn read(&self) -> Result<String, Fault> {
        let (length, capacity) = (self.raw.length, self.bytes.len());
        let text = self.bytes.get(..length).and_then(|bytes| std::str::from_utf8(bytes).ok());
        text.map(str::to_owned).ok_or(Fault::Text { length, capacity })
    }

    /// The outcome of a call that got this as its error buffer.
    ///
    /// # Errors
    /// [`Fault::Refused`] with the text for any other status than success; [`Fault::Text`].
    pub fn outcome(&self, status: KvhStatus) -> Result<(), Fault> {
        if status == KVH_OK { Ok(()) } else { Err(Fault::Refused { status, message: self.read()? }) }
    }
}
