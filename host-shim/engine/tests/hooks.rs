//! Plugins that compress real caches: what is left is what the plan says, what is freed is freed, what fails changes
//! nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{
    CONTIGUOUS, assert_rows_are_survivors, bits, figures, model, novel, paged, plugins, prefill_on, rows_of, runner,
    truncate, unshared, with,
};
use kvhook_engine::hooks::{Allocations, FreeReason, Movement};
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, Work};
use kvhook_engine::{
    Begin, CacheConfig, Engine, EngineConfig, Error, Event, KvDtype, PluginConfig, Request, Runner, Scoring, SequenceId,
};

#[test]
fn noop_changes_no_bit() {
    let tokens = novel(0, 70);
    let noop = plugins(&[("a", "noop", "observe=all,every=2")]);
    let configs = [
        CONTIGUOUS,
        CacheConfig { ranks: 3, dtype: KvDtype::Bf16, ..CONTIGUOUS },
        paged(16, 8),
        CacheConfig { ranks: 5, dtype: KvDtype::F16, ..paged(7, 16) },
    ];
    for config in configs {
        let run = |mut runner: Runner| {
            let (id, last) = runner.prefill(&tokens[..64], 40).unwrap();
            let mut rows = vec![last];
            rows.extend(runner.score(id, &tokens[64..], Scoring::OneByOne).unwrap());
            runner.free(id).unwrap();
            (bits(&rows), runner)
        };
        let (observed, runner) = run(with(config, &noop));
        assert!(observed == run(common::runner(config)).0, "{config:?}");
        // It was called: two chunks and six tokens, in every layer of every rank.
        let figures = figures(&runner, "a");
        let ranks = config.ranks as u64;
        assert_eq!(figures.before_attention.calls, 8 * 30 * ranks);
        assert_eq!((figures.on_free.calls, figures.sequences, figures.live), (ranks, 1, 0));
        assert_eq!(figures.bound.calls, 1 + 3);
    }
}

#[test]
fn truncate_keeps_the_rows_of_its_plan_and_frees_the_rest() {
    let tokens = novel(500, 168);
    let arm = truncate("keep=0.25,recent=8,history=top,importance=key_diff");
    let caches = [CONTIGUOUS, CacheConfig { ranks: 3, dtype: KvDtype::F16, ..paged(16, 24) }, unshared(paged(16, 24))];
    for cache in caches {
        let (mut compressed, mut full) = (with(cache, &arm), runner(cache));
        let id = prefill_on(&mut compressed, &tokens[..160], "a", 100);
        let (full_id, _) = full.prefill(&tokens[..160], 100).unwrap();
        let report = compressed.report(id).unwrap();
        assert_eq!((&report.lengths, report.next_position), (&vec![40; 30], 160));
        assert_eq!((report.entries_full, report.entries), (160 * 30 * 3, 40 * 30 * 3));
        assert_eq!(report.failures, Vec::<String>::new());
        let entry = 2 * 64 * cache.dtype.bytes();
        let freed = match compressed.usable_blocks() {
            // 160 rows filled a buffer of 160; 40 rows take 48.
            None => {
                assert_eq!(report.commits[0].movement, Movement::InPlace);
                full.cache_bytes().unwrap() - compressed.cache_bytes().unwrap()
            }
            // Ten blocks became three.
            Some(usable) => {
                let movement = if cache.prefix_sharing { Movement::Fresh } else { Movement::InPlace };
                assert_eq!((usable, report.commits[0].movement), (24 - 3, movement));
                7 * 16 * 30 * 3 * entry
            }
        };
        assert!(freed > 0);
        let figures = figures(&compressed, "a");
        assert_eq!((report.commits[0].bytes_freed, figures.bytes_freed), (freed, freed as u64));
        assert_eq!((figures.commits, figures.fallbacks, figures.live), (1, 0, 1));
        assert_eq!((figures.entries_before, figures.entries_after), (160 * 30 * 3, 40 * 30 * 3));
        assert_rows_are_survivors(&compressed, id, &full, full_id, 160);
        let survivors = compressed.survivors(id).unwrap();
        for positions in survivors.iter().flatten().flatten() {
            assert_eq!(positions[..4], [0, 1, 2, 3]);
            assert_eq!(positions[32..], [152, 153, 154, 155, 156, 157, 158, 159]);
        }
        // Heads choose for themselves, and what comes later follows.
        assert!(survivors.iter().flatten().flatten().any(|positions| positions != &survivors[0][0][0]));
        compressed.score(id, &tokens[160..], Scoring::OneByOne).unwrap();
        let later = compressed.survivors(id).unwrap();
        assert_eq!(later[0][29][0][..40], survivors[0][29][0]);
        assert_eq!(later[0][29][0][40..], [160, 161, 162, 163, 164, 165, 166, 167]);
        compressed.free(id).unwrap();
        assert_eq!(compressed.usable_blocks(), runner(cache).usable_blocks());
    }
}

