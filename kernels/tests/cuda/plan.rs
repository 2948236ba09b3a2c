//! Lists of a plan: copies, faults and positions against a scalar twin; formulas; what comes between scores and a selection.

use kvhook_kernels::Protected;
use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::plan::{Adoption, List, Positions, Progression, Spaced, adopt, progressions, spaced};
use kvhook_kernels::cuda::scores::{Scores, Selection, Weight, refuse, weigh};
use kvhook_kernels::cuda::{Device, FaultKind, Outcome};

use crate::common::Random;
use crate::gpu::{Judge, Memory, OwnStream, device};

/// One layer: what is kept, and the positions of what there is.
struct Case {
    heads: usize,
    length: usize,
    next_position: u32,
    /// `[lists, count]`
    kept: Vec<u32>,
    count: usize,
    shared: bool,
    /// `[tables, covered]`
    old: Vec<u32>,
    covered: usize,
    heads_agree: bool,
}

impl Case {
    fn new(random: &mut Random) -> Self {
        let (heads, length) = (1 + random.below(5), 1 + random.below(4000));
        let count = 1 + random.below(length);
        let (shared, heads_agree) = (random.below(2) == 0, random.below(2) == 0);
        let covered = if random.below(3) == 0 { 0 } else { random.below(length + 1) };
        let next_position = (length + random.below(5000)) as u32;
        let lists = if shared { 1 } else { heads };
        let tables = if heads_agree { 1 } else { heads };
        let last = next_position as usize - (length - covered);
        Self {
            heads,
            length,
            next_position,
            kept: (0..lists).flat_map(|_| random.subset(length, count)).collect(),
            count,
            shared,
            old: (0..tables).flat_map(|_| random.subset(last.max(covered), covered)).collect(),
            covered,
            heads_agree,
        }
    }

    fn stride(&self) -> usize {
        if self.shared { 0 } else { self.count }
    }

    /// Heads whose positions are written.
    fn tables(&self) -> usize {
        if self.shared && (self.heads_agree || self.covered == 0) { 1 } else { self.heads }
    }

    fn positions(&self) -> Vec<u32> {
        let of = |head: usize, place: usize| {
            let row = self.kept[head * self.stride() + place] as usize;
            let table = if self.heads_agree { 0 } else { head * self.covered };
            if row < self.covered { self.old[table + row] } else { self.next_position - (self.length - row) as u32 }
        };
        (0..self.tables()).flat_map(|head| (0..self.count).map(move |place| of(head, place))).collect()
    }
}

fn written(memory: &Memory, lists: usize, count: usize) -> Option<Indices> {
    Some(Indices { data: memory.slice(), stride_head: if lists == 1 { 0 } else { count }, count })
}

#[test]
fn lists_are_copied_with_the_positions_of_their_rows() {
    let Some(device) = device() else { return };
    let (stream, judge, mut random) = (OwnStream::new(), Judge::new(), Random(71));
    let cases: Vec<Case> = (0..500).map(|_| Case::new(&mut random)).collect();
    let memories: Vec<[Memory; 4]> = cases
        .iter()
        .map(|case| {
            let kept = Memory::poisoned(4 * case.kept.len());
            [Memory::of(&case.kept), Memory::of(&case.old), kept, Memory::poisoned(4 * case.tables() * case.count)]
        })
        .collect();
    let adoptions: Vec<Adoption> = cases
        .iter()
        .zip(&memories)
        .map(|(case, [list, old, kept, positions])| Adoption {
            list: List::Rows(
                Indices { data: list.slice(), stride_head: case.stride(), count: case.count },
                Positions {
                    table: old.slice(),
                    stride_head: if case.heads_agree { 0 } else { case.covered },
                    count: case.covered,
                    length: case.length,
                    next_position: case.next_position,
                },
            ),
            heads: if case.shared { case.tables() } else { case.heads },
            kept: written(kept, if case.shared { 1 } else { case.heads }, case.count),
            positions: written(positions, case.tables(), case.count),
        })
        .collect();
    judge.verdict().clear(device, stream.stream()).unwrap();
    adopt(device, stream.stream(), &adoptions, &judge.verdict()).unwrap();
    assert_eq!(judge.outcome(device, &stream), Outcome::Good);
    for (number, (case, [_, _, kept, positions])) in cases.iter().zip(&memories).enumerate() {
        assert_eq!(kept.values::<u32>(), case.kept, "case {number}");
        assert_eq!(positions.values::<u32>(), case.positions(), "case {number}");
    }
}

