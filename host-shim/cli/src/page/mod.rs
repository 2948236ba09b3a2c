//! A comparison as one HTML page that needs nothing else: styles and plots are inside, nothing is fetched.

mod axis;
mod bars;
mod differences;
mod facts;
mod headline;
pub mod record;
mod survivors;
mod svg;
mod tradeoff;
mod verdict;
mod words;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::eval::Evaluation;
use crate::results::{ArmSummary, Comparison};

/// Fewer passages than this get a warning: the evaluation plan asks for at least so many.
const ENOUGH_PASSAGES: usize = 8;

/// The page as text.
pub fn render(comparison: &Comparison) -> String {
    let summary = comparison.summary();
    document(
        &format!("kvhook: {}", comparison.model.name),
        html! {
            main {
                header {
                    h1 { "KV-cache compression of " (comparison.model.name) }
                    p { (introduction(comparison)) }
                    @if let Some(warning) = warning(comparison.passages.len()) {
                        p.warning { (warning) }
                    }
                }
                (body(comparison, &summary))
            }
        },
    )
}

/// A page that begins with what is to be made of the figures.
pub fn render_evaluation(comparison: &Comparison, evaluation: &Evaluation) -> String {
    let summary = comparison.summary();
    document(
        &format!("kvhook: {}", evaluation.plugin),
        html! {
            main {
                header {
                    h1 { "What " (evaluation.plugin) " is worth on " (comparison.model.name) }
                    (verdict::section(evaluation))
                    p { (introduction(comparison)) " The controls keep as many entries of each layer." }
                    @if let Some(warning) = warning(comparison.passages.len()) {
                        p.warning { (warning) }
                    }
                }
                (body(comparison, &summary))
            }
        },
    )
}

/// A whole document around a body.
fn document(title: &str, content: Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                (content)
            }
        }
    }
    .into_string()
}

fn body(comparison: &Comparison, summary: &[ArmSummary]) -> Markup {
    html! {
        (headline::table(comparison, summary))
        (legend(summary))
        div.figures {
            (tradeoff::perplexity(summary))
            (tradeoff::divergence(summary))
            (bars::decode_speed(summary))
            (differences::figure(comparison, summary))
        }
        (survivors::section(comparison))
        (words::section(comparison))
        (facts::section(comparison, summary))
    }
}

fn introduction(comparison: &Comparison) -> String {
    let settings = &comparison.settings;
    format!(
        "{} tokens are prefilled and compressed; the next {} are scored against the uncompressed run. \
         {} cache in {}, {}.",
        settings.prefix,
        settings.continuation,
        capitalised(&settings.cache),
        settings.dtype,
        counted(settings.ranks, "rank", "ranks"),
    )
}

fn warning(passages: usize) -> Option<String> {
    match passages {
        0 => Some("No passage was measured.".into()),
        1 => Some("One passage only: no standard errors, and no conclusions about arms that lie close.".into()),
        n if n < ENOUGH_PASSAGES => Some(format!(
            "{n} passages only: standard errors from so few are rough. Small differences mean nothing here."
        )),
        _ => None,
    }
}

/// Marker and name of every arm, once for all plots.
fn legend(summary: &[ArmSummary]) -> Markup {
    html! {
        ul.legend aria-label="Arms" {
            @for (series, arm) in summary.iter().enumerate() {
                li { (swatch(series)) (arm.name) }
            }
        }
    }
}

/// An arm's marker in running text.
fn swatch(series: usize) -> Markup {
    html! {
        svg.swatch viewBox="-8 -8 16 16" aria-hidden="true" { (svg::marker(series, 0.0, 0.0, false)) }
    }
}

/// A titled plot with a caption that says what is shown.
fn figure(title: &str, drawing: Markup, caption: &str) -> Markup {
    html! {
        figure {
            h2 { (title) }
            (drawing)
            figcaption { (caption) }
        }
    }
}

/// How the plots' error bars are to be read.
fn spread(n: usize) -> String {
    if n < 2 { "One passage, no error bars.".into() } else { format!("Mean ± standard error, n = {n} passages.") }
}

fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn capitalised(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}
