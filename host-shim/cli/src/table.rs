//! A comparison in the terminal, in at most [`WIDTH`] columns.

use comfy_table::{Cell, CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle};

use crate::format::{NONE, fixed, mebibytes, optional, percent, plain, with_error};
use crate::record::{ArmProbes, Findings};
use crate::results::{ArmSummary, Comparison};

/// Widest line that is printed, in characters.
pub const WIDTH: u16 = 120;

/// The measures of all arms: one row for each arm.
pub fn measures(comparison: &Comparison) -> String {
    let header = [
        "arm",
        "entries\nper head",
        "KV\nMiB",
        "hooks\nms",
        "perplexity",
        "ratio\nto full",
        "KL to full\nnats/token",
        "same top-1\n%",
        "passkey\nfound",
        "decode\ntokens/s",
    ];
    let rows = comparison.summary().into_iter().map(|arm| {
        vec![
            arm.name.clone(),
            change(fixed(arm.entries_per_head_before, 0), fixed(arm.entries_per_head_after, 0)),
            change(mebibytes(arm.bytes_before), mebibytes(arm.bytes_after)),
            with_error(&arm.hook_ms),
            plain(arm.perplexity.mean),
            with_error(&arm.perplexity_ratio),
            with_error(&arm.kl),
            with_error(&percent(&arm.top1_agreement)),
            passkey(&arm),
            with_error(&arm.decode_tokens_per_second),
        ]
    });
    let caption = format!(
        "{} · {} cache · {} + {} tokens · {}",
        comparison.model.name,
        comparison.settings.dtype,
        comparison.settings.prefix,
        comparison.settings.continuation,
        passages(comparison.passages.len()),
    );
    format!("{caption}\n{}\n", lines(&header, rows))
}

/// The rarer measures: recovered context, prefill, commit, and differences to the reference arm.
pub fn details(comparison: &Comparison) -> String {
    let header = [
        "arm",
        "kept\n%",
        "recovered\ncontext %",
        "prefill\nms",
        "commit\nms",
        "NLL difference\nnats/token",
        "KL difference\nnats/token",
        "decode difference\ntokens/s",
    ];
    let rows = comparison.summary().into_iter().map(|arm| {
        let paired = arm.paired.as_ref();
        vec![
            arm.name.clone(),
            with_error(&percent(&arm.kept_fraction)),
            optional(arm.recovered_context.as_ref().map(percent).as_ref()),
            with_error(&arm.prefill_ms),
            with_error(&arm.commit_ms),
            optional(paired.map(|p| &p.nll)),
            optional(paired.map(|p| &p.kl)),
            optional(paired.map(|p| &p.decode_tokens_per_second)),
        ]
    });
    format!("Differences are to `{}`, on the same passages.\n{}\n", comparison.settings.reference, lines(&header, rows))
}

/// The first words that each arm writes after one passage, by its index.
pub fn first_words(comparison: &Comparison, passage: usize) -> String {
    let mut table = bare();
    for arm in &comparison.arms {
        if let Some(measures) = arm.measures.get(passage) {
            table.add_row([Cell::new(&arm.name), Cell::new(one_line(&measures.first_words))]);
        }
    }
    table.trim_fmt()
}

/// What arms did while an engine served, and how their probes fared: one row for each arm.
pub fn arms(findings: &Findings<'_>) -> String {
    let header = [
        "arm",
        "sequences",
        "kept\n%",
        "given back\nMiB",
        "hooks\nus/token",
        "not\ncompressed",
        "probes",
        "same\nanswer",
        "same tokens\n%",
        "KL\nnats/token",
    ];
    let rows = findings.arms.iter().map(|arm| {
        let total = arm.history.map(|history| &history.total);
        let differing = arm.probes.and_then(ArmProbes::differing);
        let kept = total.and_then(|total| total.kept().or(total.shadow_kept()));
        let cell = |value: Option<String>| value.unwrap_or_else(|| NONE.into());
        vec![
            arm.name.to_owned(),
            cell(total.map(|total| total.sequences.to_string())),
            cell(kept.map(|kept| fixed(kept * 100.0, 1))),
            cell(total.map(|total| mebibytes(total.bytes_freed as f64))),
            cell(total.and_then(|total| total.hook_ns_per_token()).map(|ns| plain(ns / 1e3))),
            cell(total.map(|total| total.fallbacks.to_string())),
            cell(differing.map(|differing| differing.asked.to_string())),
            cell(differing.map(|differing| (differing.asked - differing.yes).to_string())),
            optional(arm.probes.and_then(ArmProbes::same_tokens).as_ref().map(percent).as_ref()),
            optional(arm.probes.and_then(ArmProbes::kl).as_ref()),
        ]
    });
    format!("{}\n", lines(&header, rows))
}

/// Fallbacks by reason, or nothing when there were none.
pub fn fallbacks(comparison: &Comparison) -> String {
    let mut text = String::new();
    for arm in &comparison.arms {
        for (reason, count) in &arm.fallbacks {
            text += &format!("{}: {count} not compressed: {reason}\n", arm.name);
        }
    }
    text
}

fn change(before: String, after: String) -> String {
    if before == after { before } else { format!("{before}→{after}") }
}

fn passkey(arm: &ArmSummary) -> String {
    arm.passkey.map_or_else(|| crate::format::NONE.into(), |p| format!("{}/{}", p.yes, p.asked))
}

fn passages(n: usize) -> String {
    match n {
        1 => "1 passage, so no errors are given".into(),
        n => format!("mean ± standard error over {n} passages"),
    }
}

/// Text on one line, so that a table's rows stay rows, and without characters that steer a terminal.
fn one_line(text: &str) -> String {
    text.trim().replace('\n', " ⏎ ").chars().filter(|c| !c.is_control()).collect()
}

fn bare() -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH);
    table
}

/// Numbers to the right and never broken; a long name in the first column is.
fn lines(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = bare();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(header.iter().map(Cell::new));
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
        column.set_constraint(ColumnConstraint::ContentWidth);
        column.set_padding((1, 0));
    }
    table.trim_fmt()
}
