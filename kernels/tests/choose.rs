//! Choosing tokens: top-k against a full sort, samples against their probabilities.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kvhook_kernels::sample::{Draw, sample};
use kvhook_kernels::top_k::{top_k, top_k_heads};
use kvhook_kernels::{KernelError, Protected};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn top_k_is_the_head_of_a_sort(
        // Few values, so that ties abound.
        scores in prop::collection::vec(
            prop_oneof![
                (-3i32..4).prop_map(|x| x as f32),
                Just(-0.0),
                Just(f32::INFINITY),
                Just(f32::NEG_INFINITY),
                any::<f32>().prop_filter("a number", |x| !x.is_nan()),
            ],
            0..60,
        ),
        sinks in 0usize..6,
        recent in 0usize..6,
        more in 0usize..60,
    ) {
        let length = scores.len();
        let protected = Protected { sinks, recent };
        let is_protected = |token: usize| token < sinks || token + recent >= length;
        let least = (0..length).filter(|&token| is_protected(token)).count();
        prop_assert_eq!(protected.count(length), least);
        let keep = (least + more).min(length);

        let mut order: Vec<usize> = (0..length).collect();
        order.sort_by(|&a, &b| {
            is_protected(b)
                .cmp(&is_protected(a))
                .then(scores[b].partial_cmp(&scores[a]).unwrap())
                .then(a.cmp(&b))
        });
        let mut expected: Vec<u32> = order[..keep].iter().map(|&token| token as u32).collect();
        expected.sort_unstable();
        let mut out = vec![0; keep];
        top_k(&scores, protected, &mut out).unwrap();
        prop_assert_eq!(out, expected);
    }

    #[test]
    fn samples_are_sets_that_keep_what_is_protected(
        weights in prop::collection::vec(prop_oneof![Just(0.0f32), 0.0f32..5.0, Just(f32::MIN_POSITIVE)], 1..60),
        sinks in 0usize..6,
        recent in 0usize..6,
        more in 0usize..60,
        seed: u64,
    ) {
        let length = weights.len();
        let protected = Protected { sinks, recent };
        let keep = (protected.count(length) + more).min(length);
        let draw = Draw { seed, round: 0, layer: 1, head: 2 };
        let mut out = vec![0; keep];
        sample(&weights, protected, draw, &mut out).unwrap();
        prop_assert!(out.windows(2).all(|pair| pair[0] < pair[1]));
        let kept = |token: usize| out.contains(&(token as u32));
        prop_assert!((0..length).all(|token| kept(token) || (token >= sinks && token + recent < length)));
        // A token without weight is kept only when all with weight are.
        let open = || sinks.min(length)..length.saturating_sub(recent).max(sinks.min(length));
        if open().any(|token| weights[token] == 0.0 && kept(token)) {
            prop_assert!(open().all(|token| weights[token] == 0.0 || kept(token)));
        }
        let mut again = vec![0; keep];
        sample(&weights, protected, draw, &mut again).unwrap();
        prop_assert_eq!(out, again);
    }
}

#[test]
fn heads_are_independent() {
    let scores = [1.0, 3.0, 2.0, 0.0, /* head 1 */ 5.0, 5.0, 5.0, 6.0];
    let mut out = [0; 4];
    top_k_heads(&scores, 2, Protected::default(), &mut out).unwrap();
    assert_eq!(out, [1, 2, 0, 3]);
    assert!(matches!(
        top_k_heads(&scores[..7], 2, Protected::default(), &mut out),
        Err(KernelError::SliceLength { found: 7, expected: 6, .. })
    ));
}

#[test]
fn what_cannot_be_chosen_is_refused() {
    let two = Protected { sinks: 1, recent: 1 };
    let mut out = [9; 3];
    assert_eq!(top_k(&[1.0, 2.0, f32::NAN, 0.0], two, &mut out), Err(KernelError::ScoreNotANumber { token: 2 }));
    assert_eq!(top_k(&[f32::NAN, 2.0, 1.0, f32::NAN], two, &mut out), Ok(()));
    assert_eq!(out, [0, 1, 3]);
    assert_eq!(top_k(&[1.0; 4], two, &mut out[..1]), Err(KernelError::Keep { keep: 1, protected: 2, length: 4 }));
    assert_eq!(top_k(&[1.0; 2], two, &mut out), Err(KernelError::Keep { keep: 3, protected: 2, length: 2 }));
    let draw = Draw { seed: 0, round: 0, layer: 0, head: 0 };
    for wrong in [-1.0, f32::INFINITY, f32::NAN] {
        let refused = sample(&[1.0, wrong, 1.0, 1.0], Protected::default(), draw, &mut out);
        assert!(matches!(refused, Err(KernelError::Weight { token: 1, .. })), "{refused:?}");
    }
    assert_eq!(out, [0, 1, 3]);
}

/// A pair drawn from weights 1, 2, 3, 4: the probability that a token is in it, from the sequential definition.
#[test]
fn samples_have_their_probabilities() {
    let weights = [1.0f32, 2.0, 3.0, 4.0];
    let mut expected = [0.0f64; 4];
    for first in 0..4 {
        for second in (0..4).filter(|&second| second != first) {
            let probability =
                f64::from(weights[first]) / 10.0 * f64::from(weights[second]) / (10.0 - f64::from(weights[first]));
            expected[first] += probability;
            expected[second] += probability;
        }
    }
    // Each of the four numbers that name a draw gives draws of their own.
    let draws = 20_000u32;
    let by: [fn(u32) -> Draw; 4] = [
        |n| Draw { seed: n.into(), round: 0, layer: 0, head: 0 },
        |n| Draw { seed: 0, round: n.into(), layer: 0, head: 0 },
        |n| Draw { seed: 0, round: 0, layer: n, head: 0 },
        |n| Draw { seed: 0, round: 0, layer: 0, head: n },
    ];
    for draw in by {
        let mut counts = [0u32; 4];
        for n in 0..draws {
            let mut out = [0; 2];
            sample(&weights, Protected::default(), draw(n), &mut out).unwrap();
            out.iter().for_each(|&token| counts[token as usize] += 1);
        }
        for (count, expected) in counts.iter().zip(expected) {
            let found = f64::from(*count) / f64::from(draws);
            // Five standard deviations.
            let bound = 5.0 * (expected * (1.0 - expected) / f64::from(draws)).sqrt();
            assert!((found - expected).abs() < bound, "{found}, expected {expected}");
        }
    }
}

/// Moments of the uniform distribution.
#[test]
fn uniform_numbers_lie_in_their_range() {
    let draw = Draw { seed: 1, round: 2, layer: 3, head: 4 };
    let numbers: Vec<f64> = (0..10_000).map(|token| draw.uniform(token)).collect();
    assert!(numbers.iter().all(|&u| u > 0.0 && u <= 1.0));
    let mean = numbers.iter().sum::<f64>() / 10_000.0;
    let square = numbers.iter().map(|u| u * u).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.015, "{mean}");
    assert!((square - 1.0 / 3.0).abs() < 0.015, "{square}");
}
