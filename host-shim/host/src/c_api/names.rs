//! Numbers in words.

use kvhook_abi::raw::KvhStr;

use crate::figures::reason_name;
use crate::raw::*;

const STATUSES: [(KvhookStatus, &str); 39] = [
    (KVHOOK_OK, "ok"),
    (KVHOOK_ERR_FILE_MISSING, "file_missing"),
    (KVHOOK_ERR_FILE_UNREADABLE, "file_unreadable"),
    (KVHOOK_ERR_PATH_NOT_ALLOWED, "path_not_allowed"),
    (KVHOOK_ERR_PATH_IS_LINK, "path_is_link"),
    (KVHOOK_ERR_FILE_CHANGED, "file_changed"),
    (KVHOOK_ERR_NOT_ELF, "not_elf"),
    (KVHOOK_ERR_WRONG_ARCHITECTURE, "wrong_architecture"),
    (KVHOOK_ERR_CHECKSUM, "checksum"),
    (KVHOOK_ERR_COPY, "copy"),
    (KVHOOK_ERR_DLOPEN, "dlopen"),
    (KVHOOK_ERR_NO_ENTRY, "no_entry"),
    (KVHOOK_ERR_WRONG_MAJOR, "wrong_major"),
    (KVHOOK_ERR_NEWER_MINOR, "newer_minor"),
    (KVHOOK_ERR_LAYOUT, "layout"),
    (KVHOOK_ERR_NULL_FUNCTION, "null_function"),
    (KVHOOK_ERR_BAD_ENTRY, "bad_entry"),
    (KVHOOK_ERR_METADATA, "metadata"),
    (KVHOOK_ERR_MODEL_PATH, "model_path"),
    (KVHOOK_ERR_SAFE_MODE, "safe_mode"),
    (KVHOOK_ERR_SPEC, "spec"),
    (KVHOOK_ERR_CONFIG, "config"),
    (KVHOOK_ERR_NEED_NOT_OFFERED, "need_not_offered"),
    (KVHOOK_ERR_CREATE, "create"),
    (KVHOOK_ERR_CREATE_PANIC, "create_panic"),
    (KVHOOK_ERR_UNSUPPORTED, "unsupported"),
    (KVHOOK_ERR_INVALID_ARGUMENT, "invalid_argument"),
    (KVHOOK_ERR_UNKNOWN_UID, "unknown_uid"),
    (KVHOOK_ERR_UNKNOWN_ARM, "unknown_arm"),
    (KVHOOK_ERR_UNKNOWN_TICKET, "unknown_ticket"),
    (KVHOOK_ERR_NOT_READY, "not_ready"),
    (KVHOOK_ERR_DROPPED, "dropped"),
    (KVHOOK_ERR_NO_ROOM, "no_room"),
    (KVHOOK_ERR_VIEW, "view"),
    (KVHOOK_ERR_OUT_OF_MEMORY, "out_of_memory"),
    (KVHOOK_ERR_FORK_REFUSED, "fork_refused"),
    (KVHOOK_ERR_INTERNAL, "internal"),
    (KVHOOK_ERR_BUFFER_TOO_SMALL, "buffer_too_small"),
    (KVHOOK_ERR_DEVICE, "device"),
];

/// A status in one word: `unknown_uid`; `unknown` for any other number. Static text.
///
/// Thread: any.
#[unsafe(no_mangle)]
pub extern "C" fn kvhook_status_name(status: KvhookStatus) -> KvhStr {
    KvhStr::new(STATUSES.iter().find(|(number, _)| *number == status).map_or("unknown", |(_, name)| name))
}

/// A reason in one word, as in the figures: `no_gain`; `unknown` for any other number. Static text.
///
/// Thread: any.
#[unsafe(no_mangle)]
pub extern "C" fn kvhook_reason_name(reason: KvhookReason) -> KvhStr {
    KvhStr::new(reason_name(reason))
}

/// Name and version of the host. Static text.
///
/// Thread: any.
#[unsafe(no_mangle)]
pub extern "C" fn kvhook_version() -> KvhStr {
    KvhStr::new(crate::NAME)
}
