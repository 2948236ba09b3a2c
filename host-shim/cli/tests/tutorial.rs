//! docs/tutorial.md: its files are written and its commands run, in their order, in an empty folder.
//!
//! The part about InfiniLM is run by `host-shim/infinilm/tests/engine/test_tutorial.py`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

const PAGE: &str = include_str!("../../../docs/tutorial.md");

/// What is run elsewhere begins here.
const ELSEWHERE: &str = "\n## In InfiniLM\n";

/// The page as a shell script. A block of Rust is the file, or the end of the file, that the text before it names last.
fn script(page: &str) -> String {
    let mut script = String::from("set -euo pipefail\n");
    let mut text = "";
    let mut rest = page;
    while let Some((before, after)) = rest.split_once("\n```") {
        let (block, after) = after.split_once("\n```\n").unwrap();
        let (language, body) = block.split_once('\n').unwrap();
        text = if before.trim().is_empty() { text } else { before };
        match language {
            "sh" => {
                script += body;
                // One folder for what cargo builds in this and in other tests: dependencies are built once.
                script += "\n[ ! -f Cargo.toml ] || [ -e target ] || ln -s \"$BUILT\" target\n";
            }
            "rust" => {
                let file = text.rsplit('`').nth(1).unwrap();
                let redirect = if text.contains("Add this") { ">>" } else { ">" };
                script += &format!("cat {redirect} {file} <<'END OF FILE'\n{body}\nEND OF FILE\n");
            }
            other => panic!("what is a block of `{other}` for?"),
        }
        rest = after;
    }
    script
}

#[test]
fn every_command_works() {
    let folder = tempfile::tempdir().unwrap();
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("projects");
    fs::create_dir_all(&built).unwrap();
    let (here, _) = PAGE.split_once(ELSEWHERE).unwrap();
    let kvhook = Path::new(env!("CARGO_BIN_EXE_kvhook")).parent().unwrap();
    let mut path = vec![kvhook.to_owned(), Path::new(env!("CARGO")).parent().unwrap().to_owned()];
    path.extend(env::split_paths(&env::var_os("PATH").unwrap()));
    let mut command = Command::new("bash");
    command.arg("-c").arg(script(here)).current_dir(folder.path());
    // Nothing of the cargo that runs this test.
    for (name, _) in env::vars().filter(|(name, _)| name.starts_with("CARGO") && name != "CARGO_HOME") {
        command.env_remove(name);
    }
    command.env("PATH", env::join_paths(path).unwrap()).env("BUILT", built);
    let output = command.output().unwrap();
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);

    assert!(out.contains("an_entry_counts_less_the_older_it_is ... ok"), "{out}");
    assert!(err.contains("compressed at position") && !err.contains("not compressed"), "{err}");
    let page = fs::read_to_string(folder.path().join("value-norm/eval.html")).unwrap();
    assert!(page.contains("value-norm") || page.contains("value_norm"));
}
