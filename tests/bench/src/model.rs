//! The real model with plugins from the shared libraries beside the benchmark.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvhook_engine::model::fetch;
use kvhook_engine::{ArmConfig, CacheConfig, Model, PluginConfig, Runner};

use crate::error::Result;

/// The folder in which cargo put the plugins: that of the running program.
pub fn plugin_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program.parent().map_or_else(PathBuf::new, Path::to_owned)
}

/// The default model, fetched on first use.
///
/// # Errors
/// Those of fetching and reading it.
pub fn load() -> Result<Arc<Model>> {
    Ok(Arc::new(Model::load(&fetch::default_model(|_, _| {})?)?))
}

/// The first `count` tokens of the novel in `tests/text`.
///
/// # Errors
/// The tokenizer's, and where the text cannot be read.
pub fn novel(model: &Model, count: usize) -> Result<Vec<u32>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../text/moby-dick.txt");
    let text = std::fs::read_to_string(&path).map_err(|source| kvhook_engine::Error::Io { path, source })?;
    let mut tokens = model.tokenizer.encode(&text)?;
    tokens.truncate(count);
    Ok(tokens)
}

/// A runner with these arms, `(name, plugin, config)` each.
///
/// # Errors
/// As [`Runner::with_plugins`].
pub fn runner(model: &Arc<Model>, cache: CacheConfig, arms: &[(&str, &str, &str)]) -> Result<Runner> {
    let arms = arms.iter().map(|(name, plugin, config)| ArmConfig::new(*name, *plugin, *config)).collect();
    let plugins = PluginConfig { arms, folders: vec![plugin_folder()], ..PluginConfig::default() };
    Ok(Runner::with_plugins(Arc::clone(model), cache, &plugins)?)
}
