//! What rows and positions are after commits of every kind.

use std::sync::Arc;

use kvhook_host::raw::*;

use crate::common::plugin::{Script, Style};
use crate::common::{BF16, Engine, F16, F32, FP8, Shape, gpu};
use crate::{DONE, GPU};

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    // Rows of 16-byte words, and others; elements that no vector holds.
    for (dtype, ranks, k_dim, v_dim) in
        [(F32, 1, 4, 3), (F16, 2, 64, 8), (BF16, 2, 128, 128), (F16, 1, 12, 5), (FP8, 1, 64, 10)]
    {
        for block_size in [0, 4, 6] {
            for token_major in [true, false] {
                shapes.push(Shape { dtype, ranks, block_size, token_major, k_dim, v_dim, ..GPU });
            }
        }
    }
    shapes
}

#[test]
fn rows_and_positions_after_many_commits_late_or_not() {
    let Some(_device) = gpu::alone() else { return };
    for shape in shapes() {
        for style in [Style::Heads, Style::Shared, Style::Ranges, Style::Rewrite] {
            // Elements of one byte have no values that a plugin may write.
            if style == Style::Rewrite && shape.dtype == FP8 {
                continue;
            }
            for fresh in [false, true] {
                let script = Arc::new(Script { style: style.into(), ..Script::default() });
                let engine = Engine::with(shape, &script);
                let mut cache = engine.begin(24);
                for late in [0, 1, 3] {
                    let ticket = engine.plan(&mut cache, DONE, fresh).unwrap();
                    cache.append(late);
                    cache.verify_bytes();
                    engine.commit(&mut cache, &script, ticket);
                    cache.append(11);
                    engine.verify(&cache);
                }
                assert_eq!(engine.figures("arm").0.commits, 3, "{shape:?} {style:?} {fresh}");
            }
        }
    }
}

#[test]
fn long_lists_take_several_tiles() {
    let Some(_device) = gpu::alone() else { return };
    for (block_size, style) in [(0, Style::Heads), (16, Style::Heads), (16, Style::Ranges), (16, Style::Rewrite)] {
        let shape = Shape { block_size, dtype: F16, k_dim: 8, v_dim: 8, heads: 3, ..GPU };
        let script = Arc::new(Script { style: style.into(), ..Script::default() });
        let engine = Engine::with(shape, &script);
        let mut cache = engine.begin(5000);
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        cache.append(70);
        engine.commit(&mut cache, &script, ticket);
    }
}

#[test]
fn whole_blocks_are_an_edit_of_the_table() {
    let Some(_device) = gpu::alone() else { return };
    for late in [0, 3] {
        let shape = Shape { block_size: 4, ranks: 2, ..GPU };
        let count = |_, length: u64| length - 4 * (length / 8).max(1);
        let script = Arc::new(Script { style: Style::Blocks(4).into(), count: Box::new(count), ..Script::default() });
        let engine = Engine::with(shape, &script);
        let mut cache = engine.begin(26);
        for _ in 0..2 {
            let ticket = engine.plan(&mut cache, DONE, false).unwrap();
            assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_TABLE);
            cache.append(late);
            engine.commit(&mut cache, &script, ticket);
            cache.append(9);
            engine.verify(&cache);
        }
    }
}

#[test]
fn rotated_keys_move_the_next_position() {
    let Some(_device) = gpu::alone() else { return };
    let script = Arc::new(Script { style: Style::Rerotate.into(), ..Script::default() });
    let engine = Engine::with(Shape { ranks: 2, ..GPU }, &script);
    let mut cache = engine.begin(20);
    for _ in 0..3 {
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        engine.commit(&mut cache, &script, ticket);
        assert_eq!(cache.next_position, cache.lengths(0)[0]);
        cache.append(10);
        engine.verify(&cache);
    }
}
