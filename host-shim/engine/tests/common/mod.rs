//! What the tests share: the model, loaded once in each test binary, text, and runners with plugins.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kvhook_engine::cache::{CacheKind, KvBuffer, read_rows};
use kvhook_engine::hooks::Figures;
use kvhook_engine::model::fetch;
use kvhook_engine::{ArmConfig, Begin, CacheConfig, Device, KvDtype, Model, PluginConfig, Runner, SequenceId};

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

pub const CONTIGUOUS: CacheConfig = CacheConfig {
    kind: CacheKind::Contiguous,
    dtype: KvDtype::F32,
    ranks: 1,
    prefix_sharing: true,
    device: Device::Cpu,
};

pub fn paged(block_size: usize, blocks: usize) -> CacheConfig {
    CacheConfig { kind: CacheKind::Paged { block_size, blocks }, ..CONTIGUOUS }
}

/// The same cache on the device that `KVHOOK_TEST_DEVICE` names, as in `cuda`; else on the CPU.
pub fn placed(cache: CacheConfig) -> CacheConfig {
    let device = std::env::var("KVHOOK_TEST_DEVICE").map_or(cache.device, |name| name.parse().unwrap());
    CacheConfig { device, ..cache }
}

pub fn runner(config: CacheConfig) -> Runner {
    Runner::new(model(), placed(config)).unwrap()
}

/// Bit patterns, so that a comparison is of bits and not of values.
pub fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}

/// Arms by name, plugin and config; copies go to cargo's folder for tests.
pub fn plugins(arms: &[(&str, &str, &str)]) -> PluginConfig {
    PluginConfig {
        arms: arms.iter().map(|(name, plugin, config)| ArmConfig::new(*name, *plugin, *config)).collect(),
        copy_folder: Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("copies")),
        ..PluginConfig::default()
    }
}

/// One arm, `a`, of `truncate`.
pub fn truncate(config: &str) -> PluginConfig {
    plugins(&[("a", "truncate", config)])
}

/// A runner with plugins.
pub fn with(cache: CacheConfig, plugins: &PluginConfig) -> Runner {
    Runner::with_plugins(model(), placed(cache), plugins).unwrap()
}

/// The same cache without prefix sharing.
pub fn unshared(cache: CacheConfig) -> CacheConfig {
    CacheConfig { prefix_sharing: false, ..cache }
}

/// A sequence on an arm whose prompt has run, `chunk` tokens a step.
pub fn prefill_on(runner: &mut Runner, tokens: &[u32], arm: &str, chunk: usize) -> SequenceId {
    runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(tokens) }, chunk).unwrap().0
}

/// Bits of every K and V row that a sequence holds: by rank, layer, KV head, then K rows and V rows.
pub type Rows = Vec<Vec<Vec<[Vec<Vec<u32>>; 2]>>>;

pub fn rows_of(runner: &Runner, id: SequenceId) -> Rows {
    let layers = runner.sequence(id).unwrap().layers.clone();
    let of_rank = move |rank: &mut kvhook_engine::rank::RankState| {
        let heads = rank.shard.kv_heads.len();
        let of_layer = |(index, layer): (usize, &kvhook_engine::cache::LayerCache)| {
            let view = rank.cache.peek(id, index);
            let width = view.layout.head_dim;
            let read = |buffer: &KvBuffer, head: usize| {
                let mut out = vec![0.0; layer.len * width];
                read_rows(buffer, &view.layout, &layer.blocks, head, 0, &mut out);
                out.chunks(width).map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
            };
            (0..heads).map(|head| [read(view.k, head), read(view.v, head)]).collect()
        };
        layers.iter().enumerate().map(of_layer).collect()
    };
    runner.ranks().run(of_rank).unwrap()
}

/// Every row of `compressed` for a position below `end` is, bit for bit, the row that `full` holds at that position.
/// Tokens from `end` on were run over compressed rows, and have others.
pub fn assert_rows_are_survivors(compressed: &Runner, id: SequenceId, full: &Runner, full_id: SequenceId, end: u32) {
    let survivors = compressed.survivors(id).unwrap();
    let (rows, all) = (rows_of(compressed, id), rows_of(full, full_id));
    for (rank, layers) in survivors.iter().enumerate() {
        for (layer, heads) in layers.iter().enumerate() {
            assert_eq!(heads.len(), rows[rank][layer].len());
            for (head, positions) in heads.iter().enumerate() {
                assert!(positions.is_sorted_by(|a, b| a < b));
                for part in 0..2 {
                    let (kept, all) = (&rows[rank][layer][head][part], &all[rank][layer][head][part]);
                    assert_eq!(kept.len(), positions.len());
                    let same = |(row, &position): (&Vec<u32>, &u32)| position >= end || *row == all[position as usize];
                    assert!(kept.iter().zip(positions).all(same), "rank {rank}, layer {layer}, head {head}");
                }
            }
        }
    }
}

/// What an arm did.
pub fn figures(runner: &Runner, arm: &str) -> Figures {
    runner.plugins().unwrap().figures(arm).unwrap()
}
