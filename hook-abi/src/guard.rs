//! The wall between a plugin's code and the boundary: panics, poison, serial calls.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, Ordering};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use crate::boundary::write_text;
use crate::call::{Host, Ranges};
use crate::error::PluginError;
use crate::log;
use crate::raw::*;

/// No call is running.
const IDLE: u8 = 0;
/// A call is running: the plugin is that call's alone.
const BUSY: u8 = 1;
/// A call panicked: the plugin is never called again.
const POISONED: u8 = 2;

/// What a [`KvhInstance`] of a Rust plugin points to.
pub(crate) struct Instance<P> {
    /// The host, for services and logs.
    pub(crate) host: Host,
    /// Whether the cache lies in ordinary memory.
    pub(crate) on_cpu: bool,
    /// What the plans of the last call point to.
    pub(crate) ranges: Ranges,
    /// `IDLE`, `BUSY` or `POISONED`. One atomic exchange for each call, where a lock would take two.
    state: AtomicU8,
    plugin: UnsafeCell<P>,
    /// The message of the panic that poisoned the instance.
    panic: OnceLock<String>,
}

// SAFETY: `plugin` is reached only by the call that turned `state` from `IDLE` to `BUSY`, one at a time, and a `Plugin`
// is `Send`.
unsafe impl<P: Send> Sync for Instance<P> {}

impl<P> Instance<P> {
    pub(crate) fn new(host: Host, on_cpu: bool, plugin: P) -> Self {
        let plugin = UnsafeCell::new(plugin);
        Self { host, on_cpu, ranges: Ranges::default(), state: AtomicU8::new(IDLE), plugin, panic: OnceLock::new() }
    }

    /// Ends the plugin, in the guard; gives back the host. A panic is logged by the panic hook.
    pub(crate) fn end(self) -> Host {
        let Self { host, plugin, .. } = self;
        let current = log::enter(&host);
        drop_guarded(plugin.into_inner());
        drop(current);
        host
    }

    /// Why the instance cannot be called now.
    #[cold]
    fn refusal(&self, state: u8) -> (KvhStatus, String) {
        if state == BUSY {
            let text = "another call on this instance is running: calls on one instance are serial";
            return (KVH_ERR_INVALID_ARGUMENT, text.to_owned());
        }
        let panic = self.panic.get().map_or("", String::as_str);
        (KVH_ERR_POISONED, format!("the instance is poisoned: {panic}"))
    }
}

/// Runs `body` and turns its error or panic into a status and text in `error`.
///
/// # Safety
/// `error` is null or a [`KvhText`] that the caller lends.
pub(crate) unsafe fn guarded(
    error: *mut KvhText,
    body: impl FnOnce() -> Result<(), PluginError>,
) -> Result<(), (KvhStatus, String)> {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(failure)) => (failure.status(), failure.to_string()),
        Err(payload) => (KVH_ERR_PANIC, format!("the plugin panicked: {}", panic_message(payload))),
    };
    // SAFETY: passed on from the caller.
    unsafe { write_text(error, &failure.1) };
    Err(failure)
}

/// Runs `body` on an instance: not null, not poisoned, not in another call.
///
/// # Safety
/// `instance` is null or points to an `Instance<P>` that lives until this returns; `error` as in [`guarded`].
pub(crate) unsafe fn on_instance<P>(
    instance: *mut KvhInstance,
    error: *mut KvhText,
    body: impl FnOnce(&mut P, &Instance<P>) -> Result<(), PluginError>,
) -> KvhStatus {
    // SAFETY: null or an instance, by the caller's promise; only shared references are made of it.
    let Some(instance) = (unsafe { instance.cast::<Instance<P>>().cast_const().as_ref() }) else {
        // SAFETY: passed on from the caller.
        unsafe { write_text(error, "`instance` is null") };
        return KVH_ERR_INVALID_ARGUMENT;
    };
    if let Err(state) = instance.state.compare_exchange(IDLE, BUSY, Ordering::Acquire, Ordering::Acquire) {
        let (status, text) = instance.refusal(state);
        // SAFETY: passed on from the caller.
        unsafe { write_text(error, &text) };
        return status;
    }
    let _current = log::enter(&instance.host);
    // SAFETY: this call turned the state from idle to busy, so no other reaches the plugin.
    let plugin = unsafe { &mut *instance.plugin.get() };
    // SAFETY: passed on from the caller.
    let (status, state) = match unsafe { guarded(error, || body(plugin, instance)) } {
        Ok(()) => (KVH_OK, IDLE),
        Err((KVH_ERR_PANIC, message)) => {
            // Set once: a poisoned instance runs no more code that could panic.
            let _ = instance.panic.set(message);
            (KVH_ERR_PANIC, POISONED)
        }
        Err((status, _)) => (status, IDLE),
    };
    instance.state.store(state, Ordering::Release);
    status
}

/// Text of a panic; the payload is dropped in a guard of its own, since its destructor may panic too.
fn panic_message(payload: Box<dyn Any + Send>) -> String {
    let message = if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    };
    drop_guarded(payload);
    message
}

/// Drops a value whose destructor may panic. A second panic's payload is leaked: dropping it could panic again.
pub(crate) fn drop_guarded<T>(value: T) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        core::mem::forget(second);
    }
}
