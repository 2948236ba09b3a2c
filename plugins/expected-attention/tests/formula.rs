//! The formula, part by part, against PyTorch.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

mod common;

use common::{Case, cases};
use kvhook_abi::kernels::{Layout, Rows};
use kvhook_abi::model::RopePairing;
use kvhook_abi::{LayerInfo, LayerKind, ModelInfo, PluginError};
use kvhook_expected_attention::attention::expected_attention;
use kvhook_expected_attention::rope::Rope;
use kvhook_expected_attention::statistics::Statistics;
use kvhook_testing::{Dtype, cache};

/// Scores differ by less than this times the largest one: f32 against f64.
const TOLERANCE: f64 = 1e-5;

fn model(case: &Case) -> ModelInfo {
    let (kv_heads, q_heads, channels) = (case.k.len(), case.q[0].len(), case.q[0][0].len());
    let layer = LayerInfo {
        kind: LayerKind::Full,
        v_inside_k: false,
        window: 0,
        shared_with: None,
        kv_heads,
        q_heads,
        k_head_dim: channels,
        v_head_dim: channels,
    };
    ModelInfo {
        name: "a model".into(),
        rank: 0,
        ranks: 1,
        total_kv_heads: kv_heads as u32,
        first_kv_head: 0,
        device_type: 1,
        device_id: 0,
        cache_dtype: cache::dtype_of(Dtype::F32),
        position_axes: 1,
        max_positions: 1 << 20,
        rope_base: if case.frequencies.is_empty() { case.base } else { 0.0 },
        rope_frequencies: case.frequencies.clone(),
        rotary_dim: case.rotary_dim,
        rope_pairing: match case.pairing.as_str() {
            "half_split" => RopePairing::HalfSplit,
            "interleaved" => RopePairing::Interleaved,
            _ => RopePairing::None,
        },
        layers: vec![layer],
    }
}

/// `[heads][tokens][channels]` in one piece, and the rows over it.
fn rows(heads: &[Vec<Vec<f32>>]) -> (Vec<f32>, Rows) {
    let mut flat: Vec<f32> = heads.concat().concat();
    let layout = Layout::head_major(Dtype::F32, heads.len(), heads[0].len(), heads[0][0].len());
    // SAFETY: the rows are read as long as `flat`, whose elements do not move, lives.
    let rows = unsafe { Rows::new(flat.as_mut_ptr().cast(), layout, None) }.unwrap();
    (flat, rows)
}

#[test]
fn scores_are_those_of_pytorch() {
    for case in cases() {
        let (tokens, rope) = (case.q.len(), Rope::new(&model(&case)).unwrap());
        // By query head, then by token.
        let q: Vec<_> =
            (0..case.q[0].len()).map(|head| case.q.iter().map(|heads| heads[head].clone()).collect()).collect();
        let (_q, queries) = rows(&q);
        let (_k, keys) = rows(&case.k);
        let mut statistics = Statistics::default();
        statistics.add(&queries, 4..tokens, &rope.turns(4, tokens - 4), case.covariance).unwrap();
        let turn = rope.mean_turn(tokens as u64, case.future);
        for (head, expected) in case.scores.iter().enumerate() {
            let queries = statistics.of_head(head, case.k.len()).unwrap();
            let attention = expected_attention(&keys, head, tokens, &queries, &turn).unwrap();
            let most = expected.iter().copied().fold(0.0, f64::max);
            for (token, (found, expected)) in attention.iter().zip(expected).enumerate() {
                let norm = case.v[head][token].iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
                let found = (f64::from(*found) + case.epsilon) * norm;
                let difference = (found - expected).abs() / most;
                assert!(difference < TOLERANCE, "{}: head {head}, token {token}: {found}, not {expected}", case.name);
            }
        }
    }
}

#[test]
fn the_mean_of_turns_is_their_mean() {
    let case = cases().into_iter().find(|case| case.name == "table").unwrap();
    let rope = Rope::new(&model(&case)).unwrap();
    let row: Vec<f32> = (0..16).map(|channel| (channel as f32 - 7.0) / 4.0).collect();
    for (first, count) in [(0, 1), (7, 3), (1000, 512), (8191, 4096)] {
        let mut mean = [0.0; 16];
        for turn in rope.turns(first, count) {
            let mut turned = row.clone();
            turn.back(&mut turned);
            mean.iter_mut().zip(turned).for_each(|(mean, value)| *mean += f64::from(value) / count as f64);
        }
        let mut found = row.clone();
        rope.mean_turn(first, count as u64).back(&mut found);
        assert!(found.iter().zip(mean).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5), "{found:?}, not {mean:?}");
    }
}

#[test]
fn positions_that_cannot_be_turned_back_are_refused() {
    let case = &cases()[0];
    let refused = |model: ModelInfo| match Rope::new(&model).err().unwrap() {
        PluginError::Unsupported(text) => text,
        error => panic!("{error}"),
    };
    assert!(refused(ModelInfo { position_axes: 3, ..model(case) }).contains("3 axes"));
    assert!(refused(ModelInfo { rope_pairing: RopePairing::Unknown(9), ..model(case) }).contains("way 9"));
    assert!(refused(ModelInfo { rotary_dim: 32, ..model(case) }).contains("32 channels"));
}
