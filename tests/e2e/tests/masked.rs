//! Decoding over a compressed cache equals full attention in which the dropped entries are masked, for each layer and KV
//! head, to rounding.
//!
//! The reference ([`kvhook_e2e::reference`]) is one forward pass over the whole text, without a cache. What each query may
//! see comes from the positions that the host says are left after each commit, which are checked themselves.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::OnceLock;

use kvhook_e2e::model::{CONTIGUOUS, bits, model, paged, path, runner, text};
use kvhook_e2e::reference::Reference;
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, LogitsRow, Work};
use kvhook_engine::{Begin, CacheConfig, Device, Runner, SequenceId};
// Builds the plugin's shared library.
use kvhook_truncate as _;

/// Most that a logit may differ by rounding, in an f32 cache; logits are up to about 30. Differences of 1e-4 to 2e-4 were
/// seen, and of 0.1 where one entry of one head of one layer is wrong.
const BOUND: f32 = 1e-3;

const SINKS: usize = 4;
const RECENT: usize = 32;

/// Query from which on an entry is not seen any more, by layer, KV head and position of the entry.
#[derive(Clone)]
struct Dropped(Vec<Vec<Vec<usize>>>);

impl Dropped {
    fn nothing(tokens: usize) -> Self {
        let config = &model().config;
        Self(vec![vec![vec![usize::MAX; tokens]; config.kv_heads]; config.layers])
    }

    /// After a commit with `next_position` tokens, `survivors` are left: by rank, layer and the rank's KV head.
    fn commit(&mut self, survivors: &[Vec<Vec<Vec<u32>>>], next_position: usize) {
        for (layer, heads) in self.0.iter_mut().enumerate() {
            let of_heads = survivors.iter().flat_map(|rank| &rank[layer]);
            for (entries, left) in heads.iter_mut().zip(of_heads) {
                for (position, until) in entries[..next_position].iter_mut().enumerate() {
                    if left.binary_search(&(position as u32)).is_err() {
                        *until = (*until).min(next_position);
                    }
                }
            }
        }
    }

    /// Logits of the last `rows` tokens, by the reference.
    fn reference(&self, tokens: &[u32], rows: usize) -> Vec<LogitsRow> {
        static REFERENCE: OnceLock<Reference> = OnceLock::new();
        let reference = REFERENCE.get_or_init(|| Reference::load(&path()).unwrap());
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let visible = |layer: usize, head: usize, query: usize, key: usize| query < self.0[layer][head][key];
        reference.logits(tokens, &positions, tokens.len() - rows, &visible).unwrap()
    }

    /// KV head and position of an entry of a layer that was dropped.
    fn any_of(&self, layer: usize) -> (usize, usize) {
        let dropped = |entries: &Vec<usize>| entries.iter().position(|until| *until < usize::MAX);
        let mut heads = self.0[layer].iter().enumerate();
        heads.find_map(|(head, entries)| Some((head, dropped(entries)?))).unwrap()
    }
}

