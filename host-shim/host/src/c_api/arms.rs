//! Arms: which plugins there are, for which sequences.

use kvhook_abi::boundary;
use kvhook_abi::raw::*;

use super::{give, guard, host_of};
use crate::error::HostError;
use crate::load::Source;
use crate::raw::*;
use crate::spec::{ArmSpec, LayerSet};

/// Replaces all arms by those of a `kv_plugin` form (JSON text), as a whole or not at all. `source` is
/// `KVHOOK_SOURCE_*`. An arm whose name stays keeps its figures; its sequences move as with `kvhook_arm_set`. In safe
/// mode the form is read and no arm is made.
///
/// Thread: any; one change that loads at a time, others wait. Plugins are loaded and created on this thread.
/// Returns `KVHOOK_ERR_SPEC`, any loading error (100 to 118), `KVHOOK_ERR_CONFIG`, `KVHOOK_ERR_NEED_NOT_OFFERED`,
/// `KVHOOK_ERR_CREATE`, `KVHOOK_ERR_CREATE_PANIC`, `KVHOOK_ERR_UNSUPPORTED`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_configure(
    host: *mut KvhookHost,
    json: KvhStr,
    source: i32,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)?.configure(boundary::text(json, "json")?, Source::from_raw(source)?) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Adds an arm, or replaces the plugin of the arm of that name: sequences that begin take the new instances. A live
/// sequence moves to them, too, unless the old ones hold state for it (memory of its own, queries seen) or its ticket is
/// open; the old instances are told with `on_free`, and destroyed when no sequence is left on them.
///
/// Thread: any; one change that loads at a time, others wait.
/// Returns as `kvhook_configure`, and `KVHOOK_ERR_SAFE_MODE`; then nothing has changed.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_arm_set(
    host: *mut KvhookHost,
    arm: *const KvhookArm,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        let (host, spec) = unsafe { (host_of(host)?, read_arm(arm)?) };
        host.set_arm(&spec)
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// # Safety
/// `arm` is null or as the header says.
unsafe fn read_arm(arm: *const KvhookArm) -> Result<ArmSpec, HostError> {
    // SAFETY: passed on from the caller.
    let arm = unsafe { boundary::read(arm, "arm")? };
    // SAFETY: as above: the arm's texts are borrowed for the call.
    let text = |text, name: &str| unsafe { boundary::text(text, name) };
    let sha256 = text(arm.sha256, "arm.sha256")?;
    Ok(ArmSpec {
        name: text(arm.name, "arm.name")?.to_owned(),
        plugin: text(arm.plugin, "arm.plugin")?.to_owned(),
        config: text(arm.config, "arm.config")?.to_owned(),
        sha256: if sha256.is_empty() { None } else { Some(sha256.parse()?) },
        layers: LayerSet::parse(text(arm.layers, "arm.layers")?).map_err(HostError::Spec)?,
        min_tokens: arm.min_tokens,
        weight: arm.weight,
        state: None,
        guard: None,
        source: Source::from_raw(arm.source)?,
    })
}

/// Changes an arm's share of the sequences that name no arm: finite, 0 or more.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_ARM`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_arm_weight(
    host: *mut KvhookHost,
    name: KvhStr,
    weight: f64,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)?.set_weight(boundary::text(name, "name")?, weight) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Removes an arm with its figures. Its live sequences are kept from now on (`KVHOOK_REASON_DISABLED`), tickets that are
/// open may be committed; its instances are destroyed when the last of its sequences is freed.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_ARM`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_arm_remove(host: *mut KvhookHost, name: KvhStr, error: *mut KvhText) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)?.remove_arm(boundary::text(name, "name")?) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Changes arms by a command (JSON text, at most 64 KiB), as a whole or not at all: `{"changes": [{"add": {...}},
/// {"replace": {...}}, {"set": {...}}, {"weights": {...}}, {"state": {...}}, {"guard": {...}}, {"remove": "..."},
/// {"safe_mode": ...}]}`, as docs/live.md describes them. `source` is `KVHOOK_SOURCE_*`; for a command that came over a
/// network, `KVHOOK_SOURCE_MODEL`: it names plugins by bare names only. What was before and after is logged.
///
/// Thread: any; one change that loads at a time, others wait. Plugins are loaded and created on this thread, while the
/// engine goes on.
/// Returns as `kvhook_configure`, and `KVHOOK_ERR_UNKNOWN_ARM`, `KVHOOK_ERR_SAFE_MODE`; then nothing has changed.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_control(
    host: *mut KvhookHost,
    command: KvhStr,
    source: i32,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)?.control(boundary::text(command, "command")?, Source::from_raw(source)?) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// The arms as JSON text: `{"safe_mode": false, "instances": 1, "arms": [{"name": ..., "plugin": ..., "weight": ...,
/// "state": ..., "cause": ..., "live": ...}]}`, with all keys of the form. `cause` says why a guard switched the arm off;
/// `instances` counts those of all hosts of the process that are not destroyed yet.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_BUFFER_TOO_SMALL`: nothing was written, and `out.length` says how many bytes are needed.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_arms_json(
    host: *mut KvhookHost,
    out: *mut KvhText,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { give(out, &host_of(host)?.arms_json()) };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}
