//! What arms did over time, one line for each.

use maud::{Markup, html};

use crate::format::{moment, plain};
use crate::page::axis::Axis;
use crate::page::figure;
use crate::page::svg::{self, Area, n};
use crate::record::{Findings, Period, Setting};

const HEIGHT: f64 = 300.0;
const AREA: Area = Area { left: 54.0, right: 424.0, top: 34.0, bottom: 246.0 };
/// With more periods than this a line has no markers.
const MARKED: usize = 24;

/// Units of time, from the largest: seconds and name.
const UNITS: [(f64, &str); 4] = [(86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")];

/// Share of the entries that compressions left.
pub fn kept(findings: &Findings<'_>, setting: &Setting) -> Markup {
    let value = |period: &Period| period.counts.kept().or(period.counts.shadow_kept()).map(|share| share * 100.0);
    plot(findings, setting, "Kept over time", "entries kept (%)", "Of the sequences that were compressed.", value)
}

/// Bytes given back for each token.
pub fn freed(findings: &Findings<'_>, setting: &Setting) -> Markup {
    let value = |period: &Period| period.counts.freed_per_token().map(|bytes| bytes / 1024.0);
    plot(findings, setting, "Given back over time", "KiB given back for each token", "More is better.", value)
}

/// Time of hooks and commits for each token.
pub fn hook_time(findings: &Findings<'_>, setting: &Setting) -> Markup {
    let value = |period: &Period| period.counts.hook_ns_per_token().map(|ns| ns / 1e3);
    plot(findings, setting, "Hook time over time", "us for each token", "Hooks and commits. Less is better.", value)
}

/// Sequences that began, a minute.
pub fn sequences(findings: &Findings<'_>, setting: &Setting) -> Markup {
    let value = |period: &Period| {
        let minutes = (period.to - period.from) / 60.0;
        (minutes > 0.0).then(|| period.counts.sequences as f64 / minutes)
    };
    plot(findings, setting, "Traffic over time", "sequences a minute", "How many began on each arm.", value)
}

/// Nothing without two points of one arm.
fn plot(
    findings: &Findings<'_>,
    setting: &Setting,
    title: &str,
    unit: &str,
    caption: &str,
    value: impl Fn(&Period) -> Option<f64>,
) -> Markup {
    let Some((start, end)) = setting.history.span() else { return html! {} };
    // Of each arm runs of neighbouring points.
    let lines: Vec<Vec<Vec<(f64, f64)>>> = findings
        .arms
        .iter()
        .map(|arm| {
            let point = |period: &Option<Period>| {
                period.as_ref().and_then(|p| Some(((p.from + p.to) / 2.0 - start, value(p).filter(|v| v.is_finite())?)))
            };
            let points: Vec<Option<(f64, f64)>> = arm.periods.iter().map(point).collect();
            points.split(Option::is_none).map(|run| run.iter().flatten().copied().collect()).collect()
        })
        .collect();
    let points = || lines.iter().flatten().flatten();
    if points().count() < 2 || end <= start {
        return html! {};
    }
    let (second, of_time) = UNITS.into_iter().find(|(length, _)| end - start >= 2.0 * length).unwrap_or(UNITS[3]);
    let time = Axis::linear([0.0, (end - start) / second]);
    let some = points().any(|(_, value)| *value > 0.0);
    let axis = match some {
        true => Axis::linear(points().map(|(_, value)| *value).chain([0.0])),
        false => Axis::Linear { from: 0.0, to: 1.0 },
    };
    let marked = findings.arms.iter().all(|arm| arm.periods.len() <= MARKED);
    let place = |(at, value): (f64, f64)| (AREA.x(&time, at / second), AREA.y(&axis, value));
    let content = html! {
        (svg::x_axis(&AREA, &time, &format!("{of_time} since {}", moment(start))))
        (svg::y_axis(&AREA, &axis, unit))
        @for (series, runs) in lines.iter().enumerate() {
            g {
                title { (findings.arms[series].name) }
                @for run in runs {
                    @if run.len() > 1 {
                        polyline class={ "series " (svg::colour(series)) } points=(path(run.iter().map(|p| place(*p)))) {}
                    }
                    @for point in run {
                        // A point alone has no line to be seen by.
                        @if marked || run.len() == 1 {
                            @let (x, y) = place(*point);
                            (svg::marker(series, x, y, false))
                        }
                    }
                }
            }
        }
    };
    let ranges: Vec<String> = findings
        .arms
        .iter()
        .zip(&lines)
        .filter_map(|(arm, runs)| {
            let values = || runs.iter().flatten().map(|(_, value)| *value);
            let low = values().reduce(f64::min)?;
            Some(format!("{} {} to {}", arm.name, plain(low), plain(values().fold(low, f64::max))))
        })
        .collect();
    figure(title, svg::drawing(HEIGHT, &format!("{unit} over time: {}", ranges.join("; ")), content), caption)
}

fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    points.map(|(x, y)| format!("{},{}", n(x), n(y))).collect::<Vec<_>>().join(" ")
}
