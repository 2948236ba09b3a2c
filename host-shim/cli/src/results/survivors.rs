//! Which positions of the prefix survive compression, layer by layer.

use serde::{Deserialize, Serialize};

/// Share of entries kept, by layer and by bin of positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SurvivorMap {
    /// Tokens of the prefix, covered by the bins of a layer in order.
    pub tokens: usize,
    /// `kept[layer][bin]`, 0 to 1, mean over KV heads and passages. Every layer has the same number of bins.
    pub kept: Vec<Vec<f32>>,
}

impl SurvivorMap {
    /// Bins of a layer.
    pub fn bins(&self) -> usize {
        self.kept.first().map_or(0, Vec::len)
    }
}

/// Counts survivors of many heads and passages of one length into a [`SurvivorMap`].
#[derive(Debug, Clone)]
pub struct SurvivorCounter {
    tokens: usize,
    bins: usize,
    counts: Vec<Vec<u64>>,
    heads: Vec<u64>,
}

impl SurvivorCounter {
    /// For `layers` layers and prefixes of `tokens` tokens; there are never more bins than tokens.
    pub fn new(layers: usize, tokens: usize, bins: usize) -> Self {
        let bins = bins.clamp(1, tokens.max(1));
        Self { tokens, bins, counts: vec![vec![0; bins]; layers], heads: vec![0; layers] }
    }

    /// Adds the kept positions of one head of one passage; positions outside the prefix are left out.
    pub fn add_head(&mut self, layer: usize, positions: impl IntoIterator<Item = usize>) {
        let Some(counts) = self.counts.get_mut(layer) else { return };
        self.heads[layer] += 1;
        for position in positions.into_iter().filter(|&p| p < self.tokens) {
            counts[position * self.bins / self.tokens] += 1;
        }
    }

    /// The map; a layer to which nothing was added counts as not kept.
    pub fn finish(self) -> SurvivorMap {
        // The first position of a bin is the least p with p * bins / tokens = bin.
        let start = |bin: usize| (bin * self.tokens).div_ceil(self.bins);
        let kept = self
            .counts
            .iter()
            .zip(&self.heads)
            .map(|(counts, &heads)| {
                let share = |(bin, &count): (usize, &u64)| {
                    let width = (start(bin + 1) - start(bin)) as u64;
                    count as f32 / (heads * width).max(1) as f32
                };
                counts.iter().enumerate().map(share).collect()
            })
            .collect();
        SurvivorMap { tokens: self.tokens, kept }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_of_unequal_width_are_full_when_all_is_kept() {
        let mut counter = SurvivorCounter::new(2, 10, 4);
        counter.add_head(0, 0..10);
        counter.add_head(0, 0..10);
        counter.add_head(1, [0, 1, 9]);
        counter.add_head(1, [99]);
        let map = counter.finish();
        assert_eq!(map.kept[0], [1.0; 4]);
        // Ten positions in four bins: widths 3, 2, 3, 2.
        assert_eq!(map.kept[1], [2.0 / 6.0, 0.0, 0.0, 1.0 / 4.0]);
        assert_eq!((map.bins(), map.tokens), (4, 10));
    }

    #[test]
    fn never_more_bins_than_tokens() {
        assert_eq!(SurvivorCounter::new(1, 3, 64).finish().bins(), 3);
    }
}
