//! Arms that change while sequences run: by commands, by weights, by a guard.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod input;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use common::plugin::Script;
use common::{Answer, Cache, Engine, SMALL, Shape, call};
use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::host::Host;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
use serde_json::{Value, json};

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;
const TWO: Shape = Shape { ranks: 2, ..SMALL };

fn control_from(engine: &Engine, command: &Value, source: i32) -> Answer<()> {
    let text = command.to_string();
    call(|error| unsafe { kvhook_control(engine.raw, KvhStr::new(&text), source, error) })
}

fn control(engine: &Engine, changes: Value) -> Answer<()> {
    control_from(engine, &json!({ "changes": changes }), KVHOOK_SOURCE_OPERATOR)
}

fn arms(engine: &Engine) -> Value {
    let mut buffer = vec![0u8; 1 << 16];
    let mut text = KvhText::over(&mut buffer);
    call(|error| unsafe { kvhook_arms_json(engine.raw, &mut text, error) }).unwrap();
    let mut all: Value = serde_json::from_slice(&buffer[..text.length]).unwrap();
    // Other tests' hosts are in this process, too.
    assert!(all.as_object_mut().unwrap().remove("instances").unwrap().is_u64());
    all
}

fn arm(engine: &Engine, name: &str) -> Value {
    let all = arms(engine);
    all["arms"].as_array().unwrap().iter().find(|arm| arm["name"] == name).unwrap().clone()
}

fn figures(engine: &Engine, name: &str) -> Value {
    let text = unsafe { (*engine.raw.cast::<Host>()).figures_json() };
    serde_json::from_str::<Value>(&text).unwrap()["arms"][name].clone()
}

fn logged(engine: &Engine, words: &str) -> usize {
    engine.watch.log.lock().unwrap().iter().filter(|(_, line)| line.contains(words)).count()
}

/// An engine with arms of a script, by name and weight.
fn scripted(shape: Shape, script: &Arc<Script>, weights: &[(&str, f64)]) -> Engine {
    let engine = Engine::new(shape);
    for &(name, weight) in weights {
        engine.arm(&ArmSpec { weight, ..ArmSpec::new(name, "scripted", script.register()) });
    }
    engine
}

/// A sequence on a named arm, with its prompt.
fn begin_on(engine: &Engine, name: &str, tokens: u64) -> Cache {
    let mut cache = Cache::new(engine.shape, engine.begin_on(name, "", tokens).unwrap().uid, tokens as usize + 200);
    cache.append(tokens);
    cache
}

/// The arm of each key. Every sequence ends at once.
fn assigned(engine: &Engine, keys: usize) -> Vec<String> {
    let host = unsafe { &*engine.raw.cast::<Host>() };
    (0..keys)
        .map(|key| {
            let live = |arm: &Arc<kvhook_host::arm::Arm>| arm.figures.read().live > 0;
            let uid = engine.begin_on("", &format!("user {key}"), 10).unwrap().uid;
            let name = host.arms().iter().find(|arm| live(arm)).map(|arm| arm.name.clone());
            if uid != 0 {
                engine.free(uid, KVH_FREE_FINISHED).unwrap();
            }
            name.unwrap_or_default()
        })
        .collect()
}

fn count(assigned: &[String], name: &str) -> usize {
    assigned.iter().filter(|arm| *arm == name).count()
}

#[test]
fn keys_fall_where_the_document_says() {
    let engine = scripted(SMALL, &Arc::default(), &[("a", 1.0), ("b", 3.0), ("c", 0.0)]);
    // Worked out with Python's hashlib and math.
    assert_eq!(assigned(&engine, 24).concat(), "bbbaabbbbbbbbbbababaaaab");
    control(&engine, json!([{"weights": {"b": 0, "c": 1}}])).unwrap();
    assert_eq!(assigned(&engine, 24).concat(), "accaacccaaaccacaaaaaaaac");
}

