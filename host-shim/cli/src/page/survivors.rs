//! Which positions survive in which layer: one small map for each arm.

use std::fmt::Write;

use maud::{Markup, html};

use super::swatch;
use crate::results::{Comparison, SurvivorMap};

/// Steps of the colour scale from nothing kept to everything kept.
const LEVELS: usize = 20;

/// Maps of all arms that recorded one.
pub fn section(comparison: &Comparison) -> Markup {
    let maps: Vec<_> = comparison
        .summary()
        .into_iter()
        .enumerate()
        .filter_map(|(series, summary)| {
            let arm = comparison.arms.iter().find(|arm| arm.name == summary.name)?;
            // A map of an arm that dropped nothing would be one even block.
            let map = arm.survivors.as_ref().filter(|map| map.kept.iter().flatten().any(|&share| share < 1.0))?;
            Some((series, summary.name, map))
        })
        .collect();
    if maps.is_empty() {
        return html! {};
    }
    html! {
        section {
            h2 { "Which positions survive" }
            p.note {
                "Across: position in the prefix. Down: layer. Colour: share kept, over KV heads and passages. "
                "Arms that keep everything are left out."
            }
            p.scale { span { "0 %" } span.ramp {} span { "100 %" } }
            div.maps {
                @for (series, name, map) in &maps {
                    figure {
                        h3 { (swatch(*series)) (name) }
                        (heat(map, name))
                    }
                }
            }
        }
    }
}

fn heat(map: &SurvivorMap, name: &str) -> Markup {
    let (layers, bins) = (map.kept.len(), map.bins());
    html! {
        div.heat {
            span.y-first { "0" }
            span.y-name { "layer" }
            span.y-last { (layers.saturating_sub(1)) }
            svg viewBox={ "0 0 " (bins) " " (layers) } preserveAspectRatio="none" role="img"
                aria-label={ "share kept by layer and position, " (name) } {
                @for (level, path) in paths(map).iter().enumerate().filter(|(_, path)| !path.is_empty()) {
                    path.cell fill-opacity=(super::svg::n2(level as f64 / LEVELS as f64)) d=(path) {}
                }
            }
            span.x-first { "0" }
            span.x-name { "position (tokens)" }
            span.x-last { (map.tokens) }
        }
    }
}

/// One path for each level of the scale, made of runs of equal cells: small, where a rectangle for each cell would
/// make pages of megabytes.
fn paths(map: &SurvivorMap) -> Vec<String> {
    let mut paths = vec![String::new(); LEVELS + 1];
    for (layer, row) in map.kept.iter().enumerate() {
        let mut start = 0;
        for run in row.chunk_by(|a, b| level(*a) == level(*b)) {
            let level = level(run[0]);
            if level > 0 {
                // Writing into a string does not fail.
                let _ = write!(paths[level], "M{start} {layer}h{}v1h-{}z", run.len(), run.len());
            }
            start += run.len();
        }
    }
    paths
}

/// Level of a share; a share above nothing is never shown as nothing.
fn level(share: f32) -> usize {
    let level = (share.clamp(0.0, 1.0) * LEVELS as f32).round() as usize;
    if share > 0.0 { level.max(1) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_become_one_run() {
        let map = SurvivorMap { tokens: 8, kept: vec![vec![1.0, 1.0, 0.0, 0.001], vec![0.5; 4]] };
        let paths = paths(&map);
        assert_eq!(paths[LEVELS], "M0 0h2v1h-2z");
        assert_eq!(paths[1], "M3 0h1v1h-1z");
        assert_eq!(paths[LEVELS / 2], "M0 1h4v1h-4z");
        assert_eq!(paths.iter().filter(|path| !path.is_empty()).count(), 3);
    }
}
