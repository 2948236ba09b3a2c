//! Compression of a cache on a CUDA device, against the plain model that the tests on the CPU use. Each test says that it
//! is skipped where there is no device.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use common::gpu::{self, gpu};
use common::plugin::{Script, Style};
use common::{BF16, Engine, F16, F32, SMALL, Shape};
use kvhook_abi::raw::*;
use kvhook_host::raw::*;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;
const GPU: Shape = Shape { gpu: true, ..SMALL };

/// What is enqueued must be enqueued sooner than this, however long the stream waits.
const SOON: Duration = Duration::from_secs(2);

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    // Rows of 16-byte words, and others; elements that no vector holds.
    for (dtype, ranks, k_dim, v_dim) in [(F32, 1, 4, 3), (F16, 2, 64, 8), (BF16, 2, 128, 128), (F16, 1, 12, 5)] {
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
    if gpu().is_none() {
        return;
    }
    for shape in shapes() {
        for style in [Style::Heads, Style::Shared, Style::Ranges, Style::Rewrite] {
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
    if gpu().is_none() {
        return;
    }
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
    if gpu().is_none() {
        return;
    }
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
    if gpu().is_none() {
        return;
    }
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

#[test]
fn a_blocked_stream_blocks_no_call() {
    if gpu().is_none() {
        return;
    }
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
fn a_bad_plan_on_one_rank_moves_nothing_on_any() {
    type Spoil = fn(&mut Vec<u32>);
    let lists: [(Spoil, i32); 4] = [
        (|list| list[3] = u32::MAX, KVHOOK_REASON_BAD_INDEX),
        (|list| list[4] = list[3], KVHOOK_REASON_BAD_INDEX),
        (|list| list.swap(5, 6), KVHOOK_REASON_BAD_INDEX),
        (|list| *list.last_mut().unwrap() = 24, KVHOOK_REASON_BAD_INDEX),
    ];
    if gpu().is_none() {
        return;
    }
    for (spoil, reason) in lists {
        for bad_rank in [0, 1] {
            let script = Arc::new(Script::default());
            let engine = Engine::with(Shape { ranks: 2, ..GPU }, &script);
            let mut cache = engine.begin(24);
            *script.tamper.lock().unwrap() = Some(Box::new(move |rank, _, layers| {
                if rank == bad_rank {
                    rewrite_list(layers[1].indices, 24, spoil);
                }
            }));
            let before = cache.stores.clone();
            let ticket = engine.plan(&mut cache, DONE, false).unwrap();
            let (verdict, found, ..) = engine.verdict(ticket).unwrap();
            assert_eq!((verdict, found), (KVHOOK_VERDICT_DROPPED, reason));
            for rank in 0..2 {
                assert_eq!(engine.commit_rank(rank, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_DROPPED);
            }
            assert!(before == cache.stores);
            assert_eq!(engine.figures("arm").1, [(reason, 1)]);
            let log = engine.watch.log.lock().unwrap();
            assert!(log.iter().any(|(_, text)| text.contains("layer 1: head")), "{log:?}");
            drop(log);
            // The next plan is as good as ever.
            *script.tamper.lock().unwrap() = None;
            let ticket = engine.plan(&mut cache, DONE, false).unwrap();
            engine.commit(&mut cache, &script, ticket);
        }
    }
}

/// Spoils `count` numbers on the device.
fn rewrite_list(at: *const u32, count: usize, spoil: fn(&mut Vec<u32>)) {
    gpu::sync_all().unwrap();
    let bytes = gpu::get(at.cast(), 4 * count);
    let mut words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect();
    spoil(&mut words);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    gpu::put(at.cast_mut().cast(), &bytes, core::ptr::null_mut());
    gpu::sync_all().unwrap();
}

#[test]
fn positions_of_a_rewrite_are_checked() {
    if gpu().is_none() {
        return;
    }
    let script = Arc::new(Script { style: Style::Rewrite.into(), ..Script::default() });
    let engine = Engine::with(GPU, &script);
    let mut cache = engine.begin(24);
    type Spoil = fn(&mut Vec<u32>);
    let lists: [(Spoil, i32); 3] = [
        (|list| list[0] = 24, KVHOOK_REASON_BAD_POSITION),
        (|list| list.swap(0, 11), KVHOOK_REASON_BAD_POSITION),
        // A row that could not be computed.
        (|list| list[5] = u32::MAX, KVH_REASON_OTHER),
    ];
    for (spoil, reason) in lists {
        *script.tamper.lock().unwrap() =
            Some(Box::new(move |_, _, layers| rewrite_list(layers[0].positions, 24, spoil)));
        let before = cache.stores.clone();
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        assert_eq!(engine.verdict(ticket).unwrap().1, reason);
        assert!(before == cache.stores);
    }
}

#[test]
fn what_a_plugin_writes_after_its_call_changes_nothing() {
    if gpu().is_none() {
        return;
    }
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
fn refused_memory_keeps_the_sequence() {
    if gpu().is_none() {
        return;
    }
    for (style, fresh) in [(Style::Heads, false), (Style::Rewrite, false), (Style::Ranges, true)] {
        let script = Arc::new(Script { style: style.into(), ..Script::default() });
        let engine = Engine::with(GPU, &script);
        for refused in 0.. {
            let mut cache = engine.begin(20);
            engine.watch.made.store(0, SeqCst);
            engine.watch.refuse.store(refused, SeqCst);
            let planned = engine.plan(&mut cache, DONE, fresh);
            engine.watch.refuse.store(-1, SeqCst);
            match planned {
                Err(reason) => {
                    assert_eq!(reason, KVHOOK_REASON_OUT_OF_MEMORY);
                    engine.verify(&cache);
                }
                Ok(ticket) => {
                    let made = engine.watch.made.load(SeqCst);
                    engine.commit(&mut cache, &script, ticket);
                    assert_eq!(engine.watch.made.load(SeqCst), made, "a commit allocated");
                }
            }
            engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
            engine.sync();
            assert_eq!(engine.watch.live.load(SeqCst), 0, "{style:?}, allocation {refused}");
            if planned.is_ok() {
                assert!(refused >= 2, "{style:?}: only {refused} allocations");
                break;
            }
        }
    }
}

#[test]
fn a_stream_of_another_context_is_refused_by_name() {
    if gpu().is_none() {
        return;
    }
    let script = Arc::new(Script::default());
    let mut engine = Engine::with(GPU, &script);
    let mut cache = engine.begin(20);
    let own = core::mem::replace(&mut engine.streams[0], gpu::foreign_stream());
    let before = cache.stores.clone();
    assert_eq!(engine.ask(&cache, DONE).0, KVHOOK_DECISION_IN_PLACE);
    let foreign = engine.streams[0];
    // The cache is copied on the good stream, the host is given the other one.
    engine.streams[0] = own;
    let (ticket, reason) = engine.prepare_on(0, &cache, DONE, foreign);
    assert_eq!((ticket, reason), (0, KVH_REASON_UNSUPPORTED));
    let named = |text: &str| text.contains("another context than the primary one of CUDA device 0");
    assert!(engine.watch.log.lock().unwrap().iter().any(|(_, text)| named(text)));
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.sync();
    let (status, text) = engine.commit_on(0, &cache, ticket, foreign).unwrap_err();
    assert!(status == KVHOOK_ERR_INVALID_ARGUMENT && named(&text), "{status}: {text}");
    assert!(before == cache.stores);
}

#[test]
fn streams_and_threads_at_once() {
    if gpu().is_none() {
        return;
    }
    let script = Arc::new(Script::default());
    let engine = &Engine::with(Shape { ranks: 2, block_size: 4, ..GPU }, &script);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let script = &script;
            scope.spawn(move || {
                gpu().unwrap();
                for late in [0, 1, 3] {
                    let mut cache = engine.begin(24 + late);
                    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
                    cache.append(late);
                    while engine.verdict_now(ticket).unwrap().0 == KVHOOK_VERDICT_PENDING {
                        std::thread::yield_now();
                    }
                    let before = cache.clone();
                    for rank in 0..2 {
                        engine.commit_rank(rank, &cache, ticket, None).unwrap();
                    }
                    cache.expect_all(script);
                    cache.verify_bytes();
                    assert!(before.stores != cache.stores);
                    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
                }
            });
        }
    });
}

#[test]
fn devices_that_cannot_be_used_are_refused() {
    let create = |ordinal, memory| common::create_on(KVH_DEVICE_CUDA, ordinal, memory).unwrap_err();
    let (status, text) = create(0, false);
    assert!(status == KVHOOK_ERR_INVALID_ARGUMENT && text.contains("no `allocate`"), "{text}");
    let (status, text) = create(99, true);
    let expected = if gpu().is_some() { "CUDA device 99 is asked for" } else { "libcuda is not found" };
    assert!(status == KVHOOK_ERR_UNSUPPORTED && text.contains(expected), "{text}");
    let (status, text) = common::create_on(7, 0, true).unwrap_err();
    assert!(status == KVHOOK_ERR_UNSUPPORTED && text.contains("device type 7"), "{text}");
}
