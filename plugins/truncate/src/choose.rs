//! Which rows of one KV head are kept.

use std::ops::Range;

use kvhook_kernels::sample::{Draw, sample};
use kvhook_kernels::top_k::top_k;
use kvhook_kernels::{KernelError, Protected};

use crate::budget::Division;

/// How rows are chosen by their scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByScore {
    /// The highest scores; of equal ones the lower row.
    Top,
    /// Without replacement, in proportion to weights.
    Sample(Draw),
}

/// How `keep` of the `open` rows that may be dropped are divided, where the first `sinks` and the last `recent` of the
/// layer's `length` rows are protected.
pub fn divide(open: &[u32], length: usize, keep: usize, sinks: usize, recent: usize) -> Division {
    let first = open.partition_point(|row| (*row as usize) < sinks);
    let last = open.len() - open.partition_point(|row| (*row as usize) < length.saturating_sub(recent));
    // Where the two meet, a row is protected once.
    let first = first.min(open.len());
    Division::new(keep, first, last.min(open.len() - first))
}

/// As [`divide`], of rows that may be dropped in ascending stretches.
pub fn divide_stretches(open: &[Range<usize>], length: usize, keep: usize, sinks: usize, recent: usize) -> Division {
    let last = length.saturating_sub(recent);
    let before = |row: usize| open.iter().map(|rows| rows.end.min(row).saturating_sub(rows.start)).sum::<usize>();
    let all = before(length);
    let first = before(sinks.min(length));
    Division::new(keep, first, (all - before(last)).min(all - first))
}

/// Evenly spaced rows: writes sinks, every `h / chosen`-th of the `h` rows of the history, and the recent rows.
pub fn stride(open: &[u32], division: Division, out: &mut [u32]) {
    let Division { sinks, recent, chosen } = division;
    let history = &open[sinks..open.len() - recent];
    out[..sinks].copy_from_slice(&open[..sinks]);
    for (place, out) in out[sinks..sinks + chosen].iter_mut().enumerate() {
        // The middle of the place's share.
        *out = history[(2 * place + 1) * history.len() / (2 * chosen)];
    }
    out[sinks + chosen..].copy_from_slice(&open[open.len() - recent..]);
}

/// Rows by score: `scores` has one for each row of `open`; `out` one place for each row that is kept. Ascending.
///
/// # Errors
/// The kernels': a NaN, a negative weight, no working memory.
pub fn by_score(
    how: ByScore,
    open: &[u32],
    scores: &[f32],
    division: Division,
    out: &mut [u32],
) -> Result<(), KernelError> {
    let protected = Protected { sinks: division.sinks, recent: division.recent };
    match how {
        ByScore::Top => top_k(scores, protected, out)?,
        ByScore::Sample(draw) => sample(scores, protected, draw, out)?,
    }
    out.iter_mut().for_each(|place| *place = open[*place as usize]);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one stretch of rows is a list of stretches, too")]
mod tests {
    use super::*;

    #[test]
    fn protected_rows_are_counted_among_those_that_may_be_dropped() {
        let all: Vec<u32> = (0..20).collect();
        assert_eq!(divide(&all, 20, 10, 4, 3), Division { sinks: 4, recent: 3, chosen: 3 });
        // Rows 4..12 only: neither sinks nor the last three are among them.
        assert_eq!(divide(&all[4..12], 20, 5, 4, 3), Division { sinks: 0, recent: 0, chosen: 5 });
        assert_eq!(divide(&all[2..18], 20, 5, 4, 3), Division { sinks: 2, recent: 1, chosen: 2 });
        // Sinks and recent rows meet.
        assert_eq!(divide(&all[..6], 6, 5, 4, 5), Division { sinks: 4, recent: 1, chosen: 0 });
        assert_eq!(divide(&all[..3], 3, 2, 4, 5), Division { sinks: 2, recent: 0, chosen: 0 });
        assert_eq!(divide(&[], 20, 0, 4, 3), Division { sinks: 0, recent: 0, chosen: 0 });
        for (length, keep, sinks, recent) in [(20, 10, 4, 3), (6, 5, 4, 5), (3, 2, 4, 5), (20, 5, 4, 3), (20, 0, 4, 3)]
        {
            let divided = divide(&all[..length], length, keep, sinks, recent);
            let stretches = [0..length];
            assert_eq!(divide_stretches(&stretches, length, keep, sinks, recent), divided, "{length} {keep} {sinks}");
        }
        for (stretches, keep, sinks, recent) in
            [(vec![4..12], 5, 4, 3), (vec![2..18], 5, 4, 3), (vec![1..3, 6..9, 18..20], 6, 8, 1), (vec![], 0, 4, 3)]
        {
            let open: Vec<u32> = stretches.iter().cloned().flatten().map(|row| row as u32).collect();
            let divided = divide(&open, 20, keep, sinks, recent);
            assert_eq!(divide_stretches(&stretches, 20, keep, sinks, recent), divided, "{stretches:?}");
        }
    }

    #[test]
    fn a_stride_is_even() {
        let open: Vec<u32> = (0..100).map(|row| row * 2).collect();
        let division = Division { sinks: 4, recent: 6, chosen: 30 };
        let mut out = [0; 40];
        stride(&open, division, &mut out);
        assert!(out.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(out[..4], open[..4]);
        assert_eq!(out[34..], open[94..]);
        // 90 rows of history, every third, each the middle of its share.
        let expected: Vec<u32> = (0..30).map(|place| open[4 + 3 * place + 1]).collect();
        assert_eq!(out[4..34], expected);
        // All of the history.
        let mut all = [0; 100];
        stride(&open, Division { sinks: 4, recent: 6, chosen: 90 }, &mut all);
        assert_eq!(all[..], open[..]);
    }

    #[test]
    fn scores_choose_from_the_history_only() {
        let open = [1, 3, 4, 8, 9, 11];
        let scores = [9.0, 1.0, 5.0, 5.0, 2.0, 9.0];
        let mut out = [0; 4];
        by_score(ByScore::Top, &open, &scores, Division { sinks: 1, recent: 1, chosen: 2 }, &mut out).unwrap();
        assert_eq!(out, [1, 4, 8, 11]);
        by_score(ByScore::Top, &open, &scores, Division { sinks: 2, recent: 1, chosen: 1 }, &mut out).unwrap();
        assert_eq!(out, [1, 3, 4, 11], "of equal scores the lower row");
        let nan = [0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0];
        let fails = by_score(ByScore::Top, &open, &nan, Division { sinks: 1, recent: 1, chosen: 2 }, &mut out);
        assert_eq!(fails, Err(KernelError::ScoreNotANumber { token: 2 }));
    }

    #[test]
    fn a_draw_follows_its_weights_and_repeats() {
        let open: Vec<u32> = (0..8).collect();
        // Row 5 weighs as much as all others together: it is in half of the draws of one row.
        let mut weights = [1.0f32; 8];
        weights[5] = 7.0;
        let division = Division { sinks: 0, recent: 0, chosen: 1 };
        let draw = |seed| {
            let mut out = [0];
            let draw = Draw { seed, round: 0, layer: 1, head: 2 };
            by_score(ByScore::Sample(draw), &open, &weights, division, &mut out).unwrap();
            out[0]
        };
        let hits = (0..4000).filter(|seed| draw(*seed) == 5).count();
        // 2000 expected, standard deviation 32.
        assert!((1850..2150).contains(&hits), "{hits}");
        assert_eq!(draw(17), draw(17));
    }
}