#[test]
fn shares_are_the_weights_within_binomial_bounds() {
    let engine = scripted(SMALL, &Arc::default(), &[("a", 0.5), ("b", 1.5), ("c", 6.0)]);
    let keys = 8000;
    let assigned = assigned(&engine, keys);
    for (name, share) in [("a", 0.0625), ("b", 0.1875), ("c", 0.75)] {
        let (expected, deviation) = (keys as f64 * share, (keys as f64 * share * (1.0 - share)).sqrt());
        let off = (count(&assigned, name) as f64 - expected).abs() / deviation;
        assert!(off < 4.0, "{name}: {off} standard deviations");
    }
}

#[test]
fn a_change_moves_only_the_keys_that_it_must() {
    let engine = scripted(SMALL, &Arc::default(), &[("a", 1.0), ("b", 1.0), ("c", 2.0)]);
    let keys = 4000;
    let before = assigned(&engine, keys);
    let moved = |after: &[String]| -> Vec<(String, String)> {
        let pairs = before.iter().zip(after).filter(|(before, after)| before != after);
        pairs.map(|(before, after)| (before.clone(), after.clone())).collect()
    };
    // 4 standard deviations around the difference of the shares.
    let near = |found: usize, share: f64| {
        let deviation = (keys as f64 * share * (1.0 - share)).sqrt();
        (found as f64 - keys as f64 * share).abs() < 4.0 * deviation
    };

    // a grows from 1/4 to 3/6.
    control(&engine, json!([{"weights": {"a": 3}}])).unwrap();
    let grown = moved(&assigned(&engine, keys));
    assert!(grown.iter().all(|(_, to)| to == "a") && near(grown.len(), 0.25), "{}", grown.len());
    // c shrinks from 2/4 to 1/3.
    control(&engine, json!([{"weights": {"a": 1, "c": 1}}])).unwrap();
    let shrunk = moved(&assigned(&engine, keys));
    assert!(shrunk.iter().all(|(from, _)| from == "c") && near(shrunk.len(), 1.0 / 6.0), "{}", shrunk.len());
    // A common factor moves nothing, and what was is again.
    control(&engine, json!([{"weights": {"a": 0.125, "b": 0.125, "c": 0.25}}])).unwrap();
    assert_eq!(assigned(&engine, keys), before);

    for state in ["draining", "disabled"] {
        control(&engine, json!([{"state": {"c": state}}])).unwrap();
        let left = moved(&assigned(&engine, keys));
        assert!(left.iter().all(|(from, to)| from == "c" && !to.is_empty()));
        assert_eq!(left.len(), count(&before, "c"));
        control(&engine, json!([{"state": {"c": "serving"}}])).unwrap();
        assert_eq!(assigned(&engine, keys), before);
    }
    // A new arm of 1/5 takes its keys, and gives them back.
    control(&engine, json!([{"add": {"name": "d", "plugin": "scripted", "config": "1", "weight": 0.125}}])).unwrap();
    let taken = moved(&assigned(&engine, keys));
    assert!(taken.iter().all(|(_, to)| to == "d") && near(taken.len(), 0.2), "{}", taken.len());
    control(&engine, json!([{"remove": "d"}])).unwrap();
    assert_eq!(assigned(&engine, keys), before);
}

