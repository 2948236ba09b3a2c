//! Sequences that begin, are cut, forked, freed; tickets that are dropped; arms that change meanwhile.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use common::plugin::{Script, Style};
use common::{Engine, SMALL, Shape, call};
use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;
const GROWN: i32 = KVHOOK_EVENT_GROWN;
const TWO: Shape = Shape { ranks: 2, ..SMALL };
const DROPPED: (i32, i32) = (KVHOOK_VERDICT_DROPPED, KVHOOK_REASON_DROPPED);

fn verdict(engine: &Engine, ticket: u64) -> (i32, i32) {
    let (verdict, reason, ..) = engine.verdict(ticket).unwrap();
    (verdict, reason)
}

#[test]
fn on_free_comes_once_for_each_rank_that_was_called() {
    let script = Arc::new(Script { keeps_state: true, ..Script::default() });
    let engine = Engine::with(TWO, &script);
    let mut cache = engine.begin(20);
    engine.plan(&mut cache, DONE, false).unwrap();
    engine.free(cache.uid, KVH_FREE_CANCELLED).unwrap();
    assert_eq!(script.frees_of(cache.uid), [(0, KVH_FREE_CANCELLED), (1, KVH_FREE_CANCELLED)]);
    for uid in [cache.uid, 0, 777] {
        let (status, message) = engine.free(uid, KVH_FREE_FINISHED).unwrap_err();
        assert_eq!(status, KVHOOK_ERR_UNKNOWN_UID, "{message}");
    }
    assert_eq!(script.frees_of(cache.uid).len(), 2);
    assert_eq!(engine.watch.live.load(SeqCst), 0);

    // `bound` is asked of the first rank only.
    let asked = engine.begin(20);
    engine.ask(&asked, DONE);
    let untouched = engine.begin(20);
    assert_eq!(engine.free(untouched.uid, 9).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    call(|error| unsafe { kvhook_reset(engine.raw, core::ptr::null_mut(), error) }).unwrap();
    assert_eq!(script.frees_of(asked.uid), [(0, KVH_FREE_RESET)]);
    assert_eq!(script.frees_of(untouched.uid), []);
    assert_eq!(engine.figures("arm").0.live, 0);
}

#[test]
fn whatever_ends_the_plan_drops_the_ticket() {
    for late in [0, 1, 3] {
        let script = Arc::new(Script::default());
        let engine = Engine::with(TWO, &script);
        let plan = |tokens| {
            let mut cache = engine.begin(tokens);
            let ticket = engine.plan(&mut cache, DONE, false).unwrap();
            assert_eq!(verdict(&engine, ticket).0, KVHOOK_VERDICT_READY);
            cache.append(late);
            (cache, ticket)
        };
        let refused = |cache: &common::Cache, ticket| {
            let before = cache.stores.clone();
            assert_eq!(verdict(&engine, ticket), DROPPED);
            assert_eq!(engine.commit_rank(0, cache, ticket, None).unwrap_err().0, KVHOOK_ERR_DROPPED);
            assert_eq!(engine.drop_ticket(ticket, 0).unwrap_err().0, KVHOOK_ERR_DROPPED);
            assert!(before == cache.stores);
        };

        for reason in [KVH_FREE_FINISHED, KVH_FREE_PREEMPTED] {
            let (cache, ticket) = plan(20);
            engine.free(cache.uid, reason).unwrap();
            refused(&cache, ticket);
        }
        let (cache, ticket) = plan(20);
        let fork = engine.fork(cache.uid).unwrap();
        refused(&cache, ticket);
        engine.verify(&common::Cache { uid: fork, ..cache.clone() });

        let (mut cache, ticket) = plan(20);
        cache.truncate(late + 1);
        engine.cut(&cache).unwrap();
        refused(&cache, ticket);
        engine.verify(&cache);

        let (cache, ticket) = plan(20);
        call(|error| unsafe { kvhook_reset(engine.raw, core::ptr::null_mut(), error) }).unwrap();
        refused(&cache, ticket);

        // A cut of appended rows only leaves the plan as it is.
        let (mut cache, ticket) = plan(20);
        cache.truncate(late);
        engine.cut(&cache).unwrap();
        cache.append(2);
        engine.commit(&mut cache, &script, ticket);
        // Each of the five was counted once.
        assert_eq!(engine.fallbacks(KVHOOK_REASON_DROPPED), 5);
    }
}

#[test]
fn cuts_into_kept_rows_keep_the_positions_right() {
    let script = Arc::new(Script { style: Style::Shared.into(), ..Script::default() });
    let engine = Engine::with(SMALL, &script);
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
    cache.append(3);
    // Two appended rows and then some kept ones.
    cache.truncate(2);
    engine.cut(&cache).unwrap();
    engine.verify(&cache);
    for heads in cache.rows.iter_mut().flatten() {
        heads.iter_mut().for_each(|rows| rows.truncate(6));
    }
    let last = cache.rows[0].iter().flatten().filter_map(|rows| rows.last()).map(|row| row.0).max().unwrap();
    cache.next_position = last;
    assert_eq!(engine.cut(&cache).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    cache.next_position = last + 1;
    engine.cut(&cache).unwrap();
    cache.append(8);
    engine.verify(&cache);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn forks_share_positions_and_go_their_own_ways() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(TWO, &script);
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
    let mut fork = common::Cache { uid: engine.fork(cache.uid).unwrap(), ..cache.clone() };
    engine.verify(&fork);
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
    engine.verify(&fork);
    let ticket = engine.plan(&mut fork, DONE, false).unwrap();
    engine.commit(&mut fork, &script, ticket);
    assert_eq!(engine.fork(cache.uid).unwrap_err().0, KVHOOK_ERR_UNKNOWN_UID);

    let script = Arc::new(Script { keeps_state: true, ..Script::default() });
    let engine = Engine::with(SMALL, &script);
    let mut cache = engine.begin(20);
    engine.fork(cache.uid).unwrap();
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    assert_eq!(engine.fork(cache.uid).unwrap_err().0, KVHOOK_ERR_FORK_REFUSED);
    engine.commit(&mut cache, &script, ticket);
}

#[test]
fn a_rank_that_keeps_keeps_all() {
    for bad in 0..3 {
        let script = Arc::new(Script::default());
        *script.tamper.lock().unwrap() = Some(Box::new(move |rank, plan, _| {
            if rank == bad {
                plan.kind = 77;
            }
        }));
        let engine = Engine::with(Shape { ranks: 3, ..SMALL }, &script);
        let cache = engine.begin(20);
        engine.ask(&cache, DONE);
        let answers: Vec<_> = (0..3).map(|rank| engine.prepare(rank, &cache, DONE, false)).collect();
        for (rank, answer) in answers.iter().enumerate() {
            match rank as u32 {
                rank if rank < bad => assert_ne!(answer.0, 0),
                rank if rank == bad => assert_eq!(*answer, (0, KVHOOK_REASON_BAD_PLAN)),
                _ => assert_eq!(*answer, (0, KVHOOK_REASON_OTHER_RANK)),
            }
        }
        if bad > 0 {
            assert_eq!(verdict(&engine, answers[0].0), (KVHOOK_VERDICT_DROPPED, KVHOOK_REASON_OTHER_RANK));
            assert_eq!(engine.commit_rank(0, &cache, answers[0].0, None).unwrap_err().0, KVHOOK_ERR_DROPPED);
        }
        assert_eq!(engine.figures("arm").1, [(KVHOOK_REASON_BAD_PLAN, 1)]);
        engine.verify(&cache);
        // The next attempt is a new one, for every rank.
        *script.tamper.lock().unwrap() = None;
        let mut cache = cache;
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        engine.commit(&mut cache, &script, ticket);
    }
}

#[test]
fn ranks_that_set_different_next_positions_keep_all() {
    let script = Arc::new(Script { style: Style::Rerotate.into(), ..Script::default() });
    *script.tamper.lock().unwrap() = Some(Box::new(|rank, plan, _| {
        if rank == 1 {
            plan.next_position += 1;
        }
    }));
    let engine = Engine::with(TWO, &script);
    let cache = engine.begin(20);
    engine.ask(&cache, DONE);
    let (ticket, _) = engine.prepare(0, &cache, DONE, false);
    assert_ne!(ticket, 0);
    assert_eq!(engine.prepare(1, &cache, DONE, false), (0, KVHOOK_REASON_BAD_POSITION));
    assert_eq!(verdict(&engine, ticket).0, KVHOOK_VERDICT_DROPPED);
    engine.verify(&cache);
}

#[test]
fn a_ticket_is_pending_until_every_rank_has_prepared() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(TWO, &script);
    let mut cache = engine.begin(20);
    cache.remember_plan();
    let (ticket, _) = engine.prepare(1, &cache, DONE, false);
    assert_eq!(verdict(&engine, ticket).0, KVHOOK_VERDICT_PENDING);
    assert_eq!(engine.ask(&cache, DONE).0, KVHOOK_DECISION_KEEP);
    assert_eq!(engine.commit_rank(1, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_NOT_READY);
    assert_eq!(engine.prepare(0, &cache, DONE, false).0, ticket);
    assert_eq!(engine.verdict(ticket).unwrap(), (KVHOOK_VERDICT_READY, 0, KVHOOK_MOVE_IN_PLACE, vec![10, 10]));

    // One rank has moved its rows: the other must, too.
    engine.commit_rank(0, &cache, ticket, None).unwrap();
    assert_eq!(engine.commit_rank(0, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    assert_eq!(engine.drop_ticket(ticket, 0).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    assert_eq!(engine.fork(cache.uid).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    assert_eq!(engine.cut(&cache).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    let mut later = cache.clone();
    later.append(1);
    assert_eq!(engine.commit_rank(1, &later, ticket, None).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    assert_eq!(verdict(&engine, ticket).0, KVHOOK_VERDICT_READY);
    engine.commit_rank(1, &cache, ticket, None).unwrap();
    assert_eq!(engine.verdict(ticket).unwrap_err().0, KVHOOK_ERR_UNKNOWN_TICKET);
    assert_eq!(engine.verdict(4711).unwrap_err().0, KVHOOK_ERR_UNKNOWN_TICKET);
}

#[test]
fn grown_is_asked_every_so_many_tokens() {
    let script = Arc::new(Script { grown_every: 8, count: Box::new(|_, length| length.min(16)), ..Script::default() });
    let engine = Engine::with(SMALL, &script);
    assert_eq!(engine.begin_on("arm", "", 20).unwrap().grown_every, 8);
    let mut cache = engine.begin(20);
    let mut commits = 0;
    for token in 1..=64u64 {
        cache.append(1);
        let (decision, reason, _) = engine.ask(&cache, GROWN);
        assert_eq!(decision != KVHOOK_DECISION_KEEP, token % 8 == 0, "token {token}");
        if decision != KVHOOK_DECISION_KEEP {
            cache.remember_plan();
            let (ticket, _) = engine.prepare(0, &cache, GROWN, false);
            cache.append(u64::from(token % 16 == 0));
            cache.truncate(u64::from(token % 16 == 0));
            engine.commit(&mut cache, &script, ticket);
            assert_eq!(cache.lengths(0), [16, 16]);
            commits += 1;
        } else {
            assert_eq!(reason, KVH_REASON_NONE);
        }
    }
    assert_eq!(commits, 8);
    assert_eq!(engine.figures("arm").0.fallbacks, 0);
}

#[test]
fn queries_that_were_not_seen_keep() {
    let script = Arc::new(Script { must: KVH_CAN_STATE, phases: KVH_PHASE_PREFILL, window: 8, ..Script::default() });
    let engine = Engine::with(TWO, &script);
    assert_eq!(unsafe { kvhook_wants(engine.raw, 0) }, KVH_PHASE_PREFILL);
    let wants = engine.begin_on("arm", "", 20).unwrap();
    assert_eq!((wants.max_prefix_hit, wants.before_attention_phases), (12, KVH_PHASE_PREFILL));
    assert_eq!(engine.begin_on("arm", "", 5).unwrap().max_prefix_hit, 0);

    let mut cache = engine.begin(20);
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVH_REASON_QUERIES_MISSING));
    // A prefix hit of 14 tokens leaves six.
    engine.attend(&[&cache], 0, 14, 6, KVH_PHASE_PREFILL);
    engine.attend(&[&cache], 1, 14, 6, KVH_PHASE_PREFILL);
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVH_REASON_QUERIES_MISSING));
    // A chunk boundary inside the window.
    let mut cache = engine.begin(20);
    for rank in 0..2 {
        engine.attend(&[&cache], rank, 10, 6, KVH_PHASE_PREFILL);
        engine.attend(&[&cache], rank, 16, 4, KVH_PHASE_PREFILL);
        // A want that holds in prefill is not called in decode.
        let before = script.attended.load(SeqCst);
        engine.attend(&[&cache], rank, 20, 1, KVH_PHASE_DECODE);
        assert_eq!(script.attended.load(SeqCst), before);
    }
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
    assert_eq!(engine.fork(cache.uid).unwrap_err().0, KVHOOK_ERR_FORK_REFUSED);
    // A gap forgets what came before it.
    let mut cache = engine.begin(20);
    for rank in 0..2 {
        engine.attend(&[&cache], rank, 0, 13, KVH_PHASE_PREFILL);
        engine.attend(&[&cache], rank, 14, 6, KVH_PHASE_PREFILL);
    }
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVH_REASON_QUERIES_MISSING));
    assert_eq!(engine.fallbacks(KVH_REASON_QUERIES_MISSING), 3);
}

#[test]
fn short_sequences_and_small_gains_are_kept() {
    let script = Arc::new(Script { min_tokens: 10, phases: KVH_PHASE_PREFILL, ..Script::default() });
    let engine = Engine::new(Shape { block_size: 8, ..SMALL });
    let mut spec = ArmSpec::new("arm", "scripted", script.register());
    spec.min_tokens = 6;
    engine.arm(&spec);
    let wants = engine.begin_on("arm", "", 9).unwrap();
    assert_eq!((wants.before_attention_phases, wants.on_prefill_done, wants.max_prefix_hit), (0, 0, 9));
    assert_eq!(engine.begin_on("arm", "", 10).unwrap().on_prefill_done, 1);
    assert_eq!(engine.plan(&mut engine.begin(5), DONE, false), Err(KVHOOK_REASON_MIN_TOKENS));
    assert_eq!(engine.plan(&mut engine.begin(9), DONE, false), Err(KVH_REASON_TOO_SHORT));
    // Ten rows take two blocks, five take one; sixteen rows take two, eight one; but 15 of 16 take two.
    assert!(engine.plan(&mut engine.begin(10), DONE, false).is_ok());
    let script = Arc::new(Script { count: Box::new(|_, length| length - 1), ..Script::default() });
    let engine = Engine::with(Shape { block_size: 8, ..SMALL }, &script);
    assert_eq!(engine.plan(&mut engine.begin(16), DONE, false), Err(KVH_REASON_NO_GAIN));
    assert!(engine.plan(&mut engine.begin(17), DONE, false).is_ok());
}

#[test]
fn a_swap_leaves_state_and_tickets_where_they_are() {
    let old = Arc::new(Script::default());
    let engine = Engine::with(TWO, &old);
    let mut planned = engine.begin(20);
    let ticket = engine.plan(&mut planned, DONE, false).unwrap();
    let mut idle = engine.begin(20);
    engine.ask(&idle, DONE);

    let new = Arc::new(Script { style: Style::Shared.into(), ..Script::default() });
    engine.arm(&ArmSpec::new("arm", "scripted", new.register()));
    // The idle one moved, and the old instance was told; the planned one is still the old one's.
    assert_eq!(old.frees_of(idle.uid), [(0, KVH_FREE_FINISHED)]);
    assert_eq!((old.live.load(SeqCst), new.live.load(SeqCst)), (2, 2));
    planned.append(3);
    engine.commit(&mut planned, &old, ticket);
    // The commit moves it, and ends the old instances.
    assert_eq!(old.live.load(SeqCst), 0);
    let ticket = engine.plan(&mut idle, DONE, false).unwrap();
    engine.commit(&mut idle, &new, ticket);
    let ticket = engine.plan(&mut planned, DONE, false).unwrap();
    engine.commit(&mut planned, &new, ticket);
    assert_eq!(old.frees_of(planned.uid).len(), 2);
    engine.free(planned.uid, KVH_FREE_FINISHED).unwrap();
    assert_eq!(new.frees_of(planned.uid), [(0, KVH_FREE_FINISHED), (1, KVH_FREE_FINISHED)]);

    // One with state stays until it ends.
    let stateful = Arc::new(Script { keeps_state: true, ..Script::default() });
    engine.arm(&ArmSpec::new("arm", "scripted", stateful.register()));
    let mut cache = engine.begin(20);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &stateful, ticket);
    engine.arm(&ArmSpec::new("arm", "scripted", new.register()));
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &stateful, ticket);
    assert_eq!(stateful.live.load(SeqCst), 2);
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
    assert_eq!(stateful.live.load(SeqCst), 0);
}

