//! Plugins that compress the cache: the engine's side of the host.
//!
//! The engine uses the host as any engine does, through its C API only:
//!
//! * [`KvPlugins`] owns a host and wraps its functions;
//! * an observer on each rank's thread shows the plugins the steps that they asked for;
//! * after each step, sequences whose prompt is done or that have grown are asked about, prepared on every rank and,
//!   `commit_lag` steps later, committed on every rank. Blocks and bytes that become free go back at once.
//!
//! Whatever a plugin or the host does wrong, the step goes on: the sequence stays uncompressed, and the reason is counted
//! in its [`SequenceReport`] and in the arm's [`Figures`].

mod allocations;
mod callbacks;
mod compress;
mod figures;
mod host;
mod observer;
mod report;
mod settle;
mod tracked;
mod views;

use std::path::PathBuf;
use std::sync::Arc;

pub use allocations::Allocations;
pub use figures::{Figures, HookTime};
pub use host::KvPlugins;
pub use observer::StepTag;
pub use report::{CommitReport, FreeReason, Movement, Reason, SequenceReport};

pub(crate) use compress::{Cache, Hooks};

/// Who named the plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// The operator: paths inside the plugin folders are honoured.
    #[default]
    Operator,
    /// A model's files: only bare names are honoured.
    Model,
}

/// A plugin with a config, under a name.
#[derive(Debug, Clone, PartialEq)]
pub struct ArmConfig {
    /// Name of the arm; letters, digits, `.`, `_`, `-`; not `none`.
    pub name: String,
    /// A bare name, looked up as `libkvhook_<name>.so` in the plugin folders, or a path inside one.
    pub plugin: String,
    /// The plugin's config string.
    pub config: String,
    /// Layers to compress, as in `0-3,8`; empty: all.
    pub layers: String,
    /// Sequences shorter than this are kept, in tokens.
    pub min_tokens: u64,
    /// Share of the sequences that name no arm, relative to the other arms' weights.
    pub weight: f64,
}

impl ArmConfig {
    /// An arm for all layers and lengths, of weight 1.
    pub fn new(name: impl Into<String>, plugin: impl Into<String>, config: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            plugin: plugin.into(),
            config: config.into(),
            layers: String::new(),
            min_tokens: 0,
            weight: 1.0,
        }
    }
}

/// Which plugins compress the cache, and how the engine serves them.
#[derive(Debug, Clone, Default)]
pub struct PluginConfig {
    /// A `kv_plugin` form (JSON text); empty: none.
    pub kv_plugin: String,
    /// Who wrote the form and the arms.
    pub source: Source,
    /// Arms beside those of the form.
    pub arms: Vec<ArmConfig>,
    /// Folders in which plugins are looked up; empty: the host's default.
    pub folders: Vec<PathBuf>,
    /// Folder for the host's private copies; `None`: the host's default.
    pub copy_folder: Option<PathBuf>,
    /// Counts the host's memory, and can refuse it; `None`: the host uses the heap.
    pub allocations: Option<Arc<Allocations>>,
    /// Steps of a sequence that run between preparing its compression and committing it. With more than 0, plans that
    /// move positions are not offered.
    pub commit_lag: usize,
}
