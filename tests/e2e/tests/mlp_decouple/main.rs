//! `mlp-decouple` from its shared library, behind the host: rows against the formula in f64, in each dtype and layout.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod engine;
mod goldens;
mod memory;
mod model;
mod shipped;
mod weights;

use engine::{Cache, Dtype, Engine, Shape};
use kvhook_abi::raw::*;
use kvhook_host::raw::*;
// Builds the plugin's shared library.
use kvhook_mlp_decouple as _;
use kvhook_mlp_weights::{PositionRule, Stored, v1, v2};
use weights::{Mlp, Weights};

const LAYERS: usize = 2;
const HEADS: usize = 3;

const SHAPE: Shape = Shape {
    layers: LAYERS,
    heads: HEADS,
    ranks: 1,
    dim: 32,
    capacity: 256,
    dtype: Dtype::F32,
    block_size: 0,
    pairing: KVH_ROPE_HALF_SPLIT,
    can: KVH_CAN_REWRITE | KVH_CAN_GROWN | KVH_CAN_MOVE_POSITIONS,
};

/// Kind (0 text, 1 image), first token, tokens of a stretch that is compressed.
type Stretch = (usize, usize, usize);

fn image(start: u64, length: u64) -> KvhSegment {
    KvhSegment { kind: KVH_SEGMENT_IMAGE, reserved0: 0, start, length }
}

/// The half of the largest result's last place, and the rounding of f32 sums.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-5,
        Dtype::F16 => 5e-4,
        Dtype::Bf16 => 4e-3,
    }
}

/// One head of one tensor after the original's steps: each stretch's groups, then its rest; all else as it was.
fn original(
    mlps: [&Mlp; 2],
    factor: usize,
    rows: &[Vec<f64>],
    stretches: &[Stretch],
    min_groups: usize,
) -> Vec<Vec<f64>> {
    let mut out = Vec::new();
    let mut at = 0;
    for &(kind, start, length) in stretches {
        let groups = if length / factor >= min_groups { length / factor } else { 0 };
        out.extend_from_slice(&rows[at..start]);
        at = start + groups * factor;
        out.extend(rows[start..at].chunks(factor).map(|group| mlps[kind].apply(&group.concat())));
    }
    out.extend_from_slice(&rows[at..]);
    out
}

fn rows(cache: &Cache, tensor: usize, head: usize, length: u64) -> Vec<Vec<f64>> {
    (0..length as usize).map(|token| cache.get(tensor, head, token)).collect()
}

fn assert_close(found: &[Vec<f64>], expected: &[Vec<f64>], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        let largest = expected.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
        let error = found.iter().zip(expected).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs()));
        assert!(error <= tolerance * largest, "{what}, row {row}: off by {error} of {largest}");
    }
}

/// Compresses a prompt and compares every row of every layer and head.
fn check(
    shape: Shape,
    weights: &Weights,
    config: &str,
    tokens: u64,
    segments: &[KvhSegment],
    expected: &[Stretch],
    min: usize,
) {
    let folder = tempfile::tempdir().unwrap();
    let path = weights.write(folder.path(), "weights.bin");
    let config = format!("weights={},positions=logical,{config}", path.display());
    let config = config.trim_end_matches(',');
    let mut engine = Engine::new(shape, config).unwrap();
    engine.begin(tokens, segments);
    let before = engine.cache.clone();
    let groups = |(_, _, length): &Stretch| if length / weights.factor >= min { length / weights.factor } else { 0 };
    let gain: usize = expected.iter().map(|stretch| groups(stretch) * (weights.factor - 1)).sum();
    let result = engine.compress(KVHOOK_EVENT_PREFILL_DONE);
    if gain == 0 {
        assert_eq!(result, Err(KVH_REASON_NO_GAIN), "{config}");
    } else {
        assert_eq!(result, Ok(()), "{config}, {tokens} tokens");
    }
    assert_eq!(engine.lengths, vec![tokens - gain as u64; shape.layers], "{config}");
    assert_eq!(engine.position, tokens, "positions go on");
    for tensor in 0..2 * shape.layers {
        let layer = &weights.layers[tensor / 2];
        let (text, image) = (&layer[tensor % 2], layer.get(2 + tensor % 2).unwrap_or(&layer[tensor % 2]));
        for head in 0..shape.heads {
            let old = rows(&before, tensor, head, tokens);
            let expected = original([text, image], weights.factor, &old, expected, min);
            let found = rows(&engine.cache, tensor, head, engine.lengths[0]);
            assert_close(
                &found,
                &expected,
                tolerance(shape.dtype),
                &format!("{shape:?}, {config}, tensor {tensor}, head {head}"),
            );
        }
    }
}

