//! Reading and writing what crosses the boundary: structs that may be older or newer than ours, arrays
//! whose elements may be larger, borrowed text.

use core::marker::PhantomData;
use core::mem::{MaybeUninit, size_of};
use core::ptr;

use crate::error::PluginError;
use crate::raw::{KvhArray, KvhArrayMut, KvhStr, KvhText};

/// A `#[repr(C)]` struct of the contract that begins with `struct_size`.
///
/// # Safety
/// `struct_size: usize` is the first field, every field is plain data for which all zeroes is a value,
/// and there is no padding.
pub unsafe trait Growing {
    /// Name of the struct.
    const NAME: &'static str;
    /// Bytes of its first generation: no host or plugin knows less.
    const FIRST_SIZE: usize;
}

/// Whether the struct at `pointer` is large enough to hold `$field`, judged by its `struct_size`.
///
/// The pointer must be valid for reading its `struct_size`; hence it is used inside `unsafe`.
#[macro_export]
macro_rules! has_field {
    ($pointer:expr, $type:ty, $field:ident) => {{
        let pointer: *const $type = $pointer;
        let end = ::core::mem::offset_of!($type, $field)
            + $crate::boundary::size_of_pointee(|value: &$type| &raw const value.$field);
        (&raw const (*pointer).struct_size).read() >= end
    }};
}

/// Size of what a field's address points to. For [`has_field`].
#[doc(hidden)]
pub const fn size_of_pointee<S, F>(_field: fn(&S) -> *const F) -> usize {
    size_of::<F>()
}

fn bad_argument(text: String) -> PluginError {
    PluginError::InvalidArgument(text)
}

/// Copies the struct at `pointer` as far as both sides know it; fields that its writer does not know are zero.
///
/// # Errors
/// [`PluginError::InvalidArgument`] naming `argument` when the pointer is null, misaligned, or `struct_size` is
/// below the first generation's.
///
/// # Safety
/// A pointer that is neither null nor misaligned is valid for reading `struct_size` bytes.
#[inline]
pub unsafe fn read<T: Growing>(pointer: *const T, argument: &str) -> Result<T, PluginError> {
    // SAFETY: passed on from the caller.
    let known = unsafe { known_size(pointer, argument)? };
    if known == size_of::<T>() {
        // The usual case, a copy of a fixed size.
        // SAFETY: not null, aligned, and at least as large as ours.
        return Ok(unsafe { pointer.read() });
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `known` is at most the struct's own size on both sides; the two do not overlap.
    unsafe { ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known) };
    // SAFETY: `Growing` promises that zeroes are a value of each field that was not copied.
    Ok(unsafe { value.assume_init() })
}

/// Writes `value` to the struct at `pointer` as far as its reader knows it; the reader's `struct_size` stays.
///
/// # Errors
/// As [`read`].
///
/// # Safety
/// A pointer that is neither null nor misaligned is valid for reading and writing `struct_size` bytes.
pub unsafe fn write<T: Growing>(pointer: *mut T, value: &T, argument: &str) -> Result<(), PluginError> {
    // SAFETY: passed on from the caller.
    let known = unsafe { known_size(pointer, argument)? };
    let head = size_of::<usize>();
    // SAFETY: `known` is at most the struct's own size on both sides, and at least `head`, as every first
    // generation begins with `struct_size`; the two do not overlap because `value` is ours.
    unsafe {
        ptr::copy_nonoverlapping(
            ptr::from_ref(value).cast::<u8>().add(head),
            pointer.cast::<u8>().add(head),
            known - head,
        );
    }
    Ok(())
}

/// How many bytes of the struct at `pointer` both sides know.
///
/// # Safety
/// As [`read`].
#[inline]
unsafe fn known_size<T: Growing>(pointer: *const T, argument: &str) -> Result<usize, PluginError> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(bad_pointer::<T>(pointer, argument));
    }
    // SAFETY: not null, aligned, and the caller promises that it can be read.
    let theirs = unsafe { pointer.cast::<usize>().read() };
    if theirs < T::FIRST_SIZE {
        return Err(too_small::<T>(theirs, argument));
    }
    Ok(theirs.min(size_of::<T>()))
}

