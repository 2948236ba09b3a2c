//! What plugins did to one sequence, in words.

use std::fmt::Write;
use std::time::Duration;

use kvhook_engine::SequenceReport;
use kvhook_engine::hooks::{CommitReport, Figures, HookTime, Movement};

use crate::format::mebibytes;

/// Reasons of the host that are a plugin's fault.
pub const FAULTS: [&str; 7] =
    ["plugin_error", "panic", "poisoned", "bad_index", "bad_count", "bad_position", "bad_plan"];

/// What happened to a sequence after its first `commits` commits: one line for each compression.
pub fn compressions(report: &SequenceReport, commits: usize) -> String {
    report.commits.iter().skip(commits).map(compression).collect()
}

fn compression(commit: &CommitReport) -> String {
    let movement = match commit.movement {
        Movement::InPlace => "rows moved to the front",
        Movement::Fresh => "rows copied into fresh blocks",
        Movement::Table => "blocks dropped, no row moved",
    };
    format!(
        "compressed at position {}: {} rows in each layer, {movement}, {} MiB given back\n",
        commit.position,
        change(&range(&commit.lengths_before), &range(&commit.lengths_after)),
        mebibytes(commit.bytes_freed as f64),
    )
}

/// Why a sequence stayed as it was, and what the host could not do: one line for each reason.
pub fn fallbacks(report: &SequenceReport) -> String {
    let mut text = String::new();
    let nothing = report.commits.is_empty() && report.kept.is_empty() && report.failures.is_empty();
    if report.uid != 0 && nothing && !report.pending {
        text += "not compressed: the plugin kept everything, or the prompt is shorter than its min_tokens\n";
    }
    for (reason, count) in &report.kept {
        text += &format!("not compressed ({count}×): {reason}\n");
    }
    for failure in &report.failures {
        text += &format!("failed: {failure}\n");
    }
    text
}

/// Entries and bytes that the sequence holds, beside those that it would hold uncompressed.
pub fn cache(report: &SequenceReport) -> String {
    format!(
        "cache: {} entries, {} MiB\n",
        change(&report.entries_full.to_string(), &report.entries.to_string()),
        change(&mebibytes(report.bytes_full as f64), &mebibytes(report.bytes as f64)),
    )
}

/// The functions of a plugin by name, with the time spent in each.
pub fn hook_times(figures: &Figures) -> [(&'static str, HookTime); 5] {
    [
        ("bound", figures.bound),
        ("on_prefill_done", figures.on_prefill_done),
        ("on_grown", figures.on_grown),
        ("before_attention", figures.before_attention),
        ("on_free", figures.on_free),
    ]
}

/// Calls and times of each hook that was called, and of the host's commits.
pub fn hooks(figures: &Figures) -> String {
    let rows = hook_times(figures).into_iter().chain([("commit (host)", figures.commit)]);
    let called: Vec<(&str, HookTime)> = rows.filter(|(_, time)| time.calls > 0).collect();
    if called.is_empty() {
        return "no hook was called\n".into();
    }
    let mut text = format!("{:<17} {:>8} {:>12} {:>12}\n", "hook", "calls", "total ms", "longest ms");
    for (name, time) in called {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        // Writing into a string does not fail.
        let _ = writeln!(text, "{name:<17} {:>8} {:>12.3} {:>12.3}", time.calls, ms(time.total), ms(time.longest));
    }
    text
}

fn change(before: &str, after: &str) -> String {
    if before == after { before.into() } else { format!("{before}→{after}") }
}

/// The one value, or the least and the greatest.
fn range(values: &[usize]) -> String {
    let (least, most) = (values.iter().min().unwrap_or(&0), values.iter().max().unwrap_or(&0));
    if least == most { least.to_string() } else { format!("{least}..{most}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_in_words() {
        let commit = CommitReport {
            position: 100,
            movement: Movement::InPlace,
            lengths_before: vec![100, 100],
            lengths_after: vec![100, 25],
            bytes_freed: 3 << 20,
        };
        let report = SequenceReport { commits: vec![commit], ..SequenceReport::default() };
        assert_eq!(
            compressions(&report, 0),
            "compressed at position 100: 100→25..100 rows in each layer, rows moved to the front, 3.0 MiB given back\n"
        );
        assert_eq!(compressions(&report, 1), "");
    }

    #[test]
    fn a_sequence_without_a_plugin_needs_no_reason() {
        assert_eq!(fallbacks(&SequenceReport::default()), "");
        assert!(fallbacks(&SequenceReport { uid: 7, ..SequenceReport::default() }).starts_with("not compressed"));
    }

    #[test]
    fn only_hooks_that_were_called_are_listed() {
        let time = HookTime { calls: 2, total: Duration::from_micros(1500), longest: Duration::from_millis(1) };
        let figures = Figures { on_prefill_done: time, ..Figures::default() };
        let text = hooks(&figures);
        assert_eq!(text.lines().count(), 2);
        let words: Vec<&str> = text.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        assert_eq!(words, ["on_prefill_done", "2", "1.500", "1.000"]);
        assert_eq!(hooks(&Figures::default()), "no hook was called\n");
    }
}