#[test]
fn every_remainder_in_every_dtype_and_layout() {
    for factor in [2, 3, 5] {
        let weights = Weights::random(factor, SHAPE.dim, LAYERS, true);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for block_size in [0, 16] {
                let shape = Shape { dtype, block_size, ..SHAPE };
                for tokens in 100..100 + factor {
                    check(shape, &weights, "sinks=0,recent=0", tokens as u64, &[], &[(0, 0, tokens)], 1);
                    let stretch = [(0, 4, tokens - 36)];
                    check(shape, &weights, "", tokens as u64, &[], &stretch, 1);
                }
            }
        }
    }
}

#[test]
fn stretches_end_with_segments() {
    let weights = Weights::random(5, SHAPE.dim, LAYERS, true);
    let all = "sinks=0,recent=0";
    for (rule, segments, expected) in [
        // The original: everything up to the last image token, then text.
        ("", vec![image(7, 50)], vec![(1, 0, 57), (0, 57, 66)]),
        ("", vec![image(7, 20), image(40, 8)], vec![(1, 0, 48), (0, 48, 75)]),
        (",image_rule=prefix", vec![image(0, 123)], vec![(1, 0, 123)]),
        (",image_rule=segments", vec![image(0, 123)], vec![(1, 0, 123)]),
        (",image_rule=segments", vec![image(7, 50)], vec![(0, 0, 7), (1, 7, 50), (0, 57, 66)]),
        (
            ",image_rule=segments",
            vec![image(7, 20), image(27, 9), image(40, 8)],
            vec![(0, 0, 7), (1, 7, 20), (1, 27, 9), (0, 36, 4), (1, 40, 8), (0, 48, 75)],
        ),
    ] {
        check(SHAPE, &weights, &format!("{all}{rule}"), 123, &segments, &expected, 1);
    }
    let protected = [(1, 4, 53), (0, 57, 34)];
    check(SHAPE, &weights, "sinks=4,recent=32", 123, &[image(7, 50)], &protected, 1);
    let text_only = Weights::random(2, SHAPE.dim, LAYERS, false);
    let config = format!("{all},image_rule=segments");
    check(SHAPE, &text_only, &config, 60, &[image(7, 20)], &[(0, 0, 7), (0, 27, 33)], 1);
}

#[test]
fn short_stretches_are_left_alone() {
    // FastCache's min_seq_len counts groups: 2 of 5 need 10 tokens.
    let weights = Weights { min_groups: 2, ..Weights::random(5, SHAPE.dim, LAYERS, true) };
    for tokens in [1, 4, 5, 9, 10, 11, 14] {
        check(SHAPE, &weights, "sinks=0,recent=0", tokens as u64, &[], &[(0, 0, tokens)], 2);
        check(SHAPE, &weights, "sinks=0,recent=0,min_groups=1", tokens as u64, &[], &[(0, 0, tokens)], 1);
    }
    check(SHAPE, &weights, "sinks=0,recent=0", 40, &[image(0, 9)], &[(1, 0, 9), (0, 9, 31)], 2);
    let mut engine = engine(SHAPE, &weights, "min_tokens=50");
    engine.begin(49, &[]);
    assert_eq!(engine.compress(KVHOOK_EVENT_PREFILL_DONE), Err(KVH_REASON_TOO_SHORT));
    let mut engine = self::engine(SHAPE, &weights, "sinks=0,recent=0,min_gain=17");
    engine.begin(24, &[]);
    assert_eq!(engine.compress(KVHOOK_EVENT_PREFILL_DONE), Err(KVH_REASON_NO_GAIN), "4 groups free 16 rows");
    engine.run(1);
    assert_eq!(engine.compress(KVHOOK_EVENT_PREFILL_DONE), Ok(()));
}

