//! Top-k and sampling: exactly the tokens that the CPU keeps.

use kvhook_kernels::cuda::sample::{Sample, sample};
use kvhook_kernels::cuda::top_k::{TopK, top_k};
use kvhook_kernels::cuda::{FaultKind, Outcome};
use kvhook_kernels::sample::Draw;
use kvhook_kernels::{Protected, top_k as host_top_k};

use crate::common::Random;
use crate::gpu::{Judge, Memory, OwnStream, device, rounds};

/// Scores of one item, with many ties in some.
struct Case {
    scores: Vec<f32>,
    heads: usize,
    protected: Protected,
    keep: usize,
}

impl Case {
    fn new(random: &mut Random, length: usize, heads: usize) -> Self {
        let kind = random.below(5);
        let scores = (0..length * heads)
            .map(|_| match kind {
                0 => random.real(),
                1 => (random.below(5) as f32 - 2.0) * 0.25,
                2 => 10.0 + random.real() * 1e-4,
                3 => f32::from_bits(random.next() as u32 & 0x807f_ffff),
                _ => [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, f32::MAX][random.below(6)],
            })
            .collect();
        let protected = Protected { sinks: random.below(6), recent: random.below(70) };
        let least = protected.count(length);
        let keep = match random.below(6) {
            0 => least,
            1 => length,
            _ => least + random.below(length - least + 1),
        };
        Self { scores, heads, protected, keep }
    }
}

fn cases(random: &mut Random) -> Vec<Case> {
    let mut cases: Vec<Case> = (0..60)
        .map(|_| {
            let (length, heads) = (1 + random.below(5000), 1 + random.below(9));
            Case::new(random, length, heads)
        })
        .collect();
    for length in [8192, 8193, 30_000, 65_536, 131_072, 300_001] {
        cases.push(Case::new(random, length, 3));
    }
    cases
}

#[test]
fn top_k_keeps_what_the_cpu_keeps() {
    let Some(device) = device() else { return };
    let (stream, judge, mut random) = (OwnStream::new(), Judge::new(), Random(41));
    let cases = cases(&mut random);
    let memories: Vec<(Memory, Memory)> =
        cases.iter().map(|case| (Memory::of(&case.scores), Memory::poisoned(4 * case.keep * case.heads))).collect();
    let items: Vec<TopK> = cases
        .iter()
        .zip(&memories)
        .map(|(case, (scores, out))| TopK {
            scores: scores.slice(),
            heads: case.heads,
            protected: case.protected,
            out: out.slice(),
        })
        .collect();
    let expected: Vec<Vec<u32>> = cases
        .iter()
        .map(|case| {
            let mut kept = vec![0; case.keep * case.heads];
            host_top_k::top_k_heads(&case.scores, case.heads, case.protected, &mut kept).unwrap();
            kept
        })
        .collect();
    // Alone, so that the number of blocks follows each length, then all in one launch.
    judge.verdict().clear(device, stream.stream()).unwrap();
    for together in [false, true] {
        if together {
            top_k(device, stream.stream(), &items, &judge.verdict()).unwrap();
        } else {
            for item in &items {
                top_k(device, stream.stream(), &[*item], &judge.verdict()).unwrap();
            }
        }
        stream.wait();
        for (number, ((_, out), expected)) in memories.iter().zip(&expected).enumerate() {
            assert!(out.values::<u32>() == *expected, "case {number}, together {together}");
        }
    }
    assert_eq!(judge.outcome(device, &stream), Outcome::Good);
}

#[test]
fn a_score_that_is_nan_is_reported() {
    let Some(device) = device() else { return };
    let (stream, judge, mut random) = (OwnStream::new(), Judge::new(), Random(42));
    let mut scores: Vec<f32> = (0..4 * 20_000).map(|_| random.real()).collect();
    // The first one is protected.
    for place in [1, 20_000 * 2 + 777, 20_000 * 2 + 15_000, 20_000 * 3 + 9] {
        scores[place] = f32::NAN;
    }
    let (scores, out) = (Memory::of(&scores), Memory::poisoned(4 * 4 * 1000));
    let item = |heads: std::ops::Range<usize>| TopK {
        scores: scores.slice().part(heads.start * 20_000..heads.end * 20_000).unwrap(),
        heads: heads.len(),
        protected: Protected { sinks: 4, recent: 16 },
        out: out.slice().part(heads.start * 1000..heads.end * 1000).unwrap(),
    };
    judge.verdict().clear(device, stream.stream()).unwrap();
    top_k(device, stream.stream(), &[item(0..1), item(1..4)], &judge.verdict()).unwrap();
    let Outcome::Bad(fault) = judge.outcome(device, &stream) else { panic!("a score is NaN") };
    assert_eq!((fault.item, fault.head, fault.place, fault.kind), (1, 1, 777, FaultKind::NotANumber));
}

#[test]
fn draws_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let (stream, judge, mut random) = (OwnStream::new(), Judge::new(), Random(43));
    for round in 0..rounds(40) {
        let length = if round < 34 { 1 + random.below(4000) } else { [8193, 40_000, 200_001][round % 3] };
        let heads = 1 + random.below(4);
        let weights: Vec<f32> =
            (0..length * heads).map(|_| if random.below(7) == 0 { 0.0 } else { random.real().abs() }).collect();
        let protected = Protected { sinks: random.below(5), recent: random.below(20) };
        let least = protected.count(length);
        let keep = least + random.below(length - least + 1);
        let draw = Draw { seed: random.next(), round: round as u64, layer: 7, head: 16 };
        let (memory, out) = (Memory::of(&weights), Memory::poisoned(4 * keep * heads));
        let item = Sample { weights: memory.slice(), heads, protected, draw, out: out.slice() };
        judge.verdict().clear(device, stream.stream()).unwrap();
        sample(device, stream.stream(), &[item], &judge.verdict()).unwrap();
        assert_eq!(judge.outcome(device, &stream), Outcome::Good);
        let found = out.values::<u32>();
        for head in 0..heads {
            let mut kept = vec![0; keep];
            let draw = Draw { head: 16 + head as u32, ..draw };
            kvhook_kernels::sample::sample(&weights[head * length..][..length], protected, draw, &mut kept).unwrap();
            assert!(found[head * keep..][..keep] == kept, "round {round}, head {head}");
        }
    }
}

#[test]
fn a_weight_that_is_none_is_reported() {
    let Some(device) = device() else { return };
    let (stream, judge) = (OwnStream::new(), Judge::new());
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        let mut weights = vec![1.0f32; 3000];
        weights[2999] = bad;
        weights[1500] = bad;
        let (weights, out) = (Memory::of(&weights), Memory::poisoned(400));
        let draw = Draw { seed: 1, round: 0, layer: 0, head: 0 };
        let protected = Protected { sinks: 0, recent: 1 };
        let item = Sample { weights: weights.slice(), heads: 1, protected, draw, out: out.slice() };
        judge.verdict().clear(device, stream.stream()).unwrap();
        sample(device, stream.stream(), &[item], &judge.verdict()).unwrap();
        let Outcome::Bad(fault) = judge.outcome(device, &stream) else { panic!("a weight is {bad}") };
        assert_eq!((fault.place, fault.kind), (1500, FaultKind::Weight));
    }
}
