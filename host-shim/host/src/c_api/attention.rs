//! Queries, keys and values, shown to the plugins that asked for them.

use kvhook_abi::boundary::{self, Structs};
use kvhook_abi::raw::*;

use super::{guard, host_of};
use crate::attention::Step;
use crate::raw::*;

/// Phases in which any plugin wants `kvhook_before_attention`: `KVH_PHASE_*` bits, 0 for none. One relaxed atomic load:
/// made to be asked in each step.
///
/// Thread: any.
///
/// # Safety
/// `host` is null (then 0) or a live host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_wants(host: *mut KvhookHost, rank: u32) -> u32 {
    let _ = rank;
    // SAFETY: the caller's argument is as the header says.
    unsafe { host_of(host) }.map_or(0, |host| host.wants())
}

/// Shows one layer of one step to the plugins that asked for it, before the layer's K and V are written. Each instance
/// sees its own sequences in one call. Sequences of no arm (uid 0) or not live are passed over. Where a plugin fails, the
/// sequences that it was shown are not compressed any more; that is logged and counted, and no error here.
/// Tensors, `cache` and `stream` must be valid during the call, and not be written; `positions` of `cache` is the host's
/// to fill.
///
/// Thread: the rank's; waits for calls of its instances that are under way.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_before_attention(
    host: *mut KvhookHost,
    rank: u32,
    step: *const KvhookStep,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let step = boundary::read(step, "step")?;
            let step = Step {
                layer: step.layer,
                q: step.q,
                k: step.k,
                v: step.v,
                sequences: Structs::new(step.sequences, "step.sequences")?,
                stream: step.stream,
            };
            host.before_attention(rank, &step)
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}