fn engine(shape: Shape, weights: &Weights, config: &str) -> Engine {
    try_engine(shape, weights, config).unwrap()
}

fn try_engine(shape: Shape, weights: &Weights, config: &str) -> Result<Engine, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = weights.write(folder.path(), "weights.bin");
    let positions = if config.contains("positions") { "" } else { ",positions=logical" };
    Engine::new(shape, format!("weights={}{positions},{config}", path.display()).trim_end_matches(','))
}

/// Everything that a sequence holds.
fn contents(engine: &Engine) -> Vec<Vec<Vec<f64>>> {
    let heads = |tensor| (0..engine.shape.heads).map(move |head| (tensor, head));
    (0..2 * engine.shape.layers)
        .flat_map(heads)
        .map(|(tensor, head)| rows(&engine.cache, tensor, head, engine.lengths[0]))
        .collect()
}

#[test]
fn compressing_again_and_again_equals_compressing_once() {
    let weights = Weights { min_groups: 3, ..Weights::random(3, SHAPE.dim, LAYERS, true) };
    for (dtype, block_size) in [(Dtype::F32, 0), (Dtype::Bf16, 16)] {
        let shape = Shape { dtype, block_size, ..SHAPE };
        for (config, segments) in [
            ("every=1", vec![]),
            ("every=1,sinks=0,recent=0", vec![]),
            ("every=1,recent=9,image_rule=segments", vec![image(6, 17), image(30, 20)]),
            ("every=1,recent=9,image_rule=prefix", vec![image(6, 17), image(30, 20)]),
        ] {
            let mut growing = engine(shape, &weights, config);
            growing.begin(61, &segments);
            growing.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
            let mut again = 0;
            for tokens in [1, 2, 3, 17, 1, 1, 29] {
                growing.run(tokens);
                again += u64::from(growing.compress(KVHOOK_EVENT_GROWN).is_ok());
            }
            let mut once = engine(shape, &weights, config);
            once.begin(61, &segments);
            once.run(54);
            once.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
            // A commit that frees no whole block is not worth it, says the host.
            assert!(again > if block_size == 0 { 2 } else { 0 }, "{config}: {again}");
            assert_eq!((growing.position, &growing.lengths), (once.position, &once.lengths));
            assert!(contents(&growing) == contents(&once), "{config}");
        }
    }
}

#[test]
fn rows_from_max_position_on_stay_as_they_are() {
    let weights = Weights::random(3, SHAPE.dim, LAYERS, false);
    let bytes = weights.bytes();
    let mut stored = Stored { origin: None, ..v1::read(&bytes, None).unwrap() };
    stored.terms.positions = Some(PositionRule::Logical);
    stored.terms.max_position = Some(80);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bounded");
    // Both versions say it; a config may say less, not more. Groups begin at 4: 25 of them end below 80, 15 below 50.
    for file in [v1::write(&stored, None).unwrap(), v2::write(&stored).unwrap()] {
        std::fs::write(&path, file).unwrap();
        for (config, groups) in [("", 25), (",max_position=80", 25), (",max_position=50", 15)] {
            let config = format!("weights={},recent=9,every=1{config}", path.display());
            let mut growing = Engine::new(SHAPE, &config).unwrap();
            growing.begin(61, &[]);
            growing.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
            for tokens in [1, 2, 3, 17, 1, 1, 29, 30] {
                growing.run(tokens);
                let _ = growing.compress(KVHOOK_EVENT_GROWN);
            }
            let mut once = Engine::new(SHAPE, &config).unwrap();
            once.begin(145, &[]);
            let before = once.cache.clone();
            once.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
            assert_eq!((&once.lengths, once.position), (&vec![145 - 2 * groups as u64; LAYERS], 145), "{config}");
            assert!(growing.lengths == once.lengths && contents(&growing) == contents(&once), "{config}");
            for tensor in 0..2 * LAYERS {
                let mlp = &weights.layers[tensor / 2][tensor % 2];
                let expected = original([mlp, mlp], 3, &rows(&before, tensor, 2, 145), &[(0, 4, 3 * groups)], 1);
                assert_close(&rows(&once.cache, tensor, 2, once.lengths[0]), &expected, 1e-5, &config);
            }
            once.run(10);
            assert_eq!(once.compress(KVHOOK_EVENT_GROWN), Err(KVH_REASON_NO_GAIN), "all that may be is compressed");
        }
        let refused = Engine::new(SHAPE, &format!("weights={},max_position=81", path.display())).err().unwrap();
        for text in ["max_position", "81", "at most 80"] {
            assert!(refused.contains(text), "{refused}");
        }
    }
}

