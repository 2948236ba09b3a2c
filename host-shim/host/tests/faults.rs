//! What plugins and engines do wrong: the right number comes back, and the cache is byte for byte as it was.
#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    clippy::mut_from_ref,
    reason = "tests; a spoiler writes through the plugin's own pointers"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use common::plugin::{Script, Style, Tamper};
use common::{Engine, SMALL, Shape, call};
use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::raw::*;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;

/// A select or rewrite that is spoilt: its reason, and words of the log.
fn spoilt(style: Style, expected: i32, words: &str, tamper: Tamper) {
    let script = Arc::new(Script { style: style.into(), ..Script::default() });
    let engine = Engine::with(SMALL, &script);
    *script.tamper.lock().unwrap() = Some(tamper);
    let mut cache = engine.begin(20);
    let before = cache.stores.clone();
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(expected), "{words}");
    assert!(before == cache.stores);
    assert_eq!(engine.figures("arm").1, [(expected, 1)]);
    let log = engine.watch.log.lock().unwrap().clone();
    assert!(log.iter().any(|(level, line)| *level == KVH_LOG_WARN && line.contains(words)), "{words}: {log:?}");
    // The instance goes on.
    *script.tamper.lock().unwrap() = None;
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn spoilt_plans() {
    fn index(layers: &[KvhLayerPlan], place: usize) -> &mut u32 {
        unsafe { &mut *layers[1].indices.cast_mut().add(place) }
    }
    fn range(layers: &[KvhLayerPlan], place: usize) -> &mut KvhRange {
        unsafe { &mut *layers[1].ranges.cast_mut().add(place) }
    }
    fn position(layers: &[KvhLayerPlan], place: usize) -> &mut u32 {
        unsafe { &mut *layers[1].positions.cast_mut().add(place) }
    }
    type Spoil = fn(&mut KvhPlan, &mut [KvhLayerPlan]);
    let heads: [(i32, &str, Spoil); 12] = [
        (KVHOOK_REASON_BAD_INDEX, "layer 1: indices, head 0, place 9: token 20 is out of range", |_, l| {
            *index(l, 9) = 20
        }),
        (KVHOOK_REASON_BAD_INDEX, "place 9: token 4294967295", |_, l| *index(l, 9) = u32::MAX),
        (KVHOOK_REASON_BAD_INDEX, "layer 1: indices, head 1, place 1", |_, l| *index(l, 11) = *index(l, 10)),
        (KVHOOK_REASON_BAD_INDEX, "expected ascending", |_, l| {
            let first = *index(l, 0);
            *index(l, 0) = *index(l, 1);
            *index(l, 1) = first;
        }),
        (KVHOOK_REASON_BAD_COUNT, "count 11: the bound is 10", |_, l| l[1].count = 11),
        (KVHOOK_REASON_BAD_COUNT, "count 9: the bound is 10", |_, l| l[1].count = 9),
        (KVHOOK_REASON_BAD_COUNT, "count 0", |_, l| l[1].count = 0),
        (KVHOOK_REASON_BAD_PLAN, "stride", |_, l| l[1].index_stride_head = -10),
        (KVHOOK_REASON_BAD_PLAN, "exactly one", |_, l| l[0].indices = core::ptr::null()),
        (KVHOOK_REASON_BAD_PLAN, "misaligned", |_, l| l[0].indices = l[0].indices.wrapping_byte_add(1)),
        (KVHOOK_REASON_BAD_PLAN, "kind 9", |plan, _| plan.kind = 9),
        (KVHOOK_REASON_BAD_PLAN, "positions moved", |plan, _| plan.flags = KVH_PLAN_FLAG_MOVED_POSITIONS),
    ];
    let ranges: [(i32, &str, Spoil); 6] = [
        (KVHOOK_REASON_BAD_INDEX, "range 1", |_, l| range(l, 1).start = 1),
        (KVHOOK_REASON_BAD_INDEX, "range 0", |_, l| range(l, 0).length = 0),
        (KVHOOK_REASON_BAD_INDEX, "range 1", |_, l| range(l, 1).length += 1),
        (KVHOOK_REASON_BAD_INDEX, "range 1", |_, l| range(l, 1).length = u64::MAX),
        (KVHOOK_REASON_BAD_COUNT, "the ranges hold 9 rows", |_, l| range(l, 1).length -= 1),
        (KVHOOK_REASON_BAD_PLAN, "ranges for 10 rows", |_, l| l[1].range_count = u32::MAX),
    ];
    let rewrites: [(i32, &str, Spoil); 5] = [
        (KVHOOK_REASON_BAD_POSITION, "head 0, place 9: position 20", |_, l| *position(l, 9) = 20),
        (KVHOOK_REASON_BAD_POSITION, "place 1: position 0", |_, l| (*position(l, 0), *position(l, 1)) = (1, 0)),
        (KVHOOK_REASON_BAD_PLAN, "`positions` is null", |_, l| l[1].positions = core::ptr::null()),
        (KVHOOK_REASON_BAD_COUNT, "count 12", |_, l| l[0].count = 12),
        (KVHOOK_REASON_BAD_POSITION, "`next_position` is 21", |plan, _| {
            (plan.flags, plan.next_position) = (KVH_PLAN_FLAG_MOVED_POSITIONS, 21);
        }),
    ];
    let all = heads.map(|case| (Style::Heads, case)).into_iter();
    let all = all.chain(ranges.map(|case| (Style::Ranges, case))).chain(rewrites.map(|case| (Style::Rewrite, case)));
    for (style, (reason, words, spoil)) in all {
        spoilt(style, reason, words, Box::new(move |_, plan, layers| spoil(plan, layers)));
    }
    // Nothing was lent for this one.
    spoilt(
        Style::Heads,
        KVHOOK_REASON_BAD_PLAN,
        "no rows were lent",
        Box::new(|_, plan, _| plan.kind = KVH_PLAN_REWRITE),
    );
}

