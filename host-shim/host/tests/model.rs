//! The protocol of swaps and tickets, on the host's own code: loom runs each case for every order in which its threads can
//! take the host's locks, with as many preemptions as `LOOM_MAX_PREEMPTIONS` says (3 if unset).
//!
//! In every order: an instance is destroyed once, and not while it is called; a sequence keeps its instances while they
//! hold something for it; a ticket is committed once, on all ranks or none, and not behind the sequence's end; all memory
//! goes back.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use common::plugin::Script;
use common::{Cache, Engine, SMALL, Shape, call};
use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
use loom::thread;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;
const TWO: Shape = Shape { ranks: 2, layers: 1, ..SMALL };
const ONE: Shape = Shape { layers: 1, ..SMALL };

fn check(case: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(3));
    model.max_branches = 20_000;
    let orders = Arc::new(AtomicU64::new(0));
    let counted = orders.clone();
    model.check(move || {
        counted.fetch_add(1, SeqCst);
        case();
    });
    println!("{} orders", orders.load(SeqCst));
    // With one alone, nothing ran beside anything.
    assert!(orders.load(SeqCst) > 20);
}

/// An engine whose arm `a` runs the first of the scripts.
struct Case {
    engine: Engine,
    old: Arc<Script>,
    new: Arc<Script>,
    config: String,
}

fn case(shape: Shape, script: impl Fn() -> Script) -> Arc<Case> {
    let (old, new) = (Arc::new(script()), Arc::new(script()));
    let engine = Engine::new(shape);
    engine.arm(&ArmSpec::new("a", "scripted", old.register()));
    Arc::new(Case { engine, config: new.register(), old, new })
}

