//! Rules about a plugin's file. A plugin that is linked into a test has none: then there is nothing to check.

use std::collections::BTreeSet;
use std::time::Duration;

use kvhook_abi::metadata::Metadata;
use kvhook_abi::raw::*;
use kvhook_abi::{Can, Hooks, boundary};

use super::subject::Subject;
use super::{broken, holds};
use crate::fault::Fault;

/// What is known of a plugin's file, beside the entry that it exports.
#[derive(Debug, Clone)]
pub struct File {
    /// What it says without running.
    pub metadata: Metadata,
    /// Names that it takes from other libraries.
    pub imports: Vec<String>,
    /// Time that it took to load, in processor time where that is known.
    pub load_time: Duration,
}

pub(super) fn metadata_is_true(subject: &Subject) -> Result<(), Fault> {
    let Some(File { metadata, .. }) = &subject.file else { return Ok(()) };
    let entry = subject.entry;
    let same = |field: &str, said: &str, found: &str| {
        holds(said == found, || format!("the metadata's `{field}` is {said}; what runs says {found}"))
    };
    for (field, said, found) in [("id", &metadata.id, entry.id), ("version", &metadata.version, entry.version)] {
        // SAFETY: a static's text.
        match unsafe { boundary::text(found, field) } {
            Ok(found) => same(field, said, found)?,
            Err(error) => return broken(error.to_string()),
        }
    }
    for (field, said, found) in [
        ("abi_major", metadata.abi_major, entry.abi_major),
        ("abi_minor", metadata.abi_minor, entry.abi_minor),
        ("required_host_minor", metadata.required_host_minor, entry.required_host_minor),
    ] {
        same(field, &said.to_string(), &found.to_string())?;
    }
    let Some(hook) = entry.hook else { return broken("`hook` is null") };
    for (_, id) in Hooks::NAMES {
        // SAFETY: `hook` takes any text.
        let runs = !unsafe { hook(KvhStr::new(id)) }.is_null();
        let said = metadata.hooks.iter().any(|hook| hook == id);
        holds(runs == said, || {
            let [what, but] = if runs { ["implements", "does not list"] } else { ["does not implement", "lists"] };
            format!("what runs {what} `{id}`; the metadata {but} it")
        })?;
    }
    let known = |name: &String| Hooks::NAMES.iter().any(|(_, known)| known == name);
    if let Some(name) = metadata.hooks.iter().find(|name| !known(name)) {
        return broken(format!("the metadata lists the hook point `{name}`, which does not exist"));
    }
    layouts_are_the_same(metadata, entry)?;
    let needs = Can(subject.instance()?.needs()?.must);
    let said = |name: &&str| metadata.may_need.iter().any(|may| may == name);
    match needs.names().split(", ").filter(|name| !name.is_empty()).find(|name| !said(name)) {
        Some(name) => broken(format!("an instance needs `{name}`, which the metadata's `may_need` does not list")),
        None => Ok(()),
    }
}

fn layouts_are_the_same(metadata: &Metadata, entry: &KvhPluginEntry) -> Result<(), Fault> {
    if metadata.layouts.is_empty() {
        return Ok(());
    }
    // SAFETY: the entry's array is static.
    let rows = unsafe { boundary::Values::<KvhFingerprint>::new(entry.fingerprints, "fingerprints") };
    let rows = rows.or_else(|error| broken(error.to_string()))?;
    let row = |row: KvhFingerprint| {
        // SAFETY: a static's text.
        let name = unsafe { boundary::text(row.name, "name") }.unwrap_or("");
        (name.to_owned(), row.generation, row.value)
    };
    let runs: BTreeSet<_> = rows.iter().map(row).collect();
    let said: BTreeSet<_> =
        metadata.layouts.iter().map(|row| (row.name.clone(), row.generation, row.fingerprint)).collect();
    match runs.symmetric_difference(&said).next() {
        Some((name, generation, _)) => {
            broken(format!("metadata and entry differ in the layout of `{name}`, generation {generation}"))
        }
        None => Ok(()),
    }
}

/// Functions that wait for a device, or make a stream, in the CUDA driver and runtime: their names, or with `*` what
/// these begin with.
const FORBIDDEN: [&str; 12] = [
    "cuCtxSynchronize*",
    "cuStreamSynchronize*",
    "cuEventSynchronize*",
    "cuStreamCreate*",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuMemFree*",
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize*",
    "cudaEventSynchronize",
    "cudaStreamCreate*",
    "cudaFree",
];

pub(super) fn imports_no_synchronisation(subject: &Subject) -> Result<(), Fault> {
    let Some(File { imports, .. }) = &subject.file else { return Ok(()) };
    let forbidden = |name: &&String| {
        FORBIDDEN.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name.as_str() == *pattern,
        })
    };
    match imports.iter().find(forbidden) {
        Some(name) => {
            broken(format!("it takes `{name}` from a library; a hook enqueues on the engine's stream and never waits"))
        }
        None => Ok(()),
    }
}
