//! One rule in a process of its own.

use std::env;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kvhook_testing::conformance::Rule;

use super::report::{Outcome, Report};
use super::seconds;
use crate::args::Validate;
use crate::error::{CliError, EXIT_USAGE};

/// How often a process is asked whether it is done.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// Lines of what a process said last that are shown.
const LAST_LINES: usize = 6;

/// Checks a rule by this program, started again.
pub(super) fn check(options: &Validate, rule: &Rule) -> Result<Outcome, CliError> {
    let failed = |what: &str, error: std::io::Error| CliError::Validate(format!("cannot {what}: {error}"));
    // Files and not pipes: a plugin may say more than a pipe holds, or leave a process behind that keeps one open.
    let file = || tempfile::tempfile().map_err(|error| failed("make a temporary file", error));
    let (mut out, mut err) = (file()?, file()?);
    let copy = |file: &File| file.try_clone().map_err(|error| failed("share a temporary file", error));
    let program = env::current_exe().map_err(|error| failed("find this program", error))?;
    let mut child = Command::new(program)
        .args(["validate", "--in-process", "--json", "--only", rule.name])
        .arg(format!("--config={}", options.config))
        .args([
            "--seed",
            &options.seed.to_string(),
            "--shape",
            &options.shape.to_string(),
            "--rope-base",
            &options.rope_base.to_string(),
            "--",
        ])
        .arg(&options.plugin)
        .stdin(Stdio::null())
        .stdout(copy(&out)?)
        .stderr(copy(&err)?)
        .spawn()
        .map_err(|error| failed("start this program again", error))?;
    let started = Instant::now();
    let ended = loop {
        match child.try_wait().map_err(|error| failed("wait for a process", error))? {
            Some(status) => break Some(status),
            None if started.elapsed() > options.timeout.0 => break None,
            None => std::thread::sleep(ASK_EVERY),
        }
    };
    if ended.is_none() {
        // Both fail only where it has just ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
    let said = text(&mut err);
    let Some(status) = ended else {
        let reason = format!("no answer within {}; its process was ended", seconds(options.timeout.0));
        return Ok(Outcome::Broken { reason: with_words(reason, &said) });
    };
    if let Some(outcome) = outcome(&text(&mut out), rule) {
        return Ok(outcome);
    }
    if status.code() == Some(EXIT_USAGE.into()) && said.starts_with("error: ") {
        return Err(CliError::Validate(said.trim().trim_start_matches("error: ").to_owned()));
    }
    Ok(Outcome::Broken { reason: with_words(how_it_ended(status), &said) })
}

/// The rule's outcome in what its process printed: the plugin may have printed too, before and after.
fn outcome(printed: &str, rule: &Rule) -> Option<Outcome> {
    let start = printed.rfind("\n{\n").map(|at| at + 1).or_else(|| printed.starts_with("{\n").then_some(0))?;
    let mut stream = serde_json::Deserializer::from_str(&printed[start..]).into_iter::<Report>();
    let report = stream.next()?.ok()?;
    report.rules.into_iter().find(|found| found.name == rule.name).map(|found| found.outcome)
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    // What cannot be read back is missing from a message only.
    read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&bytes).into_owned())
}

fn how_it_ended(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("its process was ended by signal {signal}{}", signal_name(signal)),
        (None, Some(code)) => format!("its process ended with exit code {code} and without an answer"),
        (None, None) => "its process ended without an answer".into(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL: an instruction that does not exist)",
        6 => " (SIGABRT: it gave up, as after a panic that must not leave a function)",
        7 => " (SIGBUS: memory that cannot be reached)",
        8 => " (SIGFPE: an integer division by zero)",
        9 => " (SIGKILL: from outside, or no memory was left)",
        11 => " (SIGSEGV: memory that is not its own)",
        _ => "",
    }
}

fn with_words(reason: String, said: &str) -> String {
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    if last.is_empty() { reason } else { format!("{reason}; it said last:\n{}", last.join("\n")) }
}
