//! The plugin through its one symbol, as a host calls it.

use kvhook_testing::{Dtype, Engine, Fault, Form, Instance, Layer, PerHead, Sequence, Shape, captured, entry};

const SHAPE: Shape = Shape::new(2, 2, 4, 4);
const TOKENS: usize = 100;

fn create(config: &str, shape: Shape) -> Result<Instance, Fault> {
    Engine::new(shape).create(entry!(kvhook_plugin_name), config)
}

/// How long the value of an entry is; no two of a head are alike.
fn value(layer: usize, head: usize, token: usize) -> f32 {
    ((token * 37 + layer * 5 + head * 11) % 101) as f32
}

/// A prompt of 100 tokens whose keys are as long as `key` says.
fn prompt(key: impl Fn(usize) -> f32) -> Sequence {
    let rows = |length: &dyn Fn(usize, usize) -> f32| -> PerHead {
        let row = |head, token| vec![length(head, token); SHAPE.head_dim];
        (0..SHAPE.kv_heads).map(|head| (0..TOKENS).map(|token| row(head, token)).collect()).collect()
    };
    let layer = |layer| {
        let (keys, values) = (rows(&|_, token| key(token)), rows(&|head, token| value(layer, head, token)));
        Layer::new(keys, values, Dtype::F32, Form::Paged { block: 16 })
    };
    Sequence::new(1, (0..SHAPE.layers).map(layer).collect())
}

/// The rows with the highest scores among those that are not protected, and the protected ones.
fn best(score: impl Fn(usize) -> f32, kept: usize, sinks: usize, recent: usize) -> Vec<u32> {
    let mut rows: Vec<usize> = (sinks..TOKENS - recent).collect();
    rows.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    rows.truncate(kept - sinks - recent);
    rows.extend((0..sinks).chain(TOKENS - recent..TOKENS));
    rows.sort();
    rows.into_iter().map(|row| row as u32).collect()
}

#[test]
fn the_longest_values_stay_with_the_first_and_the_most_recent_entries() {
    let mut instance = create("keep=0.5,sinks=4,recent=16", SHAPE).unwrap();
    let answer = instance.plan_one(&prompt(|_| 1.0)).unwrap();
    for (layer, plan) in answer.select().iter().enumerate() {
        for (head, rows) in plan.rows.iter().enumerate() {
            assert_eq!(*rows, best(|token| value(layer, head, token), 50, 4, 16), "layer {layer}, head {head}");
        }
    }
}

#[test]
fn a_long_key_counts_against_an_entry() {
    let key = |token| if token == 50 { 1.0 } else { 100.0 };
    let mut instance = create("budget=6,sinks=4,recent=1,key_weight=100", SHAPE).unwrap();
    let answer = instance.plan_one(&prompt(key)).unwrap();
    assert!(answer.select().iter().flat_map(|plan| &plan.rows).all(|rows| *rows == [0, 1, 2, 3, 50, 99]), "{answer:?}");
}

#[test]
fn a_short_sequence_is_kept() {
    let mut instance = create("budget=200", SHAPE).unwrap();
    // Says why; panics where it is another plan.
    instance.plan_one(&prompt(|_| 1.0)).unwrap().reason();
}

#[test]
fn a_wrong_config_is_refused_by_the_key() {
    for config in ["key_weigth=1", "key_weight=-1"] {
        let fault = create(config, SHAPE).err().unwrap();
        assert!(fault.to_string().contains("key_weight"), "{fault}");
    }
}

/// Keys, values and queries of SmolLM2. A score that wants queries is shown them, and finds them in `layer.queries()`.
#[test]
fn a_real_cache_is_cut_to_a_half() {
    let real = captured();
    let mut instance = create("keep=0.5", real.shape).unwrap();
    real.show(1, &mut instance, Dtype::F16).unwrap();
    let answer = instance.plan_one(&real.sequence(1, Dtype::F16, Form::Paged { block: 16 })).unwrap();
    assert!(answer.select().iter().all(|plan| plan.count == real.tokens / 2));
}
