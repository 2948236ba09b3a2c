//! What the engine gives to the host: its log and its memory.

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;
use std::alloc::{Layout, alloc, dealloc};

use kvhook_abi::boundary;
use kvhook_abi::raw::*;

use crate::error::HostError;
use crate::raw::KvhookCallbacks;

/// Target of the host's own messages.
const TARGET: &str = "kvhook::host";

/// The engine's callbacks, or the defaults: no log, and the host's own heap.
#[derive(Clone, Copy)]
pub struct Callbacks(KvhookCallbacks);

// SAFETY: the engine promises that every callback may be called from any thread that calls the host.
unsafe impl Send for Callbacks {}
// SAFETY: as above.
unsafe impl Sync for Callbacks {}

impl Callbacks {
    /// Copies the engine's callbacks; null gives the defaults.
    ///
    /// # Errors
    /// `InvalidArgument` when the struct is too small, or `allocate` and `free` do not come together.
    ///
    /// # Safety
    /// `raw` is null or valid for reading. The callbacks stay callable as long as the value or a copy of it is used.
    pub unsafe fn new(raw: *const KvhookCallbacks) -> Result<Self, HostError> {
        if raw.is_null() {
            return Ok(Self(KvhookCallbacks {
                struct_size: size_of::<KvhookCallbacks>(),
                context: core::ptr::null_mut(),
                log: None,
                log_max_level: None,
                allocate: None,
                free: None,
            }));
        }
        // SAFETY: passed on from the caller.
        let raw = unsafe { boundary::read(raw, "callbacks")? };
        if raw.allocate.is_some() != raw.free.is_some() {
            return Err(HostError::InvalidArgument {
                argument: "callbacks",
                problem: "has only one of `allocate` and `free`; expected both or none".to_owned(),
            });
        }
        Ok(Self(raw))
    }

    /// The lowest importance that is wanted: `KVH_LOG_*`; 0: nothing.
    pub fn max_level(&self) -> i32 {
        match (self.0.log, self.0.log_max_level) {
            (None, _) => 0,
            (Some(_), None) => KVH_LOG_INFO,
            // SAFETY: the engine promises that its callbacks are callable with its context.
            (Some(_), Some(max_level)) => unsafe { max_level(self.0.context) },
        }
    }

    /// Logs a message of the host's own, if its importance is wanted.
    pub fn log(&self, level: i32, message: fmt::Arguments<'_>) {
        if level > self.max_level() {
            return;
        }
        let message = one_line(&message.to_string());
        self.forward(&KvhLogRecord {
            struct_size: size_of::<KvhLogRecord>(),
            level,
            line: 0,
            target: KvhStr::new(TARGET),
            message: KvhStr::new(&message),
            file: KvhStr::new(""),
        });
    }

    /// Hands a record to the engine.
    pub fn forward(&self, record: &KvhLogRecord) {
        if let Some(log) = self.0.log {
            // SAFETY: the engine promises that its callbacks are callable with its context; the record is
            // borrowed during the call.
            unsafe { log(self.0.context, record) };
        }
    }

    /// Whether memory is the engine's, and not the host's own heap.
    pub fn give_memory(&self) -> bool {
        self.0.allocate.is_some()
    }

    /// Memory of a rank's device, or none when it is refused.
    // The stream is not looked into: it goes to the engine that gave it.
    #[allow(clippy::not_unsafe_ptr_arg_deref)]
    pub fn allocate(&self, rank: u32, bytes: u64, alignment: u64, stream: *mut c_void) -> Option<NonNull<u8>> {
        match self.0.allocate {
            // SAFETY: the engine promises that its callbacks are callable with its context.
            Some(allocate) => NonNull::new(unsafe { allocate(self.0.context, rank, bytes, alignment, stream) }.cast()),
            // SAFETY: `heap_layout` refuses a size of 0.
            None => heap_layout(bytes, alignment).and_then(|layout| NonNull::new(unsafe { alloc(layout) })),
        }
    }

    /// Gives memory back.
    ///
    /// # Safety
    /// `data` came from [`Callbacks::allocate`] with the same rank, bytes and alignment, and is not used any more.
    pub unsafe fn free(&self, rank: u32, data: NonNull<u8>, bytes: u64, alignment: u64, stream: *mut c_void) {
        match self.0.free {
            // SAFETY: the engine promises that its callbacks are callable; the memory is its own.
            Some(free) => unsafe { free(self.0.context, rank, data.as_ptr().cast(), bytes, alignment, stream) },
            None => {
                if let Some(layout) = heap_layout(bytes, alignment) {
                    // SAFETY: allocated above with the same layout.
                    unsafe { dealloc(data.as_ptr(), layout) };
                }
            }
        }
    }
}

fn heap_layout(bytes: u64, alignment: u64) -> Option<Layout> {
    let layout = Layout::from_size_align(bytes.try_into().ok()?, alignment.try_into().ok()?).ok()?;
    (layout.size() > 0).then_some(layout)
}

/// A message as one line, whatever was in the names and texts that it quotes: they may come from a network, and end in a
/// log. Control characters are written as in a Rust string.
pub(crate) fn one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for character in message.chars() {
        if character.is_control() { line.extend(character.escape_default()) } else { line.push(character) }
    }
    line
}