#[test]
fn keys_are_taken_in_the_order_of_the_models_pairing() {
    // The weights are half-split; channels 2 i and 2 i + 1 of this cache are i and i + d / 2 there.
    let weights = Weights::random(2, SHAPE.dim, LAYERS, true);
    let shape = Shape { pairing: KVH_ROPE_INTERLEAVED, ..SHAPE };
    let mut engine = engine(shape, &weights, "sinks=0,recent=0");
    engine.begin(64, &[]);
    let before = engine.cache.clone();
    engine.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
    let half = SHAPE.dim / 2;
    let split = |row: &Vec<f64>| -> Vec<f64> { (0..SHAPE.dim).map(|c| row[2 * (c % half) + c / half]).collect() };
    for tensor in 0..2 * LAYERS {
        let mlp = &weights.layers[tensor / 2][tensor % 2];
        let order = |rows: Vec<Vec<f64>>| if tensor % 2 == 0 { rows.iter().map(split).collect() } else { rows };
        let expected = original([mlp, mlp], 2, &order(rows(&before, tensor, 1, 64)), &[(0, 0, 64)], 1);
        let found = order(rows(&engine.cache, tensor, 1, 32));
        assert_close(&found, &expected, 1e-5, &format!("tensor {tensor}"));
    }
}

#[test]
fn compacted_positions_are_moved_once() {
    let weights = Weights::random(2, SHAPE.dim, LAYERS, true);
    let mut engine = engine(SHAPE, &weights, "positions=compacted,sinks=0,recent=0");
    engine.begin(101, &[]);
    engine.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
    assert_eq!((engine.position, engine.lengths[0]), (51, 51));
    engine.run(20);
    assert_eq!(engine.compress(KVHOOK_EVENT_PREFILL_DONE), Err(KVH_REASON_OTHER));
}

#[test]
fn what_the_cache_cannot_hold_leaves_it_as_it_was() {
    let mut weights = Weights::random(2, SHAPE.dim, LAYERS, true);
    weights.layers[1][0].0[2].1[5] = 1e5;
    for (dtype, result) in [(Dtype::F16, Err(KVH_REASON_OTHER)), (Dtype::Bf16, Ok(()))] {
        let mut engine = engine(Shape { dtype, ..SHAPE }, &weights, "");
        engine.begin(100, &[]);
        let before = contents(&engine);
        assert_eq!(engine.compress(KVHOOK_EVENT_PREFILL_DONE), result);
        assert_eq!(contents(&engine) == before, result.is_err());
    }
}

#[test]
fn working_memory_is_bounded_whatever_the_length() {
    let shape = Shape { capacity: 4096, dim: 64, dtype: Dtype::Bf16, block_size: 16, ..SHAPE };
    let weights = Weights::random(2, shape.dim, LAYERS, false);
    let cores = std::thread::available_parallelism().unwrap().get();
    for tokens in [512, 4096] {
        let mut engine = engine(shape, &weights, "");
        engine.begin(tokens as u64, &[]);
        engine.peak();
        engine.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
        let rows = engine.lengths[0] as usize;
        // New rows, and positions from the plugin and in the host's copy.
        let lent = LAYERS * rows * (2 * HEADS * shape.dim * shape.dtype.size());
        let positions = 2 * LAYERS * rows * 4;
        let working = cores * (48 * (2 + 2) * 64 + 64 + 16) * 4;
        let most = lent + positions + working + 4096;
        let peak = engine.peak() as usize;
        assert!(peak <= most, "{tokens} tokens: {peak} bytes, expected at most {most}");
        assert!(peak > lent);
    }
}