/// Logits behind each of the given tokens after a compressed prompt.
fn lagged(cache: CacheConfig, arm: &str, lag: usize, tokens: &[u32]) -> (Vec<Vec<u32>>, Runner, SequenceId) {
    let mut runner = with(cache, &PluginConfig { commit_lag: lag, ..truncate(arm) });
    let id = prefill_on(&mut runner, &tokens[..96], "a", 64);
    assert_eq!(runner.report(id).unwrap().pending, lag > 0);
    let rows = runner.score(id, &tokens[96..], Scoring::OneByOne).unwrap();
    (bits(&rows), runner, id)
}

#[test]
fn steps_ahead_of_the_verdict_see_the_whole_cache_and_later_ones_the_same_survivors() {
    let tokens = novel(2000, 96 + 5);
    let arm = "budget=32,recent=8,history=top,importance=key_norm";
    let mut full = runner(CONTIGUOUS);
    let (full_id, _) = full.prefill(&tokens[..96], 64).unwrap();
    let uncompressed = bits(&full.score(full_id, &tokens[96..], Scoring::OneByOne).unwrap());
    let (_, first, first_id) = lagged(CONTIGUOUS, arm, 0, &tokens);
    let kept = first.survivors(first_id).unwrap();
    for lag in [0, 1, 3] {
        let (rows, one, id) = lagged(CONTIGUOUS, arm, lag, &tokens);
        assert!(rows[..lag] == uncompressed[..lag], "lag {lag}");
        assert!(rows[lag] != uncompressed[lag], "lag {lag}");
        assert!(one.survivors(id).unwrap() == kept, "lag {lag}");
        assert_eq!(one.report(id).unwrap().commits[0].position, 96 + lag as u32);
        // Any cache gives the same bits.
        for cache in [unshared(paged(16, 16)), CacheConfig { ranks: 3, ..paged(16, 16) }] {
            let (others, runner, id) = lagged(cache, arm, lag, &tokens);
            assert!(others == rows, "lag {lag}, {cache:?}");
            assert_eq!(runner.usable_blocks(), Some(16 - 3));
            assert_eq!(runner.report(id).unwrap().lengths, [37; 30]);
        }
    }
}

fn engine(cache: CacheConfig, plugins: Option<PluginConfig>, chunk: usize, max_sequences: usize) -> Engine {
    Engine::new(model(), EngineConfig { cache: common::placed(cache), chunk, max_sequences, plugins }).unwrap()
}

#[derive(Default)]
struct Served {
    answers: HashMap<kvhook_engine::RequestId, Vec<u32>>,
    preemptions: u64,
    /// Blocks in use in the fullest layer after each step.
    blocks: Vec<usize>,
}

