//! Which rows are compressed, and what stands at each place afterwards: from lengths, segments and config alone.
//!
//! Groups lie on a grid that starts with each stretch, so a sequence that is compressed again and again while it grows has
//! the same groups as one that is compressed once at its end. Compressed groups are always the first ones of that grid,
//! and each of them made `factor` rows into one: `(position - length) / (factor - 1)` says how many there are already.

use std::ops::Range;

use kvhook_abi::view::{Segment, SegmentKind};
pub use kvhook_mlp_weights::{ImageRule, PositionRule};

/// Which MLPs a stretch takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Those for text.
    Text,
    /// Those for images.
    Image,
}

/// Adjacent tokens that are compressed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Which MLPs it takes.
    pub kind: Kind,
    /// Position of its first token.
    pub start: u64,
    /// Position behind its last one.
    pub end: u64,
}

/// Rows of one layer that come from one source, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Rows that are kept as they are.
    Rows {
        /// First row now.
        row: u64,
        /// Rows.
        count: u64,
        /// Position of the first row.
        position: u64,
        /// Positions from one row to the next.
        step: u64,
    },
    /// Groups that become a row each.
    Groups {
        /// Which MLPs they take.
        kind: Kind,
        /// First row now.
        row: u64,
        /// Groups.
        count: u64,
        /// Position of the first group's last token, which its row stands for.
        position: u64,
        /// Rows of a group, and positions from one group to the next.
        factor: u64,
    },
}

impl Run {
    /// Rows afterwards.
    pub fn count(&self) -> u64 {
        match self {
            Self::Rows { count, .. } | Self::Groups { count, .. } => *count,
        }
    }

    /// The position that each row stands for afterwards.
    pub fn positions(&self) -> impl Iterator<Item = u64> {
        let (first, count, step) = match *self {
            Self::Rows { position, count, step, .. } => (position, count, step),
            Self::Groups { position, count, factor, .. } => (position, count, factor),
        };
        (0..count).map(move |place| first + place * step)
    }
}

/// Rows of a layer afterwards.
pub fn rows(runs: &[Run]) -> u64 {
    runs.iter().map(Run::count).sum()
}

/// Tokens that may be in a group, of a sequence whose next token has `position`: behind the first `sinks`, before the
/// last `recent` and before `max_position`. Its end never falls while a sequence grows, so no group is ever undone.
pub fn open(position: u64, sinks: u64, recent: u64, max_position: u64) -> Range<u64> {
    sinks..position.saturating_sub(recent).min(max_position)
}

/// The stretches among the `open` tokens, ascending. Tokens of kinds that nobody knows are in none.
///
/// Text that touches text is one stretch, also across segments; each image segment is one of its own. With
/// [`ImageRule::Prefix`] all tokens up to the last one of an image are one image stretch.
pub fn stretches(rule: ImageRule, segments: impl Iterator<Item = Segment>, open: Range<u64>) -> Vec<Stretch> {
    let mut all: Vec<Stretch> = Vec::new();
    let mut add = |kind: Kind, from: u64, to: u64| match all.last_mut() {
        _ if from >= to => {}
        Some(last) if last.kind == Kind::Text && kind == Kind::Text && last.end == from => last.end = to,
        _ => all.push(Stretch { kind, start: from, end: to }),
    };
    let mut covered = 0;
    let mut image_end = 0;
    for segment in segments {
        let to = segment.start.saturating_add(segment.length);
        add(Kind::Text, covered, segment.start);
        match segment.kind {
            SegmentKind::Text => add(Kind::Text, segment.start, to),
            SegmentKind::Image => {
                image_end = to;
                add(Kind::Image, segment.start, to);
            }
            SegmentKind::Unknown(_) => {}
        }
        covered = to;
    }
    add(Kind::Text, covered, u64::MAX);
    if rule == ImageRule::Prefix && image_end > 0 {
        all.retain(|stretch| stretch.end > image_end);
        for stretch in &mut all {
            stretch.start = stretch.start.max(image_end);
        }
        all.insert(0, Stretch { kind: Kind::Image, start: 0, end: image_end });
    }
    // Segments that overlap, which a host should not give, do not make stretches overlap.
    let mut first = open.start;
    for stretch in &mut all {
        stretch.start = stretch.start.max(first);
        stretch.end = stretch.end.min(open.end);
        first = first.max(stretch.end);
    }
    all.retain(|stretch| stretch.start < stretch.end);
    all
}

