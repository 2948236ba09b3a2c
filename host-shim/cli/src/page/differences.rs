//! Differences to the reference arm, passage by passage.

use maud::{Markup, html};

use super::axis::Axis;
use super::svg::{self, Area, n};
use crate::format::with_error;
use crate::results::{ArmSummary, Comparison};
use crate::stats::Estimate;

const ROW: f64 = 40.0;

/// One row for each arm: a dot for each passage, the mean and its standard error.
pub fn figure(comparison: &Comparison, summary: &[ArmSummary]) -> Markup {
    let reference = &comparison.settings.reference;
    // The colours follow the place in the summary, as in every other plot.
    let rows: Vec<(usize, &str, Vec<f64>)> = summary
        .iter()
        .enumerate()
        .filter(|(_, arm)| arm.paired.is_some())
        .filter_map(|(series, summary)| {
            let arm = comparison.arms.iter().find(|arm| arm.name == summary.name)?;
            let values = comparison.differences(arm, |measures| measures.quality.kl);
            Some((series, summary.name.as_str(), values.into_iter().filter(|v| v.is_finite()).collect()))
        })
        .collect();
    let axis = Axis::linear(rows.iter().flat_map(|(_, _, values)| values.iter().copied()).chain([0.0]));
    let area = Area { left: 24.0, right: 416.0, top: 6.0, bottom: 10.0 + ROW * rows.len() as f64 };
    let zero = n(area.x(&axis, 0.0));
    let content = html! {
        (svg::x_axis(&area, &axis, &format!("KL minus KL of {} (nats per token)", svg::cut(reference, 24))))
        line.zero x1=(zero) x2=(zero) y1=(n(area.top)) y2=(n(area.bottom)) {}
        @for (row, (series, name, values)) in rows.iter().enumerate() {
            @let top = area.top + ROW * row as f64;
            @let middle = n(top + 27.0);
            text.name x="4" y=(n(top + 14.0)) { (svg::cut(name, 34)) }
            @for value in values {
                circle class={ "dot " (svg::colour(*series)) } cx=(n(area.x(&axis, *value))) cy=(middle) r="4.5" {}
            }
            @if let Some(mean) = Estimate::of(values.iter().copied()) {
                text.value x=(n(area.right)) y=(n(top + 14.0)) text-anchor="end" { (with_error(&mean)) }
                @let x = area.x(&axis, mean.mean);
                @if let Some(error) = mean.standard_error {
                    line.whisker x1=(n(area.x(&axis, mean.mean - error))) x2=(n(area.x(&axis, mean.mean + error)))
                        y1=(middle) y2=(middle) {}
                }
                line.mean x1=(n(x)) x2=(n(x)) y1=(n(top + 20.0)) y2=(n(top + 34.0)) {}
            }
        }
    };
    let caption = format!(
        "Left of 0: closer to the full cache than {reference} on that passage. One dot for each of {}; the upright \
         line is their mean, the level one its standard error.",
        super::counted(comparison.passages.len(), "passage", "passages")
    );
    super::figure("Paired differences", svg::drawing(area.bottom + 46.0, "paired differences in KL", content), &caption)
}