#[test]
fn what_is_wrong_is_said_when_the_plugin_starts() {
    let weights = Weights::random(2, SHAPE.dim, LAYERS, true);
    let refused = |shape: Shape, weights: &Weights, config: &str, expected: &[&str]| {
        let message = try_engine(shape, weights, config).err().unwrap_or_else(|| panic!("{config} was taken"));
        for text in expected {
            assert!(message.contains(text), "{config}: {message}");
        }
    };
    for (config, expected) in [
        ("positions=sideways", &["positions", "one of logical, compacted"][..]),
        ("factor=3", &["factor", "3", "2, which the weight file was made for"]),
        ("factor=1", &["factor", "from 2"]),
        ("min_groups=0", &["min_groups", "at least 1"]),
        ("min_gain=0", &["min_gain", "at least 1"]),
        ("max_position=0", &["max_position", "at least 1"]),
        ("recent=-1", &["recent", "-1"]),
        ("layers=2", &["layers", "2 layers"]),
        ("layers=1-0", &["layers", "1-0"]),
        ("layers=0", &["layers", "layer_counts"]),
        ("image_rule=all", &["image_rule", "one of prefix, segments"]),
        ("image_order=iv", &["image_order", "one of kv, vk"]),
        ("positions=compacted,every=64", &["every", "compacted"]),
        ("wieghts=x", &["wieghts", "did you mean `weights`"]),
    ] {
        refused(SHAPE, &weights, config, expected);
    }
    let none = Engine::new(SHAPE, "positions=logical").err().unwrap();
    assert!(none.contains("`weights`") && none.contains("no default"), "{none}");
    let folder = tempfile::tempdir().unwrap();
    let path = weights.write(folder.path(), "w.bin");
    let silent = Engine::new(SHAPE, &format!("weights={}", path.display())).err().unwrap();
    assert!(silent.contains("positions") && silent.contains("does not say"), "{silent}");
    let missing = folder.path().join("nothing");
    let gone = Engine::new(SHAPE, &format!("weights={},positions=logical", missing.display())).err().unwrap();
    assert!(gone.contains("nothing"), "{gone}");
    let mut bytes = weights.bytes();
    bytes.pop();
    std::fs::write(&missing, bytes).unwrap();
    assert!(Engine::new(SHAPE, &format!("weights={},positions=logical", missing.display())).is_err());

    refused(SHAPE, &Weights::random(2, SHAPE.dim, LAYERS + 1, true), "", &["number of layers", "3", "2"]);
    refused(SHAPE, &Weights::random(2, 64, LAYERS, true), "", &["head_dim", "64", "32"]);
    refused(Shape { pairing: 9, ..SHAPE }, &weights, "", &["number 9"]);
    refused(Shape { can: KVH_CAN_GROWN, ..SHAPE }, &weights, "", &["rewrite"]);
    refused(Shape { can: KVH_CAN_REWRITE, ..SHAPE }, &weights, "positions=compacted", &["move_positions"]);
    refused(Shape { can: KVH_CAN_REWRITE, ..SHAPE }, &weights, "every=8", &["GROWN"]);
}

#[test]
fn layers_that_are_not_named_are_kept() {
    let weights = Weights::random(2, SHAPE.dim, LAYERS, true);
    let shape = Shape { can: SHAPE.can | KVH_CAN_LAYER_COUNTS, ..SHAPE };
    let mut engine = engine(shape, &weights, "layers=1-,sinks=0,recent=0,every=1");
    engine.begin(50, &[]);
    let before = engine.cache.clone();
    engine.compress(KVHOOK_EVENT_PREFILL_DONE).unwrap();
    assert_eq!(engine.lengths, [50, 25]);
    engine.run(10);
    engine.compress(KVHOOK_EVENT_GROWN).unwrap();
    assert_eq!(engine.lengths, [60, 30]);
    for tensor in 0..2 {
        assert!(rows(&before, tensor, 0, 50) == rows(&engine.cache, tensor, 0, 50));
    }
}
