//! Looking at a plugin: what its file says without running, and every check of a load with its outcome.

use std::path::Path;

use kvhook_abi::layout::Table;
use serde::Serialize;

use super::file::{ContentHash, PluginFile};
use super::policy::{Policy, Source};
use super::step::Step;
use super::{open_image, read_metadata};
use crate::error::HostError;

/// What a plugin's file says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Bytes of the file.
    pub bytes: u64,
    /// SHA-256 of the file, for a pin.
    pub sha256: String,
    /// Short name.
    pub id: String,
    /// Version of the plugin.
    pub version: String,
    /// Major version of the ABI that it was built with.
    pub abi_major: u32,
    /// Minor version of the ABI that it was built with.
    pub abi_minor: u32,
    /// Oldest minor of a host that it works with.
    pub required_host_minor: u32,
    /// Ids of the hook points that it implements.
    pub hooks: Vec<String>,
    /// What an instance may need of an engine, with some config.
    pub may_need: Vec<String>,
    /// Language that it was written in.
    pub language: String,
    /// Compiler that built it.
    pub compiler: String,
    /// JSON Schema of its config.
    pub config_schema: serde_json::Value,
    /// The layouts of the contract's structs, its and ours.
    pub layouts: Vec<LayoutComparison>,
}

/// One generation of one struct, as the plugin and as this host compiled it.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutComparison {
    /// The struct.
    pub name: String,
    /// Its generation.
    pub generation: u32,
    /// The plugin's fingerprint; none: it does not list the struct.
    pub plugin: Option<u64>,
    /// This host's fingerprint; none: it does not know the generation.
    pub host: Option<u64>,
}

/// Reads what a plugin's file says, without running its code. The path may be any that can be read.
///
/// # Errors
/// `FileMissing`, `FileUnreadable`, `FileChanged`, and those of [`inspect_bytes`], with the path.
pub fn inspect(path: &Path) -> Result<Inspection, HostError> {
    let look = || inspect_bytes(PluginFile::open_to_inspect(path)?.read()?.bytes());
    look().map_err(|error| error.about_file(path))
}

/// As [`inspect`], from a file's content. Any bytes are safe.
///
/// # Errors
/// `NotElf`, `WrongArchitecture`, `WrongMajor` or `NoEntry` by the exported symbols, `Metadata`.
pub fn inspect_bytes(bytes: &[u8]) -> Result<Inspection, HostError> {
    let metadata = read_metadata(bytes, &mut |_| ())?;
    let ours = Table::current();
    let mut layouts: Vec<LayoutComparison> = ours
        .rows
        .iter()
        .map(|(row, _)| LayoutComparison {
            name: row.name.clone(),
            generation: row.generation,
            plugin: None,
            host: Some(row.fingerprint),
        })
        .collect();
    let known_here = layouts.len();
    for row in &metadata.layouts {
        let known =
            layouts[..known_here].iter_mut().find(|known| known.name == row.name && known.generation == row.generation);
        match known {
            Some(known) => known.plugin = Some(row.fingerprint),
            None => layouts.push(LayoutComparison {
                name: row.name.clone(),
                generation: row.generation,
                plugin: Some(row.fingerprint),
                host: None,
            }),
        }
    }
    Ok(Inspection {
        bytes: bytes.len() as u64,
        sha256: ContentHash::of(bytes).to_string(),
        id: metadata.id,
        version: metadata.version,
        abi_major: metadata.abi_major,
        abi_minor: metadata.abi_minor,
        required_host_minor: metadata.required_host_minor,
        hooks: metadata.hooks,
        may_need: metadata.may_need,
        language: metadata.language,
        compiler: metadata.compiler,
        config_schema: metadata.config_schema,
        layouts,
    })
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It holds.
    Passed,
    /// It does not: a load stops here.
    Failed,
    /// An earlier one failed.
    NotReached,
}

/// One check of a load.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What is checked.
    pub step: Step,
    /// How it ended.
    pub outcome: Outcome,
    /// What a pass means, or why it failed.
    pub detail: String,
}

/// Loads a plugin and tells each check of [`Step::ALL`]. Runs the plugin's code when the checks before that pass.
pub fn checks(policy: &Policy, plugin: &str, source: Source, pin: Option<ContentHash>) -> Vec<Check> {
    let mut reached = Vec::new();
    let failure = take_steps(policy, plugin, source, pin, &mut |step| reached.push(step)).err();
    let mut failure = failure.map(|error| error.to_string());
    Step::ALL
        .iter()
        .map(|&step| {
            let (outcome, detail) = if reached.contains(&step) {
                (Outcome::Passed, step.describe().to_owned())
            } else if let Some(reason) = failure.take() {
                (Outcome::Failed, reason)
            } else {
                (Outcome::NotReached, "an earlier check failed".to_owned())
            };
            Check { step, outcome, detail }
        })
        .collect()
}

fn take_steps(
    policy: &Policy,
    plugin: &str,
    source: Source,
    pin: Option<ContentHash>,
    passed: &mut dyn FnMut(Step),
) -> Result<(), HostError> {
    let file = policy.open(plugin, source)?;
    passed(Step::Open);
    let image = file.read()?;
    passed(Step::Read);
    image.check_pin(pin)?;
    passed(Step::Pin);
    open_image(&image, &policy.copy_folder, passed)?;
    Ok(())
}
