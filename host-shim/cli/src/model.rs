//! The model of a command: loaded from a file, or fetched.

use std::io;
use std::path::Path;
use std::sync::Arc;

use kvhook_engine::Model;
use kvhook_engine::model::fetch;
use sha2::{Digest, Sha256};

use crate::error::CliError;
use crate::progress::Progress;

/// A model and where it came from.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: Arc<Model>,
    /// Its file's name without the extension.
    pub name: String,
    /// SHA-256 of its file, hexadecimal.
    pub sha256: String,
}

/// Loads a GGUF.
///
/// # Errors
/// [`CliError::Read`]; [`CliError::Engine`] for a file that is no model which the engine runs.
fn load(path: &Path) -> Result<Loaded, CliError> {
    let unreadable = |source| CliError::Read { path: path.into(), source };
    let mut hash = Sha256::new();
    io::copy(&mut std::fs::File::open(path).map_err(unreadable)?, &mut hash).map_err(unreadable)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Loaded { model: Arc::new(Model::load(path)?), name, sha256: format!("{:x}", hash.finalize()) })
}

/// Loads the GGUF that a command names, or else SmolLM2-135M-Instruct.
///
/// # Errors
/// [`CliError::Read`]; [`CliError::Engine`] for a file that is no model which the engine runs, and where the model cannot
/// be fetched.
pub fn load_named(path: Option<&Path>) -> Result<Loaded, CliError> {
    path.map_or_else(load_default, load)
}

/// Loads SmolLM2-135M-Instruct, which is fetched with a progress bar when it is not in the user's cache folder.
///
/// # Errors
/// As [`load`], and [`CliError::Engine`] where it cannot be fetched.
fn load_default() -> Result<Loaded, CliError> {
    let mut bar = None;
    let path = fetch::default_model(|done, total| {
        bar.get_or_insert_with(|| Progress::bytes(&format!("fetching {}", fetch::NAME), total)).set(done);
    })?;
    drop(bar);
    load(&path)
}