#[cold]
fn bad_pointer<T: Growing>(pointer: *const T, argument: &str) -> PluginError {
    bad_argument(if pointer.is_null() {
        format!("`{argument}` is null; expected a {}", T::NAME)
    } else {
        format!("`{argument}` is not aligned as a {}", T::NAME)
    })
}

#[cold]
fn too_small<T: Growing>(size: usize, argument: &str) -> PluginError {
    bad_argument(format!("`{argument}.struct_size` is {size}; a {} has at least {} bytes", T::NAME, T::FIRST_SIZE))
}

/// Elements of an array of structs, read through [`read`].
pub struct Structs<'a, T> {
    data: *const u8,
    count: usize,
    stride: usize,
    name: &'static str,
    marker: PhantomData<&'a T>,
}

impl<T> Clone for Structs<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Structs<'_, T> {}

impl<'a, T: Growing> Structs<'a, T> {
    /// Checks an array's head.
    ///
    /// # Errors
    /// [`PluginError::InvalidArgument`] naming the array when its pointer is null or misaligned though it has
    /// elements, or its stride is too small or breaks alignment.
    ///
    /// # Safety
    /// The array is valid for reading during `'a`.
    #[inline]
    pub unsafe fn new(array: KvhArray, name: &'static str) -> Result<Self, PluginError> {
        let (count, stride) = check_array::<T>(array.data.cast(), array.count, array.stride, T::FIRST_SIZE, name)?;
        Ok(Self { data: array.data.cast(), count, stride, name, marker: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Element `index`, as far as both sides know it.
    ///
    /// # Errors
    /// [`PluginError::InvalidArgument`] when there is no such element, or its `struct_size` is too small or larger
    /// than the stride.
    pub fn get(&self, index: usize) -> Result<T, PluginError> {
        let pointer = self.pointer(index)?;
        // SAFETY: inside the array, which `new` was promised to be readable; the stride was checked.
        let size = unsafe { pointer.cast::<usize>().read() };
        if size > self.stride {
            return Err(bad_argument(format!(
                "`{}[{index}].struct_size` is {size}, more than the array's stride of {}",
                self.name, self.stride
            )));
        }
        // SAFETY: as above; `struct_size` lies within the stride.
        unsafe { read(pointer, self.name) }
    }

    fn pointer(&self, index: usize) -> Result<*const T, PluginError> {
        if index >= self.count {
            return Err(bad_argument(format!("`{}[{index}]` was asked for; there are {}", self.name, self.count)));
        }
        // SAFETY: inside the array.
        Ok(unsafe { self.data.add(index * self.stride) }.cast())
    }
}

/// Elements of an array of plain values without `struct_size`: `u64`, [`KvhSegment`](crate::raw::KvhSegment).
pub struct Values<'a, T> {
    data: *const u8,
    count: usize,
    stride: usize,
    marker: PhantomData<&'a T>,
}

impl<T> Clone for Values<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Values<'_, T> {}

// SAFETY: like a slice: nobody writes the elements during the borrow.
unsafe impl<T: Sync> Send for Values<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Values<'_, T> {}

impl<'a, T: Copy + 'a> Values<'a, T> {
    /// Checks an array's head.
    ///
    /// # Errors
    /// As [`Structs::new`].
    ///
    /// # Safety
    /// The array is valid for reading during `'a`, and every bit pattern is a `T`.
    #[inline]
    pub unsafe fn new(array: KvhArray, name: &'static str) -> Result<Self, PluginError> {
        let (count, stride) = check_array::<T>(array.data.cast(), array.count, array.stride, size_of::<T>(), name)?;
        Ok(Self { data: array.data.cast(), count, stride, marker: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Element `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<T> {
        // SAFETY: inside the array, which `new` was promised to be readable; alignment was checked.
        (index < self.count).then(|| unsafe { self.data.add(index * self.stride).cast::<T>().read() })
    }

    /// All elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = T> + use<'a, T> {
        let this = *self;
        (0..this.count).filter_map(move |index| this.get(index))
    }
}

/// Checks pointer, alignment and stride of an array; gives count and stride.
#[inline]
pub(crate) fn check_array<T>(
    data: *const u8,
    count: u64,
    stride: u64,
    least: usize,
    name: &str,
) -> Result<(usize, usize), PluginError> {
    if count == 0 {
        return Ok((0, 0));
    }
    let bytes = count.checked_mul(stride).is_some_and(|bytes| bytes <= isize::MAX as u64);
    let aligned = stride.is_multiple_of(align_of::<T>() as u64) && data.cast::<T>().is_aligned();
    if data.is_null() || !bytes || !aligned || stride < least as u64 {
        return Err(bad_array::<T>(data, count, stride, least, name));
    }
    Ok((count as usize, stride as usize))
}

#[cold]
fn bad_array<T>(data: *const u8, count: u64, stride: u64, least: usize, name: &str) -> PluginError {
    bad_argument(if data.is_null() {
        format!("`{name}` is null though it has {count} elements")
    } else if stride < least as u64 {
        format!("`{name}` has a stride of {stride} bytes; an element has at least {least}")
    } else if count.checked_mul(stride).is_none_or(|bytes| bytes > isize::MAX as u64) {
        format!("`{name}` has {count} elements of {stride} bytes: too large")
    } else {
        format!("`{name}` (stride {stride}) is not aligned to {} bytes", align_of::<T>())
    })
}

/// An output array's head, checked.
#[derive(Clone, Copy)]
pub(crate) struct Slots {
    data: *mut u8,
    count: usize,
    stride: usize,
}

impl Slots {
    /// Checks an output array for elements of type `T` with at least `least` bytes.
    pub(crate) fn new<T>(array: KvhArrayMut, least: usize, name: &str) -> Result<Self, PluginError> {
        let (count, stride) = check_array::<T>(array.data.cast(), array.count, array.stride, least, name)?;
        Ok(Self { data: array.data.cast(), count, stride })
    }

    pub(crate) fn len(self) -> usize {
        self.count
    }

    /// Address of element `index`; null when there is none.
    pub(crate) fn pointer<T>(self, index: usize) -> *mut T {
        if index < self.count { self.data.wrapping_add(index * self.stride).cast() } else { ptr::null_mut() }
    }
}

/// Borrows text for as long as the caller says.
///
/// # Errors
/// [`PluginError::InvalidArgument`] naming `argument` when the pointer is null though the length is not 0, or the
/// bytes are not UTF-8.
///
/// # Safety
/// The text is valid for reading during `'a`.
pub unsafe fn text<'a>(text: KvhStr, argument: &str) -> Result<&'a str, PluginError> {
    // SAFETY: passed on from the caller.
    let bytes = unsafe { bytes(text, argument)? };
    core::str::from_utf8(bytes)
        .map_err(|error| bad_argument(format!("`{argument}` is not UTF-8 from byte {}", error.valid_up_to())))
}

/// Borrows text's bytes, which may not be UTF-8.
///
/// # Errors
/// [`PluginError::InvalidArgument`] naming `argument` when the pointer is null though the length is not 0.
///
/// # Safety
/// As [`text`].
pub unsafe fn bytes<'a>(text: KvhStr, argument: &str) -> Result<&'a [u8], PluginError> {
    if text.length == 0 {
        return Ok(&[]);
    }
    if text.data.is_null() {
        return Err(bad_argument(format!("`{argument}` is null though its length is {}", text.length)));
    }
    if isize::try_from(text.length).is_err() {
        return Err(bad_argument(format!("`{argument}` has an impossible length of {}", text.length)));
    }
    // SAFETY: not null, of a possible length, and the caller promises that it can be read.
    Ok(unsafe { core::slice::from_raw_parts(text.data.cast(), text.length) })
}

impl KvhStr {
    /// Lends text to the other side.
    pub const fn new(text: &str) -> Self {
        Self { data: text.as_ptr().cast(), length: text.len() }
    }
}

impl KvhText {
    /// A text buffer over `buffer`, empty.
    pub const fn over(buffer: &mut [u8]) -> Self {
        Self { struct_size: size_of::<Self>(), data: buffer.as_mut_ptr().cast(), capacity: buffer.len(), length: 0 }
    }
}

/// Writes `message` to a caller's buffer, cut at a whole character; a null or too small buffer takes nothing.
///
/// # Safety
/// `buffer` is null or a [`KvhText`] whose `data` may be written for `capacity` bytes.
pub unsafe fn write_text(buffer: *mut KvhText, message: &str) {
    // SAFETY: passed on from the caller.
    let Ok(head) = (unsafe { read(buffer.cast_const(), "text") }) else { return };
    let room = if head.data.is_null() { 0 } else { head.capacity };
    let length = message.floor_char_boundary(room);
    if length > 0 {
        // SAFETY: at most `capacity` bytes; the message is ours, so the two do not overlap.
        unsafe { ptr::copy_nonoverlapping(message.as_ptr(), head.data.cast::<u8>(), length) };
    }
    // SAFETY: `read` found the struct to be there, with all fields of its first generation.
    unsafe { (&raw mut (*buffer).length).write(length) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up second generation of a struct whose first one ended behind `a`.
    #[repr(C)]
    struct Second {
        struct_size: usize,
        a: u64,
        b: u64,
    }

    // SAFETY: integers only, `struct_size` first, no padding.
    unsafe impl Growing for Second {
        const NAME: &'static str = "Second";
        const FIRST_SIZE: usize = 16;
    }

    #[test]
    fn a_new_plugin_reads_and_writes_an_old_hosts_struct() {
        let mut memory = [16usize, 7, 99];
        let pointer = memory.as_mut_ptr().cast::<Second>();
        // SAFETY: the memory holds what `struct_size` says.
        let value = unsafe { read(pointer.cast_const(), "value") }.unwrap();
        assert_eq!((value.a, value.b), (7, 0), "a field that the host does not know is zero");
        // SAFETY: as above.
        unsafe {
            assert!(has_field!(pointer, Second, a));
            assert!(!has_field!(pointer, Second, b));
            write(pointer, &Second { struct_size: 24, a: 8, b: 5 }, "value").unwrap();
        }
        assert_eq!(memory, [16, 8, 99], "nothing behind the host's struct is written, nor its size");
    }

    #[test]
    fn an_old_plugin_reads_and_writes_a_new_hosts_struct() {
        let mut memory = [32usize, 7, 9, 99];
        let pointer = memory.as_mut_ptr().cast::<Second>();
        // SAFETY: the memory holds what `struct_size` says.
        unsafe {
            let value = read(pointer.cast_const(), "value").unwrap();
            assert_eq!((value.struct_size, value.a, value.b), (32, 7, 9));
            write(pointer, &Second { struct_size: 24, a: 8, b: 5 }, "value").unwrap();
        }
        assert_eq!(memory, [32, 8, 5, 99]);
    }

    #[test]
    fn bad_pointers_are_named() {
        let too_small = [15usize, 0, 0];
        let text = |pointer: *const Second| {
            // SAFETY: null, or the start of memory that is larger than the struct.
            unsafe { read(pointer, "value") }.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(text(ptr::null()).contains("`value` is null"));
        assert!(text(too_small.as_ptr().cast()).contains("`value.struct_size` is 15"));
        assert!(text(too_small.as_ptr().cast::<u8>().wrapping_add(4).cast()).contains("not aligned"));
    }

    #[test]
    fn bad_arrays_are_named() {
        let values = [24u64, 1, 2, 24, 3, 4];
        let text = |data: *const u64, count, stride| {
            let array = KvhArray { data: data.cast(), count, stride };
            // SAFETY: refused before anything is read.
            unsafe { Structs::<Second>::new(array, "list") }.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(text(ptr::null(), 1, 24).contains("`list` is null"));
        assert!(text(values.as_ptr(), 2, 8).contains("stride of 8"));
        assert!(text(values.as_ptr(), 1, 25).contains("not aligned"));
        assert!(text(values.as_ptr(), u64::MAX, 24).contains("too large"));
        assert_eq!(text(ptr::null(), 0, 0), "");
        let array = KvhArray { data: values.as_ptr().cast(), count: 2, stride: 24 };
        // SAFETY: two elements of 24 bytes.
        let list = unsafe { Structs::<Second>::new(array, "list") }.unwrap();
        assert_eq!(list.get(1).map(|value| (value.a, value.b)).ok(), Some((3, 4)));
        assert!(list.get(2).is_err());
    }

    #[test]
    fn text_is_cut_at_a_whole_character() {
        let mut buffer = [0; 4];
        let mut text = KvhText::over(&mut buffer);
        // SAFETY: the buffer lives.
        unsafe { write_text(&raw mut text, "aéé") };
        assert_eq!((text.length, &buffer), (3, &[b'a', 0xc3, 0xa9, 0]));
    }
}
