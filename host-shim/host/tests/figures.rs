//! Figures in their three forms, the form that configures arms, and the headers.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::process::Command;
use std::sync::Arc;

use common::plugin::{Script, Style};
use common::{Engine, F16, SMALL, Shape, call};
use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::raw::*;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;

type TextFunction = unsafe extern "C" fn(*mut KvhookHost, *mut KvhText, *mut KvhText) -> KvhookStatus;

/// A text, asked for with no room first.
fn text(engine: &Engine, function: TextFunction) -> String {
    let mut none = KvhText::over(&mut []);
    let (status, _) = call(|error| unsafe { function(engine.raw, &mut none, error) }).unwrap_err();
    assert_eq!(status, KVHOOK_ERR_BUFFER_TOO_SMALL);
    let mut buffer = vec![0u8; none.length];
    let mut whole = KvhText::over(&mut buffer);
    call(|error| unsafe { function(engine.raw, &mut whole, error) }).unwrap();
    assert_eq!(whole.length, none.length);
    String::from_utf8(buffer).unwrap()
}

#[test]
fn figures_in_three_forms() {
    let script = Arc::new(Script { phases: KVH_PHASE_PREFILL | KVH_PHASE_DECODE, ..Script::default() });
    let engine = Engine::with(Shape { ranks: 2, layers: 3, dtype: F16, ..SMALL }, &script);
    let mut cache = engine.begin(20);
    engine.attend(&[&cache], 0, 0, 20, KVH_PHASE_PREFILL);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    cache.append(2);
    engine.commit(&mut cache, &script, ticket);
    call(|error| unsafe { kvhook_freed(engine.raw, cache.uid, 640, error) }).unwrap();
    *script.style.lock().unwrap() = Style::Keep(KVH_REASON_OTHER);
    let mut other = engine.begin(20);
    for _ in 0..2 {
        assert_eq!(engine.plan(&mut other, DONE, false), Err(KVH_REASON_OTHER));
    }
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();

    // 2 ranks, 3 layers and 2 heads, of 22 rows and then of 12; a K and its V have 7 channels of 2 bytes.
    let (figures, reasons) = engine.figures("arm");
    assert_eq!((figures.sequences, figures.live, figures.commits, figures.fallbacks), (2, 1, 1, 2));
    assert_eq!((figures.entries_before, figures.entries_after), (12 * 22, 12 * 12));
    assert_eq!((figures.bytes_before, figures.bytes_after, figures.bytes_freed), (12 * 22 * 14, 12 * 12 * 14, 640));
    assert_eq!(reasons, [(KVH_REASON_OTHER, 2)]);
    assert_eq!((figures.bound.calls, figures.before_attention.calls), (3, 3));
    // The kept attempts: the first rank says so, the second is not asked.
    assert_eq!((figures.on_prefill_done.calls, figures.on_grown.calls), (4, 0));
    assert_eq!((figures.on_free.calls, figures.commit.calls), (2, 2));
    for times in [figures.bound, figures.commit, figures.on_free] {
        assert_eq!(times.buckets.iter().sum::<u64>(), times.calls);
        assert!(times.max_ns <= times.total_ns && times.total_ns <= times.max_ns * times.calls);
    }

    let json: serde_json::Value = serde_json::from_str(&text(&engine, kvhook_figures_json)).unwrap();
    assert_eq!(json["engine"], "mock 1");
    let arm = &json["arms"]["arm"];
    assert_eq!((arm["commits"].as_u64(), arm["entries_before"].as_u64()), (Some(1), Some(12 * 22)));
    assert_eq!(arm["fallbacks"], serde_json::json!({"other": 2}));
    assert_eq!(arm["hooks"]["on_prefill_done"]["calls"], 4);

    let lines = text(&engine, kvhook_figures_prometheus);
    for line in [
        "# TYPE kvhook_sequences_total counter",
        "kvhook_sequences_total{arm=\"arm\"} 2",
        "kvhook_sequences_live{arm=\"arm\"} 1",
        "kvhook_entries_total{arm=\"arm\",when=\"after\"} 144",
        "kvhook_bytes_freed_total{arm=\"arm\"} 640",
        "kvhook_fallbacks_total{arm=\"arm\",reason=\"other\"} 2",
        "# TYPE kvhook_hook_seconds histogram",
        "kvhook_hook_seconds_bucket{arm=\"arm\",hook=\"on_free\",le=\"+Inf\"} 2",
        "kvhook_hook_seconds_count{arm=\"arm\",hook=\"commit\"} 2",
    ] {
        assert!(lines.lines().any(|found| found == line), "{line} is missing in\n{lines}");
    }
    // Buckets are cumulative, in seconds.
    let bucket = |le: &str| {
        let head = format!("kvhook_hook_seconds_bucket{{arm=\"arm\",hook=\"commit\",le=\"{le}\"}} ");
        lines.lines().find_map(|line| line.strip_prefix(&head)).unwrap().parse::<u64>().unwrap()
    };
    assert!(bucket("0.000001") <= bucket("0.001024") && bucket("0.001024") <= bucket("4.194304"));
    assert_eq!(
        call(|error| unsafe { kvhook_freed(engine.raw, 4711, 1, error) }).unwrap_err().0,
        KVHOOK_ERR_UNKNOWN_UID
    );
}

#[test]
fn a_form_is_taken_as_a_whole_or_not_at_all() {
    let script = Arc::new(Script::default());
    let engine = Engine::with(SMALL, &script);
    let cache = engine.begin(20);
    let configure =
        |json: &str, source| call(|error| unsafe { kvhook_configure(engine.raw, KvhStr::new(json), source, error) });
    for (json, source, expected) in [
        ("{", KVHOOK_SOURCE_OPERATOR, KVHOOK_ERR_SPEC),
        ("{}", 7, KVHOOK_ERR_INVALID_ARGUMENT),
        (r#"{"plugin": "no-such-plugin"}"#, KVHOOK_SOURCE_OPERATOR, KVHOOK_ERR_FILE_MISSING),
        (r#"{"plugin": "/tmp/x.so"}"#, KVHOOK_SOURCE_MODEL, KVHOOK_ERR_MODEL_PATH),
    ] {
        assert_eq!(configure(json, source).unwrap_err().0, expected, "{json}");
        assert_eq!(engine.figures("arm").0.live, 1);
    }
    // No arm any more; the sequence goes on uncompressed.
    configure(r#"{"kv_plugin": null}"#, KVHOOK_SOURCE_OPERATOR).unwrap();
    assert_eq!(engine.ask(&cache, DONE).1, KVHOOK_REASON_DISABLED);
    assert_eq!(engine.begin_on("", "", 10).unwrap().uid, 0);
    engine.free(cache.uid, KVH_FREE_FINISHED).unwrap();
}

#[test]
fn the_headers_compile_alone() {
    let folder = env!("CARGO_MANIFEST_DIR");
    for (compiler, header, arguments) in [
        ("cc", "kvhook_host.h", ["-x", "c", "-std=c11"]),
        ("c++", "kvhook_host.h", ["-x", "c++", "-std=c++17"]),
        ("c++", "kvhook.hpp", ["-x", "c++", "-std=c++17"]),
    ] {
        let source = format!("{folder}/include/{header}");
        let warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"];
        let include = [format!("-I{folder}/include"), format!("-I{folder}/../../hook-abi/include")];
        // Read as an include: a header as the main file warns of its own guard pragmas and unused functions.
        let output = Command::new(compiler)
            .args(arguments)
            .args(warnings)
            .args(include)
            .args(["-include", &source, "/dev/null"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{header}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
