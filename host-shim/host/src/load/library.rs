//! A plugin's library in this process: loaded once for each content, checked, never unloaded.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvhook_abi::boundary;
use kvhook_abi::ids::KVH_ENTRY_SYMBOL;
use kvhook_abi::layout::PluginFingerprint;
use kvhook_abi::metadata::Metadata;
use kvhook_abi::raw::*;
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;

use super::file::{ContentHash, PluginImage};
use super::hooks::{HookFn, Hooks, present};
use super::step::Step;
use super::{check_layouts, check_version};
use crate::error::HostError;

type CreateFn = unsafe extern "C" fn(*const KvhCreateArgs, *mut *mut KvhInstance, *mut KvhText) -> KvhStatus;
type DestroyFn = unsafe extern "C" fn(*mut KvhInstance);
type NeedsFn = unsafe extern "C" fn(*mut KvhInstance, *mut KvhNeeds, *mut KvhText) -> KvhStatus;

/// Functions of a plugin's entry, none of them null.
pub(crate) struct Functions {
    pub(crate) create: CreateFn,
    pub(crate) destroy: DestroyFn,
    pub(crate) needs: NeedsFn,
}

/// A loaded plugin. It stays mapped for the life of the process: threads, thread-locals and statics of its may
/// outlive every instance.
pub struct Library {
    id: String,
    version: String,
    hash: ContentHash,
    path: PathBuf,
    entry: Entry,
    functions: Functions,
    hooks: Hooks,
}

/// What was read of an entry.
struct Entry(KvhPluginEntry);

// SAFETY: plain data and functions, never written; what they lead to is the library's, for ever.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

impl Library {
    /// The plugin's short name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The plugin's version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// SHA-256 of its file.
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// What it exports, for tests that call it without a host.
    pub fn entry(&self) -> &KvhPluginEntry {
        &self.entry.0
    }

    /// Where its file was found first.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn functions(&self) -> &Functions {
        &self.functions
    }

    pub(crate) fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// Loads a private copy and checks the entry.
    ///
    /// # Errors
    /// `Dlopen`, `NoEntry`, `BadEntry`, `WrongMajor`, `NewerMinor`, `Layout`, `NullFunction`. The library stays mapped even
    /// then.
    pub(super) fn open(
        copy: &Path,
        image: &PluginImage,
        metadata: &Metadata,
        passed: &mut dyn FnMut(Step),
    ) -> Result<Self, HostError> {
        // SAFETY: loading runs the library's initialisers, which is what loading a plugin means: the operator chose
        // it, and everything that can be checked without running its code was checked.
        let handle = unsafe { Handle::open(Some(copy), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            // The system's own message stands in the source.
            let problem = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            HostError::Dlopen { path: copy.to_owned(), problem }
        })?;
        // Never unloaded.
        let handle = std::mem::ManuallyDrop::new(handle);
        passed(Step::Dlopen);

        // SAFETY: the contract gives the symbol this type.
        let entry = unsafe { handle.get::<KvhPluginEntryFn>(KVH_ENTRY_SYMBOL) }.map_err(|_| HostError::NoEntry)?;
        // SAFETY: the function takes nothing, and returns a static without side effects.
        let entry = unsafe { entry() };
        // SAFETY: `entry` is null or a static entry, valid for its `struct_size`.
        let entry =
            unsafe { boundary::read(entry, "entry") }.map_err(|error| HostError::BadEntry(error.to_string()))?;
        let id = static_text(entry.id, "id")?;
        let version = static_text(entry.version, "version")?;
        if id.is_empty() {
            return Err(HostError::BadEntry("its `id` is empty".into()));
        }
        passed(Step::Entry);

        check_version(entry.abi_major, entry.required_host_minor)?;
        passed(Step::EntryVersion);
        // SAFETY: the entry's array is static, and any bits are pointers and numbers.
        let fingerprints = unsafe { fingerprints(entry.fingerprints)? };
        check_layouts((entry.abi_major, entry.abi_minor), &fingerprints, &metadata.layouts)?;
        passed(Step::Fingerprints);

        let hook: HookFn = present("the entry", entry.hook, "hook")?;
        let functions = Functions {
            create: present("the entry", entry.create, "create")?,
            destroy: present("the entry", entry.destroy, "destroy")?,
            needs: present("the entry", entry.needs, "needs")?,
        };
        // SAFETY: `hook` is the plugin's.
        let hooks = unsafe { Hooks::fetch(hook)? };
        passed(Step::Functions);

        for (what, in_entry, in_metadata) in [("id", id, &metadata.id), ("version", version, &metadata.version)] {
            if in_entry != in_metadata {
                return Err(HostError::BadEntry(format!(
                    "its `{what}` is {in_entry:?}, but its metadata says {in_metadata:?}"
                )));
            }
        }
        passed(Step::Agreement);
        check_deep_layout(&handle)?;
        passed(Step::DeepLayout);

        Ok(Self {
            id: id.to_owned(),
            version: version.to_owned(),
            hash: image.hash(),
            path: image.path().to_owned(),
            entry: Entry(entry),
            functions,
            hooks,
        })
    }
}

