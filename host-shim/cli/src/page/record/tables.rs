//! What arms did and how their probes fared.

use maud::{Markup, html};

use crate::format::{NONE, fixed, mebibytes, plain};
use crate::page::axis::Axis;
use crate::page::svg::{self, Area, n};
use crate::page::{figure, swatch};
use crate::record::{Arm, ArmProbes, Findings, share};
use crate::stats::{Estimate, Proportion};

const ROW: f64 = 36.0;

/// One row for each arm, figures and probes.
pub fn arms(findings: &Findings<'_>) -> Markup {
    let shadows = findings.arms.iter().any(|arm| arm.history.is_some_and(|h| h.total.shadow_kept().is_some()));
    html! {
        div.scroll tabindex="0" role="region" aria-label="Figures and probes of all arms" {
            table {
                thead {
                    tr {
                        th scope="col" { "arm" }
                        (head("sequences", "live"))
                        (head("kept", "% of entries"))
                        @if shadows { (head("as a shadow", "% of entries")) }
                        (head("given back", "MiB"))
                        (head("hooks", "us/token"))
                        th.left scope="col" { "not compressed" }
                        (head("same answer", "probes"))
                        (head("same tokens", "% (95 %)"))
                        (head("KL", "nats/token (95 %)"))
                    }
                }
                tbody {
                    @for (series, arm) in findings.arms.iter().enumerate() { (row(series, arm, shadows)) }
                }
            }
        }
        p.note {
            "Sums from when each arm was made. Hooks: their time and that of commits, over the tokens of the arm's sequences. \
             Same answer: probes answered as without compression. Same tokens: before the first that differs."
        }
    }
}

fn row(series: usize, arm: &Arm<'_>, shadows: bool) -> Markup {
    let total = arm.history.map(|history| history.total);
    let cell = |value: Option<String>| html! { td { (value.unwrap_or_else(|| NONE.into())) } };
    let percent = |share: f64| fixed(share * 100.0, 1);
    html! {
        tr {
            th scope="row" { (swatch(series)) (arm.name) }
            (cell(arm.history.map(|history| {
                let live = match (history.present, history.live) {
                    (false, _) => " (gone)".into(),
                    (true, Some(live)) => format!(" ({live} live)"),
                    (true, None) => String::new(),
                };
                format!("{}{live}", history.total.sequences)
            })))
            (cell(total.and_then(|total| total.kept()).map(percent)))
            @if shadows { (cell(total.and_then(|total| total.shadow_kept()).map(percent))) }
            (cell(total.map(|total| mebibytes(total.bytes_freed as f64))))
            (cell(total.and_then(|total| total.hook_ns_per_token()).map(|ns| plain(ns / 1e3))))
            td.left {
                @for (reason, count) in arm.history.iter().flat_map(|history| &history.fallbacks) {
                    div { code { (reason) } " × " (count) }
                }
            }
            (cell(arm.probes.and_then(ArmProbes::differing).map(same)))
            (cell(arm.probes.and_then(ArmProbes::same_tokens).as_ref().map(share)))
            (cell(arm.probes.and_then(ArmProbes::kl).as_ref().map(kl)))
        }
    }
}

fn same(differing: Proportion) -> String {
    format!(
        "{} of {} ({} to {} %)",
        differing.asked - differing.yes,
        differing.asked,
        fixed((1.0 - differing.high) * 100.0, 0),
        fixed((1.0 - differing.low) * 100.0, 0),
    )
}

fn kl(estimate: &Estimate) -> String {
    let within = estimate.interval().map(|i| format!(" ({} to {})", plain(i.low.max(0.0)), plain(i.high)));
    format!("{}{}", plain(estimate.mean), within.unwrap_or_default())
}

fn head(name: &str, unit: &str) -> Markup {
    html! { th scope="col" { (name) br; span.unit { (unit) } } }
}

/// KL of each arm's probes with its interval.
pub fn divergence(findings: &Findings<'_>) -> Markup {
    let rows: Vec<(usize, &str, Estimate)> = findings
        .arms
        .iter()
        .enumerate()
        .filter_map(|(series, arm)| Some((series, arm.name, arm.probes.and_then(ArmProbes::kl)?)))
        .collect();
    if rows.is_empty() {
        return html! {};
    }
    let ends = |estimate: &Estimate| estimate.interval().map_or([estimate.mean; 2], |i| [i.low.max(0.0), i.high]);
    let some = rows.iter().any(|(_, _, kl)| ends(kl)[1] > 0.0);
    let axis = match some {
        true => Axis::linear(rows.iter().flat_map(|(_, _, kl)| ends(kl)).chain([0.0])),
        false => Axis::Linear { from: 0.0, to: 1.0 },
    };
    let area = Area { left: 14.0, right: 424.0, top: 6.0, bottom: 10.0 + ROW * rows.len() as f64 };
    let said: Vec<String> = rows.iter().map(|(_, name, estimate)| format!("{name} {}", kl(estimate))).collect();
    let content = html! {
        (svg::x_axis(&area, &axis, "KL to the uncompressed model (nats per token)"))
        @for (row, (series, name, estimate)) in rows.iter().enumerate() {
            @let top = area.top + ROW * row as f64;
            @let middle = top + 25.0;
            @let [low, high] = ends(estimate);
            text.name x=(n(area.left + 2.0)) y=(n(top + 13.0)) { (svg::cut(name, 34)) }
            text.value x=(n(area.right)) y=(n(top + 13.0)) text-anchor="end" { (plain(estimate.mean)) }
            line class={ "error " (svg::colour(*series)) } x1=(n(area.x(&axis, low))) x2=(n(area.x(&axis, high)))
                y1=(n(middle)) y2=(n(middle)) {}
            (svg::marker(*series, area.x(&axis, estimate.mean), middle, false))
        }
    };
    let drawing = svg::drawing(area.bottom + 46.0, &format!("KL of probes: {}", said.join("; ")), content);
    figure(
        "Probes: divergence",
        drawing,
        "Mean over prompts with its 95 % interval; 0 is equal to the uncompressed model.",
    )
}
