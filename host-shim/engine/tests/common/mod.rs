//! What the tests share: the model, loaded once in each test binary, and text.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kvhook_engine::cache::CacheKind;
use kvhook_engine::model::fetch;
use kvhook_engine::{CacheConfig, KvDtype, Model, Runner};

/// The default model, fetched on first use.
pub fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || Arc::new(Model::load(&fetch::default_model(|_, _| {}).unwrap()).unwrap());
    Arc::clone(MODEL.get_or_init(load))
}

/// A file below `tests/` of the repository.
pub fn shared_file(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Tokens of the novel, from `start` on.
pub fn novel(start: usize, count: usize) -> Vec<u32> {
    static TOKENS: OnceLock<Vec<u32>> = OnceLock::new();
    let tokens = TOKENS.get_or_init(|| model().tokenizer.encode(&shared_file("text/moby-dick.txt")).unwrap());
    tokens[start..start + count].to_vec()
}

pub const CONTIGUOUS: CacheConfig =
    CacheConfig { kind: CacheKind::Contiguous, dtype: KvDtype::F32, ranks: 1, prefix_sharing: true };

pub fn paged(block_size: usize, blocks: usize) -> CacheConfig {
    CacheConfig { kind: CacheKind::Paged { block_size, blocks }, ..CONTIGUOUS }
}

pub fn runner(config: CacheConfig) -> Runner {
    Runner::new(model(), config).unwrap()
}

/// Bit patterns, so that a comparison is of bits and not of values.
pub fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}
