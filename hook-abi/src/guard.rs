//! The wall between a plugin's code and the boundary: panics, poison, serial calls.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock, PoisonError, TryLockError};

use crate::boundary::write_text;
use crate::call::Host;
use crate::error::PluginError;
use crate::log;
use crate::raw::*;

/// What a [`KvhInstance`] of a Rust plugin points to.
pub(crate) struct Instance<P> {
    /// The host, for services and logs.
    pub(crate) host: Host,
    /// Whether the cache lies in ordinary memory.
    pub(crate) on_cpu: bool,
    plugin: Mutex<P>,
    /// The message of the panic that poisoned the instance.
    panic: OnceLock<String>,
}

impl<P> Instance<P> {
    pub(crate) fn new(host: Host, on_cpu: bool, plugin: P) -> Self {
        Self { host, on_cpu, plugin: Mutex::new(plugin), panic: OnceLock::new() }
    }

    /// Ends the plugin, in the guard; gives back the host. A panic is logged by the panic hook.
    pub(crate) fn end(self) -> Host {
        let Self { host, plugin, .. } = self;
        let plugin = plugin.into_inner().unwrap_or_else(PoisonError::into_inner);
        let _current = log::enter(&host);
        drop_guarded(plugin);
        drop(_current);
        host
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
    let refuse = |status, text: &str| {
        // SAFETY: passed on from the caller.
        unsafe { write_text(error, text) };
        status
    };
    // SAFETY: null or an instance, by the caller's promise; only shared references are made of it.
    let Some(instance) = (unsafe { instance.cast::<Instance<P>>().cast_const().as_ref() }) else {
        return refuse(KVH_ERR_INVALID_ARGUMENT, "`instance` is null");
    };
    if let Some(panic) = instance.panic.get() {
        return refuse(KVH_ERR_POISONED, &format!("the instance is poisoned: {panic}"));
    }
    let mut plugin = match instance.plugin.try_lock() {
        Ok(plugin) => plugin,
        Err(TryLockError::Poisoned(_)) => return refuse(KVH_ERR_POISONED, "the instance is poisoned"),
        Err(TryLockError::WouldBlock) => {
            return refuse(
                KVH_ERR_INVALID_ARGUMENT,
                "another call on this instance is running: calls on one instance are serial",
            );
        }
    };
    let _current = log::enter(&instance.host);
    // SAFETY: passed on from the caller.
    match unsafe { guarded(error, || body(&mut plugin, instance)) } {
        Ok(()) => KVH_OK,
        Err((status, message)) => {
            if status == KVH_ERR_PANIC {
                // Set once: a poisoned instance runs no more code that could panic.
                let _ = instance.panic.set(message);
            }
            status
        }
    }
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
