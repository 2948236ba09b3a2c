//! Whatever goes wrong is refused for what it is, and nothing moves.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use kvhook_abi::raw::*;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;

use crate::common::plugin::{Script, Style};
use crate::common::{self, Engine, FP8, Shape, gpu};
use crate::{DONE, GPU};

#[test]
fn a_bad_plan_on_one_rank_moves_nothing_on_any() {
    type Spoil = fn(&mut Vec<u32>);
    let lists: [(Spoil, i32); 4] = [
        (|list| list[3] = u32::MAX, KVHOOK_REASON_BAD_INDEX),
        (|list| list[4] = list[3], KVHOOK_REASON_BAD_INDEX),
        (|list| list.swap(5, 6), KVHOOK_REASON_BAD_INDEX),
        (|list| *list.last_mut().unwrap() = 24, KVHOOK_REASON_BAD_INDEX),
    ];
    let Some(_device) = gpu::alone() else { return };
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
    let Some(_device) = gpu::alone() else { return };
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
fn refused_memory_keeps_the_sequence() {
    let Some(_device) = gpu::alone() else { return };
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
    let Some(_device) = gpu::alone() else { return };
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
fn devices_that_cannot_be_used_are_refused() {
    let create = |ordinal, memory| common::create_on(KVH_DEVICE_CUDA, ordinal, memory).unwrap_err();
    let (status, text) = create(0, false);
    assert!(status == KVHOOK_ERR_INVALID_ARGUMENT && text.contains("no `allocate`"), "{text}");
    let (status, text) = create(99, true);
    let expected = if gpu::gpu().is_some() { "CUDA device 99 is asked for" } else { "libcuda is not found" };
    assert!(status == KVHOOK_ERR_UNSUPPORTED && text.contains(expected), "{text}");
    let (status, text) = common::create_on(7, 0, true).unwrap_err();
    assert!(status == KVHOOK_ERR_UNSUPPORTED && text.contains("device type 7"), "{text}");
}

#[test]
fn a_context_that_is_not_the_primary_one_is_refused() {
    let Some(_device) = gpu::alone() else { return };
    let made = gpu::in_foreign_context(|| common::create_on(KVH_DEVICE_CUDA, 0, true));
    let (status, text) = made.unwrap_err();
    assert!(status == KVHOOK_ERR_UNSUPPORTED && text.contains("is not the primary context of device 0"), "{text}");
    common::create_on(KVH_DEVICE_CUDA, 0, true).unwrap();
}

#[test]
fn dtypes_are_refused_where_they_cannot_be_worked_with() {
    let Some(_device) = gpu::alone() else { return };
    let device = KvhDevice { device_type: KVH_DEVICE_CUDA, device_id: 0 };
    let f64 = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 64, lanes: 1 };
    let (status, text) = common::create_for(Shape { dtype: f64, ..GPU }, device, true).unwrap_err();
    assert!(status == KVHOOK_ERR_UNSUPPORTED && text.contains("a cache of f64; expected f32, f16, bf16"), "{text}");

    // Rows of bytes may be dropped, not written anew.
    let engine = Engine::new(Shape { dtype: FP8, v_dim: 8, ..GPU });
    let script = Arc::new(Script { must: KVH_CAN_REWRITE, ..Script::default() });
    let (status, text) = engine.try_arm(&ArmSpec::new("arm", "scripted", script.register())).unwrap_err();
    assert!(status == KVHOOK_ERR_NEED_NOT_OFFERED && text.contains("KVH_CAN_REWRITE"), "{text}");
    let logged = |text: &str| engine.watch.log.lock().unwrap().iter().any(|(_, line)| line.contains(text));
    assert!(logged("kept or dropped, not written anew"));
    // An odd head_dim is no pairs of bytes.
    let (status, text) = common::create_for(Shape { dtype: FP8, ..GPU }, device, true).unwrap_err();
    assert!(
        status == KVHOOK_ERR_UNSUPPORTED && text.contains("layer 0: rows of 4 and 3 elements of one byte"),
        "{text}"
    );
}
