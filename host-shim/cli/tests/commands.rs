//! The built program: its commands on the real model, and its exit codes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::{KVHOOK, fail, kvhook};
use serde_json::Value;

/// Runs a command that must succeed; gives what it printed on both streams.
fn succeed(arguments: &[&str]) -> (String, String) {
    let output = kvhook(arguments);
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{arguments:?}: {}\n{err}", output.status);
    (out, err)
}

/// The default model, fetched on first use.
fn model() -> &'static str {
    static MODEL: OnceLock<String> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = kvhook_engine::model::fetch::default_model(|_, _| {}).unwrap();
        path.to_str().unwrap().to_owned()
    })
}

/// A file below `tests/` of the repository.
fn shared(path: &str) -> String {
    format!("{}/../../tests/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// The library of a plugin, which cargo puts beside the program.
fn library(name: &str) -> PathBuf {
    Path::new(KVHOOK).parent().unwrap().join("deps").join(format!("libkvhook_{name}.so"))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn inspect_reads_a_plugin_without_loading_it() {
    let truncate = library("truncate");
    let (text, _) = succeed(&["inspect", truncate.to_str().unwrap()]);
    for part in ["truncate", "kvh.on_prefill_done/1", "before_attention", "layer_counts", "keep", "same here: "] {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    assert!(!text.contains("Checks"));

    let (text, _) = succeed(&["inspect", truncate.to_str().unwrap(), "--json"]);
    let inspection = &json(&text)["inspection"];
    assert_eq!(inspection["id"], "truncate");
    assert_eq!(inspection["checks"], Value::Array(Vec::new()));
    let keys: Vec<&str> =
        inspection["config"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap()).collect();
    assert!(["keep", "budget", "sinks", "recent", "history", "every"].iter().all(|key| keys.contains(key)), "{keys:?}");
}

#[test]
fn inspect_lists_the_checks_of_a_load() {
    let (text, _) = succeed(&["inspect", library("noop").to_str().unwrap(), "--load", "--json"]);
    let report = json(&text);
    assert_eq!(report["passed"], true);
    let checks = report["inspection"]["checks"].as_array().unwrap();
    assert!(checks.len() > 10 && checks.iter().all(|check| check["outcome"] == "pass"), "{text}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libkvhook_text.so");
    std::fs::write(&path, "not a library").unwrap();
    let output = kvhook(&["inspect", path.to_str().unwrap(), "--load"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.matches("FAIL").count(), 1, "{text}");
    assert!(text.contains("not an ELF shared library") && text.contains("not reached"), "{text}");
    fail(&["inspect", path.to_str().unwrap()], 4, &["not an ELF shared library"]);
    fail(&["inspect", "no-such.so"], 2, &["no such file"]);
}

#[test]
fn run_writes_the_same_without_a_plugin_and_with_noop() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = folder.path().join("prompt.txt");
    let novel = std::fs::read_to_string(shared("text/moby-dick.txt")).unwrap();
    std::fs::write(&prompt, &novel[..800]).unwrap();
    let run = |more: &[&str]| {
        let base = ["run", "--model", model(), "--prompt-file", prompt.to_str().unwrap(), "--max-new-tokens", "8"];
        succeed(&[&base, more].concat())
    };
    let (plain, quiet) = run(&[]);
    assert!(plain.trim().len() > 8, "{plain:?}");
    assert_eq!(quiet, "", "nothing is said unless asked for");
    let (noop, said) = run(&["--plugin", "noop", "--cache", "paged", "--ranks", "3", "-v"]);
    assert_eq!(noop, plain);
    for part in ["prefill: ", "before_attention", "decode: 8 tokens"] {
        assert!(said.contains(part), "no {part} in\n{said}");
    }
    let path = library("truncate");
    let (_, said) = run(&["--plugin", path.to_str().unwrap(), "--config", "keep=0.25,recent=16", "-v"]);
    for part in ["compressed at position", "entries", "on_prefill_done", "commit (host)"] {
        assert!(said.contains(part), "no {part} in\n{said}");
    }
    let (_, said) = run(&["--plugin", "truncate", "--config", "keep=1", "-v"]);
    assert!(said.contains("not compressed (1×): no_gain"), "{said}");
    let (_, said) = run(&["--plugin", "truncate", "--config", "keep=0.25,min_tokens=4000", "-v"]);
    assert!(said.contains("min_tokens"), "{said}");
    let (_, said) = run(&["--plugin", "truncate", "--config", "budget=96,every=4", "-v"]);
    assert!(said.matches("compressed at position").count() >= 2, "{said}");
}

#[test]
fn compare_measures_what_the_arms_do() {
    let folder = tempfile::tempdir().unwrap();
    let [results, page] = ["r.json", "r.html"].map(|name| folder.path().join(name).to_str().unwrap().to_owned());
    let compare = |cache: &str, arms: &[&str]| {
        let text = shared("text/state-of-the-union.txt");
        let base = ["compare", "--model", model(), "--text", &text, "--prefix", "256", "--continuation", "32"];
        let rest = ["--passages", "2", "--cache", cache, "--json", &results, "--html", &page];
        let arms: Vec<&str> = arms.iter().flat_map(|arm| ["--arm", *arm]).collect();
        let (table, _) = succeed(&[&base[..], &rest, &arms].concat());
        (table, json(&std::fs::read_to_string(&results).unwrap()))
    };
    let arms = ["noop=noop", "half=truncate:keep=0.5", "often=truncate:budget=128,every=8", "never=truncate:keep=1"];
    let (table, report) = compare("contiguous", &arms);
    assert!(table.contains("half") && table.contains("First words after"), "{table}");
    assert!(std::fs::read_to_string(&page).unwrap().contains("</html>"));

    let arms = report["comparison"]["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|arm| arm["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["full", "noop", "half", "often", "never"]);
    let measures = |arm: &Value| arm["measures"].as_array().unwrap().clone();
    // 30 layers of 3 KV heads; the last token of the prefix is decoded, not compressed.
    let entries = 30 * 3 * 255;
    for arm in [&arms[0], &arms[1], &arms[4]] {
        for measure in measures(arm) {
            assert_eq!(measure["entries_after"], entries, "{}", arm["name"]);
            assert_eq!(measure["quality"]["kl"], 0.0, "{}: not even the last bit may differ", arm["name"]);
            assert_eq!(measure["quality"]["top1_agreement"], 1.0);
            assert_eq!(measure["passkey_found"], true, "the key is found without compression");
        }
    }
    assert_eq!(arms[1]["measures"][0]["first_words"], arms[0]["measures"][0]["first_words"]);
    // A prompt and the one with the key, on two passages.
    assert_eq!(arms[4]["fallbacks"]["no_gain"], 4);
    for measure in measures(&arms[2]) {
        assert_eq!(measure["entries_before"], entries);
        // Half of 255.
        let after = measure["entries_after"].as_u64().unwrap();
        assert!(after == 90 * 127 || after == 90 * 128, "{after}");
        // f16 keys and values of 64 channels.
        assert_eq!(measure["bytes_after"], after * 256);
        let kl = measure["quality"]["kl"].as_f64().unwrap();
        assert!(kl > 0.001 && kl < 1.0, "{kl}");
        assert!(measure["hook_ms"]["on_prefill_done"].as_f64().unwrap() > 0.0);
        assert!(measure["prefill_ms"].as_f64().unwrap() > measure["commit_ms"].as_f64().unwrap());
        assert!(measure["decode_tokens_per_second"].as_f64().unwrap() > 0.5);
    }
    assert!(arms[3]["measures"][0]["hook_ms"]["on_grown"].as_f64().unwrap() > 0.0);
    // Four sinks and the last 124 of 255, in bins of one or two positions.
    let kept = arms[2]["survivors"]["kept"][7].as_array().unwrap();
    assert_eq!((kept[0].as_f64(), kept[20].as_f64(), kept[127].as_f64()), (Some(1.0), Some(0.0), Some(1.0)));

    // A paged cache whose arms share their prefill gives the same logits.
    let (_, paged) = compare("paged", &["half=truncate:keep=0.5"]);
    let again = paged["comparison"]["arms"].as_array().unwrap();
    assert_eq!(again[1]["measures"][0]["quality"], arms[2]["measures"][0]["quality"]);
    assert_eq!(again[1]["measures"][1]["first_words"], arms[2]["measures"][1]["first_words"]);
}

#[test]
fn errors_have_their_exit_codes() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (hello, empty, binary) = (put("hello.txt", b"Hello"), put("empty.txt", b""), put("binary.txt", b"ok\xff"));
    let run = |model: &str, prompt: &str, more: &[&str], code: i32, words: &[&str]| {
        fail(&[&["run", "--model", model, "--prompt-file", prompt], more].concat(), code, words);
    };
    run("no-such.gguf", &hello, &[], 2, &["no-such.gguf", "check the path"]);
    run(&hello, &hello, &[], 4, &["GGUF"]);
    run(model(), "no-such.txt", &[], 2, &["no-such.txt"]);
    run(model(), &binary, &[], 2, &["not UTF-8", "byte 2"]);
    run(model(), &empty, &[], 2, &["no tokens"]);
    run(model(), &hello, &["--ranks", "100"], 2, &["ranks is 100"]);
    run(model(), &hello, &["--plugin", "no-such"], 4, &["libkvhook_no_such.so", "KVHOOK_PLUGIN_PATH"]);
    run(model(), &hello, &["--plugin", "./no-such.so"], 4, &["no-such.so"]);
    run(model(), &hello, &["--plugin", &hello], 4, &["not an ELF"]);
    run(model(), &hello, &["--plugin", "truncate", "--config", "kep=0.5"], 4, &["kep", "keep"]);
    run(model(), &hello, &["--plugin", "truncate", "--config", "keep=2"], 4, &["keep"]);

    let compare = |more: &[&str], code: i32, words: &[&str]| {
        fail(&[&["compare", "--model", model(), "--text", &hello], more].concat(), code, words);
    };
    compare(&["--arm", "a=noop"], 2, &["0 passages of 1152 tokens", "8 were asked for"]);
    compare(&["--arm", "a=noop", "--arm", "a=noop"], 2, &["two arms are named `a`"]);
    compare(&["--arm", "noop"], 2, &["NAME=PLUGIN:CONFIG"]);
    let text = shared("text/moby-dick.txt");
    let arms = ["--arm", "good=noop", "--arm", "bad=truncate:history=most"];
    fail(
        &[&["compare", "--model", model(), "--text", &text], &arms[..]].concat(),
        4,
        &["arm `bad`", "history", "most"],
    );
    let small = ["--prefix", "8", "--continuation", "2", "--passages", "1", "--arm", "a=noop", "--json", "/no/such/r"];
    fail(&[&["compare", "--model", model(), "--text", &text], &small[..]].concat(), 5, &["/no/such/r"]);

    // No model yet, and no Python to fetch it with.
    let output = Command::new(KVHOOK)
        .arg("demo")
        .env("KVHOOK_CACHE", folder.path().join("cache"))
        .env("PATH", "")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{err}");
    assert!(err.contains("python3") && err.contains("--model"), "{err}");
}

#[test]
fn a_device_that_is_not_there_is_named_with_what_to_do() {
    let prompt = shared("text/SOURCE.md");
    // With and without CUDA in this build and on this machine.
    fail(
        &["run", "--model", model(), "--prompt-file", &prompt, "--device", "cuda:9999"],
        3,
        &["cuda:9999", "use the CPU"],
    );
}
