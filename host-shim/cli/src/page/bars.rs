//! Decode speed, one bar for each arm.

use maud::{Markup, html};

use super::axis::Axis;
use super::svg::{self, Area, n};
use super::{figure, spread};
use crate::format::with_error;
use crate::results::ArmSummary;

const ROW: f64 = 36.0;

/// Bars from zero, with the arm's name above each.
pub fn decode_speed(summary: &[ArmSummary]) -> Markup {
    let speeds = || summary.iter().map(|arm| arm.decode_tokens_per_second);
    let axis = Axis::linear(speeds().map(|s| s.mean + s.standard_error.unwrap_or(0.0)).chain([0.0]));
    let area = Area { left: 14.0, right: 424.0, top: 6.0, bottom: 10.0 + ROW * summary.len() as f64 };
    let content = html! {
        (svg::x_axis(&area, &axis, "decode speed (tokens per second)"))
        @for (series, (arm, speed)) in summary.iter().zip(speeds()).enumerate() {
            @let top = area.top + ROW * series as f64;
            @let middle = top + 25.0;
            text.name x=(n(area.left + 2.0)) y=(n(top + 13.0)) { (svg::cut(&arm.name, 34)) }
            text.value x=(n(area.right)) y=(n(top + 13.0)) text-anchor="end" { (with_error(&speed)) }
            @if speed.mean.is_finite() {
                rect class={ "bar " (svg::colour(series)) } x=(n(area.left)) y=(n(middle - 6.0))
                    width=(n(area.x(&axis, speed.mean) - area.left)) height="12" {}
                @if let Some(error) = speed.standard_error {
                    line.whisker x1=(n(area.x(&axis, speed.mean - error))) x2=(n(area.x(&axis, speed.mean + error)))
                        y1=(n(middle)) y2=(n(middle)) {}
                }
            }
        }
    };
    let n = summary.iter().map(|arm| arm.n).min().unwrap_or(0);
    figure("Decode speed", svg::drawing(area.bottom + 46.0, "decode speed by arm", content), &spread(n))
}