fn serve(engine: &mut Engine, blocks: usize) -> Served {
    let mut served = Served::default();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            match event {
                Event::Token { request, token } => served.answers.entry(request).or_default().push(token),
                Event::Preempted { .. } => served.preemptions += 1,
                Event::Finished { .. } => {}
            }
        }
        served.blocks.push(blocks - engine.runner().usable_blocks().unwrap_or(blocks));
    }
    served
}

fn request(tokens: Vec<u32>, max_new_tokens: usize) -> Request {
    Request { tokens, max_new_tokens, arm: Some("a".into()), ..Request::default() }
}

#[test]
fn a_preempted_request_is_freed_once_and_begins_again() {
    let requests = || [request(novel(0, 50), 24), request(novel(3000, 40), 24), request(novel(6000, 30), 24)];
    let cache = CacheConfig { ranks: 3, ..unshared(paged(16, 10)) };
    let mut answers = Vec::new();
    for arm in [("a", "noop", ""), ("a", "truncate", "budget=24,recent=8,every=4")] {
        let allocations = Arc::new(Allocations::default());
        let config = PluginConfig { allocations: Some(Arc::clone(&allocations)), ..plugins(&[arm]) };
        let mut engine = engine(cache, Some(config), 64, 8);
        let ids = requests().map(|request| engine.add(request).unwrap());
        let mut served = serve(&mut engine, 10);
        assert_eq!(engine.runner().usable_blocks(), Some(10));
        let figures = figures(engine.runner(), "a");
        assert_eq!((figures.live, figures.sequences), (0, 3 + served.preemptions));
        assert_eq!(allocations.live_bytes(), 0);
        if arm.1 == "noop" {
            // All three prompts fit (4 + 3 + 2 blocks), but not all three answers.
            assert!(served.preemptions > 0);
            assert_eq!(figures.on_free.calls, 3 * figures.sequences);
        } else {
            // Compressed, they do.
            assert_eq!(served.preemptions, 0);
            assert!(figures.commits > 3);
        }
        answers.push(ids.map(|id| served.answers.remove(&id).unwrap()));
    }
    let mut plain = self::engine(unshared(paged(16, 30)), None, 64, 8);
    let ids = requests().map(|request| plain.add(Request { arm: None, ..request }).unwrap());
    let mut served = serve(&mut plain, 30);
    assert_eq!(answers[0], ids.map(|id| served.answers.remove(&id).unwrap()));
}

#[test]
fn a_shared_prompt_is_compressed_alike_each_time() {
    let tokens = novel(7000, 150);
    // A chunk ends within the last 64 tokens, whose queries are seen all the same.
    for config in ["budget=40,recent=8,history=top,importance=attention", "budget=40,recent=8"] {
        let mut runner = with(paged(16, 40), &truncate(config));
        let run = |runner: &mut Runner, chunk| {
            let (id, last) = runner.prefill_on(&Begin { arm: Some("a"), ..Begin::new(&tokens[..144]) }, chunk).unwrap();
            let shared = runner.sequence(id).unwrap().shared;
            let mut rows = vec![last];
            rows.extend(runner.score(id, &tokens[144..], Scoring::OneByOne).unwrap());
            let report = runner.report(id).unwrap();
            assert_eq!((report.commits.len(), &report.lengths), (1, &vec![46; 30]));
            assert_eq!(shared, 0, "it owns its rows now");
            (bits(&rows), runner.survivors(id).unwrap(), id)
        };
        let first = run(&mut runner, 100);
        assert_eq!(figures(&runner, "a").reasons, []);
        runner.free(first.2).unwrap();
        // Its blocks are published still: the second one takes over what the window leaves.
        let attention = config.contains("attention");
        let begun = runner.begin_on(&Begin { arm: Some("a"), ..Begin::new(&tokens[..144]) }).unwrap();
        assert_eq!(runner.sequence(begun).unwrap().shared, if attention { 80 } else { 128 });
        runner.free(begun).unwrap();
        let second = run(&mut runner, 40);
        assert!(first.0 == second.0 && first.1 == second.1, "{config}");
        runner.free(second.2).unwrap();
        assert_eq!(runner.usable_blocks(), Some(40));
    }
}