#[test]
fn what_does_not_load_changes_nothing() {
    let script = Arc::new(Script::default());
    let engine = scripted(SMALL, &script, &[("a", 1.0), ("b", 2.0)]);
    control(&engine, json!([{"add": {"name": "real", "plugin": "truncate", "config": "keep=0.5", "weight": 0}}]))
        .unwrap();
    let before = arms(&engine);
    let pin = "0".repeat(64);
    let operator = KVHOOK_SOURCE_OPERATOR;
    let refused = [
        (json!({"name": "a", "plugin": "no-such-plugin"}), operator, KVHOOK_ERR_FILE_MISSING),
        (json!({"name": "a", "plugin": "faulty", "config": "create=fail"}), operator, KVHOOK_ERR_CREATE),
        (json!({"name": "a", "plugin": "faulty", "config": "create=panic"}), operator, KVHOOK_ERR_CREATE_PANIC),
        (json!({"name": "a", "plugin": "faulty", "config": "needs=panic"}), operator, KVHOOK_ERR_CREATE_PANIC),
        (json!({"name": "real", "config": "keep=7"}), operator, KVHOOK_ERR_CONFIG),
        (json!({"name": "real", "config": "no-such-key=1"}), operator, KVHOOK_ERR_CONFIG),
        (json!({"name": "real", "sha256": pin}), operator, KVHOOK_ERR_CHECKSUM),
        (json!({"name": "real", "layers": "0-9"}), operator, KVHOOK_ERR_SPEC),
        (json!({"name": "a", "plugin": "/etc/passwd"}), operator, KVHOOK_ERR_PATH_NOT_ALLOWED),
        (json!({"name": "a", "plugin": "./libkvhook_noop.so"}), KVHOOK_SOURCE_MODEL, KVHOOK_ERR_MODEL_PATH),
        (json!({"name": "x", "plugin": "noop"}), operator, KVHOOK_ERR_UNKNOWN_ARM),
    ];
    for (patch, source, expected) in refused {
        // What stands before it and behind it in the command is not made either.
        let command = json!({"changes": [
            {"weights": {"b": 7}}, {"add": {"name": "new", "plugin": "noop"}}, {"replace": patch},
            {"state": {"b": "disabled"}}, {"safe_mode": true},
        ]});
        let warnings = logged(&engine, "the arms stay as they are");
        let (status, message) = control_from(&engine, &command, source).unwrap_err();
        assert_eq!(status, expected, "{patch}: {message}");
        assert_eq!(arms(&engine), before);
        assert_eq!(logged(&engine, "the arms stay as they are"), warnings + 1);
        let mut cache = begin_on(&engine, "a", 20);
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        engine.commit(&mut cache, &script, ticket);
        engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
    }
    for (changes, expected) in [
        (json!([{"add": {"name": "a", "plugin": "noop"}}]), KVHOOK_ERR_SPEC),
        (json!([{"weights": {"a": -1}}]), KVHOOK_ERR_INVALID_ARGUMENT),
        (json!([{"weights": {"a": 5, "x": 1}}]), KVHOOK_ERR_UNKNOWN_ARM),
        (json!([{"remove": "a"}, {"state": {"a": "shadow"}}]), KVHOOK_ERR_UNKNOWN_ARM),
        (json!([{"remove": "x".repeat(1 << 16)}]), KVHOOK_ERR_SPEC),
    ] {
        assert_eq!(control(&engine, changes).unwrap_err().0, expected);
        assert_eq!(arms(&engine), before);
    }
}

#[test]
fn changes_are_logged_with_what_was_before_and_after() {
    let engine = scripted(SMALL, &Arc::default(), &[("a", 1.0)]);
    control(&engine, json!([{"weights": {"a": 4}}, {"state": {"a": "draining"}}])).unwrap();
    let log = engine.watch.log.lock().unwrap().clone();
    let (level, line) = log.last().unwrap();
    assert_eq!(*level, KVH_LOG_INFO);
    let (was, is) = line.split_once(" to ").unwrap();
    assert!(was.contains("weight 1, serving") && is.contains("weight 4, draining"), "{line}");
}

#[test]
fn a_config_is_replaced_while_sequences_run() {
    let engine = Engine::new(SMALL);
    control(&engine, json!([{"add": {"name": "a", "plugin": "truncate", "config": "keep=0.5,sinks=0,recent=4"}}]))
        .unwrap();
    let asked = |cache: &Cache| engine.ask(cache, DONE).2;
    let cache = begin_on(&engine, "a", 20);
    assert_eq!(asked(&cache), [10, 10]);
    control(&engine, json!([{"replace": {"name": "a", "config": "keep=0.25,sinks=0,recent=4"}}])).unwrap();
    assert_eq!(asked(&cache), [5, 5]);
    control(&engine, json!([{"replace": {"name": "a", "plugin": "noop"}}])).unwrap();
    assert_eq!(asked(&cache), [20, 20]);
    assert_eq!(arm(&engine, "a")["config"], "");
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
}

