//! `kvhook validate`: each rule can be broken by a plugin's file, and those that keep the rules pass.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvhook_faulty::broken::BROKEN;
use kvhook_faulty::variant::{MARK, WORD_BYTES};
use kvhook_testing::conformance::RULES;
use serde_json::Value;
use tempfile::TempDir;

const KVHOOK: &str = env!("CARGO_BIN_EXE_kvhook");

/// Exit code, what was found as JSON (null where nothing was), and what was said on standard error.
fn validate(plugin: &Path, arguments: &[&str]) -> (i32, Value, String) {
    let output = Command::new(KVHOOK).arg("validate").arg(plugin).arg("--json").args(arguments).output().unwrap();
    let found = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap(), found, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A plugin that cargo built beside this test.
fn built(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().join(format!("libkvhook_{name}.so"))
}

/// A copy of a file with some bytes instead of others of the same number.
fn patched(folder: &Path, from: &Path, old: &[u8], new: &[u8]) -> PathBuf {
    assert_eq!(old.len(), new.len());
    let mut bytes = fs::read(from).unwrap();
    let places: Vec<usize> = (0..bytes.len() - old.len()).filter(|at| bytes[*at..].starts_with(old)).collect();
    assert!(!places.is_empty(), "{} has no {:?}", from.display(), String::from_utf8_lossy(old));
    places.iter().for_each(|at| bytes[*at..at + new.len()].copy_from_slice(new));
    let path = folder.join("libkvhook_patched.so");
    fs::write(&path, bytes).unwrap();
    path
}

/// The faulty plugin in the variant of a word.
fn variant(folder: &Path, word: &str) -> PathBuf {
    let marked = |word: &str| [&MARK[..], format!("{word:.<WORD_BYTES$}").as_bytes()].concat();
    patched(folder, &built("faulty"), &marked("good"), &marked(word))
}

/// A plugin in C, of the example's source and what stands behind it.
fn in_c(folder: &Path, more: &str) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (source, library) = (folder.join("plugin.c"), folder.join("libkvhook_window_c.so"));
    fs::write(&source, fs::read_to_string(repository.join("tests/c/plugin.c")).unwrap() + more).unwrap();
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-Wl,-z,nodelete", "-I"])
        .arg(repository.join("hook-abi/include"))
        .arg(&source)
        .arg("-o")
        .arg(&library)
        .status();
    assert!(status.unwrap().success());
    library
}

