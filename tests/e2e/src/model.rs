//! The real model with plugins from their shared libraries, and text to run through it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use kvhook_engine::Error;
use kvhook_engine::cache::{CacheConfig, CacheKind};
use kvhook_engine::model::fetch;
use kvhook_engine::{ArmConfig, Device, KvDtype, Model, PluginConfig, Runner};

use crate::plugins::{Place, built};

/// A contiguous f32 cache of one rank.
pub const CONTIGUOUS: CacheConfig = CacheConfig {
    kind: CacheKind::Contiguous,
    dtype: KvDtype::F32,
    ranks: 1,
    prefix_sharing: true,
    device: Device::Cpu,
};

/// A paged f32 cache of one rank that shares prefixes.
pub const fn paged(block_size: usize, blocks: usize) -> CacheConfig {
    CacheConfig { kind: CacheKind::Paged { block_size, blocks }, ..CONTIGUOUS }
}

/// Path of the default model, fetched on first use.
///
/// # Panics
/// When it cannot be fetched; the message says what to do.
pub fn path() -> PathBuf {
    fetch::default_model(|_, _| {}).unwrap_or_else(|error| panic!("{error}"))
}

/// The default model, loaded once in each test program.
///
/// # Panics
/// When it cannot be fetched or read.
pub fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || Arc::new(Model::load(&path()).unwrap_or_else(|error| panic!("{error}")));
    Arc::clone(MODEL.get_or_init(load))
}

/// Tokens of a text below `tests/text`.
///
/// # Panics
/// When there is no such text.
pub fn text(name: &str) -> Vec<u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../text").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    model().tokenizer.encode(&text).unwrap_or_else(|error| panic!("{error}"))
}

/// What makes plugins of `arms`, `(name, plugin, config)` each, from the libraries beside the running test.
pub fn plugins(arms: &[(&str, &str, &str)], place: &Place) -> PluginConfig {
    PluginConfig {
        arms: arms.iter().map(|(name, plugin, config)| ArmConfig::new(*name, *plugin, *config)).collect(),
        folders: vec![built()],
        copy_folder: Some(place.copies()),
        ..PluginConfig::default()
    }
}

/// A runner on the default model with these arms, which commits `commit_lag` steps late.
///
/// # Panics
/// When an arm cannot be made.
pub fn runner(cache: CacheConfig, arms: &[(&str, &str, &str)], commit_lag: usize) -> Runner {
    let place = Place::new();
    let plugins = PluginConfig { commit_lag, ..plugins(arms, &place) };
    Runner::with_plugins(model(), cache, &plugins).unwrap_or_else(|error| panic!("{error}"))
}

/// The first CUDA device, if this machine has one that the engine can use; else says that a test is skipped.
///
/// # Panics
/// When there is one and it fails.
#[cfg(feature = "cuda")]
pub fn cuda() -> Option<Device> {
    let device = Device::Cuda(0);
    match Runner::new(model(), CacheConfig { device, ..CONTIGUOUS }) {
        Ok(_) => Some(device),
        Err(Error::Device { reason, .. }) if reason.contains("libcuda") || reason.contains("has 0 devices") => {
            println!("skipped: no CUDA device");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Bit patterns, so that a comparison is of bits and not of values.
pub fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}
