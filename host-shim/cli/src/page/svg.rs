//! Small drawing functions that the plots share.

use maud::{Markup, html};

use super::axis::Axis;

/// Number of colours in the style sheet; shapes tell further arms apart.
const COLOURS: usize = 8;

/// Width of every plot in its own units; text of 13 units stays readable at 400 pixels.
pub const WIDTH: f64 = 440.0;

/// The rectangle in which measures are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// Left edge.
    pub left: f64,
    /// Right edge.
    pub right: f64,
    /// Upper edge.
    pub top: f64,
    /// Lower edge.
    pub bottom: f64,
}

impl Area {
    /// Horizontal place of a measure.
    pub fn x(&self, axis: &Axis, value: f64) -> f64 {
        self.left + axis.place(value) * (self.right - self.left)
    }

    /// Vertical place of a measure; larger is higher.
    pub fn y(&self, axis: &Axis, value: f64) -> f64 {
        self.bottom - axis.place(value) * (self.bottom - self.top)
    }
}

/// A drawing of `height` units with a text for readers that cannot see it.
pub fn drawing(height: f64, label: &str, content: Markup) -> Markup {
    html! {
        svg.plot viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-label=(label) { (content) }
    }
}

/// Vertical grid lines with tick labels and a title below them.
pub fn x_axis(area: &Area, axis: &Axis, title: &str) -> Markup {
    html! {
        @for (place, label) in axis.ticks() {
            @let x = n(area.left + place * (area.right - area.left));
            line.grid x1=(x) x2=(x) y1=(n(area.top)) y2=(n(area.bottom)) {}
            text.tick x=(x) y=(n(area.bottom + 20.0)) text-anchor="middle" { (label) }
        }
        text.title x=(n((area.left + area.right) / 2.0)) y=(n(area.bottom + 40.0)) text-anchor="middle" { (title) }
    }
}

/// Horizontal grid lines with tick labels, and a title above them.
pub fn y_axis(area: &Area, axis: &Axis, title: &str) -> Markup {
    html! {
        @for (place, label) in axis.ticks() {
            @let y = area.bottom - place * (area.bottom - area.top);
            line.grid x1=(n(area.left)) x2=(n(area.right)) y1=(n(y)) y2=(n(y)) {}
            text.tick x=(n(area.left - 7.0)) y=(n(y + 4.5)) text-anchor="end" { (label) }
        }
        text.title x="4" y=(n(area.top - 12.0)) { (title) }
    }
}

/// The marker of an arm; hollow where the true place lies outside the plot.
pub fn marker(series: usize, x: f64, y: f64, hollow: bool) -> Markup {
    let class = format!("{} {}", colour(series), if hollow { "hollow" } else { "mark" });
    // Unit shapes around the origin, of about equal area.
    let path = match series % 5 {
        0 => "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z",
        1 => "M-5 -5h10v10h-10z",
        2 => "M0 -6.5l6.2 11h-12.4z",
        3 => "M0 -7l7 7l-7 7l-7 -7z",
        _ => "M0 6.5l6.2 -11h-12.4z",
    };
    html! { path class=(class) d=(path) transform={ "translate(" (n(x)) " " (n(y)) ")" } {} }
}

/// Class that gives an arm its colour.
pub fn colour(series: usize) -> String {
    format!("s{}", series % COLOURS)
}

/// A coordinate, to a tenth of a unit.
pub fn n(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// A name that fits `most` characters, cut with an ellipsis.
pub fn cut(name: &str, most: usize) -> String {
    if name.chars().count() <= most {
        return name.to_owned();
    }
    name.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// A share, to a hundredth.
pub fn n2(value: f64) -> String {
    format!("{value:.2}")
}
