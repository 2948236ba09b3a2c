//! What each arm writes after a passage, side by side.

use maud::{Markup, html};

use super::swatch;
use crate::results::Comparison;

/// Passages that are shown open; the others fold.
const OPEN: usize = 1;

/// The first words of all arms, passage by passage.
pub fn section(comparison: &Comparison) -> Markup {
    html! {
        section {
            h2 { "First words" }
            p.note { "Greedy decoding from the compressed cache. One text is an impression, not a measure." }
            @for (index, passage) in comparison.passages.iter().enumerate() {
                details open[index < OPEN] {
                    summary { (passage.text) ", from token " (passage.start) }
                    div.words {
                        @for (series, arm) in comparison.arms.iter().enumerate() {
                            @if let Some(measures) = arm.measures.get(index) {
                                article {
                                    h3 { (swatch(series)) (arm.name) }
                                    p { (measures.first_words.trim()) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