/// What becomes of the `length` rows of a layer whose next token has `position`, when all groups of `factor` rows are
/// compressed in the stretches that have at least `min_groups` of them. `None`: the rows are not what compressing such
/// groups leaves.
pub fn runs(stretches: &[Stretch], factor: u64, min_groups: u64, length: u64, position: u64) -> Option<Vec<Run>> {
    let missing = position.checked_sub(length)?;
    let mut done = missing / (factor - 1);
    if missing % (factor - 1) != 0 {
        return None;
    }
    let mut runs = Vec::new();
    let mut push = |run: Run| {
        if run.count() > 0 {
            runs.push(run);
        }
    };
    // Next row, and the position of the first token that it stands for.
    let (mut row, mut at) = (0, 0);
    for &Stretch { kind, start, end } in stretches {
        let groups = match (end - start) / factor {
            groups if groups < min_groups => 0,
            groups => groups,
        };
        push(Run::Rows { row, count: start - at, position: at, step: 1 });
        row += start - at;
        let old = groups.min(done);
        done -= old;
        push(Run::Rows { row, count: old, position: start + factor - 1, step: factor });
        row += old;
        let (count, position) = (groups - old, start + old * factor + factor - 1);
        push(Run::Groups { kind, row, count, position, factor });
        row += count * factor;
        at = start + groups * factor;
    }
    push(Run::Rows { row, count: position - at, position: at, step: 1 });
    (done == 0).then_some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache as a list: the positions of the tokens that each row stands for.
    type Cache = Vec<Vec<u64>>;

    const F: u64 = 3;

    fn segment(kind: SegmentKind, start: u64, length: u64) -> Segment {
        Segment { kind, start, length }
    }

    /// A number for the stretch that a token is in, by looking at one token at a time; 0: none.
    fn label(rule: ImageRule, segments: &[Segment], position: u64) -> (u64, Kind) {
        let inside = |segment: &Segment| (segment.start..segment.start + segment.length).contains(&position);
        let last_image = segments.iter().rposition(|segment| segment.kind == SegmentKind::Image);
        if rule == ImageRule::Prefix
            && last_image.is_some_and(|last| position < segments[last].start + segments[last].length)
        {
            return (1_000, Kind::Image);
        }
        // Text is numbered by how many tokens that are not text come before it.
        let before =
            segments.iter().filter(|segment| segment.kind != SegmentKind::Text && segment.start < position).count()
                as u64;
        match segments.iter().position(inside).map(|index| (index as u64, segments[index].kind)) {
            Some((_, SegmentKind::Unknown(_))) => (0, Kind::Text),
            Some((index, SegmentKind::Image)) => (2_000 + index, Kind::Image),
            _ => (3_000 + before, Kind::Text),
        }
    }

    /// Compresses a cache token by token, the way the original does: walks each stretch and takes its groups.
    /// A group is taken when its last token lies below `most`, and a stretch when it has `min` of such groups.
    fn compress(
        cache: &Cache,
        rule: ImageRule,
        segments: &[Segment],
        unprotected: Range<u64>,
        most: u64,
        min: u64,
    ) -> Cache {
        let of = |position: u64| if unprotected.contains(&position) { label(rule, segments, position).0 } else { 0 };
        let mut out = Cache::new();
        let mut place = 0;
        let total = cache.iter().flatten().count() as u64;
        let size = |number: u64| (0..total.min(most)).filter(|position| of(*position) == number).count() as u64;
        while place < cache.len() {
            let number = of(cache[place][0]);
            let group = cache.get(place..place + F as usize).filter(|rows| {
                let whole = rows.iter().all(|row| row.len() == 1 && of(row[0]) == number);
                number != 0 && size(number) / F >= min && whole && rows[rows.len() - 1][0] < most
            });
            match group {
                Some(rows) => {
                    out.push(rows.concat());
                    place += F as usize;
                }
                None => {
                    out.push(cache[place].clone());
                    place += 1;
                }
            }
        }
        out
    }

    /// Carries runs out on a cache.
    fn carry_out(cache: &Cache, runs: &[Run], rule: ImageRule, segments: &[Segment]) -> Cache {
        let mut out = Cache::new();
        for run in runs {
            let first = out.len();
            match *run {
                Run::Rows { row, count, .. } => out.extend_from_slice(&cache[row as usize..(row + count) as usize]),
                Run::Groups { row, count, kind, factor, .. } => {
                    let rows = &cache[row as usize..(row + count * factor) as usize];
                    out.extend(rows.chunks(factor as usize).map(|group| group.concat()));
                    assert!(rows.iter().all(|row| label(rule, segments, row[0]).1 == kind));
                }
            }
            let last: Vec<u64> = out[first..].iter().map(|row| *row.last().unwrap()).collect();
            assert_eq!(run.positions().collect::<Vec<_>>(), last);
        }
        out
    }

    fn layouts() -> Vec<Vec<Segment>> {
        use SegmentKind::{Image, Text, Unknown};
        vec![
            vec![],
            vec![segment(Image, 0, 50)],
            vec![segment(Image, 7, 10)],
            vec![segment(Image, 3, 6), segment(Image, 9, 7), segment(Image, 30, 2)],
            vec![segment(Text, 0, 5), segment(Text, 5, 9), segment(Image, 20, 8), segment(Text, 28, 3)],
            vec![segment(Unknown(9), 6, 5), segment(Image, 15, 4), segment(Unknown(9), 25, 3)],
        ]
    }

    #[test]
    fn equals_the_original_walk_once_and_while_it_grows() {
        let mut compressed = 0;
        for segments in layouts() {
            for rule in [ImageRule::Prefix, ImageRule::Segments] {
                let mut each = vec![];
                for most in [0, 1, 6, 19, 31, 38, 39, 40, 64, u64::MAX] {
                    each.extend(
                        [(0, 0, 1), (4, 0, 1), (0, 5, 2), (2, 3, 3), (4, 32, 2)].map(|(s, r, m)| (s, r, m, most)),
                    );
                }
                for (sinks, recent, min, most) in each {
                    let mut cache = Cache::new();
                    let mut position = 0;
                    for step in [1, 11, 2, 3, 17, 1, 1, 20, 9] {
                        cache.extend((position..position + step).map(|position| vec![position]));
                        position += step;
                        let unprotected = sinks..position.saturating_sub(recent);
                        let open = open(position, sinks, recent, most);
                        let stretches = stretches(rule, segments.iter().copied(), open);
                        let runs = runs(&stretches, F, min, cache.len() as u64, position).unwrap();
                        let new = carry_out(&cache, &runs, rule, &segments);
                        let original = |cache| compress(cache, rule, &segments, unprotected.clone(), most, min);
                        assert_eq!(new, original(&cache), "{segments:?} {rule:?}");
                        let whole: Cache = (0..position).map(|position| vec![position]).collect();
                        assert_eq!(new, original(&whole), "once at the end");
                        assert_eq!(rows(&runs), new.len() as u64);
                        let raw = (most..position).filter(|position| new.contains(&vec![*position])).count() as u64;
                        assert_eq!(raw, position.saturating_sub(most), "all rows from max_position on are raw");
                        compressed += cache.len() - new.len();
                        cache = new;
                    }
                }
            }
        }
        assert!(compressed > 500);
    }

    #[test]
    fn each_segment_becomes_its_groups_and_its_rest() {
        // FastCache's count: floor(n / f) + n mod f, segment by segment.
        let segments = [segment(SegmentKind::Image, 5, 20)];
        for (rule, parts) in [(ImageRule::Prefix, &[25, 38][..]), (ImageRule::Segments, &[5, 20, 38])] {
            let stretches = stretches(rule, segments.iter().copied(), 0..63);
            let expected: u64 = parts.iter().map(|n| n / F + n % F).sum();
            assert_eq!(rows(&runs(&stretches, F, 1, 63, 63).unwrap()), expected);
        }
    }

    #[test]
    fn overlapping_segments_give_stretches_one_behind_the_other() {
        let segments = [segment(SegmentKind::Image, 5, 20), segment(SegmentKind::Image, 10, u64::MAX)];
        let found = stretches(ImageRule::Segments, segments.into_iter(), 2..40);
        let kinds: Vec<_> = found.iter().map(|stretch| (stretch.kind, stretch.start, stretch.end)).collect();
        assert_eq!(kinds, [(Kind::Text, 2, 5), (Kind::Image, 5, 25), (Kind::Image, 25, 40)]);
        assert!(runs(&found, F, 1, 40, 40).is_some());
    }

    #[test]
    fn rows_that_another_compressed_are_noticed() {
        let text = stretches(ImageRule::Segments, [].into_iter(), 0..30);
        assert_eq!(runs(&text, 3, 1, 29, 30), None, "one row less is no group");
        assert_eq!(runs(&text, 3, 1, 8, 30), None, "more groups than there are");
        assert_eq!(runs(&text, 3, 1, 31, 30), None);
        assert!(runs(&text, 3, 1, 10, 30).is_some());
    }
}
