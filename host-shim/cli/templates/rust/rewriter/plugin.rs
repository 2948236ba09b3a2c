//! The plugin through its one symbol, as a host calls it.

mod mock;

use mock::{Cache, Made, Plugin, Shape};

const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 4 };

/// A cache whose keys tell layer, head and row; a value is a key times two.
fn cache(length: usize) -> Cache {
    Cache::new(&SHAPE, length, |layer, head, token| {
        let key = (1000 * layer + 100 * head + token) as f32;
        (key, 2.0 * key)
    })
}

#[test]
fn neighbours_become_one_between_the_first_and_the_most_recent_entries() {
    let plugin = Plugin::create("sinks=2,recent=3", &SHAPE).unwrap();
    let Made::Rewrite { cache: made, positions } = plugin.plan(&cache(10)).unwrap() else { panic!("no rewrite") };
    // Rows 2 to 6 are between; the odd one stays.
    let rows = [0.0, 1.0, 2.5, 4.5, 6.0, 7.0, 8.0, 9.0];
    for (layer, positions) in positions.iter().enumerate() {
        assert_eq!(*positions, [0, 1, 2, 4, 6, 7, 8, 9]);
        for head in 0..SHAPE.kv_heads {
            for (row, expected) in rows.iter().enumerate() {
                let key = (1000 * layer + 100 * head) as f32 + expected;
                let found = made.row(layer, head, row);
                assert_eq!(found, (&[key; 4][..], &[2.0 * key; 4][..]), "layer {layer}, head {head}, row {row}");
            }
        }
    }
}

#[test]
fn a_short_sequence_is_kept() {
    let plugin = Plugin::create("sinks=4,recent=32", &SHAPE).unwrap();
    assert_eq!(plugin.plan(&cache(37)), Ok(Made::Keep));
    assert_eq!(plugin.plan(&cache(1)), Ok(Made::Keep));
    assert!(matches!(plugin.plan(&cache(38)), Ok(Made::Rewrite { .. })));
}

#[test]
fn a_wrong_config_is_refused_by_the_key() {
    for config in ["recnt=1", "recent=-1"] {
        let error = Plugin::create(config, &SHAPE).err().unwrap();
        assert!(error.contains("recent"), "{error}");
    }
}

#[test]
fn the_same_cache_gives_the_same_plan() {
    let plugin = Plugin::create("recent=4", &SHAPE).unwrap();
    assert_eq!(plugin.plan(&cache(50)), plugin.plan(&cache(50)));
}
