//! How the figures came about: arms, hooks, fallbacks, passages, machine.

use maud::{Markup, html};

use super::counted;
use crate::format::{NONE, fixed, optional, plain, with_error};
use crate::results::{ArmSummary, Comparison};

/// Everything that is needed to repeat the comparison.
pub fn section(comparison: &Comparison, summary: &[ArmSummary]) -> Markup {
    html! {
        section {
            h2 { "Arms" }
            div.scroll tabindex="0" role="region" aria-label="Configs and times of all arms" {
                table {
                    thead {
                        tr {
                            th scope="col" { "arm" }
                            th.left scope="col" { "plugin" }
                            th.left scope="col" { "config" }
                            th.left scope="col" { "hooks" br; span.unit { "ms" } }
                            th scope="col" { "commit" br; span.unit { "ms" } }
                            th scope="col" { "prefill" br; span.unit { "ms" } }
                            th scope="col" { "NLL difference" br; span.unit { "to " (comparison.settings.reference) } }
                            th.left scope="col" { "not compressed" }
                        }
                    }
                    tbody {
                        @for arm in &comparison.arms {
                            @let of_arm = summary.iter().find(|summary| summary.name == arm.name);
                            tr {
                                th scope="row" { (arm.name) }
                                td.left { (arm.plugin.as_deref().unwrap_or(NONE)) }
                                td.left { code { (arm.config) } }
                                td.left { (hooks(of_arm)) }
                                td { (optional(of_arm.map(|s| &s.commit_ms))) }
                                td { (optional(of_arm.map(|s| &s.prefill_ms))) }
                                td { (optional(of_arm.and_then(|s| s.paired.as_ref()).map(|p| &p.nll))) }
                                td.left { (fallbacks(&arm.fallbacks)) }
                            }
                        }
                    }
                }
            }
            h2 { "Passages" }
            div.scroll tabindex="0" role="region" aria-label="Passages" {
                table {
                    thead {
                        tr {
                            th scope="col" { "text" }
                            th scope="col" { "from token" }
                            th scope="col" { "NLL, full cache" br; span.unit { "nats/token" } }
                            th scope="col" { "NLL, no prefix" br; span.unit { "nats/token" } }
                        }
                    }
                    tbody {
                        @for passage in &comparison.passages {
                            tr {
                                th scope="row" { (passage.text) }
                                td { (passage.start) }
                                td { (plain(passage.nll_full)) }
                                td { (passage.nll_no_prefix.map_or_else(|| NONE.into(), plain)) }
                            }
                        }
                    }
                }
            }
            (provenance(comparison))
        }
    }
}

fn hooks(summary: Option<&ArmSummary>) -> Markup {
    html! {
        @for (hook, ms) in summary.into_iter().flat_map(|summary| &summary.hook_ms_by_hook) {
            div { code { (hook) } " " (with_error(ms)) }
        }
    }
}

fn fallbacks(fallbacks: &std::collections::BTreeMap<String, u64>) -> Markup {
    html! {
        @for (reason, count) in fallbacks { div { code { (reason) } " × " (count) } }
    }
}

fn provenance(comparison: &Comparison) -> Markup {
    let (machine, model) = (&comparison.machine, &comparison.model);
    html! {
        h2 { "Where and when" }
        dl {
            dt { "date" } dd { (comparison.date) }
            dt { "kvhook" } dd { (comparison.settings.version) }
            dt { "machine" }
            dd {
                (machine.cpu) ", " (counted(machine.cores, "core", "cores")) ", "
                (fixed(machine.memory_bytes as f64 / (1u64 << 30) as f64, 0)) " GiB, " (machine.system)
            }
            @if !machine.accelerator.is_empty() {
                dt { "model and cache on" }
                dd { (machine.accelerator) "; times of hooks and commits are those to enqueue" }
            }
            dt { "model" }
            dd {
                (model.name) ": " (counted(model.layers, "layer", "layers")) ", "
                (counted(model.kv_heads, "KV head", "KV heads")) ", head_dim " (model.head_dim)
            }
            @if !model.sha256.is_empty() { dt { "sha256" } dd { code { (model.sha256) } } }
        }
    }
}
