//! Calls and streams: nothing waits, and many go on at once.

use core::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvhook_abi::raw::*;
use kvhook_host::raw::*;

use crate::common::plugin::Script;
use crate::common::{Engine, Placed, Shape, gpu};
use crate::{DONE, GPU};

/// What is enqueued must be enqueued sooner than this, however long the stream waits.
const SOON: Duration = Duration::from_secs(2);

#[test]
fn a_blocked_stream_blocks_no_call() {
    let Some(_device) = gpu::alone() else { return };
    let script = Arc::new(Script::default());
    let engine = Engine::with(Shape { ranks: 2, ..GPU }, &script);
    let mut cache = engine.begin(24);
    assert_eq!(engine.ask(&cache, DONE).0, KVHOOK_DECISION_IN_PLACE);
    cache.remember_plan();

    // Rank 1's stream waits: its verdict is not there, and nothing may move on either rank.
    let before = cache.stores.clone();
    let blocked = gpu::block(engine.streams[1]);
    let start = Instant::now();
    let (ticket, _) = engine.prepare(0, &cache, DONE, false);
    assert_eq!(engine.prepare(1, &cache, DONE, false).0, ticket);
    gpu::sync(engine.streams[0]);
    assert_eq!(engine.verdict_now(ticket).unwrap().0, KVHOOK_VERDICT_PENDING);
    assert_eq!(engine.commit_rank(0, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_NOT_READY);
    assert!(start.elapsed() < SOON, "a call waited for the stream");
    assert!(before == cache.stores);
    drop(blocked);
    engine.commit(&mut cache, &script, ticket);

    // A ticket that is dropped before its verdict came gives back what the device still writes.
    cache.append(20);
    let blocked = gpu::block(engine.streams[1]);
    cache.remember_plan();
    let (ticket, _) = engine.prepare(0, &cache, DONE, false);
    engine.prepare(1, &cache, DONE, false);
    engine.drop_ticket(ticket, KVHOOK_REASON_DROPPED).unwrap();
    assert_eq!(engine.verdict_now(ticket).unwrap().0, KVHOOK_VERDICT_DROPPED);
    drop(blocked);
    engine.sync();
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn what_a_plugin_writes_after_its_call_changes_nothing() {
    let Some(_device) = gpu::alone() else { return };
    let script = Arc::new(Script::default());
    let engine = Engine::with(GPU, &script);
    let kept: Arc<std::sync::Mutex<usize>> = Arc::default();
    let address = kept.clone();
    *script.tamper.lock().unwrap() = Some(Box::new(move |_, _, layers| {
        *address.lock().unwrap() = layers[0].indices as usize;
    }));
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    gpu::put(*kept.lock().unwrap() as *mut u8, &[0xff; 8], engine.streams[0]);
    engine.sync();
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn a_commit_returns_while_its_stream_waits() {
    let Some(_device) = gpu::alone() else { return };
    for block_size in [0, 4] {
        let script = Arc::new(Script::default());
        let engine = Engine::with(Shape { block_size, ..GPU }, &script);
        let stream = engine.streams[0];
        let mut cache = engine.begin(24);
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        cache.append(3);
        assert_eq!(engine.verdict(ticket).unwrap().0, KVHOOK_VERDICT_READY);
        let placed = Placed::new(&cache, 0, false, stream);
        gpu::sync(stream);
        let blocked = gpu::block(stream);
        let start = Instant::now();
        engine.commit_placed(0, &cache, ticket, &placed, None, stream).unwrap();
        assert!(start.elapsed() < SOON, "a commit waited for its stream");
        // The cache lies there as it was until the stream goes on.
        placed.read_back();
        cache.verify_bytes();
        drop(blocked);
        gpu::sync(stream);
        placed.read_back();
        cache.expect_all(&script);
        engine.verify(&cache);
    }
}

/// Each thread has its own streams and sequences. Rows are appended between prepare and commit.
#[test]
fn streams_and_threads_at_once() {
    let Some(_device) = gpu::alone() else { return };
    let script = &Arc::new(Script::default());
    let engine = &Engine::with(Shape { ranks: 2, block_size: 4, ..GPU }, script);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                let streams = [gpu::stream(), gpu::stream()];
                for late in [0, 1, 3, 0, 1, 3] {
                    race(engine, script, late, streams);
                }
                streams.into_iter().for_each(gpu::end);
            });
        }
    });
}

/// One sequence, from its beginning to its end.
fn race(engine: &Engine, script: &Arc<Script>, late: u64, streams: [*mut c_void; 2]) {
    let mut cache = engine.begin(24 + late);
    assert_eq!(engine.ask(&cache, DONE).0, KVHOOK_DECISION_IN_PLACE);
    cache.remember_plan();
    let placed = [0, 1].map(|rank| [Placed::new(&cache, rank, false, streams[rank])]);
    let ticket = [0, 1].map(|rank| {
        let asked = engine.prepare_placed(rank, &[&cache], &placed[rank], DONE, (false, 0), streams[rank]);
        asked.unwrap()[0].0
    });
    assert!(ticket[0] != 0 && ticket[0] == ticket[1]);
    cache.append(late);
    while engine.verdict_now(ticket[0]).unwrap().0 == KVHOOK_VERDICT_PENDING {
        std::thread::yield_now();
    }
    let before = cache.clone();
    for (rank, stream) in streams.into_iter().enumerate() {
        let now = Placed::new(&cache, rank, false, stream);
        engine.commit_placed(rank, &cache, ticket[0], &now, None, stream).unwrap();
        gpu::sync(stream);
        now.read_back();
    }
    cache.expect_all(script);
    cache.verify_bytes();
    assert!(before.stores != cache.stores);
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
}