#[test]
fn states() {
    let script = Arc::new(Script::default());
    let engine = scripted(SMALL, &script, &[("a", 1.0)]);
    let set = |state: &str| control(&engine, json!([{"state": {"a": state}}])).unwrap();
    let mut old = begin_on(&engine, "a", 20);
    let mut open = begin_on(&engine, "a", 20);
    let ticket = engine.plan(&mut open, DONE, false).unwrap();

    set("draining");
    assert_eq!((engine.begin_on("a", "", 10).unwrap().uid, engine.begin_on("", "key", 10).unwrap().uid), (0, 0));
    let of_old = engine.plan(&mut old, DONE, false).unwrap();
    engine.commit(&mut old, &script, of_old);
    assert_eq!((&arm(&engine, "a")["state"], &arm(&engine, "a")["live"]), (&json!("draining"), &json!(2)));

    set("disabled");
    assert_eq!(engine.begin_on("a", "", 10).unwrap().uid, 0);
    assert_eq!(engine.plan(&mut old, DONE, false), Err(KVHOOK_REASON_DISABLED));
    // A ticket that was open may be committed.
    engine.commit(&mut open, &script, ticket);

    set("serving");
    let of_old = engine.plan(&mut old, DONE, false).unwrap();
    engine.commit(&mut old, &script, of_old);

    control(&engine, json!([{"safe_mode": true}])).unwrap();
    assert_eq!(arms(&engine)["safe_mode"], true);
    assert_eq!((engine.begin_on("a", "", 10).unwrap().uid, engine.begin_on("", "key", 10).unwrap().uid), (0, 0));
    assert_eq!(engine.plan(&mut old, DONE, false), Err(KVHOOK_REASON_DISABLED));
    let add = json!({"add": {"name": "b", "plugin": "noop"}});
    assert_eq!(control(&engine, json!([add])).unwrap_err().0, KVHOOK_ERR_SAFE_MODE);
    control(&engine, json!([{"safe_mode": false}, add])).unwrap();
    assert_ne!(engine.begin_on("a", "", 10).unwrap().uid, 0);
    assert!(engine.plan(&mut old, DONE, false).is_ok());
}

#[test]
fn an_arm_that_is_off_wants_nothing() {
    let script = Arc::new(Script { must: KVH_CAN_STATE, phases: KVH_PHASE_PREFILL, ..Script::default() });
    let engine = scripted(SMALL, &script, &[("a", 1.0)]);
    let wants = || unsafe { kvhook_wants(engine.raw, 0) };
    let set = |changes| control(&engine, changes).unwrap();
    assert_eq!(wants(), KVH_PHASE_PREFILL);
    set(json!([{"state": {"a": "disabled"}}]));
    assert_eq!(wants(), 0);
    // New instances of it want nothing either, until it is on.
    set(json!([{"replace": {"name": "a", "config": script.register()}}]));
    assert_eq!(wants(), 0);
    for state in ["serving", "shadow", "draining"] {
        set(json!([{"state": {"a": state}}]));
        assert_eq!(wants(), KVH_PHASE_PREFILL);
    }
    set(json!([{"state": {"a": "serving"}}]));
    let live = begin_on(&engine, "a", 20);
    set(json!([{"remove": "a"}]));
    assert_eq!(wants(), 0);
    engine.free(live.uid, KVH_FREE_FINISHED).unwrap();
}

