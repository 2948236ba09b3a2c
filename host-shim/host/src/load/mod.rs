//! Loading a plugin: which file may be loaded, what it must be, and the library that comes of it.
//!
//! A load takes the steps of [`Step::ALL`] in order. Nothing of the file runs before [`Step::Dlopen`], and the path is
//! never used again once the file is open.

mod elf;
mod file;
mod hooks;
mod inspect;
mod library;
mod policy;
mod step;

use std::path::Path;
use std::sync::Arc;

use kvhook_abi::layout::{self, PluginFingerprint, Row, Table};
use kvhook_abi::metadata::Metadata;
use kvhook_abi::raw::{KVH_ABI_MAJOR, KVH_ABI_MINOR};

pub use elf::imports;
pub use file::{ContentHash, MAX_PLUGIN_BYTES, PluginFile, PluginImage};
pub(crate) use hooks::{Hooks, Planner};
pub use inspect::{Check, Inspection, LayoutComparison, Outcome, checks, inspect, inspect_bytes};
pub use library::Library;
pub use policy::{Policy, Source, is_bare_name};
pub use step::Step;

use crate::error::HostError;

/// Loads a plugin by name or path. The same content gives the same library.
///
/// # Errors
/// Every `KVHOOK_ERR_*` from 100 on to 118, with the plugin named.
pub fn load(
    policy: &Policy,
    plugin: &str,
    source: Source,
    pin: Option<ContentHash>,
) -> Result<Arc<Library>, HostError> {
    let image = policy.open(plugin, source).and_then(PluginFile::read).map_err(|error| error.about(plugin))?;
    load_image(&image, pin, &policy.copy_folder)
}

/// The second half of [`load`]: loads a content that was read. Whatever happened to the file since does not matter.
///
/// # Errors
/// As [`load`].
pub fn load_image(
    image: &PluginImage,
    pin: Option<ContentHash>,
    copy_folder: &Path,
) -> Result<Arc<Library>, HostError> {
    let open = || {
        image.check_pin(pin)?;
        library::cached(image.hash(), || open_image(image, copy_folder, &mut |_| ()))
    };
    open().map_err(|error| error.about_file(image.path()))
}

/// Takes the steps from [`Step::Elf`] on.
fn open_image(image: &PluginImage, copy_folder: &Path, passed: &mut dyn FnMut(Step)) -> Result<Library, HostError> {
    let metadata = check_bytes(image.bytes(), passed)?;
    let copy = image.copy_to(copy_folder)?;
    passed(Step::Copy);
    Library::open(&copy, image, &metadata, passed)
}

/// Makes every check of a load that runs no code, and gives the metadata. Any bytes are safe.
///
/// # Errors
/// `NotElf`, `WrongArchitecture`, `WrongMajor`, `NewerMinor`, `NoEntry`, `Metadata`, `Layout`.
pub fn check_without_running(bytes: &[u8]) -> Result<Metadata, HostError> {
    check_bytes(bytes, &mut |_| ())
}

/// The steps from [`Step::Elf`] to [`Step::Layouts`].
fn check_bytes(bytes: &[u8], passed: &mut dyn FnMut(Step)) -> Result<Metadata, HostError> {
    let metadata = read_metadata(bytes, passed)?;
    check_version(metadata.abi_major, metadata.required_host_minor)?;
    passed(Step::Version);
    if !metadata.layouts.is_empty() {
        check_layouts((metadata.abi_major, metadata.abi_minor), &listed(&metadata), &metadata.layouts)?;
    }
    passed(Step::Layouts);
    Ok(metadata)
}

/// Reads a plugin's metadata out of its file's bytes, whatever these are.
fn read_metadata(bytes: &[u8], passed: &mut dyn FnMut(Step)) -> Result<Metadata, HostError> {
    let section = elf::metadata_section(bytes, passed)?;
    let metadata = Metadata::parse(section).map_err(|error| HostError::Metadata(error.to_string()))?;
    passed(Step::Metadata);
    Ok(metadata)
}

fn check_version(major: u32, required_host_minor: u32) -> Result<(), HostError> {
    if major != KVH_ABI_MAJOR {
        return Err(HostError::WrongMajor { found: vec![major], ours: KVH_ABI_MAJOR });
    }
    // Holds for every plugin while the minor is 0, and must go on being checked when it grows.
    #[allow(clippy::absurd_extreme_comparisons)]
    if required_host_minor > KVH_ABI_MINOR {
        return Err(HostError::NewerMinor { major, required: required_host_minor, ours: KVH_ABI_MINOR });
    }
    Ok(())
}

fn check_layouts(abi: (u32, u32), fingerprints: &[PluginFingerprint], layouts: &[Row]) -> Result<(), HostError> {
    layout::check(&Table::current(), abi, fingerprints, layouts).map_err(|error| HostError::Layout(error.to_string()))
}

/// The fingerprints that the metadata lists.
fn listed(metadata: &Metadata) -> Vec<PluginFingerprint> {
    metadata
        .layouts
        .iter()
        .map(|row| PluginFingerprint { name: row.name.clone(), generation: row.generation, value: row.fingerprint })
        .collect()
}