#[test]
fn ranges_become_lists() {
    let Some(device) = device() else { return };
    let (stream, judge) = (OwnStream::new(), Judge::new());
    let (length, ranges) = (5000usize, [(0usize, 4usize), (7, 1), (1000, 2500), (4900, 100)]);
    let count = ranges.iter().map(|range| range.1).sum();
    let old: Vec<u32> = (0..2 * 3000).map(|place| place as u32 * 3).collect();
    let (table, kept, positions) = (Memory::of(&old), Memory::poisoned(4 * count), Memory::poisoned(8 * count));
    let old_positions =
        Positions { table: table.slice(), stride_head: 3000, count: 3000, length, next_position: 70_000 };
    let mut place = 0;
    let mut adoptions = Vec::new();
    for (start, of_range) in ranges {
        adoptions.push(Adoption {
            list: List::Range { start, count: of_range, place, old: old_positions },
            heads: 2,
            kept: written(&kept, 1, count),
            positions: written(&positions, 2, count),
        });
        place += of_range;
    }
    judge.verdict().clear(device, stream.stream()).unwrap();
    adopt(device, stream.stream(), &adoptions, &judge.verdict()).unwrap();
    assert_eq!(judge.outcome(device, &stream), Outcome::Good);
    let rows: Vec<usize> = ranges.iter().flat_map(|&(start, count)| start..start + count).collect();
    assert_eq!(kept.values::<u32>(), rows.iter().map(|&row| row as u32).collect::<Vec<_>>());
    let position = |head: usize, row: usize| {
        if row < 3000 { old[head * 3000 + row] } else { (70_000 - (length - row)) as u32 }
    };
    let expected: Vec<u32> = (0..2).flat_map(|head| rows.iter().map(move |&row| position(head, row))).collect();
    assert_eq!(positions.values::<u32>(), expected);
}

#[test]
fn faults_of_lists_are_found() {
    let Some(device) = device() else { return };
    let (stream, judge) = (OwnStream::new(), Judge::new());
    let good: Vec<u32> = (0..3000).map(|place| place * 2).collect();
    let spoilt: [(usize, u32, FaultKind); 4] = [
        (2999, 6000, FaultKind::OutOfRange),
        (1024, 2046, FaultKind::Repeated),
        (1025, 2046, FaultKind::Descending),
        (0, u32::MAX, FaultKind::OutOfRange),
    ];
    for (place, value, kind) in spoilt {
        for positions in [false, true] {
            let mut list = good.clone();
            list[place] = value;
            let (first, second) = (Memory::of(&good), Memory::of(&list));
            let adoption = |memory: &Memory| {
                let indices = Indices { data: memory.slice(), stride_head: 1500, count: 1500 };
                let none = Positions {
                    table: kvhook_kernels::cuda::DeviceSlice::empty(),
                    stride_head: 0,
                    count: 0,
                    length: 6000,
                    next_position: 6000,
                };
                let list = match positions {
                    true => List::NewRows { positions: indices, limit: 6000 },
                    false => List::Rows(indices, none),
                };
                Adoption { list, heads: 2, kept: None, positions: None }
            };
            judge.verdict().clear(device, stream.stream()).unwrap();
            adopt(device, stream.stream(), &[adoption(&first), adoption(&second)], &judge.verdict()).unwrap();
            match judge.outcome(device, &stream) {
                // Positions may repeat: several new rows may stand for one.
                Outcome::Good => assert!(positions && kind == FaultKind::Repeated),
                Outcome::Bad(fault) => {
                    assert_eq!((fault.item, fault.head, fault.place), (1, place / 1500, place % 1500));
                    let not_computed = positions && value == u32::MAX;
                    assert_eq!(fault.kind, if not_computed { FaultKind::TooLarge } else { kind });
                }
                Outcome::Pending => panic!("the stream was waited for"),
            }
        }
    }
}

#[test]
fn spaced_rows_follow_their_formula() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(5));
    let shapes: Vec<[usize; 4]> = (0..300)
        .map(|_| {
            let length = 1 + random.below(9000);
            let sinks = random.below(length.min(8) + 1);
            let recent = random.below((length - sinks).min(500) + 1);
            [sinks, random.below(length - sinks - recent + 1), recent, length]
        })
        .chain([[4, 60_000, 32, 131_072]])
        .collect();
    let memories: Vec<Memory> =
        shapes.iter().map(|shape| Memory::poisoned(4 * (shape[0] + shape[1] + shape[2]))).collect();
    let items: Vec<Spaced> = shapes
        .iter()
        .zip(&memories)
        .map(|(&[sinks, chosen, recent, length], out)| Spaced { sinks, chosen, recent, length, out: out.slice() })
        .collect();
    spaced(device, stream.stream(), &items).unwrap();
    stream.wait();
    for (&[sinks, chosen, recent, length], out) in shapes.iter().zip(&memories) {
        let history = length - sinks - recent;
        let expected: Vec<u32> = (0..sinks)
            .chain((0..chosen).map(|place| sinks + (2 * place + 1) * history / (2 * chosen)))
            .chain(length - recent..length)
            .map(|row| row as u32)
            .collect();
        assert_eq!(out.values::<u32>(), expected, "{sinks} {chosen} {recent} {length}");
    }
}

