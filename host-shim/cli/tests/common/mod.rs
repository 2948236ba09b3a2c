//! The built program, run as a user does.

use std::process::{Command, Output};

/// Path of the program.
pub const KVHOOK: &str = env!("CARGO_BIN_EXE_kvhook");

/// Runs it.
pub fn kvhook(arguments: &[&str]) -> Output {
    Command::new(KVHOOK).args(arguments).output().unwrap()
}

/// Runs a command that must fail with `code`, and say `words` on standard error.
pub fn fail(arguments: &[&str], code: i32, words: &[&str]) {
    let output = kvhook(arguments);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}:\n{err}");
    for word in words {
        assert!(err.contains(word), "{arguments:?}: no `{word}` in\n{err}");
    }
}