#[test]
fn many_requests_over_one_prefix_never_use_more_blocks_than_uncompressed() {
    const BLOCKS: usize = 400;
    let prefix = novel(0, 32);
    let tail = |index: usize| novel(5000 + 40 * index, 9);
    let requests: Vec<_> = (0..64).map(|index| request([prefix.clone(), tail(index)].concat(), 2)).collect();
    let run = |plugins: Option<PluginConfig>| {
        let arm = plugins.as_ref().map(|_| "a".to_owned());
        let mut engine = engine(paged(4, BLOCKS), plugins, 128, 64);
        for request in &requests {
            engine.add(Request { arm: arm.clone(), ..request.clone() }).unwrap();
        }
        let served = serve(&mut engine, BLOCKS);
        assert_eq!(engine.runner().usable_blocks(), Some(BLOCKS));
        (served.blocks, engine)
    };
    let (plain, _) = run(None);
    // 41 rows are eleven blocks, eight of them the prefix: two are fewer than the other three, three are not.
    for (config, compresses) in [("budget=8,recent=4", true), ("budget=12,recent=4", false)] {
        let (blocks, engine) = run(Some(truncate(config)));
        assert_eq!(blocks.len(), plain.len());
        for (step, (now, plain)) in blocks.iter().zip(&plain).enumerate() {
            assert!(now <= plain, "{config}, step {step}: {now} blocks, uncompressed {plain}");
        }
        assert_eq!(figures(engine.runner(), "a").commits, if compresses { 64 } else { 0 }, "{config}");
        assert_eq!(blocks.iter().sum::<usize>() < plain.iter().sum(), compresses);
    }
    // A window of queries makes each request compute some shared tokens again, in more steps; it shares them all the same.
    let (blocks, engine) = run(Some(truncate("budget=8,recent=4,history=top,importance=attention,window=16")));
    assert!(blocks.iter().max() <= plain.iter().max(), "{blocks:?}, uncompressed {plain:?}");
    assert_eq!(figures(engine.runner(), "a").commits, 64);
}

