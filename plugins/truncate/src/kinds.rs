//! Which rows may be dropped, by the kind of token that they stand for.

use std::ops::Range;

use kvhook_abi::view::{LayerView, SegmentKind, Segments};

/// The kinds of tokens that are compressed; rows of the others are kept whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compressed {
    /// Text: what no segment covers, too.
    Text,
    /// Entries made from images.
    Image,
    /// Every kind.
    All,
}

impl Compressed {
    /// The config's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Image => "image",
            Self::All => "both",
        }
    }
}

/// The stretches of one sequence that are compressed.
pub struct Kinds {
    /// Ascending positions, `start..end`; `None`: all positions.
    stretches: Option<Vec<(u64, u64)>>,
}

impl Kinds {
    /// What is compressed of a sequence whose next token has `position`.
    pub fn new(compressed: Compressed, segments: Segments<'_>, position: u64) -> Self {
        let segments = segments.iter().map(|segment| (segment.kind, segment.start, segment.length));
        Self::from_stretches(compressed, segments, position)
    }

    fn from_stretches(
        compressed: Compressed,
        segments: impl Iterator<Item = (SegmentKind, u64, u64)>,
        position: u64,
    ) -> Self {
        let wanted = match compressed {
            Compressed::All => return Self { stretches: None },
            Compressed::Text => SegmentKind::Text,
            Compressed::Image => SegmentKind::Image,
        };
        let mut stretches = Vec::new();
        let mut add = |start: u64, end: u64| {
            if start < end {
                stretches.push((start, end));
            }
        };
        let mut covered = 0;
        for (kind, start, length) in segments {
            let (start, end) = (start.min(position), start.saturating_add(length).min(position));
            if wanted == SegmentKind::Text {
                add(covered, start);
            }
            if kind == wanted {
                add(start, end);
            }
            covered = end;
        }
        if wanted == SegmentKind::Text {
            add(covered, position);
        }
        Self { stretches: Some(stretches) }
    }

    /// How many of the first `position` tokens are compressed.
    pub fn seen(&self, position: u64) -> u64 {
        match &self.stretches {
            None => position,
            Some(stretches) => stretches.iter().map(|(start, end)| end - start).sum(),
        }
    }

    /// Whether every token is compressed, so that the rows' positions do not matter.
    pub fn is_all(&self) -> bool {
        self.stretches.is_none()
    }

    fn contains(&self, position: u64) -> bool {
        self.stretches.as_ref().is_none_or(|stretches| {
            let behind = stretches.partition_point(|(start, _)| *start <= position);
            behind > 0 && position < stretches[behind - 1].1
        })
    }

    /// The stretches of rows that may be dropped, of `length` rows that stand for the last positions before `position`
    /// without a gap.
    pub fn of_adjacent(&self, length: usize, position: u64) -> Vec<Range<usize>> {
        let all = [(0, position)];
        let stretches = self.stretches.as_deref().unwrap_or(&all);
        let row = |at: u64| (at + length as u64).saturating_sub(position) as usize;
        let rows = stretches.iter().map(|&(start, end)| row(start)..row(end)).filter(|rows| !rows.is_empty());
        let mut joined: Vec<Range<usize>> = Vec::new();
        for rows in rows {
            match joined.last_mut() {
                Some(last) if last.end == rows.start => last.end = rows.end,
                _ => joined.push(rows),
            }
        }
        joined
    }

    /// The rows of one head that may be dropped, and those that are kept whole, both ascending. `None` when the layer
    /// does not say which position a row stands for.
    pub fn split(&self, layer: &LayerView<'_>, head: usize) -> Option<(Vec<u32>, Vec<u32>)> {
        let (mut open, mut whole) = (Vec::new(), Vec::new());
        for row in 0..layer.length() {
            let rows = if self.contains(layer.position(row, head)?) { &mut open } else { &mut whole };
            rows.push(row as u32);
        }
        Some((open, whole))
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one stretch of rows is a list of stretches, too")]
mod tests {
    use super::*;

    /// Image at 3..6 and 6..8, text at 9..10, another kind at 12..14, of 20 tokens.
    fn kinds(compressed: Compressed, position: u64) -> Kinds {
        let segments = [
            (SegmentKind::Image, 3, 3),
            (SegmentKind::Image, 6, 2),
            (SegmentKind::Text, 9, 1),
            (SegmentKind::Unknown(7), 12, 2),
        ];
        Kinds::from_stretches(compressed, segments.into_iter(), position)
    }

    fn positions(kinds: &Kinds) -> Vec<u64> {
        (0..30).filter(|position| kinds.contains(*position)).collect()
    }

    #[test]
    fn text_is_what_no_other_kind_covers() {
        let text = kinds(Compressed::Text, 20);
        assert_eq!(positions(&text), [0, 1, 2, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19]);
        assert_eq!(text.seen(20), 13);
    }

    #[test]
    fn images_are_their_segments_as_far_as_they_were_seen() {
        assert_eq!(positions(&kinds(Compressed::Image, 20)), [3, 4, 5, 6, 7]);
        assert_eq!(positions(&kinds(Compressed::Image, 7)), [3, 4, 5, 6]);
        assert_eq!(kinds(Compressed::Image, 2).seen(2), 0);
    }

    #[test]
    fn rows_of_adjacent_positions_are_stretches() {
        let text = kinds(Compressed::Text, 20);
        assert_eq!(text.of_adjacent(20, 20), [0..3, 8..12, 14..20]);
        // Rows 0 to 15 stand for positions 5 to 19.
        assert_eq!(text.of_adjacent(15, 20), [3..7, 9..15]);
        assert_eq!(kinds(Compressed::Image, 20).of_adjacent(15, 20), [0..3]);
        assert_eq!(kinds(Compressed::Image, 20).of_adjacent(5, 20), []);
        assert_eq!(kinds(Compressed::All, 20).of_adjacent(15, 20), [0..15]);
    }

    #[test]
    fn all_needs_no_positions() {
        let all = kinds(Compressed::All, 20);
        assert!(all.is_all());
        assert_eq!(all.seen(20), 20);
    }
}
