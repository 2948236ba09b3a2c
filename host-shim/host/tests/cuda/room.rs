//! Compression where there is little memory, and rows that others see.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use kvhook_abi::raw::*;
use kvhook_host::raw::*;

use crate::common::plugin::{Script, Style};
use crate::common::{Cache, Engine, F16, Shape, gpu};
use crate::{DONE, GPU};

#[test]
fn a_long_sequence_is_compressed_in_a_full_pool() {
    let Some(_device) = gpu::alone() else { return };
    const LENGTH: u64 = 32_768;
    let script = Arc::new(Script::default());
    let shape = Shape { block_size: 16, dtype: F16, k_dim: 16, v_dim: 8, ..GPU };
    let engine = Engine::with(shape, &script);
    // Every block of its table is full, and no fresh one is given.
    let uid = engine.begin_on("arm", "", LENGTH).unwrap().uid;
    let mut cache = Cache::new(shape, uid, LENGTH as usize);
    cache.append(LENGTH);
    engine.watch.peak.store(0, SeqCst);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
    assert_eq!(cache.lengths(0), vec![LENGTH / 2; 2]);

    // The plugin's lists, the host's copies of them, positions: 4 bytes each for each kept row and head. Working memory: 4
    // for each 32 KiB that move.
    let list = 4 * LENGTH / 2 * (shape.layers * shape.heads) as u64;
    let moved = LENGTH * (shape.layers * shape.heads * 2 * (shape.k_dim + shape.v_dim)) as u64;
    let most = 3 * list + 4 * moved.div_ceil(32 << 10) + 4096;
    let peak = engine.watch.peak.load(SeqCst) as u64;
    assert!(peak <= most, "{peak} bytes, expected at most {most}");
    assert!(peak >= 3 * list, "{peak} bytes were counted");

    // What goes on goes into the blocks that are free now.
    cache.append(100);
    engine.verify(&cache);
    engine.free(uid, KVH_FREE_FINISHED).unwrap();
    assert_eq!((engine.watch.live.load(SeqCst), engine.watch.bytes.load(SeqCst)), (0, 0));
}

#[test]
fn rows_that_others_see_stay_as_they_are() {
    let Some(_device) = gpu::alone() else { return };
    let shape = Shape { block_size: 4, dtype: F16, k_dim: 64, v_dim: 64, ..GPU };
    const SHARED: u64 = 8;
    // With fresh rows, whatever is kept.
    for style in [Style::Heads, Style::Ranges, Style::Rewrite] {
        let count = |_, length: u64| length / 2 - 1;
        let script = Arc::new(Script { style: style.into(), count: Box::new(count), ..Script::default() });
        let engine = Engine::with(shape, &script);
        let mut cache = engine.begin(24);
        engine.ask_shared(&cache, DONE, SHARED, 0).unwrap();
        cache.remember_plan();
        let (ticket, reason) = engine.prepare_all(0, &[&cache], DONE, true, SHARED).unwrap()[0];
        assert_ne!(ticket, 0, "kept: {reason}");
        assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_FRESH);
        let before = cache.stores.clone();
        let mut fresh = Cache::new(shape, cache.uid, cache.capacity);
        engine.commit_rank(0, &cache, ticket, Some(&fresh)).unwrap();
        assert!(before == cache.stores, "{style:?}: the rows of others were written");
        cache.expect_all(&script);
        core::mem::swap(&mut cache.stores, &mut fresh.stores);
        engine.verify(&cache);
    }

    // In place, ranges that begin with those rows; not lists, which are not known here.
    let count = |_, length: u64| length * 2 / 3;
    let script = Arc::new(Script { style: Style::Ranges.into(), count: Box::new(count), ..Script::default() });
    let engine = Engine::with(shape, &script);
    let mut cache = engine.begin(27);
    let prepare = |cache: &mut Cache| {
        engine.ask_shared(cache, DONE, 4, 0).unwrap();
        cache.remember_plan();
        engine.prepare_all(0, &[cache], DONE, false, 4).unwrap()[0]
    };
    let (ticket, reason) = prepare(&mut cache);
    assert_ne!(ticket, 0, "kept: {reason}");
    let before = cache.first_rows(4);
    assert_eq!(engine.verdict(ticket).unwrap().2, KVHOOK_MOVE_IN_PLACE);
    engine.commit(&mut cache, &script, ticket);
    assert_eq!(before, cache.first_rows(4));
    *script.style.lock().unwrap() = Style::Heads;
    let before = cache.stores.clone();
    assert_eq!(prepare(&mut cache), (0, KVH_REASON_NO_ROOM));
    assert!(before == cache.stores);
}
