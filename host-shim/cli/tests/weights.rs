//! `kvhook convert`, and `kvhook inspect` of weight files.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Runs the program; its exit code and what it printed on both streams.
fn kvhook(arguments: &[&Path]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_kvhook")).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/mlp_decouple").join(name)
}

fn convert(input: &Path, output: &Path, options: &[&str]) -> (i32, String) {
    let first = [Path::new("convert"), input, output];
    kvhook(&first.into_iter().chain(options.iter().map(Path::new)).collect::<Vec<_>>())
}

fn inspect(file: &Path) -> Value {
    let (code, text) = kvhook(&[Path::new("inspect"), file, Path::new("--json")]);
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(code == 0, value["passed"] == true, "{text}");
    value
}

#[test]
fn a_checkpoint_becomes_both_versions_and_says_what_it_was_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let terms = r#"{"positions": "compacted", "min_groups": 2, "image_rule": "prefix", "training": "random"}"#;
    std::fs::write(file("terms.json"), terms).unwrap();
    let terms = file("terms.json");

    let options = ["--dtype", "f16", "--terms", terms.to_str().unwrap()];
    let (code, text) = convert(&golden("f5-f32.pth"), &file("two.safetensors"), &options);
    assert_eq!(code, 0, "{text}");
    for part in [
        "model_state_dict.compressor.compress_iv.1.6.bias",
        "used as layers.1.image_v.2.bias",
        "ignored: in FastCache's state dict, never used",
        "ignored: not under the prefix",
        "2 layers, head_dim 8, factor 5",
    ] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
    let two = inspect(&file("two.safetensors"));
    assert_eq!((&two["weights"]["dtype"], &two["weights"]["version"]), (&"f16".into(), &2.into()));
    assert_eq!(two["weights"]["terms"]["positions"], "compacted");

    let (code, text) = convert(&file("two.safetensors"), &file("one.bin"), &["--to", "v1"]);
    assert_eq!(code, 0, "{text}");
    let one = inspect(&file("one.bin"));
    assert_eq!(one["weights"]["version"], 1);
    assert_eq!(one["weights"]["sha256"], two["weights"]["sha256"]);
    assert_eq!(one["weights"]["terms"], two["weights"]["terms"]);

    // Back and forth in place, with the file that is read replaced.
    let before = std::fs::read(file("one.bin")).unwrap();
    assert_eq!(convert(&file("one.bin"), &file("one.bin"), &[]).0, 0);
    assert_eq!(inspect(&file("one.bin"))["weights"]["version"], 2);
    assert_eq!(convert(&file("one.bin"), &file("one.bin"), &["--to", "v1"]).0, 0);
    assert_eq!(std::fs::read(file("one.bin")).unwrap(), before);
}

#[test]
fn terms_are_added_and_the_others_stay() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for (name, text) in
        [("a.json", r#"{"min_groups": 3}"#), ("b.json", r#"{"sinks": 4}"#), ("c.json", r#"{"sink": 4}"#)]
    {
        std::fs::write(file(name), text).unwrap();
    }
    let with = |name: &str| format!("--terms={}", file(name).display());
    assert_eq!(convert(&golden("plain-bf16.pth"), &file("w"), &["--to=v1", &with("a.json")]).0, 0);
    assert_eq!(convert(&file("w"), &file("w"), &["--to=v1", &with("b.json")]).0, 0);
    let terms = &inspect(&file("w"))["weights"]["terms"];
    assert_eq!((&terms["min_groups"], &terms["sinks"]), (&3.into(), &4.into()));
    let (code, text) = convert(&file("w"), &file("w"), &[&with("c.json")]);
    assert!(code == 2 && text.contains("unknown field `sink`"), "{text}");
}

#[test]
fn the_order_of_image_mlps_is_an_option() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let order = ["--to=v1", "--image-order=tk,tv,iv,ik"];
    assert_eq!(convert(&golden("state-dict.safetensors"), &file("w"), &order).0, 0);
    // The file says it; another order is refused.
    assert_eq!(inspect(&file("w"))["weights"]["v1"]["image_order"], "tk,tv,iv,ik");
    let (code, text) = convert(&file("w"), &file("v"), &["--image-order=tk,tv,ik,iv"]);
    assert!(code == 2 && text.contains("the file's metadata says `tk,tv,iv,ik`"), "{text}");
}

#[test]
fn what_cannot_be_used_is_said_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::write(file("text"), "hello").unwrap();
    let mut cut = std::fs::read(golden("state-dict.safetensors")).unwrap();
    cut.pop();
    std::fs::write(file("cut"), cut).unwrap();
    let cases: [(PathBuf, &[&str], &str); 7] = [
        (golden("module.pth"), &[], "no compressor found among 0 tensors"),
        (golden("legacy.pth"), &[], "before 1.6"),
        (golden("plain-bf16.pth"), &["--prefix", "other"], "no compressor found"),
        (file("text"), &[], "not a weight file: it begins with 68 65 6c 6c 6f"),
        (file("cut"), &[], "not a whole safetensors file"),
        (file("none"), &[], "cannot read"),
        (folder.path().into(), &[], "cannot read"),
    ];
    for (input, options, words) in cases {
        let (code, text) = convert(&input, &file("out"), options);
        assert!(code == 2 && text.contains(words), "{words}: {code} {text}");
    }
    let (code, text) = convert(&golden("plain-bf16.pth"), &file("none/out"), &[]);
    assert!(code == 5 && text.contains("cannot write"), "{text}");
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 2, "only what the test wrote");

    let problem = inspect(&file("cut"));
    assert!(problem["problem"].as_str().unwrap().contains("not a whole safetensors file"), "{problem}");
    let (code, text) = kvhook(&[Path::new("inspect"), &golden("state-dict.safetensors")]);
    assert!(code == 1 && text.contains("FAIL") && text.contains("kvhook convert"), "{text}");
}