#[test]
fn a_shadow_leaves_the_cache_untouched() {
    for keeps_state in [false, true] {
        let script = Arc::new(Script { keeps_state, ..Script::default() });
        let engine = scripted(TWO, &script, &[("a", 1.0)]);
        control(&engine, json!([{"state": {"a": "shadow"}}])).unwrap();
        let mut cache = begin_on(&engine, "a", 20);
        let before = cache.stores.clone();
        // Rows that others use would need fresh ones; nothing is asked for.
        assert_eq!(engine.ask_shared(&cache, DONE, 8, 8).unwrap().0, KVHOOK_DECISION_IN_PLACE);
        for fresh in [false, true] {
            let ticket = engine.plan(&mut cache, DONE, fresh).unwrap();
            let (verdict, reason, ..) = engine.verdict(ticket).unwrap();
            assert_eq!((verdict, reason), (KVHOOK_VERDICT_DROPPED, KVHOOK_REASON_SHADOW));
            assert_eq!(engine.commit_rank(0, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_DROPPED);
            // A commit that does not ask first is refused, too.
            let ticket = engine.plan(&mut cache, DONE, fresh).unwrap();
            assert_eq!(engine.commit_rank(0, &cache, ticket, None).unwrap_err().0, KVHOOK_ERR_DROPPED);
        }
        assert!(before == cache.stores);
        engine.verify(&cache);
        // 4 tickets of 2 ranks, 2 layers and 2 heads, of 20 rows and then of 10; a K and its V have 7 channels of 4 bytes.
        let found = figures(&engine, "a");
        let expected = json!({"commits": 4, "entries_before": 4 * 8 * 20, "entries_after": 4 * 8 * 10,
            "bytes_before": 4 * 8 * 20 * 28, "bytes_after": 4 * 8 * 10 * 28});
        assert_eq!(found["shadow"], expected);
        assert_eq!(
            (&found["commits"], &found["entries_before"], &found["fallbacks"]),
            (&json!(0), &json!(0), &json!({}))
        );
        assert_eq!((&found["hooks"]["on_prefill_done"]["calls"], &found["tokens"]), (&json!(8), &json!(20)));

        // A ticket that is open when the arm serves again is still the shadow's; the next is not.
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        control(&engine, json!([{"state": {"a": "serving"}}])).unwrap();
        assert_eq!(engine.verdict(ticket).unwrap().1, KVHOOK_REASON_SHADOW);
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        engine.commit(&mut cache, &script, ticket);
        engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
    }
}

#[test]
fn a_shadow_in_one_call_is_a_keep() {
    let script = Arc::new(Script::default());
    let engine = scripted(SMALL, &script, &[("a", 1.0)]);
    control(&engine, json!([{"state": {"a": "shadow"}}])).unwrap();
    let mut cache = begin_on(&engine, "a", 20);
    let before = cache.stores.clone();
    assert_eq!(engine.compress(&mut cache, &script, DONE), (KVHOOK_DECISION_KEEP, KVHOOK_REASON_SHADOW));
    assert!(before == cache.stores);
    engine.verify(&cache);
}

#[test]
fn a_guard_switches_off_an_arm_that_fails() {
    let script = Arc::new(Script::default());
    let engine = scripted(SMALL, &script, &[("a", 1.0), ("b", 1.0)]);
    control(&engine, json!([{"guard": {"a": {"failed": 0.5, "sequences": 4}}}])).unwrap();
    let run = |fails: bool| {
        let mut cache = begin_on(&engine, "a", 20);
        *script.prepare_status.lock().unwrap() = if fails { KVH_ERR_INTERNAL } else { 0 };
        let first = engine.plan(&mut cache, DONE, false).err();
        assert_eq!(first, fails.then_some(KVHOOK_REASON_PLUGIN_ERROR));
        // However often one sequence fails, it is one.
        for _ in 0..if fails { 3 } else { 0 } {
            engine.plan(&mut cache, DONE, false).unwrap_err();
        }
        engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
    };
    // Two of any four may fail.
    for round in 0..20 {
        run(round % 2 == 0);
    }
    assert_eq!(arm(&engine, "a")["state"], "serving");
    let mut live = begin_on(&engine, "a", 20);
    run(true);
    run(true);
    let off = arm(&engine, "a");
    assert_eq!(
        (&off["state"], &off["cause"]),
        (&json!("disabled"), &json!("3 of its last 4 sequences failed; 2 of 4 may"))
    );
    assert_eq!(logged(&engine, "arm a: its guard switched it off: 3 of"), 1);
    assert_eq!(engine.begin_on("a", "", 10).unwrap().uid, 0);
    *script.prepare_status.lock().unwrap() = 0;
    assert_eq!(engine.plan(&mut live, DONE, false), Err(KVHOOK_REASON_DISABLED));
    engine.free(live.uid, KVH_FREE_FINISHED).unwrap();
    assert!(assigned(&engine, 50).iter().all(|name| name == "b"));

    // A new plugin does not switch it on; the operator does, and the count begins anew.
    control(&engine, json!([{"replace": {"name": "a", "config": script.register()}}])).unwrap();
    assert_eq!(arm(&engine, "a")["state"], "disabled");
    control(&engine, json!([{"state": {"a": "serving"}}])).unwrap();
    assert_eq!((&arm(&engine, "a")["state"], &arm(&engine, "a")["cause"]), (&json!("serving"), &Value::Null));
    run(true);
    run(true);
    assert_eq!(arm(&engine, "a")["state"], "serving");
}

#[test]
fn a_guard_switches_off_an_arm_that_is_slow() {
    let script = Arc::new(Script::default());
    *script.inside.lock().unwrap() = Some(Box::new(|_| thread::sleep(Duration::from_millis(4))));
    let engine = scripted(SMALL, &script, &[("a", 1.0)]);
    // 4 ms for a prompt of 20 tokens are 200 us for each.
    let set = |ns: u64| {
        control(&engine, json!([{"guard": {"a": {"ns_per_token": ns, "tokens": 40}}}])).unwrap();
        for _ in 0..5 {
            let mut cache = Cache::new(SMALL, engine.begin_on("a", "", 20).unwrap().uid, 300);
            if cache.uid == 0 {
                break;
            }
            cache.append(20);
            let planned = engine.plan(&mut cache, DONE, false);
            assert!(planned.is_ok() || planned == Err(KVHOOK_REASON_DISABLED));
            engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
        }
        arm(&engine, "a")
    };
    assert_eq!(set(1_000_000_000)["state"], "serving");
    let off = set(50_000);
    assert_eq!(off["state"], "disabled");
    assert!(off["cause"].as_str().unwrap().contains("50000 ns are allowed"), "{off}");
}

#[test]
fn faults_of_others_do_not_trip_a_guard() {
    let script = Arc::new(Script::default());
    let engine = scripted(SMALL, &script, &[("a", 1.0)]);
    control(&engine, json!([{"guard": {"a": {"failed": 0}}}])).unwrap();
    for _ in 0..20 {
        let mut cache = begin_on(&engine, "a", 20);
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        engine.drop_ticket(ticket, KVHOOK_REASON_OUT_OF_MEMORY).unwrap();
        engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
    }
    assert_eq!(arm(&engine, "a")["state"], "serving");
}

#[test]
fn a_command_is_seen_as_a_whole() {
    let engine = scripted(SMALL, &Arc::default(), &[("a", 1.0), ("b", 0.0)]);
    let (done, begun) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for thread in 0..2 {
            let (engine, done, begun) = (&engine, &done, &begun);
            scope.spawn(move || {
                while !done.load(SeqCst) {
                    let number = begun.fetch_add(1, SeqCst);
                    // Between the two weights there is no moment without an arm, or without safe mode and its end.
                    let uid = engine.begin_on("", &format!("{thread} {number}"), 10).unwrap().uid;
                    assert_ne!(uid, 0);
                    engine.free(uid, KVH_FREE_FINISHED).unwrap();
                }
            });
        }
        for round in 0..400 {
            let (on, off) = if round % 2 == 0 { ("b", "a") } else { ("a", "b") };
            let mut changes = vec![json!({"safe_mode": true}), json!({"weights": {off: 0}})];
            if round % 8 == 0 {
                changes.push(json!({"replace": {"name": off, "plugin": "noop"}}));
                changes.insert(0, json!({"safe_mode": false}));
            }
            changes.extend([json!({"weights": {on: 1}}), json!({"safe_mode": false})]);
            control(&engine, Value::Array(changes)).unwrap();
        }
        done.store(true, SeqCst);
    });
    assert!(begun.load(SeqCst) > 0);
    assert_eq!((&arm(&engine, "a")["live"], &arm(&engine, "b")["live"]), (&json!(0), &json!(0)));
}

