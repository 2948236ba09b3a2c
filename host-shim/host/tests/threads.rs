//! Many sequences on several threads, and plugins that are called while others change what they are called for.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use common::plugin::Script;
use common::{Engine, SMALL, Shape};
use kvhook_abi::raw::*;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;

#[test]
fn two_threads_with_many_sequences() {
    let script = Arc::new(Script { keeps_state: true, ..Script::default() });
    let engine = Engine::with(SMALL, &script);
    thread::scope(|scope| {
        for thread in 0..2u64 {
            let (engine, script) = (&engine, &script);
            scope.spawn(move || {
                for round in 0..60 {
                    let mut caches: Vec<_> = (0..4).map(|place| engine.begin(12 + place)).collect();
                    for cache in &mut caches {
                        let ticket = engine.plan(cache, DONE, round % 2 == 0).unwrap();
                        cache.append(round % 3);
                        if (round + thread) % 5 == 0 {
                            engine.free(cache.uid, KVH_FREE_CANCELLED).unwrap();
                            assert_eq!(engine.commit_rank(0, cache, ticket, None).unwrap_err().0, KVHOOK_ERR_DROPPED);
                        } else {
                            engine.commit(cache, script, ticket);
                        }
                    }
                    for cache in &caches {
                        let freed = engine.free(cache.uid, KVH_FREE_FINISHED);
                        assert_eq!(freed.is_err(), (round + thread) % 5 == 0);
                    }
                }
            });
        }
        // Meanwhile a third one swaps an arm and reads figures.
        let engine = &engine;
        scope.spawn(move || {
            for _ in 0..50 {
                let other = Arc::new(Script::default());
                engine.arm(&ArmSpec::new("other", "scripted", other.register()));
                assert!(engine.figures("arm").0.live <= 8);
            }
        });
    });
    let (figures, _) = engine.figures("arm");
    assert_eq!((figures.sequences, figures.live, figures.commits), (480, 0, 384));
    assert_eq!(script.freed.lock().unwrap().len(), 480);
    assert_eq!(engine.watch.live.load(SeqCst), 0);
}

#[test]
fn ranks_prepare_and_commit_at_the_same_time() {
    let shape = Shape { ranks: 3, ..SMALL };
    let script = Arc::new(Script::default());
    let engine = Engine::with(shape, &script);
    for _ in 0..50 {
        let mut cache = engine.begin(20);
        engine.ask(&cache, DONE);
        cache.remember_plan();
        let each = |work: &(dyn Fn(usize) -> u64 + Sync)| -> Vec<u64> {
            thread::scope(|scope| {
                let threads: Vec<_> = (0..3).map(|rank| scope.spawn(move || work(rank))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            })
        };
        let tickets = each(&|rank| engine.prepare(rank, &cache, DONE, false).0);
        assert!(tickets[0] != 0 && tickets.iter().all(|ticket| *ticket == tickets[0]));
        cache.append(2);
        let lengths = each(&|rank| engine.commit_rank(rank, &cache, tickets[0], None).unwrap().0[0]);
        assert_eq!(lengths, [12, 12, 12]);
        cache.expect_all(&script);
        engine.verify(&cache);
    }
    assert_eq!(engine.figures("arm").0.commits, 50);
}

#[test]
fn a_panic_is_counted_however_soon_the_other_ranks_hear_of_it() {
    let script = Arc::new(Script { prepare_status: KVH_ERR_PANIC.into(), ..Script::default() });
    let engine = Arc::new(Engine::with(Shape { ranks: 2, ..SMALL }, &script));
    let cache = engine.begin(20);
    engine.ask(&cache, DONE);
    let (other, of_other) = (engine.clone(), cache.clone());
    let (send, receive) = std::sync::mpsc::channel();
    let first_message = AtomicBool::new(true);
    // Rank 0 has panicked and says so; its ticket is still open.
    *engine.watch.on_log.lock().unwrap() = Some(Box::new(move |message| {
        if message.contains("on_prefill_done failed") && first_message.swap(false, SeqCst) {
            let (other, of_other) = (other.clone(), of_other.clone());
            let joined = thread::spawn(move || other.prepare(1, &of_other, DONE, false));
            // Long enough that rank 1 has joined; its own message waits for this one.
            thread::sleep(std::time::Duration::from_millis(100));
            let _ = send.send(joined);
        }
    }));
    let first = engine.prepare(0, &cache, DONE, false);
    let second = receive.recv().unwrap().join().unwrap();
    *engine.watch.on_log.lock().unwrap() = None;
    let mut answers = [first, second];
    answers.sort();
    assert_eq!(answers, [(0, KVHOOK_REASON_PANIC), (0, KVHOOK_REASON_OTHER_RANK)]);
    assert_eq!(engine.figures("arm").1, [(KVHOOK_REASON_PANIC, 1)]);
    engine.verify(&cache);
}

#[test]
fn a_sequence_is_freed_while_its_plugin_runs() {
    let script = Arc::new(Script { keeps_state: true, ..Script::default() });
    let engine = Arc::new(Engine::with(SMALL, &script));
    let cache = engine.begin(20);
    engine.ask(&cache, DONE);
    let (uid, freeing) = (cache.uid, engine.clone());
    let (send, receive) = std::sync::mpsc::channel();
    *script.inside.lock().unwrap() = Some(Box::new(move |_| {
        let freeing = freeing.clone();
        let freed = thread::spawn(move || freeing.free(uid, KVH_FREE_PREEMPTED));
        // Long enough that the sequence is gone; the instance hears of it after this call.
        thread::sleep(std::time::Duration::from_millis(100));
        send.send(freed).unwrap();
    }));
    assert_eq!(engine.prepare(0, &cache, DONE, false), (0, KVHOOK_REASON_DROPPED));
    *script.inside.lock().unwrap() = None;
    receive.recv().unwrap().join().unwrap().unwrap();
    assert_eq!(script.frees_of(uid), [(0, KVH_FREE_PREEMPTED)]);
    assert_eq!(engine.watch.live.load(SeqCst), 0);
    cache.verify_bytes();
}

#[test]
fn a_sequence_is_freed_while_it_waits_for_the_plugin() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(SMALL, &script);
    let (busy, waiting) = (engine.begin(20), engine.begin(20));
    let (inside, entered) = std::sync::mpsc::channel();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let (inside, wait) = (std::sync::Mutex::new(inside), std::sync::Mutex::new(wait));
    *script.inside.lock().unwrap() = Some(Box::new(move |_| {
        inside.lock().unwrap().send(()).unwrap();
        // The second call, if there is one, finds the channel closed.
        let _ = wait.lock().unwrap().recv();
    }));
    thread::scope(|scope| {
        let first = scope.spawn(|| engine.prepare(0, &busy, DONE, false));
        entered.recv().unwrap();
        let second = scope.spawn(|| engine.prepare(0, &waiting, DONE, false));
        while engine.verdict(2).is_err() {
            thread::yield_now();
        }
        engine.free(waiting.uid, KVH_FREE_CANCELLED).unwrap();
        drop(go_on);
        assert_ne!(first.join().unwrap().0, 0);
        assert_eq!(second.join().unwrap(), (0, KVHOOK_REASON_DROPPED));
    });
    // It was never shown to the plugin, so nothing is said of its end.
    assert_eq!(script.prepared.load(SeqCst), 1);
    assert_eq!(script.frees_of(waiting.uid), []);
}
