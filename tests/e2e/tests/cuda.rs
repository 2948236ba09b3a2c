//! The engine on a CUDA device: its logits beside those of the CPU, the same bits whatever the batch, windows of queries,
//! and decode before and after a cut. `masked`, `ladder` and `exact` run on it, too. Without a device: skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Instant;

use kvhook_e2e::model::{CONTIGUOUS, bits, cuda, model, paged, path, runner, text};
use kvhook_e2e::reference::Reference;
use kvhook_engine::quality::argmax;
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, LogitsRow, Work};
use kvhook_engine::{Begin, CacheConfig, Device, KvDtype, Runner, Scoring, SequenceId};
// Builds the plugin's shared library.
use kvhook_truncate as _;

fn plain(cache: CacheConfig) -> Runner {
    Runner::new(model(), cache).unwrap()
}

/// Largest difference of two logits.
fn difference(a: &[LogitsRow], b: &[LogitsRow]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().flatten().all(|logit| logit.is_finite()));
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits behind each of the last `rows` tokens.
fn behind(cache: CacheConfig, tokens: &[u32], rows: usize, chunk: usize) -> Vec<LogitsRow> {
    let mut runner = plain(cache);
    let (prompt, rest) = tokens.split_at(tokens.len() - rows);
    let (id, _) = runner.prefill(prompt, chunk).unwrap();
    runner.score(id, rest, Scoring::Together).unwrap()
}

#[test]
fn logits_are_those_of_an_independent_implementation() {
    let Some(device) = cuda() else { return };
    let tokens = &text("moby-dick.txt")[1_000..1_400];
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let reference = Reference::load(&path()).unwrap();
    let expected = reference.logits(tokens, &positions, tokens.len() - 48, &|_, _, _, _| true).unwrap();
    let found = difference(&behind(CacheConfig { device, ..CONTIGUOUS }, tokens, 48, 300), &expected);
    println!("f32: logits differ by {found:.1e}");
    assert!(found < 1e-3, "logits differ by {found:e}");
}

#[test]
fn logits_are_those_of_the_cpu() {
    let Some(device) = cuda() else { return };
    let tokens = &text("moby-dick.txt")[1_000..1_700];
    // The device rounds queries to the cache's dtype, too, as engines on GPUs do. Differences of 7e-5, 0.015 and 0.13 were
    // seen; logits reach 27.
    for (dtype, bound) in [(KvDtype::F32, 5e-4), (KvDtype::F16, 0.05), (KvDtype::Bf16, 0.4)] {
        let cache = CacheConfig { dtype, ..CONTIGUOUS };
        let expected = behind(cache, tokens, 40, 512);
        let found = behind(CacheConfig { device, ..cache }, tokens, 40, 512);
        let largest = difference(&found, &expected);
        println!("{dtype:?}: logits differ by {largest:.1e}");
        assert!(largest < bound, "{dtype:?}: logits differ by {largest:e}");
    }
}

#[test]
fn greedy_answers_are_those_of_the_cpu() {
    let Some(device) = cuda() else { return };
    let prompt = &text("state-of-the-union.txt")[4_000..4_200];
    let answer = |device| {
        let mut runner = plain(CacheConfig { device, ..CONTIGUOUS });
        let (id, mut row) = runner.prefill(prompt, 512).unwrap();
        let mut tokens = Vec::new();
        while tokens.len() < 48 {
            tokens.push(argmax(&row));
            row = runner.score(id, &tokens[tokens.len() - 1..], Scoring::OneByOne).unwrap().remove(0);
        }
        tokens
    };
    assert_eq!(answer(device), answer(Device::Cpu));
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_cache_and_chunk() {
    let Some(device) = cuda() else { return };
    let tokens = &text("moby-dick.txt")[3_000..3_400];
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        let on = |cache: CacheConfig, ranks| CacheConfig { device, dtype, ranks, ..cache };
        let expected: Vec<_> = behind(on(CONTIGUOUS, 1), tokens, 100, 512).iter().map(|row| bits(row)).collect();
        for (cache, chunk) in [
            (on(CONTIGUOUS, 3), 1),
            (on(paged(16, 64), 1), 65),
            (on(paged(7, 64), 3), 33),
            // Some ranks share a KV head.
            (on(paged(16, 64), 5), 100),
            (on(CONTIGUOUS, 9), 128),
        ] {
            let found = behind(cache, tokens, 100, chunk);
            assert!(found.iter().map(|row| bits(row)).eq(expected.iter().cloned()), "{cache:?}, chunks of {chunk}");
        }
        // Decode, alone and beside 39 others.
        let mut runner = plain(on(paged(16, 1_200), 1));
        let ids: Vec<_> = (0..40).map(|other| runner.prefill(&tokens[..300 + other % 3], 512).unwrap().0).collect();
        for step in 0..4 {
            let next = |index: usize| &tokens[300 + index % 3 + step..][..1];
            let work = |(index, &sequence): (usize, &SequenceId)| Work {
                sequence,
                tokens: next(index),
                phase: Phase::Decode,
                prompt_ends: false,
                logits: Logits::Last,
            };
            let rows = runner.step(&ids.iter().enumerate().map(work).collect::<Vec<_>>()).unwrap();
            for (index, row) in rows.iter().enumerate() {
                assert_eq!(bits(&row[0]), expected[step + index % 3], "{dtype:?}, step {step}, sequence {index}");
            }
        }
    }
}

