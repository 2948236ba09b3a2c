//! On the real model, with weights that give each group's last entry: the same as dropping the others.

use kvhook_e2e::model::{CONTIGUOUS, bits, model, paged, path, runner, text};
use kvhook_e2e::reference::Reference;
use kvhook_engine::cache::read_rows;
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, LogitsRow, Scoring, Work};
use kvhook_engine::{Begin, CacheConfig, Runner, SequenceId};

use super::weights::{Mlp, Weights};

pub const PROMPT: usize = 200;
pub const ANSWER: usize = 72;
const FACTOR: usize = 2;

/// Most that a logit may differ: hidden values lie around 128, so that channels keep 17 of 24 bits. Logits are up to about
/// 30; a compression that drops other entries, or the wrong ones, changes them by more than 0.1.
const BOUND: f32 = 2e-2;

/// `relu(x + c) - c` is `x` where `x > -c`.
fn last_entry(dim: usize, layers: usize) -> Weights {
    let shift = 128.0f32;
    let unit = |inputs: usize| -> Vec<f32> {
        (0..dim * inputs).map(|place| f32::from(place % inputs == inputs - dim + place / inputs)).collect()
    };
    let mlp =
        Mlp([(unit(FACTOR * dim), vec![shift; dim]), (unit(dim), vec![0.0; dim]), (unit(dim), vec![-shift; dim])]);
    Weights { factor: FACTOR, dim, min_groups: 1, layers: vec![vec![mlp.clone(), mlp]; layers] }
}

/// By tensor (`2 * layer + part`) and KV head of the model: rows, one behind the other.
pub type Tensors = Vec<Vec<Vec<f32>>>;

/// The rows of a sequence from the end: all, or the last one.
pub fn rows(runner: &Runner, id: SequenceId, only_last: bool) -> Tensors {
    let layers = runner.sequence(id).unwrap().layers.clone();
    let of_rank = runner.ranks().run(move |rank| {
        let mut tensors = Vec::new();
        for (layer, cache) in layers.iter().enumerate() {
            let peek = rank.cache.peek(id, layer);
            let start = if only_last { cache.len - 1 } else { 0 };
            for buffer in [peek.k, peek.v] {
                let of_head = |head| {
                    let mut out = vec![0.0; (cache.len - start) * rank.head_dim];
                    read_rows(buffer, &peek.layout, &cache.blocks, head, start, &mut out);
                    out
                };
                tensors.push((0..rank.shard.kv_heads.len()).map(of_head).collect());
            }
        }
        tensors
    });
    of_rank
        .unwrap()
        .into_iter()
        .reduce(|mut all: Tensors, rank| {
            all.iter_mut().zip(rank).for_each(|(heads, more)| heads.extend(more));
            all
        })
        .unwrap()
}

/// What came of one run.
pub struct Run {
    pub logits: Vec<LogitsRow>,
    /// Query from which on each entry is not seen any more.
    pub until: Vec<usize>,
    pub commits: usize,
    /// The row of each token of the answer, as it was appended.
    pub appended: Vec<Tensors>,
    /// The rows at the end, and the position that each of them stands for.
    pub rows: Tensors,
    pub positions: Vec<u32>,
}

/// Prefills the first [`PROMPT`] tokens on a plugin of this config and feeds it the others one by one.
pub fn run(cache: CacheConfig, config: &str, tokens: &[u32]) -> Run {
    let mut runner = runner(cache, &[("a", "mlp-decouple", config)], 0);
    let begin = Begin { arm: Some("a"), ..Begin::new(&tokens[..PROMPT]) };
    let (id, first) = runner.prefill_on(&begin, 64).unwrap();
    let until = vec![usize::MAX; tokens.len()];
    let (appended, rows, positions) = (Vec::new(), Vec::new(), Vec::new());
    let mut run = Run { logits: vec![first], until, commits: 0, appended, rows, positions };
    let mut stored = PROMPT;
    for position in PROMPT..=tokens.len() {
        let survivors = runner.survivors(id).unwrap();
        let left = &survivors[0][0][0];
        assert!(survivors.iter().flatten().flatten().all(|head| head == left), "all ranks, layers and heads agree");
        run.commits += usize::from(left.len() < stored);
        for (entry, until) in run.until[..position].iter_mut().enumerate() {
            if left.binary_search(&(entry as u32)).is_err() {
                *until = (*until).min(position);
            }
        }
        stored = left.len() + 1;
        if let Some(token) = tokens.get(position) {
            run.logits.extend(runner.score(id, &[*token], Scoring::OneByOne).unwrap());
            run.appended.push(self::rows(&runner, id, true));
        }
        run.positions = left.clone();
    }
    run.rows = self::rows(&runner, id, false);
    run
}

