//! A host's beginning and end.

use kvhook_abi::boundary::{self, Structs, Values};
use kvhook_abi::raw::*;

use super::guard;
use crate::callbacks::Callbacks;
use crate::error::HostError;
use crate::host::{Host, HostConfig};
use crate::model::Model;
use crate::raw::*;

/// Makes a host for one model, without arms. `*out` is written only on `KVHOOK_OK`; it is the caller's until
/// `kvhook_host_destroy`. The callbacks must stay callable as long as the host lives; everything else is copied.
///
/// Thread: any.
/// Ranks with a CUDA device: the primary context of each is retained, and the host's kernels are loaded; that may wait for
/// the device. The callbacks must give memory.
/// Returns `KVHOOK_ERR_UNSUPPORTED` for a device or cache dtype that this host does not move, a driver that is missing or
/// too old, and a context that is not the primary one; `KVHOOK_ERR_DEVICE` when the driver fails.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_host_create(
    config: *const KvhookHostConfig,
    out: *mut *mut KvhookHost,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        let config = unsafe { read_config(config)? };
        if out.is_null() {
            return Err(HostError::InvalidArgument { argument: "out", problem: "is null".to_owned() });
        }
        let host = Box::new(Host::new(config)?);
        // SAFETY: not null; the caller lends it.
        unsafe { out.write(Box::into_raw(host).cast()) };
        Ok(())
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// # Safety
/// `config` is null or as the header says.
unsafe fn read_config(config: *const KvhookHostConfig) -> Result<HostConfig, HostError> {
    // SAFETY: passed on from the caller, here and below.
    let config = unsafe { boundary::read(config, "config")? };
    // SAFETY: as above.
    let models = unsafe { Structs::<KvhModel>::new(config.models, "models")? };
    let models = (0..models.len())
        // SAFETY: as above.
        .map(|rank| unsafe { Model::new(models.get(rank)?) })
        .collect::<Result<_, _>>()?;
    // SAFETY: as above.
    let folders = unsafe { Values::<KvhStr>::new(config.plugin_folders, "plugin_folders")? };
    let plugin_folders = folders
        .iter()
        // SAFETY: as above.
        .map(|folder| Ok(unsafe { boundary::text(folder, "plugin_folders")? }.into()))
        .collect::<Result<_, HostError>>()?;
    // SAFETY: as above.
    unsafe {
        let copy_folder = boundary::text(config.copy_folder, "copy_folder")?;
        Ok(HostConfig {
            engine: boundary::text(config.engine, "engine")?.to_owned(),
            callbacks: Callbacks::new(config.callbacks)?,
            models,
            offers: boundary::read(config.offers, "offers")?,
            plugin_folders,
            copy_folder: (!copy_folder.is_empty()).then(|| copy_folder.into()),
        })
    }
}

/// Ends a host: every live sequence is freed with the reason `KVH_FREE_RESET`, every instance destroyed, all memory given
/// back. Null is ignored. The handle, positions and table edits that it gave are invalid afterwards.
///
/// Thread: any; no other call on the host is running.
///
/// # Safety
/// `host` is null or came from `kvhook_host_create` and was not destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_host_destroy(host: *mut KvhookHost) {
    if host.is_null() {
        return;
    }
    let body = || {
        // SAFETY: the caller gives the host up, and it was made by `kvhook_host_create`.
        let host = unsafe { Box::from_raw(host.cast::<Host>()) };
        host.reset(core::ptr::null_mut());
        Ok(())
    };
    // SAFETY: there is no buffer.
    let _ = unsafe { guard(core::ptr::null_mut(), body) };
}