#[test]
fn what_a_plugin_writes_after_its_call_changes_nothing() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(SMALL, &script);
    let kept: Arc<std::sync::Mutex<usize>> = Arc::default();
    let address = kept.clone();
    *script.tamper.lock().unwrap() = Some(Box::new(move |_, _, layers| {
        *address.lock().unwrap() = layers[0].indices as usize;
    }));
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    let indices = *kept.lock().unwrap() as *mut u32;
    unsafe { indices.write(u32::MAX) };
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn hooks_that_fail() {
    for (status, reason) in [
        (KVH_ERR_INTERNAL, KVHOOK_REASON_PLUGIN_ERROR),
        (KVH_ERR_DEVICE, KVHOOK_REASON_DEVICE),
        (KVH_ERR_OUT_OF_MEMORY, KVHOOK_REASON_OUT_OF_MEMORY),
        (4711, KVHOOK_REASON_PLUGIN_ERROR),
    ] {
        let script = Arc::new(Script { phases: KVH_PHASE_PREFILL, ..Script::default() });
        let engine = Engine::with(SMALL, &script);
        let mut cache = engine.begin(20);
        *script.bound_status.lock().unwrap() = status;
        assert_eq!(engine.plan(&mut cache, DONE, false), Err(reason));
        *script.bound_status.lock().unwrap() = 0;
        *script.prepare_status.lock().unwrap() = status;
        assert_eq!(engine.plan(&mut cache, DONE, false), Err(reason));
        *script.prepare_status.lock().unwrap() = 0;
        assert!(engine.plan(&mut cache, DONE, false).is_ok());

        // What it saw is not complete: this sequence is not compressed any more, others are.
        let mut broken = engine.begin(20);
        *script.attention_status.lock().unwrap() = status;
        engine.attend(&[&broken], 0, 0, 20, KVH_PHASE_PREFILL);
        *script.attention_status.lock().unwrap() = 0;
        assert_eq!(script.attended.load(SeqCst), 1);
        assert_eq!(engine.plan(&mut broken, DONE, false), Err(reason));
        assert!(engine.plan(&mut engine.begin(20), DONE, false).is_ok());
        assert_eq!(engine.figures("arm").1, [(reason, 3)]);
        engine.verify(&cache);
        engine.verify(&broken);
    }
}

#[test]
fn a_panic_poisons_the_arm() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(Shape { ranks: 2, ..SMALL }, &script);
    let mut cache = engine.begin(20);
    let mut other = engine.begin(20);
    let ticket = engine.plan(&mut other, DONE, false).unwrap();
    *script.prepare_status.lock().unwrap() = KVH_ERR_PANIC;
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVHOOK_REASON_PANIC));
    *script.prepare_status.lock().unwrap() = 0;
    let calls = script.prepared.load(SeqCst);
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVHOOK_REASON_POISONED));
    assert_eq!(engine.plan(&mut engine.begin(20), DONE, false), Err(KVHOOK_REASON_POISONED));
    assert_eq!(script.prepared.load(SeqCst), calls);
    // A ticket from before is whole.
    engine.commit(&mut other, &script, ticket);
    // Only the rank that did not panic is told.
    engine.free(other.uid, KVH_FREE_FINISHED).unwrap();
    assert_eq!(script.frees_of(other.uid), [(1, KVH_FREE_FINISHED)]);
    engine.verify(&cache);
}

