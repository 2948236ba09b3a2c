//! Rows that were chosen, among those that are kept whole: against lists put together one row at a time.

use std::ops::Range;

use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::whole::{MOST_STRETCHES, Merge, merge_whole};

use crate::common::Random;
use crate::gpu::{Memory, OwnStream, device};

struct Case {
    open: Vec<Range<usize>>,
    length: usize,
    lists: usize,
    count: usize,
    /// `[lists, count]`
    chosen: Vec<u32>,
}

impl Case {
    fn new(random: &mut Random, stretches: usize) -> Self {
        let length = 2 * stretches + random.below(6000);
        let bounds = random.subset(length + 1, 2 * stretches);
        let open: Vec<_> = bounds.chunks_exact(2).map(|pair| pair[0] as usize..pair[1] as usize).collect();
        let rows = open.iter().map(Range::len).sum::<usize>();
        let (lists, count) = (1 + random.below(5), random.below(rows + 1));
        let chosen = (0..lists).flat_map(|_| random.subset(rows, count)).collect();
        Self { open, length, lists, count, chosen }
    }

    fn kept(&self) -> usize {
        self.count + self.length - self.open.iter().map(Range::len).sum::<usize>()
    }

    fn expected(&self) -> Vec<u32> {
        let open: Vec<usize> = self.open.iter().cloned().flatten().collect();
        let mut lists = Vec::new();
        for list in 0..self.lists {
            let mut keep = vec![true; self.length];
            open.iter().for_each(|&row| keep[row] = false);
            for &number in &self.chosen[list * self.count..][..self.count] {
                keep[open[number as usize]] = true;
            }
            lists.extend((0..self.length as u32).filter(|&row| keep[row as usize]));
        }
        lists
    }
}

#[test]
fn chosen_rows_stand_among_whole_ones() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(7));
    // Several launches: more items, and more stretches in all, than one takes.
    let mut cases: Vec<Case> = (0..600)
        .map(|_| {
            let stretches = random.below(9);
            Case::new(&mut random, stretches)
        })
        .collect();
    cases.push(Case::new(&mut random, MOST_STRETCHES));
    cases.push(Case::new(&mut random, 1));
    let memories: Vec<[Memory; 2]> =
        cases.iter().map(|case| [Memory::of(&case.chosen), Memory::poisoned(4 * case.lists * case.kept())]).collect();
    let merges: Vec<Merge<'_>> = cases
        .iter()
        .zip(&memories)
        .map(|(case, [chosen, out])| Merge {
            open: &case.open,
            length: case.length,
            chosen: Indices::per_head(chosen.slice(), case.count),
            lists: case.lists,
            out: out.slice(),
        })
        .collect();
    merge_whole(device, stream.stream(), &merges).unwrap();
    stream.wait();
    for (case, [_, out]) in cases.iter().zip(&memories) {
        assert!(out.values::<u32>() == case.expected(), "{:?} of {}, {} chosen", case.open, case.length, case.count);
    }

    // What cannot be is refused.
    let good = merges[600];
    let many: Vec<Range<usize>> = (0..=MOST_STRETCHES).map(|place| 2 * place..2 * place + 1).collect();
    assert!(merge_whole(device, stream.stream(), &[Merge { open: &many, length: 1 << 20, ..good }]).is_err());
    assert!(merge_whole(device, stream.stream(), &[Merge { open: &[3..4, 2..6], ..good }]).is_err());
    assert!(merge_whole(device, stream.stream(), &[Merge { length: good.length + 1, ..good }]).is_err());
}

/// A list of numbers that are none stays inside its buffers, which have guards.
#[test]
fn a_spoilt_choice_stays_inside_its_lists() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(8));
    let mut case = Case::new(&mut random, 5);
    case.chosen.iter_mut().for_each(|number| *number = random.below(1 << 31) as u32 * 2 + 1);
    let (chosen, out) = (Memory::of(&case.chosen), Memory::poisoned(4 * case.lists * case.kept()));
    let chosen = Indices::per_head(chosen.slice(), case.count);
    let (open, length, lists) = (&case.open[..], case.length, case.lists);
    merge_whole(device, stream.stream(), &[Merge { open, length, chosen, lists, out: out.slice() }]).unwrap();
    stream.wait();
}