#[test]
fn a_weight_does_not_wait_for_a_plugin_that_loads() {
    let engine = Arc::new(scripted(SMALL, &Arc::default(), &[("a", 1.0)]));
    let (inner, once) = (engine.clone(), AtomicBool::new(true));
    let (send, receive) = std::sync::mpsc::channel();
    // While the new arm is being made, another thread changes a weight and begins a sequence.
    *engine.watch.on_log.lock().unwrap() = Some(Box::new(move |message| {
        if message.starts_with("arm b: plugin") && once.swap(false, SeqCst) {
            let inner = inner.clone();
            let other = thread::spawn(move || {
                assert_ne!(inner.begin_on("", "key", 10).unwrap().uid, 0);
                let host = unsafe { &*inner.raw.cast::<Host>() };
                host.arm("a").unwrap().weight()
            });
            send.send(other.join().unwrap()).unwrap();
        }
    }));
    control(&engine, json!([{"add": {"name": "b", "plugin": "noop"}}])).unwrap();
    *engine.watch.on_log.lock().unwrap() = None;
    assert_eq!(receive.recv_timeout(Duration::from_secs(5)).unwrap(), 1.0);
}

/// `older` in the list of arms: arm, sequences.
fn older(engine: &Engine) -> Vec<(String, u64)> {
    let arms = arms(engine);
    let of = |older: &Value| (older["arm"].as_str().unwrap().to_owned(), older["sequences"].as_u64().unwrap());
    arms["older"].as_array().unwrap().iter().map(of).collect()
}

