//! The plugin through its one symbol, as a host calls it.

use kvhook_testing::{Dtype, Engine, Fault, Form, Instance, Layer, PerHead, Sequence, Shape, captured, entry};

const SHAPE: Shape = Shape::new(2, 2, 4, 4);

fn create(config: &str, shape: Shape) -> Result<Instance, Fault> {
    Engine::new(shape).create(entry!(kvhook_plugin_name), config)
}

/// A prompt whose keys tell layer, head and row; a value is a key times two.
fn prompt(tokens: usize) -> Sequence {
    let rows = |layer: usize, times: f32| -> PerHead {
        let row = |head: usize, token: usize| vec![times * (1000 * layer + 100 * head + token) as f32; SHAPE.head_dim];
        (0..SHAPE.kv_heads).map(|head| (0..tokens).map(|token| row(head, token)).collect()).collect()
    };
    let layer = |layer| Layer::new(rows(layer, 1.0), rows(layer, 2.0), Dtype::F32, Form::Paged { block: 16 });
    Sequence::new(1, (0..SHAPE.layers).map(layer).collect())
}

#[test]
fn neighbours_become_one_between_the_first_and_the_most_recent_entries() {
    let mut instance = create("sinks=2,recent=3", SHAPE).unwrap();
    let answer = instance.plan_one(&prompt(10)).unwrap();
    // Rows 2 to 6 are between; the odd one stays.
    let rows = [0.0, 1.0, 2.5, 4.5, 6.0, 7.0, 8.0, 9.0];
    for (layer, made) in answer.rewrite().iter().enumerate() {
        for head in 0..SHAPE.kv_heads {
            assert_eq!(made.positions[head], [0, 1, 2, 4, 6, 7, 8, 9]);
            for (row, expected) in rows.iter().enumerate() {
                let key = (1000 * layer + 100 * head) as f32 + expected;
                assert_eq!(made.keys[head][row], [key; 4], "layer {layer}, head {head}, row {row}");
                assert_eq!(made.values[head][row], [2.0 * key; 4], "layer {layer}, head {head}, row {row}");
            }
        }
    }
}

#[test]
fn a_short_sequence_is_kept() {
    let mut instance = create("sinks=4,recent=32", SHAPE).unwrap();
    for tokens in [1, 37] {
        // Says why; panics where it is another plan.
        instance.plan_one(&prompt(tokens)).unwrap().reason();
    }
    instance.plan_one(&prompt(38)).unwrap().rewrite();
}

#[test]
fn a_wrong_config_is_refused_by_the_key() {
    for config in ["recnt=1", "recent=-1"] {
        let fault = create(config, SHAPE).err().unwrap();
        assert!(fault.to_string().contains("recent"), "{fault}");
    }
}

/// Keys and values of SmolLM2.
#[test]
fn a_real_cache_is_rewritten() {
    let real = captured();
    let mut instance = create("", real.shape).unwrap();
    let answer = instance.plan_one(&real.sequence(1, Dtype::F16, Form::Paged { block: 16 })).unwrap();
    assert!(answer.rewrite().iter().all(|layer| layer.keys[0].len() < real.tokens));
}
