//! A sequence's life, but for its compression.

use core::ffi::c_void;

use kvhook_abi::boundary::{self, Values};
use kvhook_abi::raw::*;

use super::{guard, host_of};
use crate::error::HostError;
use crate::lifecycle::{Began, Begin};
use crate::raw::*;

/// Begins a sequence: chooses its arm and says what the host wants. A uid of 0 means that no arm took it (`none` was
/// named, there are no arms, safe mode): nothing needs to be called for it, not even `kvhook_free`.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_ARM`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_begin(
    host: *mut KvhookHost,
    begin: *const KvhookBegin,
    out: *mut KvhookSequence,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let begin = boundary::read(begin, "begin")?;
            boundary::read(out, "out")?;
            let began = host.begin(Begin {
                key: boundary::bytes(begin.key, "begin.key")?,
                arm: boundary::text(begin.arm, "begin.arm")?,
                prompt_length: begin.prompt_length,
                segments: Values::new(begin.segments, "begin.segments")?.iter().collect(),
            })?;
            write_began(out, &began)
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// # Safety
/// `out` is as the header says.
unsafe fn write_began(out: *mut KvhookSequence, began: &Began) -> Result<(), HostError> {
    let sequence = KvhookSequence {
        struct_size: size_of::<KvhookSequence>(),
        uid: began.uid,
        max_prefix_hit: began.max_prefix_hit,
        before_attention_phases: began.phases,
        on_prefill_done: began.on_prefill_done.into(),
        grown_every: began.grown_every,
    };
    // SAFETY: passed on from the caller.
    unsafe { boundary::write(out, &sequence, "out")? };
    Ok(())
}

/// Begins a sequence with the rows of a live one: same arm, same positions, its own uid. An open ticket of the live one
/// is dropped.
///
/// Thread: any, but not while the sequence is committed.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`, `KVHOOK_ERR_FORK_REFUSED` where the plugin keeps state for the sequence.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_fork(
    host: *mut KvhookHost,
    uid: u64,
    out: *mut KvhookSequence,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            boundary::read(out, "out")?;
            write_began(out, &host.fork(uid)?)
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// The last rows of a sequence were taken away, as after speculative decoding. `lengths` are `uint64_t` elements: the
/// rows that each layer still has; `next_position` is that of the next token, above those of all rows. An open ticket
/// stays only if all rows that were planned are still there.
///
/// Thread: any, but not while the sequence is committed.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_cut(
    host: *mut KvhookHost,
    uid: u64,
    lengths: *const KvhArray,
    next_position: u64,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says; an array's head is plain data.
        let (host, lengths) = unsafe { (host_of(host)?, lengths.as_ref()) };
        let lengths =
            lengths.ok_or_else(|| HostError::InvalidArgument { argument: "lengths", problem: "is null".to_owned() })?;
        // SAFETY: as above.
        let lengths: Vec<u64> = unsafe { Values::new(*lengths, "lengths")? }.iter().collect();
        host.cut(uid, &lengths, next_position)
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Ends a sequence: an open ticket is dropped, then each rank's instance that any hook was called for hears `on_free`
/// once, then the memory that the plugin kept for it goes back, in `stream`'s order; on a rank whose device is not the
/// stream's, in the order of the stream of the rank's last call. `reason` is `KVH_FREE_*`. The rows may be given to others
/// afterwards.
///
/// Thread: any; waits for calls of the instances that are under way.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`, also the second time.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_free(
    host: *mut KvhookHost,
    uid: u64,
    reason: i32,
    stream: *mut c_void,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)? }.free(uid, reason, stream);
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Ends every live sequence, as `kvhook_free` with `KVH_FREE_RESET`.
///
/// Thread: any; waits for calls of the instances that are under way.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_reset(host: *mut KvhookHost, stream: *mut c_void, error: *mut KvhText) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe { host_of(host)? }.reset(stream);
        Ok(())
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Positions of the rows of one layer, after the last commit. `*out` leads to the host's memory: valid until the next
/// commit of the sequence on this rank, its cut or its end.
///
/// Thread: the rank's.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_positions(
    host: *mut KvhookHost,
    rank: u32,
    uid: u64,
    layer: u32,
    out: *mut KvhPositions,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        let positions = unsafe { host_of(host)? }.positions(rank, uid, layer)?;
        if out.is_null() {
            return Err(HostError::InvalidArgument { argument: "out", problem: "is null".to_owned() });
        }
        // SAFETY: not null; the caller lends it.
        unsafe { out.write(positions) };
        Ok(())
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}
