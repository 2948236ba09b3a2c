//! Index check: the first fault is the CPU's.

use kvhook_kernels::cuda::check::{Check, Indices, check_indices};
use kvhook_kernels::cuda::{FaultKind, Outcome};
use kvhook_kernels::{IndexFault, check};

use crate::common::Random;
use crate::gpu::{Judge, Memory, OwnStream, device};

#[test]
fn the_first_fault_is_the_one_of_the_cpu() {
    let Some(device) = device() else { return };
    let (stream, judge) = (OwnStream::new(), Judge::new());
    let mut random = Random(11);
    for round in 0..200 {
        let (heads, items) = (1 + random.below(9), 1 + random.below(5));
        let length = 1 + random.below(9000);
        let count = random.below(length + 1);
        let shared = random.below(3) == 0;
        let mut lists: Vec<Vec<u32>> = Vec::new();
        for _ in 0..items {
            let lists_here = if shared { 1 } else { heads };
            lists.push((0..lists_here).flat_map(|_| random.subset(length, count)).collect());
        }
        for _ in 0..if count > 0 { random.below(4) } else { 0 } {
            let list = &mut lists[random.below(items)];
            let place = random.below(list.len());
            list[place] = match random.below(3) {
                0 => u32::MAX - random.below(2) as u32,
                1 => list[place.saturating_sub(1)],
                _ => random.below(length) as u32,
            };
        }
        let memories: Vec<Memory> = lists.iter().map(|list| Memory::of(list)).collect();
        let checks: Vec<Check> = memories
            .iter()
            .map(|memory| Check {
                indices: Indices { data: memory.slice(), stride_head: if shared { 0 } else { count }, count },
                heads,
                length,
                least: 0,
            })
            .collect();
        judge.verdict().clear(device, stream.stream()).unwrap();
        check_indices(device, stream.stream(), &checks, &judge.verdict()).unwrap();
        let expected = lists.iter().enumerate().find_map(|(item, list)| {
            let indices = check::Indices { data: list, stride_head: if shared { 0 } else { count }, count };
            check::check_indices(&indices, heads, length).err().map(|bad| (item, bad))
        });
        match (judge.outcome(device, &stream), expected) {
            (Outcome::Good, None) => {}
            (Outcome::Bad(fault), Some((item, bad))) => {
                assert_eq!((fault.item, fault.head, fault.place), (item, bad.head, bad.place), "round {round}");
                let kind = match bad.fault {
                    IndexFault::OutOfRange { .. } => FaultKind::OutOfRange,
                    IndexFault::Descending { .. } => FaultKind::Descending,
                    IndexFault::Repeated => FaultKind::Repeated,
                    IndexFault::BufferTooShort { .. } => FaultKind::Unknown,
                };
                assert_eq!(fault.kind, kind, "round {round}");
            }
            (found, expected) => panic!("round {round}: found {found:?}, expected {expected:?}"),
        }
    }
}

#[test]
fn a_first_index_before_its_destination_overtakes() {
    let Some(device) = device() else { return };
    let (stream, judge) = (OwnStream::new(), Judge::new());
    let list = Memory::of(&[4u32, 5, 9]);
    let check = |least| Check { indices: Indices::shared(list.slice()), heads: 2, length: 10, least };
    for (least, good) in [(4, true), (5, false)] {
        judge.verdict().clear(device, stream.stream()).unwrap();
        check_indices(device, stream.stream(), &[check(least)], &judge.verdict()).unwrap();
        match judge.outcome(device, &stream) {
            Outcome::Good => assert!(good),
            Outcome::Bad(fault) => assert!(!good && fault.kind == FaultKind::Overtakes && fault.place == 0),
            Outcome::Pending => panic!("the stream was waited for"),
        }
    }
}