#[test]
fn replaced_instances_live_as_long_as_they_are_needed() {
    let old = Arc::new(Script::default());
    let engine = scripted(TWO, &old, &[("a", 1.0)]);
    let replace = || {
        let new = Arc::new(Script::default());
        control(&engine, json!([{"replace": {"name": "a", "config": new.register()}}])).unwrap();
    };
    // Whatever ends the ticket ends what ties the sequence to the old instances.
    type End = fn(&Engine, &mut Cache, u64, &Script);
    let ends: [End; 5] = [
        |engine, cache, ticket, script| engine.commit(cache, script, ticket),
        |engine, _, ticket, _| engine.drop_ticket(ticket, KVHOOK_REASON_OUT_OF_MEMORY).unwrap(),
        |engine, cache, _, _| engine.free(cache.uid, KVH_FREE_FINISHED).unwrap(),
        // A prepare that is refused, and one of another position.
        |engine, cache, _, _| {
            cache.append(1);
            control(engine, json!([{"state": {"a": "disabled"}}])).unwrap();
            assert_eq!(engine.prepare(0, cache, DONE, false), (0, KVHOOK_REASON_DISABLED));
            control(engine, json!([{"state": {"a": "serving"}}])).unwrap();
        },
        |engine, cache, ticket, _| {
            let fork = engine.fork(cache.uid).unwrap();
            assert_eq!(engine.verdict(ticket).unwrap().0, KVHOOK_VERDICT_DROPPED);
            engine.free(fork, KVH_FREE_FINISHED).unwrap();
        },
    ];
    let mut script = old;
    for end in ends {
        let mut cache = begin_on(&engine, "a", 20);
        let ticket = engine.plan(&mut cache, DONE, false).unwrap();
        replace();
        assert_eq!((older(&engine), script.live.load(SeqCst)), (vec![("a".to_owned(), 1)], 2));
        end(&engine, &mut cache, ticket, &script);
        assert_eq!((older(&engine), script.live.load(SeqCst)), (vec![], 0));
        script = Arc::new(Script::default());
        control(&engine, json!([{"replace": {"name": "a", "config": script.register()}}])).unwrap();
    }
}

