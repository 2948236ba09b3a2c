//! The plugin through its one symbol, as a host calls it.

mod mock;

use mock::{Cache, Made, Plugin, Shape};

const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 4 };

/// How long the value of an entry is; no two of a head are alike.
fn value(layer: usize, head: usize, token: usize) -> f32 {
    ((token * 37 + layer * 5 + head * 11) % 101) as f32
}

/// A cache of 100 entries whose keys are as long as `key` says.
fn cache(key: impl Fn(usize) -> f32) -> Cache {
    Cache::new(&SHAPE, 100, |layer, head, token| (key(token), value(layer, head, token)))
}

/// The rows with the highest scores among those that are not protected, and the protected ones.
fn best(score: impl Fn(usize) -> f32, kept: usize, sinks: usize, recent: usize) -> Vec<usize> {
    let mut rows: Vec<usize> = (sinks..100 - recent).collect();
    rows.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    rows.truncate(kept - sinks - recent);
    rows.extend((0..sinks).chain(100 - recent..100));
    rows.sort();
    rows
}

#[test]
fn the_longest_values_stay_with_the_first_and_the_most_recent_entries() {
    let plugin = Plugin::create("keep=0.5,sinks=4,recent=16", &SHAPE).unwrap();
    let Made::Select(kept) = plugin.plan(&cache(|_| 1.0)).unwrap() else { panic!("no selection") };
    for (layer, heads) in kept.iter().enumerate() {
        for (head, rows) in heads.iter().enumerate() {
            assert_eq!(*rows, best(|token| value(layer, head, token), 50, 4, 16), "layer {layer}, head {head}");
        }
    }
}

#[test]
fn a_long_key_counts_against_an_entry() {
    let key = |token| if token == 50 { 1.0 } else { 100.0 };
    let plugin = Plugin::create("budget=6,sinks=4,recent=1,key_weight=100", &SHAPE).unwrap();
    let Made::Select(kept) = plugin.plan(&cache(key)).unwrap() else { panic!("no selection") };
    assert!(kept.iter().flatten().all(|rows| *rows == [0, 1, 2, 3, 50, 99]), "{kept:?}");
}

#[test]
fn a_short_sequence_is_kept() {
    let plugin = Plugin::create("budget=200", &SHAPE).unwrap();
    assert_eq!(plugin.plan(&cache(|_| 1.0)), Ok(Made::Keep));
}

#[test]
fn a_wrong_config_is_refused_by_the_key() {
    for config in ["key_weigth=1", "key_weight=-1"] {
        let error = Plugin::create(config, &SHAPE).err().unwrap();
        assert!(error.contains("key_weight"), "{error}");
    }
}

#[test]
fn the_same_cache_gives_the_same_plan() {
    let plugin = Plugin::create("keep=0.3", &SHAPE).unwrap();
    let cache = cache(|token| token as f32);
    assert_eq!(plugin.plan(&cache), plugin.plan(&cache));
}
