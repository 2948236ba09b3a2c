//! What the host calls: its messages go to `tracing`, its memory comes from [`Allocations`].

use std::ffi::c_void;
use std::slice;
use std::sync::Arc;

use kvhook_abi::raw::*;
use kvhook_host::raw::KvhookCallbacks;
use tracing::level_filters::LevelFilter;

use super::Allocations;
use super::allocations::{give, take_back};
use crate::device::Backend;

/// What the callbacks get back.
pub(super) struct Context {
    pub(super) allocations: Option<Arc<Allocations>>,
    /// Where memory comes from.
    pub(super) backend: Backend,
}

/// The callbacks with a context that must outlive the host.
pub(super) fn callbacks(context: &Context) -> KvhookCallbacks {
    // The host's own heap serves the CPU, where nobody counts.
    let ours = context.allocations.is_some() || !matches!(context.backend, Backend::Cpu);
    KvhookCallbacks {
        struct_size: size_of::<KvhookCallbacks>(),
        context: std::ptr::from_ref(context).cast_mut().cast(),
        log: Some(log),
        log_max_level: Some(log_max_level),
        allocate: ours.then_some(allocate as _),
        free: ours.then_some(free as _),
    }
}

unsafe extern "C" fn log_max_level(_: *mut c_void) -> i32 {
    match LevelFilter::current() {
        LevelFilter::OFF => 0,
        LevelFilter::ERROR => KVH_LOG_ERROR,
        LevelFilter::WARN => KVH_LOG_WARN,
        LevelFilter::INFO => KVH_LOG_INFO,
        LevelFilter::DEBUG => KVH_LOG_DEBUG,
        _ => KVH_LOG_TRACE,
    }
}

unsafe extern "C" fn log(_: *mut c_void, record: *const KvhLogRecord) {
    // SAFETY: the host lends a record of its own during the call, with texts of valid UTF-8.
    let (level, source, message) = unsafe {
        let record = &*record;
        (record.level, text(&record.target), text(&record.message))
    };
    match level {
        KVH_LOG_ERROR => tracing::error!(target: "kvhook", source, "{message}"),
        KVH_LOG_WARN => tracing::warn!(target: "kvhook", source, "{message}"),
        KVH_LOG_INFO => tracing::info!(target: "kvhook", source, "{message}"),
        KVH_LOG_DEBUG => tracing::debug!(target: "kvhook", source, "{message}"),
        _ => tracing::trace!(target: "kvhook", source, "{message}"),
    }
}

/// # Safety
/// The text is valid for reading as long as the result is used.
unsafe fn text(text: &KvhStr) -> &str {
    if text.data.is_null() {
        return "";
    }
    // SAFETY: passed on from the caller.
    let bytes = unsafe { slice::from_raw_parts(text.data.cast::<u8>(), text.length) };
    std::str::from_utf8(bytes).unwrap_or("(a message that is not UTF-8)")
}

unsafe extern "C" fn allocate(
    context: *mut c_void,
    _rank: u32,
    bytes: u64,
    alignment: u64,
    _stream: *mut c_void,
) -> *mut c_void {
    // SAFETY: the context is ours, and outlives the host.
    let context = unsafe { &*context.cast::<Context>() };
    let give = || give(&context.backend, bytes, alignment);
    match &context.allocations {
        Some(allocations) => allocations.allocate(bytes, give),
        None => give(),
    }
}

unsafe extern "C" fn free(
    context: *mut c_void,
    _rank: u32,
    data: *mut c_void,
    bytes: u64,
    alignment: u64,
    _stream: *mut c_void,
) {
    // SAFETY: as in `allocate`.
    let context = unsafe { &*context.cast::<Context>() };
    // SAFETY: the host gives back what it got, with the same size and alignment.
    unsafe { take_back(&context.backend, data, bytes, alignment) };
    if let Some(allocations) = &context.allocations {
        allocations.freed(bytes);
    }
}
