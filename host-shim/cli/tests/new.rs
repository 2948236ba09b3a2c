//! `kvhook new`: what it writes builds, passes its own tests, and runs on the real model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::{bf16, f16};
use tempfile::TempDir;

const KVHOOK: &str = env!("CARGO_BIN_EXE_kvhook");

/// Runs `kvhook new` in `folder`.
fn new(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(KVHOOK).arg("new").args(arguments).current_dir(folder).output().unwrap()
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{command:?} ended with {}\n{out}{err}", output.status);
    out
}

/// A new project and the folder that it lies in.
fn project(arguments: &[&str]) -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let output = new(parent.path(), arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains(&format!("cd {} && ", arguments[0])));
    let folder = parent.path().join(arguments[0]);
    (parent, folder)
}

/// Runs cargo in a project, without a network where all that it needs was fetched before.
fn cargo(folder: &Path, arguments: &[&str]) -> String {
    let command = |offline: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.current_dir(folder).args(arguments).args(offline);
        // Nothing of the cargo that runs this test.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO") && name != "CARGO_HOME") {
            command.env_remove(name);
        }
        // One for all projects: their dependencies are built once.
        command.env("CARGO_TARGET_DIR", target());
        command
    };
    match command(&["--offline"]).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => succeed(&mut command(&[])),
    }
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("projects")
}

/// Checks the rules that every plugin keeps.
fn validate(library: &Path) {
    succeed(Command::new(KVHOOK).arg("validate").arg(library));
}

/// Runs a plugin on the real model, and gives what is said of its work.
fn run(plugin: &Path, config: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let prompt = folder.path().join("prompt.txt");
    let novel = format!("{}/../../tests/text/moby-dick.txt", env!("CARGO_MANIFEST_DIR"));
    fs::write(&prompt, &fs::read_to_string(novel).unwrap()[..800]).unwrap();
    let model = kvhook_engine::model::fetch::default_model(|_, _| {}).unwrap();
    let mut command = Command::new(KVHOOK);
    command.arg("run").arg("--model").arg(model).arg("--prompt-file").arg(prompt).arg("--plugin").arg(plugin);
    command.args(["--config", config, "--cache", "paged", "--ranks", "3", "--max-new-tokens", "8", "-v"]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}:\n{said}");
    assert!(String::from_utf8_lossy(&output.stdout).trim().len() > 8);
    said
}

#[test]
fn projects_in_rust_pass_their_tests_and_run() {
    for (name, kind, config) in [("value-norm", "scorer", "keep=0.5"), ("merge_pairs", "rewriter", "recent=16")] {
        let (_parent, folder) = project(&[name, "--kind", kind]);
        let tested = cargo(&folder, &["test", "--release"]);
        assert!(tested.contains("test a_short_sequence_is_kept ... ok"), "{tested}");
        assert!(tested.contains("test every_rule_holds ... ok"), "{tested}");
        // As strict as the project's own CI.
        cargo(&folder, &["clippy", "--release", "--all-targets", "--", "-D", "warnings"]);
        succeed(
            Command::new("rustfmt")
                .args(["--edition", "2024", "--check", "src/lib.rs", "tests/plugin.rs", "tests/conformance.rs"])
                .current_dir(&folder),
        );
        cargo(&folder, &["build", "--release"]);
        let library = target().join(format!("release/libkvhook_{}.so", name.replace('-', "_")));
        let checked = succeed(Command::new(KVHOOK).arg("inspect").arg(&library).args(["--load", "--json"]));
        let checked: serde_json::Value = serde_json::from_str(&checked).unwrap();
        assert_eq!((&checked["inspection"]["id"], &checked["passed"]), (&name.into(), &true.into()));
        validate(&library);
        let said = run(&library, config);
        assert!(said.contains("compressed at position") && !said.contains("not compressed"), "{said}");
    }
}

#[test]
fn projects_in_c_pass_their_tests_and_run() {
    for (name, kind, config) in [("long-values", "scorer", "keep=0.5"), ("merge_pairs", "rewriter", "recent=16")] {
        let (_parent, folder) = project(&[name, "--lang", "c", "--kind", kind]);
        let tested = succeed(Command::new("make").arg("test").current_dir(&folder));
        assert!(tested.contains("all tests passed"), "{tested}");
        let library = folder.join(format!("libkvhook_{}.so", name.replace('-', "_")));
        validate(&library);
        let said = run(&library, config);
        assert!(said.contains("compressed at position") && !said.contains("not compressed"), "{said}");
    }
}

