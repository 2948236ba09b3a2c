//! What `gpu.rs` has, in a build without CUDA: never called.

use core::ffi::c_void;

pub fn stream() -> *mut c_void {
    unreachable!()
}

pub fn end(_: *mut c_void) {
    unreachable!()
}

pub fn sync(_: *mut c_void) {
    unreachable!()
}

pub fn sync_all() -> Result<(), core::fmt::Error> {
    unreachable!()
}

pub fn alloc(_: usize, _: *mut c_void) -> *mut c_void {
    unreachable!()
}

pub fn poison(_: *mut c_void, _: usize, _: *mut c_void) {
    unreachable!()
}

pub fn release(_: *mut c_void, _: usize) {
    unreachable!()
}

pub fn put(_: *mut u8, _: &[u8], _: *mut c_void) {
    unreachable!()
}

pub fn get(_: *const u8, _: usize) -> Vec<u8> {
    unreachable!()
}