/// Where the survivors of two sequences differ, as a share of all.
fn disagreement(a: &[Vec<Vec<Vec<u32>>>], b: &[Vec<Vec<Vec<u32>>>]) -> f64 {
    let (mut missing, mut all) = (0, 0);
    for (a, b) in a.iter().flatten().flatten().zip(b.iter().flatten().flatten()) {
        assert_eq!(a.len(), b.len());
        all += a.len();
        missing += a.iter().filter(|position| b.binary_search(position).is_err()).count();
    }
    missing as f64 / all as f64
}

fn survivors(runner: &mut Runner, arm: &str, prompt: &[u32], chunk: usize) -> Vec<Vec<Vec<Vec<u32>>>> {
    let (id, _) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(prompt) }, chunk).unwrap();
    let report = runner.report(id).unwrap();
    assert_eq!((report.commits.len(), report.failures.len()), (1, 0), "{report:?}");
    let survivors = runner.survivors(id).unwrap();
    runner.free(id).unwrap();
    survivors
}

#[test]
fn windows_of_queries_are_whole_behind_chunks_and_prefix_hits() {
    let Some(device) = cuda() else { return };
    let arms = [1, 7, 63, 64].map(|window| {
        let config = format!("budget=128,recent=16,history=top,importance=attention,window={window}");
        (format!("w{window}"), config)
    });
    let arms: Vec<_> = arms.iter().map(|(name, config)| (name.as_str(), "truncate", config.as_str())).collect();
    let tokens = &text("moby-dick.txt")[9_000..9_600];
    let cache = |device, sharing| CacheConfig { device, prefix_sharing: sharing, ..paged(16, 128) };
    let mut whole = runner(cache(device, false), &arms, 0);
    let mut shared = runner(cache(device, true), &arms, 0);
    let mut on_cpu = runner(cache(Device::Cpu, false), &arms, 0);
    for left in [1, 7, 63, 64] {
        let prompt = &tokens[..512 + left];
        for arm in &arms {
            let expected = survivors(&mut whole, arm.0, prompt, prompt.len());
            // The last chunk has `left` queries.
            assert!(survivors(&mut whole, arm.0, prompt, 512) == expected, "{} behind a chunk, {left} left", arm.0);
            // The prompt but for its last tokens is in the cache already, and so far as the window allows taken over.
            let (other, _) = shared.prefill_on(&Begin { arm: Some("none"), ..Begin::new(prompt) }, 600).unwrap();
            shared.free(other).unwrap();
            assert!(
                survivors(&mut shared, arm.0, prompt, 600) == expected,
                "{} behind a prefix hit, {left} left",
                arm.0
            );
        }
        let (name, arm) = (arms[3].0, survivors(&mut whole, "w64", prompt, 600));
        let apart = disagreement(&arm, &survivors(&mut on_cpu, name, prompt, 600));
        println!("{name}, {} tokens: {:.3} % of the rows are others than on the CPU", prompt.len(), 100.0 * apart);
        assert!(apart <= 0.001, "{apart}");
    }
}

#[test]
fn plans_that_wait_for_their_verdict_are_carried_out_later() {
    let Some(device) = cuda() else { return };
    let tokens = &text("moby-dick.txt")[2_000..2_310];
    let arm = [("a", "truncate", "budget=64,history=top,importance=key_diff")];
    let cache = CacheConfig { device, ..CONTIGUOUS };
    let mut kept = Vec::new();
    for lag in [0, 1, 3] {
        let mut runner = runner(cache, &arm, lag);
        let (id, _) = runner.prefill_on(&Begin { arm: Some("a"), ..Begin::new(&tokens[..300]) }, 512).unwrap();
        assert_eq!(runner.report(id).unwrap().pending, lag > 0);
        runner.score(id, &tokens[300..], Scoring::OneByOne).unwrap();
        let report = runner.report(id).unwrap();
        assert_eq!(report.lengths, vec![64 + 10; model().config.layers], "{report:?}");
        kept.push(runner.survivors(id).unwrap());
    }
    assert!(kept.iter().all(|positions| *positions == kept[0]));
}

/// Median milliseconds of a decode step.
fn step_ms(runner: &mut Runner, id: SequenceId, tokens: &[u32]) -> f64 {
    let mut times: Vec<f64> = tokens
        .chunks(1)
        .map(|token| {
            let start = Instant::now();
            runner.score(id, token, Scoring::OneByOne).unwrap();
            1e3 * start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[test]
fn decode_after_a_cut_is_as_fast_as_that_of_a_short_prompt() {
    let Some(device) = cuda() else { return };
    let tokens = &text("moby-dick.txt")[..7_200];
    let arms = [("cut", "truncate", "budget=1024,history=top,importance=attention")];
    for (name, cache) in [("contiguous", CONTIGUOUS), ("paged", paged(16, 1_200))] {
        let cache = CacheConfig { device, dtype: KvDtype::F16, prefix_sharing: false, ..cache };
        let mut runner = runner(cache, &arms, 0);
        let mut of = |arm, prompt: usize| {
            let start = Instant::now();
            let (id, _) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(&tokens[..prompt]) }, 4_096).unwrap();
            let prefill = start.elapsed().as_secs_f64();
            let ms = step_ms(&mut runner, id, &tokens[7_000..7_100]);
            runner.free(id).unwrap();
            (prefill, ms)
        };
        // Warm.
        of("none", 4_096);
        let (long, cut, short) = (of("none", 4_096), of("cut", 4_096), of("none", 1_024));
        println!(
            "{name}: prefill of 4,096 tokens {:.0} ms; decode step {:.3} ms at 4,096, {:.3} ms after a cut to 1,024, \
             {:.3} ms at 1,024",
            1e3 * long.0,
            long.1,
            cut.1,
            short.1
        );
        assert!(cut.1 < 1.1 * short.1, "{name}: {} ms after a cut, {} ms of a short prompt", cut.1, short.1);
    }
}
