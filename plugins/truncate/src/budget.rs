//! How many rows are kept, from lengths, segments and config alone.

use kvhook_abi::raw::KvhRange;

/// How much of a layer is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// This share of the tokens seen so far: what is kept stays in proportion to an uncompressed cache, also when it is
    /// compressed many times.
    Fraction(f64),
    /// So many entries for each layer and KV head.
    Entries(u64),
}

/// The tokens of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Tokens seen so far, of the kinds that are compressed.
    pub seen: u64,
    /// Rows that are left of those.
    pub stored: u64,
    /// Rows of the other kinds, which are kept whole.
    pub whole: u64,
}

impl Tokens {
    /// A layer with `length` rows of a sequence with `position` tokens seen, `seen` of them of the compressed kinds.
    /// `None` when the layer lost rows of the other kinds: somebody else compressed it.
    pub fn new(length: u64, position: u64, seen: u64) -> Option<Self> {
        let whole = position.checked_sub(seen)?;
        Some(Self { seen, stored: length.checked_sub(whole)?, whole })
    }
}

impl Amount {
    /// How many of `tokens.stored` rows are kept: `floor(seen * fraction)` or the entries, at least 1, at most all.
    pub fn rows(self, tokens: Tokens) -> u64 {
        let rows = match self {
            Self::Fraction(fraction) => (tokens.seen as f64 * fraction).floor() as u64,
            Self::Entries(entries) => entries,
        };
        rows.max(1).min(tokens.stored)
    }
}

/// How `keep` of some rows are divided: the first ones, the last ones, and a choice of the history between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// Rows kept at the front.
    pub sinks: usize,
    /// Rows kept at the end.
    pub recent: usize,
    /// Rows kept of those between.
    pub chosen: usize,
}

impl Division {
    /// Divides `keep` rows. Where sinks and recent rows do not both fit, the sinks go first and fewer recent rows are
    /// kept; never more than `keep` in all. `sinks + recent` is at most the number of rows.
    pub fn new(keep: usize, sinks: usize, recent: usize) -> Self {
        let sinks = sinks.min(keep);
        let recent = recent.min(keep - sinks);
        Self { sinks, recent, chosen: keep - sinks - recent }
    }
}

/// The first `sinks` of `length` rows and the `keep - sinks` last ones, as ascending ranges that do not touch.
pub fn streaming(length: u64, keep: u64, sinks: u64) -> Vec<KvhRange> {
    let front = sinks.min(keep);
    join(length, front, length - (keep - front).min(length))
}

/// As [`streaming`], both ranges rounded outward to whole blocks. The last block of a sequence may be partly filled.
pub fn streaming_blocks(length: u64, keep: u64, sinks: u64, block: u64) -> Vec<KvhRange> {
    let front = sinks.min(keep);
    let back = (keep - front).min(length);
    let start = if back == 0 { length } else { (length - back) / block * block };
    join(length, front.next_multiple_of(block).min(length), start)
}

/// Rows `0..front` and `start..length`.
fn join(length: u64, front: u64, start: u64) -> Vec<KvhRange> {
    if start <= front {
        return vec![KvhRange { start: 0, length }];
    }
    [KvhRange { start: 0, length: front }, KvhRange { start, length: length - start }]
        .into_iter()
        .filter(|range| range.length > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(ranges: &[KvhRange]) -> Vec<u64> {
        ranges.iter().flat_map(|range| range.start..range.start + range.length).collect()
    }

    #[test]
    fn a_fraction_is_of_the_tokens_seen_and_rounds_down_to_one_at_least() {
        let prompt = |length| Tokens::new(length, length, length).unwrap();
        assert_eq!(Amount::Fraction(0.25).rows(prompt(1023)), 255);
        assert_eq!(Amount::Fraction(0.25).rows(prompt(3)), 1);
        assert_eq!(Amount::Fraction(1.0).rows(prompt(7)), 7);
        assert_eq!(Amount::Entries(5).rows(prompt(7)), 5);
        assert_eq!(Amount::Entries(5).rows(prompt(3)), 3);
        assert_eq!(Amount::Entries(5).rows(prompt(0)), 0);
        // 1000 tokens, cut to 250, then 64 more: a quarter of 1064, not of 314.
        let grown = Tokens::new(314, 1064, 1064).unwrap();
        assert_eq!(Amount::Fraction(0.25).rows(grown), 266);
        assert_eq!(Amount::Entries(250).rows(grown), 250);
    }

    #[test]
    fn rows_that_are_kept_whole_count_on_top() {
        let tokens = Tokens::new(100, 100, 60).unwrap();
        assert_eq!(tokens, Tokens { seen: 60, stored: 60, whole: 40 });
        assert_eq!(Amount::Fraction(0.5).rows(tokens), 30);
        assert_eq!(Tokens::new(70, 100, 60).unwrap().stored, 30);
        assert_eq!(Tokens::new(39, 100, 60), None, "rows kept whole are missing");
    }

    #[test]
    fn a_division_never_exceeds_what_is_kept_and_takes_sinks_first() {
        assert_eq!(Division::new(100, 4, 32), Division { sinks: 4, recent: 32, chosen: 64 });
        assert_eq!(Division::new(20, 4, 32), Division { sinks: 4, recent: 16, chosen: 0 });
        assert_eq!(Division::new(3, 4, 32), Division { sinks: 3, recent: 0, chosen: 0 });
        for keep in 0..80 {
            let division = Division::new(keep, 7, 50);
            assert_eq!(division.sinks + division.recent + division.chosen, keep);
        }
    }

    #[test]
    fn streaming_keeps_sinks_and_the_most_recent() {
        for length in 0..40u64 {
            for keep in 0..=length {
                for sinks in 0..6 {
                    let front = sinks.min(keep);
                    let expected: Vec<u64> =
                        (0..length).filter(|row| *row < front || *row >= length - (keep - front)).collect();
                    let ranges = streaming(length, keep, sinks);
                    assert_eq!(rows(&ranges), expected, "{length} {keep} {sinks}");
                    assert_eq!(rows(&ranges).len() as u64, keep);
                    assert!(ranges.windows(2).all(|pair| pair[0].start + pair[0].length < pair[1].start));
                }
            }
        }
    }

    #[test]
    fn block_alignment_keeps_every_block_that_streaming_touches() {
        for block in [1, 4, 16] {
            for length in 1..70u64 {
                for keep in 1..=length {
                    let touched = rows(&streaming(length, keep, 4)).into_iter().map(|row| row / block);
                    let blocks: std::collections::BTreeSet<u64> = touched.collect();
                    let expected: Vec<u64> = (0..length).filter(|row| blocks.contains(&(row / block))).collect();
                    assert_eq!(rows(&streaming_blocks(length, keep, 4, block)), expected, "{block} {length} {keep}");
                }
            }
        }
    }
}
