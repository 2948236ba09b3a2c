//! Compression: what the cache and the positions hold afterwards, against a plain model.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;

use common::plugin::{Script, Style};
use common::{BF16, Engine, F16, F32, FP8, SMALL, Shape};
use kvhook_abi::raw::*;
use kvhook_host::raw::*;
use kvhook_host::spec::{ArmSpec, LayerSet};

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (dtype, ranks, v_dim) in [(F32, 1, 3), (F16, 2, 3), (BF16, 3, 3), (FP8, 2, 6)] {
        for block_size in [0, 4] {
            for token_major in [true, false] {
                shapes.push(Shape { dtype, ranks, block_size, token_major, v_dim, ..SMALL });
            }
        }
    }
    shapes
}

#[test]
fn rows_and_positions_after_many_commits_late_or_not() {
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
                for late in [0, 1, 3, 0, 3] {
                    let ticket = engine.plan(&mut cache, DONE, fresh).unwrap();
                    cache.append(late);
                    cache.verify_bytes();
                    engine.commit(&mut cache, &script, ticket);
                    cache.append(11);
                    engine.verify(&cache);
                }
                assert_eq!(engine.figures("arm").0.commits, 5, "{shape:?} {style:?} {fresh}");
            }
        }
    }
}

#[test]
fn whole_blocks_are_an_edit_of_the_table() {
    for late in [0, 1, 3, 5] {
        let shape = Shape { block_size: 4, ranks: 2, ..SMALL };
        let count = |_, length: u64| length - 4 * (length / 8).max(1);
        let script = Arc::new(Script { style: Style::Blocks(4).into(), count: Box::new(count), ..Script::default() });
        let engine = Engine::with(shape, &script);
        let mut cache = engine.begin(26);
        for round in 0..3 {
            let ticket = engine.plan(&mut cache, DONE, round == 1).unwrap();
            assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_TABLE);
            cache.append(late);
            let before = cache.stores.clone();
            engine.commit(&mut cache, &script, ticket);
            for (before, after) in before.iter().flatten().zip(cache.stores.iter().flatten()) {
                assert!(before.table.len() > after.table.len());
            }
            cache.append(9);
            engine.verify(&cache);
        }
    }
}

#[test]
fn blocks_that_leave_an_appended_row_behind_are_moved() {
    // The last planned block is partly filled and not kept: rows that are appended to it must move.
    let shape = Shape { block_size: 4, ..SMALL };
    let script = Arc::new(Script { style: Style::Blocks(8).into(), count: Box::new(|_, _| 8), ..Script::default() });
    let engine = Engine::with(shape, &script);
    let mut cache = engine.begin(14);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_IN_PLACE);
    assert_eq!(engine.table_edit(ticket).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    cache.append(3);
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn one_table_for_all_layers_is_edited_only_if_they_agree() {
    let shape = Shape { block_size: 4, can: KVH_CAN_GROWN, ..SMALL };
    let count = |_, length: u64| length - 8;
    let script = Arc::new(Script { style: Style::Blocks(4).into(), count: Box::new(count), ..Script::default() });
    *script.tamper.lock().unwrap() = Some(Box::new(|_, _, layers: &mut [KvhLayerPlan]| {
        // The second layer keeps two first blocks and one less of the last: other blocks, as many rows.
        let ranges = unsafe { &mut *layers[1].ranges.cast_mut().cast::<[KvhRange; 2]>() };
        ranges[0].length += 4;
        ranges[1].start += 4;
        ranges[1].length -= 4;
    }));
    let engine = Engine::with(shape, &script);
    let mut cache = engine.begin(24);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_IN_PLACE);
}

#[test]
fn rotated_keys_move_the_next_position() {
    let script = Arc::new(Script { style: Style::Rerotate.into(), ..Script::default() });
    let engine = Engine::with(Shape { ranks: 2, ..SMALL }, &script);
    let mut cache = engine.begin(20);
    for _ in 0..3 {
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        engine.commit(&mut cache, &script, ticket);
        assert_eq!(cache.next_position, cache.lengths(0)[0]);
        cache.append(10);
        engine.verify(&cache);
    }
    // Rows appended with the old rotation cannot follow.
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    cache.append(1);
    let before = cache.clone();
    let (status, _) = engine.commit_rank(0, &cache, ticket, None).unwrap_err();
    assert_eq!(status, KVHOOK_ERR_INVALID_ARGUMENT);
    assert!(cache.stores == before.stores);
    assert_eq!(engine.verdict(ticket).unwrap().0, KVHOOK_VERDICT_DROPPED);
    engine.verify(&cache);
}

#[test]
fn layers_keep_different_numbers_of_rows() {
    let count = |layer: usize, length: u64| (length * (layer as u64 + 1) / 4).max(1);
    for block_size in [0, 4] {
        let shape = Shape { layers: 4, ranks: 2, block_size, ..SMALL };
        let script = Arc::new(Script { count: Box::new(count), ..Script::default() });
        let engine = Engine::with(shape, &script);
        let mut cache = engine.begin(32);
        for late in [0, 3, 1] {
            let ticket = engine.plan(&mut cache, DONE, false).unwrap();
            cache.append(late);
            engine.commit(&mut cache, &script, ticket);
            cache.append(8);
        }
        engine.verify(&cache);
    }
    // Without the offer the bound is refused.
    let script = Arc::new(Script { count: Box::new(count), ..Script::default() });
    let engine = Engine::with(Shape { layers: 4, can: KVH_CAN_STATE, ..SMALL }, &script);
    let mut cache = engine.begin(32);
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVH_REASON_UNSUPPORTED));
}