#[test]
fn layers_keep_what_their_ratio_says() {
    let tokens = novel(1000, 106);
    let arm = truncate(r#"{"keep": 0.5, "recent": 8, "layers": {"0-3": 1.0, "4-9": 0.25}}"#);
    let mut results = Vec::new();
    for cache in [CONTIGUOUS, CacheConfig { ranks: 3, ..paged(16, 16) }, unshared(paged(16, 16))] {
        let mut runner = with(cache, &arm);
        let id = prefill_on(&mut runner, &tokens[..100], "a", 64);
        let lengths: Vec<usize> = [100; 4].into_iter().chain([25; 6]).chain([50; 20]).collect();
        assert_eq!(runner.report(id).unwrap().lengths, lengths);
        results.push(bits(&runner.score(id, &tokens[100..], Scoring::OneByOne).unwrap()));
        runner.free(id).unwrap();
        assert_eq!(runner.usable_blocks(), common::runner(cache).usable_blocks());
    }
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn whole_blocks_leave_the_tables_and_nothing_moves() {
    let tokens = novel(4000, 120);
    let arm = truncate("budget=40,recent=8,align=block");
    for (sharing, lag) in [(false, 0), (false, 3), (true, 0), (true, 1)] {
        let cache = CacheConfig { prefix_sharing: sharing, ranks: 3, ..paged(16, 24) };
        let (mut compressed, mut full) = (with(cache, &PluginConfig { commit_lag: lag, ..arm.clone() }), runner(cache));
        let begun = compressed.begin_on(&Begin { arm: Some("a"), ..Begin::new(&tokens[..110]) }).unwrap();
        let work =
            |tokens, prompt_ends, phase| Work { sequence: begun, tokens, phase, prompt_ends, logits: Logits::None };
        compressed.step(&[work(&tokens[..100], false, Phase::Prefill)]).unwrap();
        compressed.reserve(begun, 10).unwrap();
        let before = compressed.sequence(begun).unwrap().layers[0].blocks.clone();
        compressed.step(&[work(&tokens[100..110], true, Phase::Prefill)]).unwrap();
        compressed.score(begun, &tokens[110..113], Scoring::OneByOne).unwrap();
        // Four sinks are one block; 36 recent rows, from row 74 on, begin in block 4: blocks 0, 4, 5, 6 (and 7).
        let report = compressed.report(begun).unwrap();
        assert_eq!(report.commits[0].movement, Movement::Table);
        let after = &compressed.sequence(begun).unwrap().layers[0].blocks;
        assert_eq!(after[..4], [before[0], before[4], before[5], before[6]]);
        assert_eq!((after.len(), report.lengths[0]), (5, 113 - 48));
        assert_eq!(compressed.usable_blocks(), Some(24 - 5));
        let (full_id, _) = full.prefill(&tokens[..110], 100).unwrap();
        full.score(full_id, &tokens[110..113], Scoring::OneByOne).unwrap();
        assert_rows_are_survivors(&compressed, begun, &full, full_id, 110 + lag as u32);
        assert_eq!(compressed.survivors(begun).unwrap()[2][29][0][16], 64);
    }
}

#[test]
fn a_long_answer_stays_within_its_budget() {
    let tokens = novel(8000, 60 + 80);
    let arm = "budget=48,recent=16,history=top,importance=key_diff,every=16";
    for (cache, lag) in [(CONTIGUOUS, 0), (unshared(paged(16, 16)), 1)] {
        let mut runner = with(cache, &PluginConfig { commit_lag: lag, ..truncate(arm) });
        let id = prefill_on(&mut runner, &tokens[..60], "a", 64);
        for (step, token) in tokens[60..].iter().enumerate() {
            runner.score(id, &[*token], Scoring::OneByOne).unwrap();
            let lengths = runner.report(id).unwrap().lengths;
            assert!(lengths.iter().all(|&length| length <= 48 + 16 + lag), "step {step}: {lengths:?}");
        }
        let report = runner.report(id).unwrap();
        // At the prompt's end and after 16, 32, 48, 64, 80 tokens; the last may still wait.
        assert_eq!(report.commits.len() + usize::from(report.pending), 6);
        let positions = &runner.survivors(id).unwrap()[0][7][1];
        assert!(positions.starts_with(&[0, 1, 2, 3]) && positions.ends_with(&[137, 138, 139]));
        runner.free(id).unwrap();
    }
}

#[test]
fn what_ends_before_its_commit_gives_everything_back() {
    let tokens = novel(9000, 110);
    let allocations = Arc::new(Allocations::default());
    let config = PluginConfig {
        commit_lag: 3,
        allocations: Some(Arc::clone(&allocations)),
        ..truncate("budget=24,recent=8,history=top,importance=key_norm")
    };
    for cache in [paged(16, 24), CONTIGUOUS] {
        let mut runner = with(cache, &config);
        let empty = runner.usable_blocks();
        let uncompressed = {
            let mut full = common::runner(cache);
            let (id, _) = full.prefill(&tokens[..100], 64).unwrap();
            bits(&full.score(id, &tokens[100..], Scoring::OneByOne).unwrap())
        };
        let pending = |runner: &mut Runner| {
            let id = prefill_on(runner, &tokens[..100], "a", 64);
            assert!(runner.report(id).unwrap().pending);
            id
        };
        for reason in [FreeReason::Finished, FreeReason::Cancelled, FreeReason::Preempted] {
            let id = pending(&mut runner);
            runner.free_because(id, reason).unwrap();
            assert_eq!((runner.usable_blocks(), allocations.live_bytes()), (empty, 0));
            assert!(matches!(runner.free(id), Err(Error::UnknownSequence(_))));
        }
        pending(&mut runner);
        runner.reset().unwrap();
        assert_eq!((runner.usable_blocks(), allocations.live_bytes()), (empty, 0));

        // Cut below what was planned, and forked: both go on whole, and at their next occasion nothing is left over.
        let id = pending(&mut runner);
        runner.cut(id, 2).unwrap();
        let report = runner.report(id).unwrap();
        assert_eq!((report.pending, report.kept.values().sum::<u64>()), (false, 1));
        runner.score(id, &tokens[98..100], Scoring::Together).unwrap();
        assert!(bits(&runner.score(id, &tokens[100..], Scoring::OneByOne).unwrap()) == uncompressed);
        runner.free(id).unwrap();
        let id = pending(&mut runner);
        let fork = runner.fork(id).unwrap();
        for id in [fork, id] {
            assert!(!runner.report(id).unwrap().pending);
            assert!(bits(&runner.score(id, &tokens[100..], Scoring::OneByOne).unwrap()) == uncompressed);
        }
        runner.free(id).unwrap();
        runner.free(fork).unwrap();
        assert_eq!((runner.usable_blocks(), allocations.live_bytes()), (empty, 0));
        let figures = figures(&runner, "a");
        let reasons: Vec<_> = figures.reasons.iter().map(|(reason, count)| (reason.name(), *count)).collect();
        assert_eq!((figures.live, figures.commits, reasons), (0, 0, vec![("dropped", 6)]));
    }
}

#[test]
fn a_fork_of_compressed_rows_goes_on_like_the_original() {
    let tokens = novel(300, 108);
    for cache in [paged(16, 24), CacheConfig { ranks: 3, ..CONTIGUOUS }] {
        let mut runner = with(cache, &truncate("budget=40,recent=8,history=top,importance=key_norm,every=4"));
        let id = prefill_on(&mut runner, &tokens[..100], "a", 64);
        let fork = runner.fork(id).unwrap();
        assert_eq!(runner.survivors(id).unwrap(), runner.survivors(fork).unwrap());
        let original = bits(&runner.score(id, &tokens[100..], Scoring::OneByOne).unwrap());
        assert!(original == bits(&runner.score(fork, &tokens[100..], Scoring::OneByOne).unwrap()));
        // The last tokens again: rows behind the last commit may be cut.
        assert!(matches!(runner.cut(fork, 60), Err(Error::CutTooFar { rows: 60, .. })));
        runner.free(id).unwrap();
        runner.free(fork).unwrap();
        assert_eq!(runner.usable_blocks(), common::runner(cache).usable_blocks());
    }
    // A plugin that has seen the sequence's queries has state of it.
    let mut runner = with(paged(16, 24), &plugins(&[("a", "noop", "")]));
    let id = prefill_on(&mut runner, &tokens[..100], "a", 64);
    assert!(matches!(runner.fork(id), Err(Error::Plugin { name: "fork_refused", .. })));
    assert_eq!(runner.usable_blocks(), Some(24 - 7));
}

/// Config of `faulty`, and the reason for which the sequence then stays as it is.
const FAULTS: &[(&str, &str)] = &[
    ("prefill_done=fail", "plugin_error"),
    ("prefill_done=panic", "panic"),
    ("prefill_done=panic-twice", "panic"),
    ("prefill_done=out-of-memory", "out_of_memory"),
    ("bound=fail", "plugin_error"),
    ("bound=panic", "panic"),
    ("answer=above", "bad_count"),
    ("answer=zero", "bad_count"),
    ("answer=too-short", "too_short"),
    ("before_attention=fail,phases=1,must=1", "plugin_error"),
    ("damage=out-of-range", "bad_index"),
    ("damage=negative", "bad_index"),
    ("damage=descending", "bad_index"),
    ("damage=repeated,plan=select-heads", "bad_index"),
    ("damage=too-many", "bad_count"),
    ("damage=no-rows", "bad_count"),
    ("damage=fewer", "bad_count"),
    ("damage=null-array", "bad_plan"),
    ("damage=unknown-kind", "bad_plan"),
    ("damage=sum,plan=ranges", "bad_count"),
    ("damage=position,plan=rewrite,must=32", "bad_position"),
    ("damage=not-lent,plan=rewrite,must=32", "bad_plan"),
    ("prefill_done=fail,rank=1", "plugin_error"),
    ("damage=out-of-range,rank=2", "bad_index"),
    ("prefill_done=panic,rank=0", "panic"),
];

#[test]
fn a_plugin_that_fails_leaves_the_cache_as_it_was() {
    let tokens = novel(1500, 44);
    let names: Vec<String> = (0..FAULTS.len()).map(|index| format!("f{index}")).collect();
    let arms: Vec<_> = names.iter().zip(FAULTS).map(|(name, (config, _))| (name.as_str(), "faulty", *config)).collect();
    for cache in [CacheConfig { ranks: 3, ..CONTIGUOUS }, CacheConfig { ranks: 3, ..paged(16, 8) }] {
        let mut full = runner(cache);
        let (full_id, last) = full.prefill(&tokens[..40], 64).unwrap();
        let rows = rows_of(&full, full_id);
        let mut expected = vec![last];
        expected.extend(full.score(full_id, &tokens[40..], Scoring::OneByOne).unwrap());
        let mut runner = with(cache, &plugins(&arms));
        for (name, (config, reason)) in names.iter().zip(FAULTS) {
            let begin = Begin { arm: Some(name), prefix_limit: 0, ..Begin::new(&tokens[..40]) };
            let (id, last) = runner.prefill_on(&begin, 64).unwrap();
            assert!(rows_of(&runner, id) == rows, "{config}");
            let mut logits = vec![last];
            logits.extend(runner.score(id, &tokens[40..], Scoring::OneByOne).unwrap());
            assert!(bits(&logits) == bits(&expected), "{config}");
            let report = runner.report(id).unwrap();
            assert!(report.commits.is_empty() && !report.pending, "{config}");
            runner.free(id).unwrap();
            let figures = figures(&runner, name);
            let known: Vec<&str> = figures.reasons.iter().map(|(reason, _)| reason.name()).collect();
            assert!(known.contains(reason), "{config}: {known:?}, expected {reason}");
            assert_eq!((figures.commits, figures.live), (0, 0), "{config}");
        }
        assert_eq!(runner.usable_blocks(), common::runner(cache).usable_blocks());
    }
}

#[test]
fn memory_that_is_refused_leaves_the_cache_as_it_was() {
    let tokens = novel(1700, 43);
    let mut full = runner(unshared(paged(16, 8)));
    let (full_id, _) = full.prefill(&tokens[..40], 64).unwrap();
    let expected = bits(&full.score(full_id, &tokens[40..], Scoring::OneByOne).unwrap());
    for config in ["plan=select-heads,allocate=64", "plan=rewrite,must=32,allocate=64"] {
        let allocations = Arc::new(Allocations::default());
        let plugins =
            PluginConfig { allocations: Some(Arc::clone(&allocations)), ..plugins(&[("a", "faulty", config)]) };
        let mut runner = with(unshared(paged(16, 8)), &plugins);
        let before = allocations.asked();
        let id = prefill_on(&mut runner, &tokens[..40], "a", 64);
        assert_eq!(runner.report(id).unwrap().lengths, [20; 30], "{config}");
        runner.free(id).unwrap();
        let needed = allocations.asked() - before;
        assert!(needed > 30 && allocations.live_bytes() == 0, "{config}: {needed}");
        // The first ones, the last ones, and some between.
        for number in (1..=needed).filter(|number| *number < 5 || number % 37 == 0 || number + 3 > needed) {
            allocations.refuse(allocations.asked() + number);
            let id = prefill_on(&mut runner, &tokens[..40], "a", 64);
            assert_eq!(runner.report(id).unwrap().lengths, [40; 30], "{config}, allocation {number}");
            assert!(bits(&runner.score(id, &tokens[40..], Scoring::OneByOne).unwrap()) == expected);
            runner.free(id).unwrap();
            assert_eq!((runner.usable_blocks(), allocations.live_bytes()), (Some(8), 0));
        }
        allocations.refuse(0);
    }
}

#[test]
fn without_room_for_fresh_rows_it_is_kept() {
    let tokens = novel(600, 102);
    let arm = "budget=40,recent=8,history=top,importance=key_norm";
    // Seven blocks are published; three fresh ones are not to be had.
    let mut runner = with(paged(16, 8), &truncate(arm));
    let id = prefill_on(&mut runner, &tokens[..100], "a", 64);
    let report = runner.report(id).unwrap();
    let kept: Vec<_> = report.kept.iter().map(|(reason, count)| (reason.name(), *count)).collect();
    assert_eq!((kept, report.lengths[0]), (vec![("no_room", 1)], 100));
    assert_eq!(figures(&runner, "a").reasons.len(), 1);
    // What is reserved for a plan that waits goes to whoever needs it.
    let mut runner = with(paged(16, 11), &PluginConfig { commit_lag: 3, ..truncate(arm) });
    let id = prefill_on(&mut runner, &tokens[..100], "a", 64);
    assert!(runner.report(id).unwrap().pending);
    assert_eq!(runner.usable_blocks(), Some(11 - 7 - 3));
    let (other, _) = runner.prefill_on(&Begin { arm: Some("none"), ..Begin::new(&novel(0, 40)) }, 64).unwrap();
    let report = runner.report(id).unwrap();
    assert_eq!((report.pending, report.kept.values().sum::<u64>()), (false, 1));
    runner.free(other).unwrap();
    runner.free(id).unwrap();
    assert_eq!(runner.usable_blocks(), Some(11));
}

#[test]
fn arms_are_named_or_chosen_and_unknown_ones_refused() {
    let mut runner = with(CONTIGUOUS, &plugins(&[("a", "noop", ""), ("b", "truncate", "budget=16")]));
    let tokens = novel(0, 40);
    assert!(matches!(
        runner.prefill_on(&Begin { arm: Some("c"), ..Begin::new(&tokens) }, 64),
        Err(Error::Plugin { name: "unknown_arm", .. })
    ));
    let none = prefill_on(&mut runner, &tokens, "none", 64);
    assert_eq!((runner.report(none).unwrap().uid, runner.report(none).unwrap().lengths[0]), (0, 40));
    // The same key, the same arm.
    for key in ["x", "y", "z"] {
        let of_key = |runner: &mut Runner| runner.prefill_on(&Begin { key, ..Begin::new(&tokens) }, 64).unwrap().0;
        let (first, second) = (of_key(&mut runner), of_key(&mut runner));
        assert_eq!(runner.report(first).unwrap().lengths, runner.report(second).unwrap().lengths);
    }
    assert_eq!(figures(&runner, "a").sequences + figures(&runner, "b").sequences, 6);
    let mut engine = engine(CONTIGUOUS, Some(truncate("budget=16")), 64, 2);
    let other = Request { arm: Some("c".into()), ..request(tokens, 1) };
    assert!(matches!(engine.add(other), Err(Error::Plugin { name: "unknown_arm", .. })));
    let json = engine.runner().plugins().unwrap().figures_json().unwrap();
    assert!(json.contains("\"a\""), "{json}");
    let missing = Runner::with_plugins(model(), CONTIGUOUS, &plugins(&[("a", "no-such-plugin", "")]));
    assert!(matches!(missing, Err(Error::Plugin { name: "file_missing", .. })));
}