#[test]
fn an_arm_that_is_removed_leaves_no_instances_but_those_that_hold_state() {
    for keeps_state in [false, true] {
        let script = Arc::new(Script { keeps_state, ..Script::default() });
        let engine = scripted(TWO, &script, &[("a", 1.0)]);
        let mut used = begin_on(&engine, "a", 20);
        let ticket = engine.plan(&mut used, DONE, false).unwrap();
        engine.commit(&mut used, &script, ticket);
        let mut open = begin_on(&engine, "a", 20);
        let ticket = engine.plan(&mut open, DONE, false).unwrap();
        let untouched = begin_on(&engine, "a", 20);
        control(&engine, json!([{"remove": "a"}])).unwrap();
        assert_eq!(older(&engine), [("a".to_owned(), if keeps_state { 2 } else { 1 })]);
        // A ticket that is open may be committed, as of an arm that is disabled.
        engine.commit(&mut open, &script, ticket);
        let left = if keeps_state { 2 } else { 0 };
        assert_eq!((older(&engine).len() as u64, script.live.load(SeqCst)), (left / 2, left));
        for mut cache in [used, open, untouched] {
            assert_eq!(engine.plan(&mut cache, DONE, false), Err(KVHOOK_REASON_DISABLED));
            engine.verify(&cache);
            let forked = engine.fork(cache.uid);
            assert!(forked.is_ok() || keeps_state);
            if let Ok(uid) = forked {
                engine.free(uid, KVH_FREE_FINISHED).unwrap();
            }
            engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
        }
        assert_eq!((older(&engine), script.live.load(SeqCst)), (vec![], 0));
        assert_eq!(engine.watch.live.load(SeqCst), 0);
    }
}

#[test]
fn a_change_between_two_ranks_leaves_them_at_one() {
    let failing = Arc::new(Script { prepare_status: KVH_ERR_INTERNAL.into(), ..Script::default() });
    let engine = scripted(TWO, &failing, &[("a", 1.0)]);
    let cache = begin_on(&engine, "a", 20);
    engine.ask(&cache, DONE);
    assert_eq!(engine.prepare(0, &cache, DONE, false), (0, KVHOOK_REASON_PLUGIN_ERROR));
    let good = Arc::new(Script::default());
    control(&engine, json!([{"replace": {"name": "a", "config": good.register()}}])).unwrap();
    // The other rank hears that the first one kept, and opens no ticket of its own.
    assert_eq!(engine.prepare(1, &cache, DONE, false), (0, KVHOOK_REASON_OTHER_RANK));
    assert_eq!((failing.live.load(SeqCst), good.prepared.load(SeqCst)), (0, 0));
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
}

#[test]
fn what_was_not_shown_is_not_planned_from() {
    let watching = || Script {
        must: KVH_CAN_STATE,
        phases: KVH_PHASE_PREFILL | KVH_PHASE_DECODE,
        window: 4,
        grown_every: 4,
        ..Script::default()
    };
    let script = Arc::new(watching());
    let engine = scripted(SMALL, &script, &[("a", 1.0)]);
    let grow = |cache: &mut Cache| {
        for _ in 0..4 {
            let position = cache.next_position;
            cache.append(1);
            engine.attend(&[&*cache], 0, position, 1, KVH_PHASE_DECODE);
        }
    };
    const GROWN: i32 = KVHOOK_EVENT_GROWN;
    let mut cache = begin_on(&engine, "a", 20);
    engine.attend(&[&cache], 0, 0, 20, KVH_PHASE_PREFILL);
    grow(&mut cache);
    let ticket = engine.plan(&mut cache, GROWN, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
    // While the arm is off its plugin sees nothing, and plans nothing for this sequence from then on.
    control(&engine, json!([{"state": {"a": "disabled"}}])).unwrap();
    grow(&mut cache);
    control(&engine, json!([{"state": {"a": "serving"}}])).unwrap();
    for _ in 0..2 {
        grow(&mut cache);
        assert_eq!(engine.plan(&mut cache, GROWN, false), Err(KVH_REASON_QUERIES_MISSING));
    }
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();

    // An engine that was not told to show decode, since the sequence began on other instances.
    let other = Arc::new(Script { grown_every: 4, ..Script::default() });
    control(&engine, json!([{"replace": {"name": "a", "config": other.register()}}])).unwrap();
    let mut cache = begin_on(&engine, "a", 20);
    let script = Arc::new(Script { window: 0, ..watching() });
    control(&engine, json!([{"replace": {"name": "a", "config": script.register()}}])).unwrap();
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    engine.commit(&mut cache, &script, ticket);
    cache.append(4);
    assert_eq!(engine.plan(&mut cache, GROWN, false), Err(KVH_REASON_QUERIES_MISSING));
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
}