/// Every half, one float in 4093, and all ties.
#[test]
fn the_element_types_of_c_projects_are_those_of_the_half_crate() {
    let (_parent, folder) = project(&["types", "--lang", "c"]);
    fs::write(
        folder.join("convert.c"),
        r#"#include "helpers.h"
int main(void) {
    for (uint32_t i = 0; i < 65536; i++)
        printf("%u\n", (unsigned)bits_of_float(float_of_half((uint16_t)i)));
    for (uint64_t i = 0; i < 0x100000000; i += 4093)
        printf("%u\n", (unsigned)half_of_float(float_of_bits((uint32_t)i)) << 16 | bfloat_of_float(float_of_bits((uint32_t)i)));
    for (uint32_t i = 0; i < 65536; i++) {
        const uint32_t even = bits_of_float(float_of_half((uint16_t)i)) + 0x1000;
        printf("%u\n", (unsigned)half_of_float(float_of_bits(even)) << 16 | bfloat_of_float(float_of_bits(i << 16 | 0x8000)));
    }
}
"#,
    )
    .unwrap();
    succeed(
        Command::new("cc")
            .args(["-std=c11", "-Wall", "-Wextra", "-O2", "-Iinclude", "convert.c", "-o", "convert"])
            .current_dir(&folder),
    );
    let printed = succeed(&mut Command::new(folder.join("convert")));
    let mut printed = printed.lines().map(|line| line.parse::<u32>().unwrap());
    for bits in 0..=u16::MAX {
        let (found, expected) = (f32::from_bits(printed.next().unwrap()), f16::from_bits(bits).to_f32());
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "half {bits:#x}");
    }
    let check = |found: u32, half: f32, bfloat: f32| {
        let (found_half, found_bfloat) = (f16::from_bits((found >> 16) as u16), bf16::from_bits(found as u16));
        let (expected_half, expected_bfloat) = (f16::from_f32(half), bf16::from_f32(bfloat));
        let halves = found_half.to_bits() == expected_half.to_bits() || found_half.is_nan() && half.is_nan();
        let bfloats = found_bfloat.to_bits() == expected_bfloat.to_bits() || found_bfloat.is_nan() && bfloat.is_nan();
        assert!(halves, "{half:e}: {found_half:?}, expected {expected_half:?}");
        assert!(bfloats, "{bfloat:e}: {found_bfloat:?}, expected {expected_bfloat:?}");
    };
    for bits in (0..=u32::MAX).step_by(4093) {
        check(printed.next().unwrap(), f32::from_bits(bits), f32::from_bits(bits));
    }
    // Ties.
    for bits in 0..=u16::MAX {
        let half = f32::from_bits(f16::from_bits(bits).to_f32().to_bits() + 0x1000);
        check(printed.next().unwrap(), half, f32::from_bits(u32::from(bits) << 16 | 0x8000));
    }
    assert_eq!(printed.next(), None);
}

#[test]
fn what_is_wrong_is_named_and_nothing_is_overwritten() {
    let parent = tempfile::tempdir().unwrap();
    let fail = |arguments: &[&str], words: &[&str]| {
        let output = new(parent.path(), arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}:\n{said}");
        for word in words {
            assert!(said.contains(word), "{arguments:?}: no `{word}` in\n{said}");
        }
    };
    fail(&[], &["NAME"]);
    fail(&["9lives"], &["9lives", "begins with a letter"]);
    fail(&["../up"], &["`.` cannot be in it"]);
    fail(&["Norm"], &["`N` cannot be in it", "value-norm"]);
    fail(&["kernels"], &["kvhook-kernels", "another name"]);
    fail(&["mine", "--kind", "evictor"], &["evictor", "scorer", "rewriter"]);
    fail(&["mine", "--lang", "zig"], &["zig", "rust", "c"]);
    assert!(fs::read_dir(parent.path()).unwrap().next().is_none(), "a refused command writes nothing");

    let folder = parent.path().join("mine");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("Cargo.toml"), "mine").unwrap();
    fail(&["mine"], &["mine exists", "nothing in it was changed"]);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(folder.join("Cargo.toml")).unwrap(), "mine");
}