impl Library {
    /// A plugin that is part of this program: no file, nothing to compare its layouts with. For tests.
    ///
    /// # Errors
    /// `BadEntry`, `NullFunction`.
    ///
    /// # Safety
    /// `entry` is null or a static plugin entry.
    #[doc(hidden)]
    pub unsafe fn from_entry(entry: *const KvhPluginEntry) -> Result<Self, HostError> {
        // SAFETY: passed on from the caller.
        let entry =
            unsafe { boundary::read(entry, "entry") }.map_err(|error| HostError::BadEntry(error.to_string()))?;
        let id = static_text(entry.id, "id")?.to_owned();
        let hook: HookFn = present("the entry", entry.hook, "hook")?;
        Ok(Self {
            hash: ContentHash::of(id.as_bytes()),
            id,
            version: static_text(entry.version, "version")?.to_owned(),
            path: PathBuf::new(),
            functions: Functions {
                create: present("the entry", entry.create, "create")?,
                destroy: present("the entry", entry.destroy, "destroy")?,
                needs: present("the entry", entry.needs, "needs")?,
            },
            // SAFETY: `hook` is the plugin's.
            hooks: unsafe { Hooks::fetch(hook)? },
            entry: Entry(entry),
        })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library({} {}, {})", self.id, self.version, self.hash)
    }
}

/// Every library of this process, by content.
static LIBRARIES: Mutex<BTreeMap<ContentHash, Arc<Library>>> = Mutex::new(BTreeMap::new());

/// The library with a content: the one that is loaded already, or the one that `open` makes. One load at a time.
pub(super) fn cached(
    hash: ContentHash,
    open: impl FnOnce() -> Result<Library, HostError>,
) -> Result<Arc<Library>, HostError> {
    let mut libraries = LIBRARIES.lock();
    if let Some(library) = libraries.get(&hash) {
        return Ok(library.clone());
    }
    let library = Arc::new(open()?);
    libraries.insert(hash, library.clone());
    Ok(library)
}

/// The second check between Rust and Rust, where the plugin exports its layouts.
#[cfg(feature = "abi-stable")]
fn check_deep_layout(handle: &Handle) -> Result<(), HostError> {
    // SAFETY: only the symbol's address is used here.
    let symbol = unsafe { handle.get::<*const std::ffi::c_void>(kvhook_abi::ids::KVH_RUST_LAYOUT_SYMBOL) };
    let Ok(symbol) = symbol else { return Ok(()) };
    // SAFETY: it is that symbol's address, and the library is never unloaded.
    unsafe { kvhook_abi::deep::deep_check(symbol.as_raw_ptr()) }.map_err(HostError::Layout)
}

#[cfg(not(feature = "abi-stable"))]
fn check_deep_layout(_: &Handle) -> Result<(), HostError> {
    Ok(())
}

fn static_text(text: KvhStr, what: &str) -> Result<&'static str, HostError> {
    // SAFETY: texts of the entry are static.
    unsafe { boundary::text(text, what) }.map_err(|error| HostError::BadEntry(error.to_string()))
}

/// Copies the fingerprints out of an entry.
///
/// # Safety
/// The array is valid for reading.
unsafe fn fingerprints(array: KvhArray) -> Result<Vec<PluginFingerprint>, HostError> {
    // SAFETY: passed on from the caller.
    let values = unsafe { boundary::Values::<KvhFingerprint>::new(array, "fingerprints") }
        .map_err(|error| HostError::BadEntry(error.to_string()))?;
    values
        .iter()
        .map(|row| {
            let name = static_text(row.name, "fingerprints[].name")?.to_owned();
            Ok(PluginFingerprint { name, generation: row.generation, value: row.value })
        })
        .collect()
}