#[test]
fn every_allocation_that_fails_in_turn() {
    for style in [Style::Heads, Style::Ranges, Style::Rewrite] {
        let script = Arc::new(Script { style: style.into(), keeps_state: true, ..Script::default() });
        let engine = Engine::with(Shape { ranks: 2, ..SMALL }, &script);
        let mut refused = 0;
        loop {
            let mut cache = engine.begin(20);
            let before = cache.stores.clone();
            engine.watch.made.store(0, SeqCst);
            engine.watch.refuse.store(refused, SeqCst);
            let planned = engine.plan(&mut cache, DONE, false);
            match planned {
                Err(reason) => {
                    assert_eq!(reason, KVHOOK_REASON_OUT_OF_MEMORY);
                    assert!(before == cache.stores);
                    engine.verify(&cache);
                }
                Ok(ticket) => {
                    let made = engine.watch.made.load(SeqCst);
                    engine.commit(&mut cache, &script, ticket);
                    assert_eq!(engine.watch.made.load(SeqCst), made, "a commit allocated");
                }
            }
            engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
            assert_eq!(engine.watch.live.load(SeqCst), 0, "{style:?}, allocation {refused}");
            if planned.is_ok() {
                break;
            }
            refused += 1;
        }
        assert!(refused > 8, "{style:?}: only {refused} allocations");
        assert_eq!(engine.fallbacks(KVHOOK_REASON_OUT_OF_MEMORY), refused as u64);
    }
}

#[test]
fn views_that_differ_from_the_model() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(Shape { block_size: 4, ..SMALL }, &script);
    type Spoil = fn(&mut common::Cache);
    let cases: [(&str, Spoil); 5] = [
        ("layer 0: `kv_heads` is 3; the model says 2", |cache| cache.shape.heads = 3),
        ("layer 0: `k.head_dim` is 5", |cache| cache.shape.k_dim = 5),
        ("layer 0: `k` is f16; the model's cache is f32", |cache| cache.shape.dtype = common::F16),
        ("layer 0: `block_size` is 8; the engine offered 4", |cache| cache.shape.block_size = 8),
        ("layer 1: the block table has 1 blocks", |cache| cache.stores[0][1].table.truncate(1)),
    ];
    for (words, spoil) in cases {
        let good = engine.begin(20);
        let mut cache = good.clone();
        spoil(&mut cache);
        let (status, message) = engine.prepare_all(0, &[&cache], DONE, false, 0).unwrap_err();
        assert_eq!(status, KVHOOK_ERR_VIEW);
        assert!(message.contains(words), "{message}");
        // At commit, too; then the ticket is gone.
        let (ticket, _) = engine.prepare(0, &good, DONE, false);
        let before = good.stores.clone();
        let (status, message) = engine.commit_rank(0, &cache, ticket, None).unwrap_err();
        assert_eq!(status, KVHOOK_ERR_VIEW, "{message}");
        assert!(before == good.stores);
        assert_eq!(engine.verdict(ticket).unwrap().0, KVHOOK_VERDICT_DROPPED);
    }
    assert_eq!(script.prepared.load(SeqCst), 5);
    // Rows that were cut without saying so.
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    cache.truncate(1);
    assert_eq!(engine.commit_rank(0, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
}

#[test]
fn null_and_unknown_arguments() {
    let engine = Engine::with(SMALL, &Arc::new(Script::default()));
    let null_host = core::ptr::null_mut();
    let (status, message) = call(|error| unsafe { kvhook_free(null_host, 1, 0, null_host.cast(), error) }).unwrap_err();
    assert_eq!((status, message.as_str()), (KVHOOK_ERR_INVALID_ARGUMENT, "`host` is null"));
    let ask = |ask, out| call(|error| unsafe { kvhook_ask(engine.raw, ask, out, error) }).unwrap_err();
    assert_eq!(ask(core::ptr::null(), core::ptr::null_mut()).0, KVHOOK_ERR_INVALID_ARGUMENT);
    let begin = call(|error| unsafe { kvhook_begin(engine.raw, core::ptr::null(), core::ptr::null_mut(), error) });
    assert!(begin.unwrap_err().1.contains("`begin` is null"));
    // A message is not needed.
    let status = unsafe { kvhook_free(engine.raw, 1234, 0, core::ptr::null_mut(), core::ptr::null_mut()) };
    assert_eq!(status, KVHOOK_ERR_UNKNOWN_UID);
    assert_eq!(unsafe { kvhook_wants(null_host, 0) }, 0);
    unsafe { kvhook_host_destroy(null_host) };
    let cache = engine.begin(20);
    assert!(engine.prepare_all(0, &[&cache], 3, false, 0).unwrap_err().1.contains("`event` is 3"));
    let mut unknown = cache.clone();
    unknown.uid = 4711;
    assert_eq!(engine.ask_shared(&unknown, DONE, 0, 0).unwrap_err().0, KVHOOK_ERR_UNKNOWN_UID);
    let answers = engine.prepare_all(0, &[&unknown, &cache], DONE, false, 0).unwrap();
    assert_eq!(answers[0], (0, KVHOOK_REASON_DROPPED));
    assert_ne!(answers[1].0, 0);
    let name = |text: KvhStr| unsafe { kvhook_abi::boundary::text(text, "name") }.unwrap();
    assert_eq!(name(kvhook_status_name(KVHOOK_ERR_UNKNOWN_UID)), "unknown_uid");
    assert_eq!(name(kvhook_reason_name(KVHOOK_REASON_BAD_INDEX)), "bad_index");
    assert!(name(kvhook_version()).starts_with("kvhook-host "));
}