/// The rule that was found broken, and why.
fn broken(found: &Value) -> (&str, &str) {
    let rules = found["rules"].as_array().unwrap();
    let rule = rules.iter().find(|rule| rule["outcome"] == "broken").unwrap_or_else(|| panic!("none: {found:#}"));
    (rule["name"].as_str().unwrap(), rule["reason"].as_str().unwrap())
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn every_rule_can_be_broken_and_no_broken_plugin_harms_the_program() {
    let folder = folder();
    for case in BROKEN {
        let plugin = variant(folder.path(), case.word);
        let limit = if case.config == "breaks=hang" { "3" } else { "300" };
        let (code, found, said) =
            validate(&plugin, &["--only", case.rule, "--config", case.config, "--seed", "5", "--timeout", limit]);
        assert_eq!(code, 1, "{case:?}: {found:#}\n{said}");
        let (name, reason) = broken(&found);
        assert_eq!((name, &found["seed"], &found["holds"]), (case.rule, &5.into(), &false.into()));
        assert!(reason.contains(case.said), "{case:?}: {reason}");
    }
    // A schema that allows what the plugin then panics at.
    let (code, found, _) = validate(&built("faulty"), &["--only", "configs-keep-the-schema"]);
    assert_eq!((code, broken(&found).0), (1, "configs-keep-the-schema"));
    // Metadata that says something else than what runs.
    for (word, words) in [("other-id", "someone-else"), ("no-hooks", "does not implement `kvh.on_prefill_done/1`")] {
        let (code, found, _) = validate(&variant(folder.path(), word), &["--only", "metadata-is-true"]);
        assert_eq!(code, 1);
        assert!(broken(&found).1.contains(words), "{found:#}");
    }
    let (code, found, _) = validate(
        &in_c(
            folder.path(),
            "extern int cuCtxSynchronize(void) __attribute__((weak));\nint kvh_wait(void);\nint kvh_wait(void) { return cuCtxSynchronize ? cuCtxSynchronize() : 0; }\n",
        ),
        &["--only", "imports-no-synchronisation"],
    );
    assert_eq!(code, 1);
    assert!(broken(&found).1.contains("`cuCtxSynchronize`"), "{found:#}");
}

#[test]
fn what_a_host_refuses_unread_never_runs() {
    let folder = folder();
    let marker = folder.path().join("it-ran");
    let constructor = format!(
        "#include <stdio.h>\n__attribute__((constructor)) static void begin(void) {{ fclose(fopen(\"{}\", \"w\")); }}\n",
        marker.display()
    );
    let good = in_c(folder.path(), &constructor);
    let bad = patched(folder.path(), &good, b"KVHMETA1", b"KVHMETA9");
    let (code, found, said) = validate(&bad, &[]);
    assert_eq!(code, 1, "{said}");
    let (name, reason) = broken(&found);
    assert_eq!(name, "metadata-is-true");
    assert!(reason.contains("before any of it runs") && reason.contains("KVHMETA9"), "{reason}");
    let rules = found["rules"].as_array().unwrap();
    assert_eq!(rules.iter().filter(|rule| rule["outcome"] == "not_run").count(), RULES.len() - 1);
    assert!(!marker.exists(), "a constructor ran");
    let (code, ..) = validate(&good, &["--only", "entry-is-whole"]);
    assert!(code == 0 && marker.exists(), "the constructor of a good file runs");
}

#[test]
fn what_is_no_plugin_is_said_to_be_none() {
    let folder = folder();
    let text = folder.path().join("text.so");
    fs::write(&text, "no library at all").unwrap();
    let fail = |plugin: &Path, arguments: &[&str], words: &[&str]| {
        let (code, found, said) = validate(plugin, arguments);
        assert_eq!((code, found), (2, Value::Null), "{said}");
        for word in words {
            assert!(said.contains(word), "no `{word}` in: {said}");
        }
    };
    fail(&text, &[], &["text.so", "cannot be validated", "ELF"]);
    fail(&folder.path().join("missing.so"), &[], &["missing.so"]);
    fail(folder.path(), &[], &["cannot be validated"]);
    fail(Path::new(KVHOOK), &[], &["cannot be validated"]);
    fail(&built("noop"), &["--only", "no-such-rule"], &["no-such-rule", "plans-keep-the-bound"]);
    fail(&built("truncate"), &["--config", "keep=7"], &["keep", "--config"]);
    fail(&built("noop"), &["--shape", "2,2,3,16"], &["--shape", "30,3,9,64"]);
    fail(&built("noop"), &["--timeout", "0"], &["--timeout", "above 0"]);
}

#[test]
fn plugins_that_keep_the_rules_pass() {
    let folder = folder();
    let c = in_c(folder.path(), "");
    let queries = "history=top,importance=attention,window=16,every=32";
    let cases = [(built("noop"), ""), (built("truncate"), queries), (c, "")];
    for (plugin, config) in cases {
        let (code, found, said) = validate(&plugin, &["--config", config]);
        assert_eq!(code, 0, "{} `{config}`: {found:#}\n{said}", plugin.display());
        assert_eq!(found["holds"], true);
        assert_eq!(found["rules"].as_array().unwrap().len(), RULES.len());
    }
}

/// A rewrite, with its shipped weights. The rules that are left out make many instances of 30 layers, which takes a minute:
/// `kvhook validate mlp-decouple` with these options checks all.
#[test]
fn a_rewrite_keeps_the_rules() {
    let weights = "../../plugins/mlp-decouple/trained/smollm2-135m-f2.safetensors";
    let config = format!("weights={}", Path::new(env!("CARGO_MANIFEST_DIR")).join(weights).display());
    let model = ["--config", &config, "--shape", "30,3,9,64", "--rope-base", "100000"];
    let only = "entry-is-whole,null-arguments-are-refused,larger-structs-are-taken,plans-keep-the-bound,same-in-same-out,\
                values-that-are-no-numbers,metadata-is-true,any-thread-may-call,strange-arguments-are-survived";
    let (code, found, said) = validate(&built("mlp_decouple"), &[&model[..], &["--only", only]].concat());
    assert_eq!(code, 0, "{found:#}\n{said}");
}

#[test]
fn the_table_names_each_rule_and_how_to_repeat_it() {
    let run = |config: &str| {
        let only = "entry-is-whole,plans-keep-the-bound";
        let mut command = Command::new(KVHOOK);
        command.arg("validate").arg(built("faulty")).args(["--only", only, "--config", config]);
        String::from_utf8_lossy(&command.output().unwrap().stdout).into_owned()
    };
    let good = run("");
    assert!(good.contains("holds     1 entry-is-whole") && good.contains("2 of 2 rules hold."), "{good}");
    let bad = run("damage=descending");
    assert!(bad.contains("BROKEN   10 plans-keep-the-bound") && bad.contains("do not ascend"), "{bad}");
    assert!(bad.contains("--seed 1 --only plans-keep-the-bound --in-process"), "{bad}");
}