#[test]
fn progressions_are_written_one_behind_the_other() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(6));
    let pieces: Vec<[usize; 3]> =
        (0..1500).map(|_| [random.below(100_000), random.below(9), random.below(3000)]).collect();
    let count: usize = pieces.iter().map(|piece| piece[2]).sum();
    let memory = Memory::poisoned(4 * count);
    let mut at = 0;
    let items = pieces.iter().map(|&[first, step, count]| {
        at += count;
        let out = memory.slice().part(at - count..at).unwrap();
        Progression { first: first as u32, step: step as u32, out }
    });
    progressions(device, stream.stream(), &items.collect::<Vec<_>>()).unwrap();
    stream.wait();
    let expected = pieces.iter().flat_map(|&[first, step, count]| (0..count).map(move |i| (first + i * step) as u32));
    assert!(memory.values::<u32>() == expected.collect::<Vec<_>>());
    let too_far = Progression { first: u32::MAX - 5, step: 3, out: memory.slice().part(0..3).unwrap() };
    assert!(progressions(device, stream.stream(), &[too_far]).is_err());
}

#[test]
fn bytes_that_are_kept_arrive() {
    if device().is_none() {
        return;
    }
    let mut own = Device::adopt(0, std::ptr::null_mut()).unwrap();
    let bytes: Vec<u8> = (0..1_000_003u32).map(|place| ((place * 7) >> 3) as u8).collect();
    let (first, second) = (own.keep(&bytes).unwrap(), own.keep(&bytes[1..]).unwrap());
    for (slice, expected) in [(first, &bytes[..]), (second, &bytes[1..])] {
        let mut found = vec![0; slice.len()];
        // SAFETY: the memory is that long, and lives as long as `own`.
        unsafe { cudarc::driver::result::memcpy_dtoh_sync(&mut found, slice.address()) }.unwrap();
        assert!(found == expected && slice.address().is_multiple_of(256));
    }
}

#[test]
fn scores_become_weights() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut scores = vec![-2.0f32, -0.5, 0.0, -1.000_001, 1.0, -0.25, f32::NAN, 3.0e38];
    scores.resize(8 * 1201, -4.0);
    for (weight, expected) in [
        (
            Weight::OfNorm,
            [
                0.5,
                2.0,
                1.0 / f32::MIN_POSITIVE,
                1.0 / 1.000_001,
                1.0 / f32::MIN_POSITIVE,
                4.0,
                f32::NAN,
                1.0 / f32::MIN_POSITIVE,
            ],
        ),
        (Weight::OfDirection, [0.0, 0.5, 1.0, 0.0, 2.0, 0.75, f32::NAN, 2.0]),
        (Weight::One, [1.0; 8]),
    ] {
        let memory = Memory::of(&scores);
        weigh(device, stream.stream(), &[Scores { scores: memory.slice(), heads: 2 }], weight).unwrap();
        stream.wait();
        let found = memory.values::<f32>();
        for (found, expected) in found.iter().zip(expected) {
            assert!(*found == expected || (found.is_nan() && expected.is_nan()), "{weight:?}: {found}, {expected}");
        }
        let rest = match weight {
            Weight::OfNorm => 0.25,
            Weight::OfDirection => 0.0,
            Weight::One => 1.0,
        };
        assert!(found[8..].iter().all(|&found| found == rest));
    }
}

#[test]
fn a_score_without_order_spoils_its_own_head() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let (heads, length, keep) = (3, 9000, 100);
    let protected = Protected { sinks: 4, recent: 32 };
    let kept: Vec<u32> = (0..heads * keep).map(|place| (place % keep) as u32).collect();
    for (place, value, spoils_top, spoils_sample) in [
        (5000, f32::NAN, true, true),
        (5000, -1.0, false, true),
        (5000, f32::INFINITY, false, true),
        (3, f32::NAN, false, false),
        (8999, f32::NAN, false, false),
        (8967, f32::NAN, true, true),
    ] {
        for weights in [false, true] {
            let mut scores = vec![0.5f32; heads * length];
            scores[length + place] = value;
            let (scores, out) = (Memory::of(&scores), Memory::of(&kept));
            let scores = Scores { scores: scores.slice(), heads };
            refuse(device, stream.stream(), &[Selection { scores, protected, kept: out.slice() }], weights).unwrap();
            stream.wait();
            let mut expected = kept.clone();
            if if weights { spoils_sample } else { spoils_top } {
                expected[keep] = u32::MAX;
            }
            assert_eq!(out.values::<u32>(), expected, "{place} {value} {weights}");
        }
    }
}
