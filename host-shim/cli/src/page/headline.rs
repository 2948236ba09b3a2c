//! The measures of all arms in one table.

use maud::{Markup, html};

use super::swatch;
use crate::format::{NONE, fixed, mebibytes, optional, percent, plain, with_error};
use crate::results::{ArmSummary, Comparison};

/// One row for each arm.
pub fn table(comparison: &Comparison, summary: &[ArmSummary]) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label="Measures of all arms" {
            table {
                thead {
                    tr {
                        th scope="col" { "arm" }
                        (head("entries per head", "before → after"))
                        (head("KV cache", "MiB"))
                        (head("hooks", "ms"))
                        (head("perplexity", ""))
                        (head("ratio to full", ""))
                        (head("KL to full", "nats/token"))
                        (head("same top-1", "%"))
                        (head("recovered context", "%"))
                        (head("passkey", "found"))
                        (head("decode", "tokens/s"))
                    }
                }
                tbody {
                    @for (series, arm) in summary.iter().enumerate() {
                        tr {
                            th scope="row" { (swatch(series)) (arm.name) }
                            td { (change(fixed(arm.entries_per_head_before, 0), fixed(arm.entries_per_head_after, 0))) }
                            td { (change(mebibytes(arm.bytes_before), mebibytes(arm.bytes_after))) }
                            td { (with_error(&arm.hook_ms)) }
                            td { (plain(arm.perplexity.mean)) }
                            td { (with_error(&arm.perplexity_ratio)) }
                            td { (with_error(&arm.kl)) }
                            td { (with_error(&percent(&arm.top1_agreement))) }
                            td { (optional(arm.recovered_context.as_ref().map(percent).as_ref())) }
                            td { (passkey(arm)) }
                            td { (with_error(&arm.decode_tokens_per_second)) }
                        }
                    }
                }
            }
        }
        p.note { (note(comparison)) }
    }
}

fn head(name: &str, unit: &str) -> Markup {
    html! {
        th scope="col" { (name) @if !unit.is_empty() { br; span.unit { (unit) } } }
    }
}

fn change(before: String, after: String) -> String {
    if before == after { before } else { format!("{before} → {after}") }
}

fn passkey(arm: &ArmSummary) -> Markup {
    match arm.passkey {
        Some(p) => html! {
            span title={ "Wilson 95 % interval: " (fixed(p.low * 100.0, 0)) " to " (fixed(p.high * 100.0, 0)) " %" } {
                (p.yes) "/" (p.asked)
            }
        },
        None => html! { (NONE) },
    }
}

fn note(comparison: &Comparison) -> String {
    format!(
        "{} Perplexity is a mean over passages that differ much; the ratio compares like with like.",
        super::spread(comparison.passages.len())
    )
}
