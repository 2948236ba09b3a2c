//! The tables of functions of a plugin's hook points, fetched and checked once.

use std::ffi::c_void;

use kvhook_abi::ids::*;
use kvhook_abi::raw::*;

use crate::error::HostError;

pub(crate) type BoundFn =
    unsafe extern "C" fn(*mut KvhInstance, *const KvhBoundArgs, *mut KvhBoundOut, *mut KvhText) -> KvhStatus;
pub(crate) type PrepareFn =
    unsafe extern "C" fn(*mut KvhInstance, *const KvhPrepareArgs, *mut KvhPrepareOut, *mut KvhText) -> KvhStatus;
pub(crate) type BeforeAttentionFn =
    unsafe extern "C" fn(*mut KvhInstance, *const KvhBeforeAttentionArgs, *mut KvhText) -> KvhStatus;
pub(crate) type OnFreeFn = unsafe extern "C" fn(*mut KvhInstance, *const KvhOnFreeArgs, *mut KvhText) -> KvhStatus;
pub(crate) type HookFn = unsafe extern "C" fn(id: KvhStr) -> *const c_void;

/// Functions of a hook point that answers with plans.
#[derive(Clone, Copy)]
pub(crate) struct Planner {
    pub(crate) bound: BoundFn,
    pub(crate) prepare: PrepareFn,
}

/// The hook points that a plugin implements.
pub(crate) struct Hooks {
    pub(crate) on_prefill_done: Option<Planner>,
    pub(crate) on_grown: Option<Planner>,
    pub(crate) before_attention: Option<BeforeAttentionFn>,
    pub(crate) on_free: Option<OnFreeFn>,
}

impl Hooks {
    /// Fetches every table that this host knows.
    ///
    /// # Errors
    /// `NullFunction` for a table with a null function, `BadEntry` for a misaligned one.
    ///
    /// # Safety
    /// `lookup` is a plugin's `hook`, which answers an id with null or that id's static table.
    pub(super) unsafe fn fetch(lookup: HookFn) -> Result<Self, HostError> {
        // SAFETY: passed on from the caller; the type is that of the id.
        let done: Option<KvhOnPrefillDone1> = unsafe { table(lookup, KVH_ON_PREFILL_DONE_1)? };
        // SAFETY: as above.
        let grown: Option<KvhOnGrown1> = unsafe { table(lookup, KVH_ON_GROWN_1)? };
        // SAFETY: as above.
        let before: Option<KvhBeforeAttention1> = unsafe { table(lookup, KVH_BEFORE_ATTENTION_1)? };
        // SAFETY: as above.
        let free: Option<KvhOnFree1> = unsafe { table(lookup, KVH_ON_FREE_1)? };
        let done =
            done.map(|table| planner(KVH_ON_PREFILL_DONE_1, table.bound, table.on_prefill_done, "on_prefill_done"));
        let grown = grown.map(|table| planner(KVH_ON_GROWN_1, table.bound, table.on_grown, "on_grown"));
        let before = before.map(|table| present(KVH_BEFORE_ATTENTION_1, table.before_attention, "before_attention"));
        let free = free.map(|table| present(KVH_ON_FREE_1, table.on_free, "on_free"));
        Ok(Self {
            on_prefill_done: done.transpose()?,
            on_grown: grown.transpose()?,
            before_attention: before.transpose()?,
            on_free: free.transpose()?,
        })
    }
}

/// A copy of an id's table, or none when the plugin has none.
///
/// # Safety
/// `lookup` answers `id` with null or a static `T`.
unsafe fn table<T>(lookup: HookFn, id: &str) -> Result<Option<T>, HostError> {
    // SAFETY: passed on from the caller; the id is text.
    let pointer: *const T = unsafe { lookup(KvhStr::new(id)) }.cast();
    if pointer.is_null() {
        return Ok(None);
    }
    if !pointer.is_aligned() {
        return Err(HostError::BadEntry(format!("the table of {id} is misaligned")));
    }
    // SAFETY: neither null nor misaligned, so it is a static `T`; tables hold function pointers only.
    Ok(Some(unsafe { pointer.read() }))
}

fn planner(
    id: &str,
    bound: Option<BoundFn>,
    prepare: Option<PrepareFn>,
    name: &'static str,
) -> Result<Planner, HostError> {
    Ok(Planner { bound: present(id, bound, "bound")?, prepare: present(id, prepare, name)? })
}

/// The function, or the error that it is null.
pub(super) fn present<F>(table: &str, function: Option<F>, name: &'static str) -> Result<F, HostError> {
    function.ok_or_else(|| HostError::NullFunction { table: table.to_owned(), function: name })
}
