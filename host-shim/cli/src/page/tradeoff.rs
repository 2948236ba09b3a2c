//! Quality over the share of entries kept.

use maud::{Markup, html};

use super::axis::Axis;
use super::svg::{self, Area, n};
use super::{figure, spread};
use crate::format::{percent, with_error};
use crate::results::ArmSummary;
use crate::stats::Estimate;

/// KL below this is rounding noise of the cache's element type, and does not stretch the axis.
const KL_FLOOR: f64 = 1e-5;

/// Arms whose kept shares differ by less than this are set side by side.
const SAME_SHARE: f64 = 0.005;

const HEIGHT: f64 = 300.0;
const AREA: Area = Area { left: 54.0, right: 424.0, top: 34.0, bottom: 246.0 };

/// Perplexity ratio over the share kept.
pub fn perplexity(summary: &[ArmSummary]) -> Markup {
    let ends = summary.iter().flat_map(|arm| ends(&arm.perplexity_ratio));
    let axis = Axis::linear(ends.chain([1.0]));
    let caption = format!(
        "1 is as good as the full cache, higher is worse. {} Arms with the same share are set side by side.",
        spread(passages(summary))
    );
    let plot = plot(summary, &axis, "perplexity ratio to full cache", |arm| arm.perplexity_ratio);
    figure("Perplexity", plot, &caption)
}

/// KL over the share kept, on a logarithmic axis.
pub fn divergence(summary: &[ArmSummary]) -> Markup {
    let axis = Axis::log(summary.iter().flat_map(|arm| [arm.kl.mean, ends(&arm.kl)[1]]), KL_FLOOR);
    let caption = format!(
        "0 is equal to the full cache, higher is worse; the axis is logarithmic. Hollow: below the axis. {}",
        spread(passages(summary))
    );
    let plot = plot(summary, &axis, "KL to full cache (nats per token)", |arm| arm.kl);
    figure("Divergence", plot, &caption)
}

fn passages(summary: &[ArmSummary]) -> usize {
    summary.iter().map(|arm| arm.n).min().unwrap_or(0)
}

fn ends(estimate: &Estimate) -> [f64; 2] {
    let error = estimate.standard_error.unwrap_or(0.0);
    [estimate.mean - error, estimate.mean + error]
}

fn plot(summary: &[ArmSummary], axis: &Axis, title: &str, measure: impl Fn(&ArmSummary) -> Estimate) -> Markup {
    // Room at both ends for markers that stand side by side.
    let share = Axis::Linear { from: -5.0, to: 105.0 };
    let content = html! {
        (svg::x_axis(&AREA, &share, "entries kept (%)"))
        (svg::y_axis(&AREA, axis, title))
        @for (series, arm) in summary.iter().enumerate() {
            @let estimate = measure(arm);
            // A broken run has no place; the table shows a dash for it.
            @if estimate.mean.is_finite() {
                @let x = AREA.x(&share, arm.kept_fraction.mean * 100.0) + sidestep(summary, series);
                @let [low, high] = ends(&estimate);
                g {
                    title {
                        (arm.name) ": " (with_error(&estimate)) " at "
                        (with_error(&percent(&arm.kept_fraction))) " % kept"
                    }
                    @if estimate.standard_error.is_some() {
                        line class={ "error " (svg::colour(series)) } x1=(n(x)) x2=(n(x))
                            y1=(n(AREA.y(axis, low))) y2=(n(AREA.y(axis, high))) {}
                    }
                    (svg::marker(series, x, AREA.y(axis, estimate.mean), axis.is_below(estimate.mean)))
                }
            }
        }
    };
    svg::drawing(HEIGHT, &format!("{title} over entries kept"), content)
}

/// Distance by which an arm moves aside for others with the same share.
fn sidestep(summary: &[ArmSummary], series: usize) -> f64 {
    let own = summary[series].kept_fraction.mean;
    let same = |arm: &&ArmSummary| (arm.kept_fraction.mean - own).abs() < SAME_SHARE;
    let all = summary.iter().filter(same).count();
    let before = summary[..series].iter().filter(same).count();
    (before as f64 - (all - 1) as f64 / 2.0) * 13.0
}
