//! What an observer on a rank's thread sees of each step.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::mpsc::{Sender, channel};

use common::{CONTIGUOUS, bits, model, novel, runner};
use half::f16;
use kvhook_engine::rank::{HeadRows, LayerStep, StepObserver};
use kvhook_engine::{CacheConfig, Scoring};

struct Seen {
    rank: usize,
    layer: usize,
    thread: String,
    lengths: [usize; 3],
    cached: usize,
    first_position: u32,
    prompt_ends: bool,
}

fn elements(rows: HeadRows<'_>) -> usize {
    rows.rows * rows.heads * rows.head_dim
}

struct Reporter {
    rank: usize,
    to: Sender<Seen>,
}

impl StepObserver for Reporter {
    fn before_attention(&mut self, step: &LayerStep<'_>) {
        let sequence = &step.batch.sequences[0];
        let seen = Seen {
            rank: self.rank,
            layer: step.layer,
            thread: std::thread::current().name().unwrap().to_owned(),
            lengths: [step.q, step.k, step.v].map(elements),
            cached: sequence.layers[step.layer].len,
            first_position: sequence.first_position,
            prompt_ends: sequence.prompt_ends,
        };
        self.to.send(seen).unwrap();
    }
}

#[test]
fn sees_every_layer_of_every_step_on_its_own_rank_and_changes_nothing() {
    let tokens = novel(0, 50);
    let config = CacheConfig { ranks: 3, ..CONTIGUOUS };
    let run = |observed: bool| {
        let mut runner = runner(config);
        let (to, seen) = channel();
        if observed {
            let set = move |rank: &mut kvhook_engine::rank::RankState| {
                rank.observer = Some(Box::new(Reporter { rank: rank.rank, to: to.clone() }));
            };
            runner.ranks().run(set).unwrap();
        }
        let (id, _) = runner.prefill(&tokens[..48], 32).unwrap();
        let rows = runner.score(id, &tokens[48..], Scoring::OneByOne).unwrap();
        drop(runner);
        (bits(&rows), seen.try_iter().collect::<Vec<_>>())
    };
    let (plain, none) = run(false);
    let (observed, seen) = run(true);
    assert!(none.is_empty() && plain == observed);
    for rank in 0..3 {
        let mut of_rank = seen.iter().filter(|seen| seen.rank == rank);
        for (rows, cached, prompt_ends) in [(32, 0, false), (16, 32, true), (1, 48, false), (1, 49, false)] {
            for layer in 0..model().config.layers {
                let seen = of_rank.next().unwrap();
                assert_eq!((seen.layer, seen.cached, seen.prompt_ends), (layer, cached, prompt_ends));
                assert_eq!(seen.first_position as usize, cached);
                assert_eq!(seen.lengths, [rows * 3 * 64, rows * 64, rows * 64]);
                assert_eq!(seen.thread, format!("rank {rank}"));
            }
        }
        assert!(of_rank.next().is_none());
    }
}

/// The layers of `kvhook_testing::captured`, its tokens, and of how many of these the queries are kept.
const CAPTURED: ([usize; 2], usize, usize) = ([4, 15], 192, 16);

/// Shape and values of q, k and v.
type Tensors = [([usize; 3], Vec<f32>); 3];

struct Capturer(Sender<(usize, Tensors)>);

impl StepObserver for Capturer {
    fn before_attention(&mut self, step: &LayerStep<'_>) {
        if CAPTURED.0.contains(&step.layer) {
            let tensors = [step.q, step.k, step.v].map(|rows| {
                assert_eq!(rows.stride, rows.heads * rows.head_dim);
                // SAFETY: f32 in ordinary memory, borrowed for the call.
                let values = unsafe { std::slice::from_raw_parts(rows.address.cast::<f32>(), elements(rows)) };
                ([rows.rows, rows.heads, rows.head_dim], values.to_vec())
            });
            self.0.send((step.layer, tensors)).unwrap();
        }
    }
}

/// K, V and the last queries of some layers, computed now.
fn capture() -> Vec<(usize, Tensors)> {
    let (_, tokens, queries) = CAPTURED;
    let mut runner = runner(CONTIGUOUS);
    let (to, seen) = channel();
    runner
        .ranks()
        .run(move |rank: &mut kvhook_engine::rank::RankState| {
            rank.observer = Some(Box::new(Capturer(to.clone())));
        })
        .unwrap();
    runner.prefill(&novel(0, tokens), tokens).unwrap();
    drop(runner);
    let mut layers: Vec<(usize, Tensors)> = seen.iter().collect();
    for (_, [(shape, values), ..]) in &mut layers {
        values.drain(..(shape[0] - queries) * shape[1] * shape[2]);
        shape[0] = queries;
    }
    layers
}

/// The file that `captured/SOURCE.md` of kvhook-testing describes.
fn write_captured(layers: &[(usize, Tensors)]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (layer, tensors) in layers {
        for (name, (shape, values)) in ["q", "k", "v"].iter().zip(tensors) {
            let start = data.len();
            data.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()));
            let place = serde_json::json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, data.len()] });
            header.insert(format!("layers.{layer}.{name}"), place);
        }
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    let path = format!("{}/../../hook-abi/testing/captured/smollm2-135m.safetensors", env!("CARGO_MANIFEST_DIR"));
    std::fs::write(path, file).unwrap();
}

#[test]
fn the_captured_cache_is_what_the_model_computes() {
    let layers = capture();
    if std::env::var_os("KVHOOK_WRITE_CAPTURED").is_some() {
        return write_captured(&layers);
    }
    let file = kvhook_testing::captured();
    assert_eq!(file.tokens, CAPTURED.1);
    assert_eq!(layers.len(), file.layers.len());
    for ((index, [q, k, v]), layer) in layers.iter().zip(&file.layers) {
        assert_eq!(*index, layer.index);
        let near = |found: f32, expected: f32| (found - expected).abs() <= 2e-3 * expected.abs().max(1.0);
        // By token, then head.
        let same = |(shape, values): &([usize; 3], Vec<f32>), at: &dyn Fn(usize, usize) -> Vec<f32>| {
            let rows = values.chunks(shape[2]).enumerate();
            rows.for_each(|(place, row)| {
                let expected = at(place / shape[1], place % shape[1]);
                assert!(row.iter().zip(&expected).all(|(found, expected)| near(*found, *expected)), "row {place}");
            });
        };
        same(q, &|token, head| layer.queries[token][head].clone());
        same(k, &|token, head| layer.keys[head][token].clone());
        same(v, &|token, head| layer.values[head][token].clone());
    }
}