#[test]
fn arms_are_chosen_by_name_weight_and_key() {
    let script = Arc::new(Script::default());
    let engine = Engine::new(SMALL);
    assert_eq!(engine.begin_on("", "key", 10).unwrap().uid, 0);
    for (name, weight) in [("a", 1.0), ("b", 3.0), ("c", 0.0)] {
        let mut spec = ArmSpec::new(name, "scripted", script.register());
        spec.weight = weight;
        engine.arm(&spec);
    }
    let sequences = |arm: &str| engine.figures(arm).0.sequences;
    assert_eq!(engine.begin_on("none", "key", 10).unwrap().uid, 0);
    assert_eq!(engine.begin_on("d", "", 10).err().unwrap().0, KVHOOK_ERR_UNKNOWN_ARM);
    for key in 0..400 {
        engine.begin_on("", &format!("user {key}"), 10).unwrap();
    }
    let (a, b) = (sequences("a"), sequences("b"));
    assert_eq!((a + b, sequences("c")), (400, 0));
    assert!((70..130).contains(&a), "{a} of 400");
    for _ in 0..10 {
        engine.begin_on("", "user 7", 10).unwrap();
    }
    assert!(sequences("a") == a + 10 || sequences("b") == b + 10);
    // By docs/live.md, worked out with Python's hashlib.
    let before = sequences("b");
    engine.begin_on("", "user 1", 10).unwrap();
    assert_eq!(sequences("b"), before + 1);

    let weight = |arm, weight| call(|error| unsafe { kvhook_arm_weight(engine.raw, KvhStr::new(arm), weight, error) });
    weight("b", 0.0).unwrap();
    weight("c", 1.0).unwrap();
    assert_eq!(weight("b", -1.0).unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    assert_eq!(weight("x", 1.0).unwrap_err().0, KVHOOK_ERR_UNKNOWN_ARM);
    // Arms a and c now have a half each.
    engine.begin_on("", "user 1", 10).unwrap();
    assert_eq!(sequences("c"), 1);

    let mut cache = common::Cache::new(SMALL, engine.begin_on("c", "", 10).unwrap().uid, 32);
    cache.append(10);
    call(|error| unsafe { kvhook_arm_remove(engine.raw, KvhStr::new("c"), error) }).unwrap();
    assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVHOOK_REASON_DISABLED));
    assert_eq!(engine.begin_on("c", "", 10).err().unwrap().0, KVHOOK_ERR_UNKNOWN_ARM);
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
}