impl Case {
    fn control(&self, change: &str) {
        let command = format!(r#"{{"changes": [{change}]}}"#);
        call(|error| unsafe { kvhook_control(self.engine.raw, KvhStr::new(&command), KVHOOK_SOURCE_OPERATOR, error) })
            .unwrap();
    }

    fn replace(&self) {
        self.control(&format!(r#"{{"replace": {{"name": "a", "config": "{}"}}}}"#, self.config));
    }

    fn begin(&self) -> Cache {
        let mut cache = Cache::new(self.engine.shape, self.engine.begin_on("a", "", 8).unwrap().uid, 24);
        cache.append(8);
        cache
    }

    /// Which of the scripts was asked for a plan last.
    fn planner(&self) -> &Script {
        if self.new.prepared.load(SeqCst) > 0 { &self.new } else { &self.old }
    }

    /// With no sequence left, only the arm's instances are.
    fn end(&self, replaced: bool, removed: bool) {
        let ranks = self.engine.shape.ranks as u64;
        let (old, new) = (self.old.live.load(SeqCst), self.new.live.load(SeqCst));
        let expected = if removed {
            (0, 0)
        } else if replaced {
            (0, ranks)
        } else {
            (ranks, 0)
        };
        assert_eq!((old, new), expected);
        assert_eq!(self.engine.watch.live.load(SeqCst), 0);
    }
}

/// Both halves of a compression, and the sequence's end, while the arm gets other instances.
#[test]
fn a_swap_beside_a_sequence() {
    for keeps_state in [false, true] {
        check(move || {
            let case = case(ONE, move || Script { keeps_state, ..Script::default() });
            let swapper = thread::spawn({
                let case = case.clone();
                move || case.replace()
            });
            let mut cache = case.begin();
            let ticket = case.engine.plan(&mut cache, DONE, false).unwrap();
            let planner = case.planner();
            // What was planned is committed, on the instances that planned it.
            case.engine.commit(&mut cache, planner, ticket);
            assert!(case.engine.commit_rank(0, &cache, ticket, None).is_err());
            case.engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
            swapper.join().unwrap();
            let told = case.old.frees_of(cache.uid).len() + case.new.frees_of(cache.uid).len();
            // Each instance that was called heard of the end once.
            assert!((1..=2).contains(&told) && (!keeps_state || told <= 2));
            case.end(true, false);
        });
    }
}

/// Two ranks prepare on threads of their own, while the arm gets other instances.
#[test]
fn a_swap_beside_two_ranks_that_prepare() {
    check(|| {
        let case = case(TWO, Script::default);
        let cache = case.begin();
        case.engine.ask(&cache, DONE);
        let other = thread::spawn({
            let (case, cache) = (case.clone(), cache.clone());
            move || case.engine.prepare(1, &cache, DONE, false)
        });
        let swapper = thread::spawn({
            let case = case.clone();
            move || case.replace()
        });
        let first = case.engine.prepare(0, &cache, DONE, false);
        let second = other.join().unwrap();
        swapper.join().unwrap();
        // One ticket, of the same instances.
        assert_eq!(first, second);
        assert_ne!(first.0, 0);
        assert_eq!(case.engine.verdict(first.0).unwrap().0, KVHOOK_VERDICT_READY);
        assert!([(2, 0), (0, 2)].contains(&(case.old.prepared.load(SeqCst), case.new.prepared.load(SeqCst))));
        case.engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
        case.end(true, false);
    });
}

/// Two ranks commit on threads of their own, while the arm gets other instances and is asked to let go of the ticket.
#[test]
fn a_swap_beside_two_ranks_that_commit() {
    check(|| {
        let case = case(TWO, Script::default);
        let mut cache = case.begin();
        let ticket = case.engine.plan(&mut cache, DONE, false).unwrap();
        let other = thread::spawn({
            let (case, cache) = (case.clone(), cache.clone());
            move || case.engine.commit_rank(1, &cache, ticket, None)
        });
        let dropper = thread::spawn({
            let case = case.clone();
            move || {
                let dropped = case.engine.drop_ticket(ticket, KVHOOK_REASON_DROPPED);
                case.replace();
                dropped
            }
        });
        let first = case.engine.commit_rank(0, &cache, ticket, None);
        let (second, dropped) = (other.join().unwrap(), dropper.join().unwrap());
        // All ranks or none; none where the ticket was let go.
        assert_eq!((first.is_ok(), second.is_ok()), (dropped.is_err(), dropped.is_err()));
        assert!(case.engine.commit_rank(0, &cache, ticket, None).is_err());
        assert_eq!(case.engine.figures("a").0.commits, u64::from(dropped.is_err()));
        assert_eq!(case.old.live.load(SeqCst), 0);
        case.engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
        case.end(true, false);
    });
}

/// One rank's plugin fails, while the arm gets other instances: the other rank keeps, too.
#[test]
fn a_swap_beside_a_rank_that_fails() {
    check(|| {
        let case = case(TWO, Script::default);
        *case.old.prepare_status.lock().unwrap() = KVH_ERR_INTERNAL;
        let cache = case.begin();
        case.engine.ask(&cache, DONE);
        let swapper = thread::spawn({
            let case = case.clone();
            move || case.replace()
        });
        let answers = [0, 1].map(|rank| case.engine.prepare(rank, &cache, DONE, false));
        swapper.join().unwrap();
        // Instances that were there before the swap fail, those behind it do not; never one of each.
        assert_eq!(answers[0].0, answers[1].0);
        let open = answers[0].0 != 0;
        assert_eq!(open, case.new.prepared.load(SeqCst) == 2);
        case.engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
        case.end(true, false);
    });
}

/// A sequence is freed while its ticket is committed, and while the arm gets other instances.
#[test]
fn a_sequence_that_ends_beside_its_commit() {
    check(|| {
        let case = case(ONE, Script::default);
        let mut cache = case.begin();
        let ticket = case.engine.plan(&mut cache, DONE, false).unwrap();
        let freeing = thread::spawn({
            let (case, uid) = (case.clone(), cache.uid);
            move || {
                case.engine.free(uid, KVH_FREE_CANCELLED).unwrap();
                case.replace();
            }
        });
        // Either it moved its rows, or it says that the ticket is gone; a second commit does nothing.
        let committed = case.engine.commit_rank(0, &cache, ticket, None);
        assert!(
            committed.is_ok() || [KVHOOK_ERR_DROPPED, KVHOOK_ERR_UNKNOWN_TICKET].contains(&committed.unwrap_err().0)
        );
        assert!(case.engine.commit_rank(0, &cache, ticket, None).is_err());
        freeing.join().unwrap();
        assert_eq!(case.old.frees_of(cache.uid).len() + case.new.frees_of(cache.uid).len(), 1);
        case.end(true, false);
    });
}

/// An arm is removed beside a sequence that begins on it and is planned.
#[test]
fn an_arm_that_goes() {
    check(|| {
        let case = case(ONE, Script::default);
        let removing = thread::spawn({
            let case = case.clone();
            move || case.control(r#"{"remove": "a"}"#)
        });
        if let Ok(began) = case.engine.begin_on("a", "", 8) {
            let mut cache = Cache::new(ONE, began.uid, 24);
            cache.append(8);
            match case.engine.plan(&mut cache, DONE, false) {
                Ok(ticket) => case.engine.commit(&mut cache, &case.old, ticket),
                Err(reason) => assert!([KVHOOK_REASON_DISABLED, KVH_REASON_NONE].contains(&reason), "{reason}"),
            }
            removing.join().unwrap();
            // It holds nothing, so it keeps nothing alive.
            assert_eq!(case.old.live.load(SeqCst), 0);
            case.engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
        } else {
            removing.join().unwrap();
        }
        case.end(false, true);
    });
}

/// Two commands at once are made one behind the other, each as a whole.
#[test]
fn two_commands_at_once() {
    check(|| {
        let case = case(ONE, Script::default);
        let other = thread::spawn({
            let case = case.clone();
            move || case.control(r#"{"weights": {"a": 2}}, {"state": {"a": "draining"}}"#)
        });
        case.control(&format!(
            r#"{{"replace": {{"name": "a", "config": "{}"}}}}, {{"state": {{"a": "serving"}}}}"#,
            case.config
        ));
        other.join().unwrap();
        let host = unsafe { &*case.engine.raw.cast::<kvhook_host::host::Host>() };
        let arm = host.arm("a").unwrap();
        assert_eq!((arm.weight(), &arm.spec().config), (2.0, &case.config));
        case.end(true, false);
    });
}
