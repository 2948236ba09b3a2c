//! Figures, as a struct, JSON and Prometheus text.

use kvhook_abi::boundary;
use kvhook_abi::raw::*;

use super::{give, guard, host_of};
use crate::error::HostError;
use crate::raw::*;

/// Figures of one arm. `out.reasons` are lent by the engine.
///
/// Thread: any; counters that change meanwhile need not fit each other.
/// Returns `KVHOOK_ERR_UNKNOWN_ARM`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_figures(
    host: *mut KvhookHost,
    arm: KvhStr,
    out: *mut KvhookFigures,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let arm = host_of(host)?.arm(boundary::text(arm, "arm")?)?;
            let mut reasons = boundary::read(out, "out")?.reasons;
            reasons.count = write_reasons(reasons, &arm.figures.reasons())?;
            let figures = KvhookFigures { reasons, ..arm.figures.read() };
            boundary::write(out, &figures, "out")?;
            Ok(())
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Writes as many as fit, and says how many.
///
/// # Safety
/// The array is writable.
unsafe fn write_reasons(array: KvhArrayMut, reasons: &[KvhookReasonCount]) -> Result<u64, HostError> {
    let (data, stride) = (array.data.cast::<u8>(), array.stride as usize);
    let align = align_of::<KvhookReasonCount>();
    let bad = data.is_null() || stride < size_of::<KvhookReasonCount>() || !stride.is_multiple_of(align);
    if array.count > 0 && (bad || !data.cast::<KvhookReasonCount>().is_aligned()) {
        return Err(HostError::Argument("`out.reasons` is null, misaligned, or its stride is too small".to_owned()));
    }
    let fitting = reasons.iter().take(array.count as usize);
    for (place, reason) in fitting.clone().enumerate() {
        // SAFETY: within the array, aligned; the caller vouches for the rest.
        unsafe { data.add(place * stride).cast::<KvhookReasonCount>().write(*reason) };
    }
    Ok(fitting.len() as u64)
}

/// Figures of all arms as JSON text: `{"engine": ..., "arms": {name: {...}}}`.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_BUFFER_TOO_SMALL`: nothing was written, and `out.length` says how many bytes are needed (more by
/// the next call, perhaps).
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_figures_json(
    host: *mut KvhookHost,
    out: *mut KvhText,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { give(out, &host_of(host)?.figures_json()) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Figures of all arms as Prometheus text, version 0.0.4.
///
/// Thread: any.
/// Returns as `kvhook_figures_json`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_figures_prometheus(
    host: *mut KvhookHost,
    out: *mut KvhText,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { give(out, &host_of(host)?.figures_prometheus()) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}