#[test]
fn an_arm_leaves_out_layers() {
    for fresh in [false, true] {
        // The plugin plans every layer to half; only the second is the arm's.
        let script = Arc::new(Script::default());
        let engine = Engine::new(Shape { layers: 3, ..SMALL });
        let mut spec = ArmSpec::new("arm", "scripted", script.register());
        spec.layers = LayerSet::parse("1").unwrap();
        engine.arm(&spec);
        let mut cache = engine.begin(16);
        assert_eq!(engine.ask(&cache, DONE).2, [16, 8, 16]);
        let ticket = engine.plan(&mut cache, DONE, fresh).unwrap();
        cache.append(2);
        let count = |layer, length: u64| if layer == 1 { length / 2 } else { length };
        let expected = Script { count: Box::new(count), ..Script::default() };
        engine.commit(&mut cache, &expected, ticket);
        assert_eq!(cache.lengths(0), [18, 10, 18]);
    }
}

#[test]
fn both_halves_in_one_call() {
    for style in [Style::Heads, Style::Rewrite, Style::Keep(KVH_REASON_OTHER)] {
        let script = Arc::new(Script { style: style.into(), ..Script::default() });
        let engine = Engine::with(SMALL, &script);
        let mut cache = engine.begin(20);
        for _ in 0..3 {
            let (decision, reason) = engine.compress(&mut cache, &script, DONE);
            match style {
                Style::Keep(expected) => assert_eq!((decision, reason), (KVHOOK_DECISION_KEEP, expected)),
                _ => assert_eq!((decision, reason), (KVHOOK_DECISION_IN_PLACE, KVH_REASON_NONE)),
            }
            cache.append(6);
            engine.verify(&cache);
        }
    }
}

#[test]
fn shared_rows_are_not_written() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(Shape { block_size: 4, ..SMALL }, &script);
    let mut cache = engine.begin(32);
    let (decision, _, counts) = engine.ask_shared(&cache, DONE, 8, 8).unwrap();
    assert_eq!((decision, counts), (KVHOOK_DECISION_FRESH, vec![16, 16]));
    // Six blocks are its own, four are needed beside the two that others use: of 24 rows nothing would be freed.
    assert_eq!(engine.ask_shared(&cache, DONE, 16, 16).unwrap().0, KVHOOK_DECISION_KEEP);
    assert_eq!(engine.ask_shared(&cache, DONE, 16, 16).unwrap().1, KVH_REASON_NO_GAIN);
    // Published rows are not written, but they become free.
    assert_eq!(engine.ask_shared(&cache, DONE, 0, 32).unwrap().0, KVHOOK_DECISION_FRESH);

    // An engine that has no fresh rows after all.
    let answer = engine.prepare_all(0, &[&cache], DONE, false, 8).unwrap()[0];
    assert_eq!(answer, (0, KVH_REASON_NO_ROOM));
    engine.verify(&cache);

    cache.remember_plan();
    let (ticket, _) = engine.prepare_all(0, &[&cache], DONE, true, 8).unwrap()[0];
    let before = cache.stores.clone();
    let fresh = common::Cache::new(cache.shape, cache.uid, 64);
    engine.commit_rank(0, &cache, ticket, Some(&fresh)).unwrap();
    assert!(before == cache.stores);
}

#[test]
fn shared_blocks_that_are_dropped_free_nothing() {
    // Rows 4 to 19 are dropped, and all of them are shared: an edit would free no block.
    let count = |_, length: u64| length - 16;
    let script = Arc::new(Script { style: Style::Blocks(4).into(), count: Box::new(count), ..Script::default() });
    let engine = Engine::with(Shape { block_size: 4, ..SMALL }, &script);
    let cache = engine.begin(64);
    let (ticket, _) = engine.prepare_all(0, &[&cache], DONE, true, 12).unwrap()[0];
    assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_TABLE);
    engine.drop_ticket(ticket, KVH_REASON_OTHER).unwrap();
    let answer = engine.prepare_all(0, &[&cache], DONE, true, 20).unwrap()[0];
    assert_eq!(answer, (0, KVH_REASON_NO_GAIN));
}

#[test]
fn fresh_rows_that_are_too_few_change_nothing() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(SMALL, &script);
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, true).unwrap();
    cache.append(3);
    let fresh = common::Cache::new(cache.shape, cache.uid, 12);
    let before = (cache.stores.clone(), fresh.stores.clone());
    let (status, message) = engine.commit_rank(0, &cache, ticket, Some(&fresh)).unwrap_err();
    assert_eq!(status, KVHOOK_ERR_NO_ROOM);
    assert_eq!(message, "layer 0: rows for 13 tokens are needed, 12 were given");
    assert!(before.0 == cache.stores && before.1 == fresh.stores);
    assert_eq!(engine.verdict(ticket).unwrap(), (KVHOOK_VERDICT_DROPPED, KVH_REASON_NO_ROOM, 0, vec![0, 0]));
    let ticket = engine.plan(&mut cache, DONE, true).unwrap();
    assert_eq!(engine.commit_rank(0, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    engine.verify(&cache);
}