#[test]
fn equals_dropping_entries_in_every_cache_and_while_it_grows() {
    let config = &model().config;
    let folder = tempfile::tempdir().unwrap();
    let weights = last_entry(config.head_dim, config.layers).write(folder.path(), "last.bin");
    let spec = format!("weights={},positions=logical,recent=24,every=16", weights.display());
    let tokens = text("moby-dick.txt")[3_000..3_000 + PROMPT + ANSWER].to_vec();

    let whole = run(CONTIGUOUS, &spec, &tokens);
    assert!(whole.commits >= 4, "{} commits", whole.commits);
    assert!(whole.until.iter().filter(|until| **until < usize::MAX).count() > 100);
    for cache in [CacheConfig { ranks: 3, ..CONTIGUOUS }, paged(8, 80), CacheConfig { ranks: 3, ..paged(8, 80) }] {
        let other = run(cache, &spec, &tokens);
        assert_eq!((other.until == whole.until, other.commits), (true, whole.commits));
        let same = whole.logits.iter().zip(&other.logits).all(|(a, b)| bits(a) == bits(b));
        assert!(same, "{cache:?}");
    }

    let reference = Reference::load(&path()).unwrap();
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let visible = |_: usize, _: usize, query: usize, key: usize| query < whole.until[key];
    let expected = reference.logits(&tokens, &positions, PROMPT - 1, &visible).unwrap();
    assert_eq!(expected.len(), whole.logits.len());
    for (row, (found, expected)) in whole.logits.iter().zip(&expected).enumerate() {
        let error = found.iter().zip(expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(error < BOUND, "row {row} is off by {error}");
    }
    // The test can fail: with nothing dropped, the same tokens have other logits.
    let full = reference.logits(&tokens, &positions, PROMPT - 1, &|_, _, _, _| true).unwrap();
    let other = full[ANSWER].iter().zip(&expected[ANSWER]).any(|(a, b)| (a - b).abs() > 10.0 * BOUND);
    assert!(other);
}

#[test]
fn a_sequence_is_the_same_alone_and_in_a_batch() {
    let config = &model().config;
    let folder = tempfile::tempdir().unwrap();
    let weights = Weights::random(3, config.head_dim, config.layers, false).write(folder.path(), "random.bin");
    let spec = format!("weights={},positions=logical,recent=8", weights.display());
    let arms = [("a", "mlp-decouple", spec.as_str())];
    let tokens = text("moby-dick.txt");
    let prompts = [&tokens[500..620], &tokens[900..977], &tokens[2_000..2_201]];
    let next = tokens[7_000];
    let alone = prompts.map(|prompt| {
        let mut runner = runner(CONTIGUOUS, &arms, 0);
        let (id, _) = runner.prefill_on(&Begin { arm: Some("a"), ..Begin::new(prompt) }, 512).unwrap();
        assert!(runner.sequence(id).unwrap().layers[0].len < prompt.len() / 2);
        runner.score(id, &[next], Scoring::OneByOne).unwrap().remove(0)
    });
    let mut runner = runner(CONTIGUOUS, &arms, 0);
    let ids = prompts.map(|prompt| runner.begin_on(&Begin { arm: Some("a"), ..Begin::new(prompt) }).unwrap());
    let work =
        |(tokens, sequence)| Work { sequence, tokens, phase: Phase::Prefill, prompt_ends: true, logits: Logits::Last };
    runner.step(&prompts.into_iter().zip(ids).map(work).collect::<Vec<_>>()).unwrap();
    for (id, alone) in ids.into_iter().zip(&alone) {
        assert_eq!(bits(&runner.score(id, &[next], Scoring::OneByOne).unwrap()[0]), bits(alone));
    }
}