/// Largest difference of two logits.
fn difference(a: &[LogitsRow], b: &[LogitsRow]) -> f32 {
    assert_eq!(a.len(), b.len());
    let of_row = |(a, b): (&LogitsRow, &LogitsRow)| {
        assert!(a.iter().all(|logit| logit.is_finite()));
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    a.iter().zip(b).map(of_row).fold(0.0, f32::max)
}

/// Checks what a commit left: ascending positions, sinks and recent ones among them, as many as the commit says.
fn check_survivors(survivors: &[Vec<Vec<Vec<u32>>>], counts: &[usize], next_position: usize) {
    for rank in survivors {
        for (layer, &count) in rank.iter().zip(counts) {
            for left in layer {
                assert_eq!(left.len(), count);
                assert!(left.is_sorted_by(|a, b| a < b), "{left:?}");
                assert!(left.iter().take(SINKS).copied().eq(0..SINKS as u32), "{left:?}");
                let recent = (next_position - RECENT) as u32..next_position as u32;
                assert!(left[count - RECENT..].iter().copied().eq(recent), "{left:?}");
            }
        }
    }
}

/// One sequence that is decoded along a given text.
struct Followed {
    id: SequenceId,
    dropped: Dropped,
    commits: usize,
    rows: Vec<LogitsRow>,
}

impl Followed {
    fn begin(runner: &mut Runner, arm: &str, tokens: &[u32], prompt: usize) -> Self {
        let begin = Begin { arm: Some(arm), ..Begin::new(&tokens[..prompt]) };
        let (id, _) = runner.prefill_on(&begin, 128).unwrap();
        let mut followed = Self { id, dropped: Dropped::nothing(tokens.len()), commits: 0, rows: Vec::new() };
        followed.look(runner);
        followed
    }

    /// Notes what a commit dropped since the last look, if there was one.
    fn look(&mut self, runner: &Runner) {
        let report = runner.report(self.id).unwrap();
        assert!(report.failures.is_empty(), "{report:?}");
        assert!(report.commits.len() <= self.commits + 1);
        if let Some(commit) = report.commits.get(self.commits) {
            self.commits += 1;
            let survivors = runner.survivors(self.id).unwrap();
            let next_position = commit.position as usize;
            check_survivors(&survivors, &commit.lengths_after, next_position);
            self.dropped.commit(&survivors, next_position);
        }
    }
}

/// Feeds the rest of `tokens` to all sequences at once, a token a step.
fn decode(runner: &mut Runner, followed: &mut [Followed], tokens: &[u32], prompt: usize) {
    for token in tokens[prompt..].chunks(1) {
        let work: Vec<_> = followed
            .iter()
            .map(|one| Work {
                sequence: one.id,
                tokens: token,
                phase: Phase::Decode,
                prompt_ends: false,
                logits: Logits::Last,
            })
            .collect();
        let rows = runner.step(&work).unwrap();
        for (one, rows) in followed.iter_mut().zip(rows) {
            one.rows.extend(rows);
            one.look(runner);
        }
    }
}

/// Runs all arms together; what each dropped and answered.
fn run(
    cache: CacheConfig,
    arms: &[(&str, &str, &str)],
    commit_lag: usize,
    tokens: &[u32],
    prompt: usize,
) -> Vec<Followed> {
    let mut runner = runner(cache, arms, commit_lag);
    let mut followed: Vec<_> = arms.iter().map(|arm| Followed::begin(&mut runner, arm.0, tokens, prompt)).collect();
    decode(&mut runner, &mut followed, tokens, prompt);
    followed
}

fn ranks(ranks: usize, cache: CacheConfig) -> CacheConfig {
    CacheConfig { ranks, ..cache }
}

fn on(device: Device, cache: CacheConfig) -> CacheConfig {
    CacheConfig { device, ..cache }
}

#[track_caller]
fn assert_same_bits(a: &Followed, b: &Followed, what: &str) {
    assert!(a.dropped.0 == b.dropped.0, "{what}: other entries are kept");
    assert!(a.rows.iter().map(|row| bits(row)).eq(b.rows.iter().map(|row| bits(row))), "{what}: other logits");
}

#[test]
fn a_prompt_compressed_at_its_end_equals_masked_attention() {
    compressed_at_its_end(Device::Cpu);
}

#[test]
fn an_answer_compressed_as_it_grows_equals_masked_attention() {
    compressed_as_it_grows(Device::Cpu);
}

#[cfg(feature = "cuda")]
#[test]
fn a_prompt_compressed_on_a_cuda_device_equals_masked_attention() {
    if let Some(device) = kvhook_e2e::model::cuda() {
        compressed_at_its_end(device);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn an_answer_compressed_on_a_cuda_device_equals_masked_attention() {
    if let Some(device) = kvhook_e2e::model::cuda() {
        compressed_as_it_grows(device);
    }
}

fn compressed_at_its_end(device: Device) {
    const PROMPT: usize = 300;
    const ANSWER: usize = 32;
    let mut arms = vec![
        ("streaming", "truncate", "budget=100"),
        ("stride", "truncate", "budget=100,history=stride"),
        ("key_diff", "truncate", "budget=100,history=top,importance=key_diff"),
        ("attention", "truncate", "budget=100,history=top,importance=attention,window=32"),
        ("sample", "truncate", "keep=0.3,history=sample,importance=key_norm,seed=7"),
        ("segments", "truncate", "keep=0.3,history=top,importance=key_diff,segments=text"),
        ("layers", "truncate", r#"{"layers": {"0-3": 1.0, "4-9": 0.2, "25-": 0.5}, "keep": 0.3, "history": "top"}"#),
    ];
    if device != Device::Cpu {
        // Which kind a row has is not known there.
        arms.retain(|arm| arm.0 != "segments");
    }
    let contiguous = CacheConfig { device, ..CONTIGUOUS };
    let tokens = &text("moby-dick.txt")[5_000..5_000 + PROMPT + ANSWER];
    let runs = run(contiguous, &arms, 0, tokens, PROMPT);
    for (arm, followed) in arms.iter().zip(&runs) {
        assert_eq!(followed.commits, 1, "{}", arm.0);
        let expected = followed.dropped.reference(tokens, ANSWER);
        let found = difference(&followed.rows, &expected);
        println!("{:<10} {found:.2e}", arm.0);
        assert!(found < BOUND, "{}: logits differ by {found:e}", arm.0);
    }
    for cache in [ranks(3, contiguous), on(device, paged(16, 256)), on(device, ranks(3, paged(7, 512)))] {
        for ((arm, expected), found) in arms.iter().zip(&runs).zip(run(cache, &arms, 0, tokens, PROMPT)) {
            assert_same_bits(expected, &found, &format!("{} in {cache:?}", arm.0));
        }
    }

    // Two steps run before the commit, and their queries see everything.
    let late = run(on(device, ranks(3, paged(16, 256))), &arms[2..3], 2, tokens, PROMPT);
    let found = difference(&late[0].rows, &late[0].dropped.reference(tokens, ANSWER));
    assert!(found < BOUND, "late: logits differ by {found:e}");
    let early = difference(&late[0].rows, &runs[2].dropped.reference(tokens, ANSWER));
    assert!(early > 3.0 * BOUND, "the bound does not see when a commit comes: {early:e}");

    // The bound sees one entry of one head of one layer, and positions that are one too high.
    let key_diff = &runs[2];
    let mut other = key_diff.dropped.clone();
    let (head, position) = other.any_of(0);
    other.0[0][head][position] = usize::MAX;
    let one = difference(&key_diff.rows, &other.reference(tokens, ANSWER));
    let mut shifted = key_diff.dropped.clone();
    for entries in shifted.0.iter_mut().flatten() {
        entries[SINKS..].rotate_right(1);
    }
    let shift = difference(&key_diff.rows, &shifted.reference(tokens, ANSWER));
    println!("commit late {early:.2e}, one entry {one:.2e}, shifted {shift:.2e}");
    assert!(one > BOUND && shift > 3.0 * BOUND, "the bound is too wide: one entry {one:e}, a shift {shift:e}");
}

fn compressed_as_it_grows(device: Device) {
    const PROMPT: usize = 100;
    const ANSWER: usize = 1_000;
    const BUDGET: usize = 128;
    let arms = [
        ("attention", "truncate", "budget=128,every=64,history=top,importance=attention,window=16"),
        ("sample", "truncate", "budget=128,every=64,history=sample,importance=key_diff"),
        ("streaming", "truncate", "budget=128,every=64"),
    ];
    let tokens = &text("state-of-the-union.txt")[9_000..9_000 + PROMPT + ANSWER];
    let runs = run(on(device, CONTIGUOUS), &arms, 0, tokens, PROMPT);
    for (arm, followed) in arms.iter().zip(&runs) {
        assert_eq!(followed.commits, ANSWER / 64, "{}", arm.0);
        for entries in followed.dropped.0.iter().flatten() {
            let kept = entries.iter().filter(|until| **until == usize::MAX).count();
            assert_eq!(kept, BUDGET + ANSWER % 64, "{}", arm.0);
        }
        let expected = followed.dropped.reference(tokens, ANSWER);
        let found = difference(&followed.rows, &expected);
        println!("{:<10} {found:.2e}", arm.0);
        assert!(found < BOUND, "{}: logits differ by {found:e}", arm.0);
    }
    // Sequences that shared the prompt's blocks would gain nothing by the first commits.
    let cache = CacheConfig { prefix_sharing: false, ..on(device, ranks(3, paged(16, 48))) };
    let paged = run(cache, &arms[..2], 0, tokens, PROMPT);
    for ((arm, expected), found) in arms.iter().zip(&runs).zip(&paged) {
        assert_same_bits(expected, found, arm.0);
    }
    // The bound sees a commit of one layer that came one step early.
    let mut other = runs[1].dropped.clone();
    for until in other.0[15].iter_mut().flatten().filter(|until| **until < usize::MAX) {
        *until -= 1;
    }
    let early = difference(&runs[1].rows, &other.reference(tokens, ANSWER));
    println!("one step early {early:.2e}");
    assert!(early > BOUND, "the bound is too wide: {early:e}");
}
