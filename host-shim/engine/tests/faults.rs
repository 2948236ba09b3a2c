//! What goes wrong around a compression: plugins that are replaced, sequences that end, hooks and ranks that fail, forms
//! that are refused, pools that are full. Each ends in its reason, and whatever stays uncompressed stays bit for bit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use common::{
    CONTIGUOUS, assert_rows_are_survivors, bits, figures, model, novel, paged, plugins, prefill_on, rows_of, runner,
    truncate, unshared, with,
};
use kvhook_engine::hooks::{Allocations, Movement, SequenceReport, Source};
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, Work};
use kvhook_engine::{
    ArmConfig, Begin, CacheConfig, Engine, EngineConfig, Error, Event, KvDtype, PluginConfig, Request, RequestId,
    Runner, Scoring, SequenceId,
};

fn of_ranks(ranks: usize, cache: CacheConfig) -> CacheConfig {
    CacheConfig { ranks, ..cache }
}

/// The host's refusal of that name, whose message has the words.
fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, expected: &str, words: &str) {
    match result {
        Err(Error::Plugin { name, message, .. }) => {
            assert!(name == expected && message.contains(words), "{name}: {message}; expected {expected}: {words}");
        }
        other => panic!("{other:?}; expected {expected}: {words}"),
    }
}

/// One token of each sequence a step, all in one batch; by sequence, the bits of the logits behind each token.
fn decode_together<'a>(runner: &mut Runner, ids: &[SequenceId], tokens: &'a [&'a [u32]]) -> Vec<Vec<Vec<u32>>> {
    let mut answers = vec![Vec::new(); ids.len()];
    for step in 0..tokens[0].len() {
        let of = |(id, tokens): (&SequenceId, &'a &[u32])| Work {
            sequence: *id,
            tokens: &tokens[step..=step],
            phase: Phase::Decode,
            prompt_ends: false,
            logits: Logits::All,
        };
        let work: Vec<Work<'_>> = ids.iter().zip(tokens).map(of).collect();
        for (answer, rows) in answers.iter_mut().zip(runner.step(&work).unwrap()) {
            answer.extend(bits(&rows));
        }
    }
    answers
}

fn score(runner: &mut Runner, id: SequenceId, tokens: &[u32]) -> Vec<Vec<u32>> {
    bits(&runner.score(id, tokens, Scoring::OneByOne).unwrap())
}

fn kept(report: &SequenceReport) -> Vec<(&'static str, u64)> {
    report.kept.iter().map(|(reason, count)| (reason.name(), *count)).collect()
}

/// The one position table of a sequence whose heads keep the same rows.
fn positions(runner: &Runner, id: SequenceId) -> Vec<u32> {
    let survivors = runner.survivors(id).unwrap();
    let first = survivors[0][0][0].clone();
    assert!(survivors.iter().flatten().flatten().all(|positions| *positions == first));
    first
}

#[test]
fn a_plugin_is_replaced_while_plans_wait() {
    let old = "budget=24,recent=8,history=top,importance=key_norm,every=8";
    let new = "budget=12,recent=4,every=8";
    let texts = [novel(100, 62), novel(2100, 62), novel(4100, 62)];
    let answers = |from: usize, to: usize| [&texts[0][from..to], &texts[1][from..to]];
    for (cache, lag) in [(of_ranks(3, CONTIGUOUS), 1), (of_ranks(3, paged(16, 40)), 3)] {
        let allocations = Arc::new(Allocations::default());
        let config = PluginConfig { commit_lag: lag, ..truncate(old) };
        let counted = PluginConfig { allocations: Some(Arc::clone(&allocations)), ..config.clone() };
        let (mut runner, mut unchanged) = (with(cache, &counted), with(cache, &config));
        let set = |runner: &Runner, plugin: &str, config: &str| {
            runner.plugins().unwrap().set_arm(&ArmConfig::new("a", plugin, config), Source::Operator)
        };
        for (plugin, config, name, words) in [
            ("no-such-plugin", "", "file_missing", "no such file"),
            ("truncate", "budget=24,recend=8", "config", "recent"),
            ("faulty", "create=fail,rank=1", "create", "goes wrong as its config says"),
            ("faulty", "create=panic,rank=2", "create_panic", "goes wrong as its config says"),
            ("faulty", "must=8", "need_not_offered", "KVH_CAN_DATA_COUNTS"),
        ] {
            assert_refused(set(&runner, plugin, config), name, words);
        }
        // None of them took the place of the old plugin.
        let ids = [0, 1].map(|text| prefill_on(&mut runner, &texts[text][..48], "a", 64));
        let part = |sequence, tokens, prompt_ends| Work {
            sequence,
            tokens,
            phase: Phase::Prefill,
            prompt_ends,
            logits: Logits::None,
        };
        let late = runner.begin_on(&Begin { arm: Some("a"), ..Begin::new(&texts[2][..48]) }).unwrap();
        runner.step(&[part(late, &texts[2][..30], false)]).unwrap();
        assert!(ids.iter().all(|id| runner.report(*id).unwrap().pending));
        set(&runner, "truncate", new).unwrap();

        // Plans of the old plugin are carried out as though nobody had replaced it.
        let expected_ids = [0, 1].map(|text| prefill_on(&mut unchanged, &texts[text][..48], "a", 64));
        let expected = decode_together(&mut unchanged, &expected_ids, &answers(48, 56));
        assert!(decode_together(&mut runner, &ids, &answers(48, 56)) == expected, "lag {lag}");
        for (id, expected) in ids.into_iter().zip(expected_ids) {
            let report = runner.report(id).unwrap();
            assert_eq!((report.commits.len(), &report.commits[0].lengths_after), (1, &vec![24 + lag; 30]));
            assert!(rows_of(&runner, id) == rows_of(&unchanged, expected), "lag {lag}");
        }
        // The next occasion is the new plugin's, and so is a prompt that ends only now.
        runner.step(&[part(late, &texts[2][30..48], true)]).unwrap();
        decode_together(&mut runner, &ids, &answers(56, 62));
        let recent = |until: u32, end: u32| (0..4).chain(until - 8..end).collect::<Vec<u32>>();
        for id in ids {
            let report = runner.report(id).unwrap();
            assert_eq!((report.commits.len(), kept(&report)), (2, vec![]));
            assert_eq!(positions(&runner, id)[..4], [0, 1, 2, 3]);
            assert_eq!((report.lengths, report.failures), (vec![12 + 6; 30], Vec::<String>::new()));
            assert_eq!(positions(&runner, id)[4..], recent(56, 62)[4..]);
        }
        score(&mut runner, late, &texts[2][48..48 + lag]);
        assert_eq!(positions(&runner, late), recent(48, 48 + lag as u32));
        let mut full = common::runner(cache);
        let (full_id, _) = full.prefill(&texts[2][..48], 64).unwrap();
        score(&mut full, full_id, &texts[2][48..48 + lag]);
        assert_rows_are_survivors(&runner, late, &full, full_id, 48 + lag as u32);

        // A plan that waits outlives its arm; after it there are none.
        let last = prefill_on(&mut runner, &texts[0][..48], "a", 64);
        let figures = figures(&runner, "a");
        assert_eq!((figures.sequences, figures.commits, figures.fallbacks), (4, 5, 0));
        runner.plugins().unwrap().remove_arm("a").unwrap();
        score(&mut runner, last, &texts[0][48..56]);
        let report = runner.report(last).unwrap();
        assert_eq!((report.commits.len(), kept(&report)), (1, vec![("disabled", 1)]));
        for id in [ids[0], late, last, ids[1]] {
            runner.free(id).unwrap();
        }
        assert_eq!((runner.usable_blocks(), allocations.live_bytes()), (full.usable_blocks().map(|_| 40), 0));
    }
}

#[derive(Default)]
struct Served {
    answers: HashMap<RequestId, Vec<u32>>,
    preempted: Vec<RequestId>,
}

impl Served {
    fn note(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Token { request, token } => self.answers.entry(request).or_default().push(token),
                Event::Preempted { request } => self.preempted.push(request),
                Event::Finished { .. } => {}
            }
        }
    }

    fn run(&mut self, engine: &mut Engine) {
        while !engine.is_idle() {
            self.note(engine.step().unwrap());
        }
    }
}

fn engine(blocks: usize, plugins: PluginConfig) -> Engine {
    let cache = unshared(paged(16, blocks));
    Engine::new(
        model(),
        EngineConfig { cache: common::placed(cache), chunk: 256, max_sequences: 8, plugins: Some(plugins) },
    )
    .unwrap()
}

fn request(tokens: &[u32], max_new_tokens: usize) -> Request {
    Request { tokens: tokens.to_vec(), max_new_tokens, arm: Some("a".into()), ..Request::default() }
}

#[test]
fn requests_that_end_while_plans_wait_leave_the_others_alone() {
    let texts = [novel(0, 48), novel(3000, 48), novel(6000, 48)];
    for lag in [1, 3] {
        let allocations = Arc::new(Allocations::default());
        let arm = truncate("budget=16,recent=8,history=top,importance=key_norm");
        let config = PluginConfig { commit_lag: lag, allocations: Some(Arc::clone(&allocations)), ..arm };
        let alone = |tokens: &[u32], count: usize| {
            let mut engine = engine(10, config.clone());
            let id = engine.add(request(tokens, count)).unwrap();
            let mut served = Served::default();
            served.run(&mut engine);
            served.answers.remove(&id).unwrap()
        };
        let expected = texts.each_ref().map(|text| alone(text, 8));
        let check = |engine: &Engine, sequences: u64, blocks: usize| {
            let figures = figures(engine.runner(), "a");
            let reasons: Vec<_> = figures.reasons.iter().map(|(reason, count)| (reason.name(), *count)).collect();
            assert_eq!((figures.sequences, figures.live, reasons), (sequences, 0, vec![("dropped", 1)]), "lag {lag}");
            assert_eq!((engine.runner().usable_blocks(), allocations.live_bytes()), (Some(blocks), 0));
        };

        // Three prompts fill nine blocks; the second of three more blocks is taken from the youngest.
        let mut preempting = engine(10, config.clone());
        let ids = texts.each_ref().map(|text| preempting.add(request(text, 8)).unwrap());
        let mut served = Served::default();
        served.note(preempting.step().unwrap());
        assert!(ids.iter().all(|id| preempting.report(*id).unwrap().pending));
        served.run(&mut preempting);
        assert_eq!(served.preempted, [ids[2]], "lag {lag}");
        check(&preempting, 4, 10);
        let answers = ids.map(|id| served.answers.remove(&id).unwrap());
        assert_eq!(answers[..2], expected[..2], "lag {lag}");
        // It was computed again with the token it had, and compressed behind that.
        let again = [&texts[2][..], &answers[2][..1]].concat();
        assert_eq!((answers[2][0], &answers[2][1..]), (expected[2][0], &alone(&again, 7)[..]), "lag {lag}");

        let mut cancelling = engine(20, config.clone());
        let ids = texts.each_ref().map(|text| cancelling.add(request(text, 8)).unwrap());
        let mut served = Served::default();
        served.note(cancelling.step().unwrap());
        assert!(cancelling.report(ids[1]).unwrap().pending);
        cancelling.cancel(ids[1]).unwrap();
        served.run(&mut cancelling);
        check(&cancelling, 3, 20);
        assert_eq!([&served.answers[&ids[0]], &served.answers[&ids[2]]], [&expected[0], &expected[2]], "lag {lag}");
    }
}

#[test]
fn after_a_reset_everything_begins_again() {
    let texts = [novel(5000, 56), novel(5500, 56)];
    for (cache, lag) in [(paged(16, 16), 1), (of_ranks(3, CONTIGUOUS), 1), (paged(16, 16), 3)] {
        let allocations = Arc::new(Allocations::default());
        let arm = truncate("budget=16,recent=8,history=top,importance=key_norm");
        let config = PluginConfig { commit_lag: lag, allocations: Some(Arc::clone(&allocations)), ..arm };
        let mut runner = with(cache, &config);
        let mut run = |reset: bool| {
            let ids = [0, 1].map(|text| prefill_on(&mut runner, &texts[text][..50], "a", 64));
            assert!(ids.iter().all(|id| runner.report(*id).unwrap().pending));
            if !reset {
                let answers = decode_together(&mut runner, &ids, &[&texts[0][50..], &texts[1][50..]]);
                assert!(ids.iter().all(|id| runner.report(*id).unwrap().lengths == [16 + 6; 30]));
                let rows = ids.map(|id| rows_of(&runner, id));
                runner.reset().unwrap();
                return Some((answers, rows));
            }
            runner.reset().unwrap();
            assert!(ids.iter().all(|id| matches!(runner.report(*id), Err(Error::UnknownSequence(_)))));
            assert_eq!((runner.usable_blocks(), allocations.live_bytes()), (common::runner(cache).usable_blocks(), 0));
            None
        };
        let first = run(false);
        assert!(run(true).is_none() && run(false) == first, "lag {lag}, {cache:?}");
        let figures = figures(&runner, "a");
        assert_eq!((figures.sequences, figures.live, figures.commits, figures.fallbacks), (6, 0, 4, 2));
    }
}

/// Config of `faulty` whose prompt is compressed well, and what then comes of two occasions to compress the answer.
const GROWN: &[(&str, &[&str])] = &[
    ("grown=fail", &["plugin_error", "plugin_error"]),
    ("grown=panic", &["panic", "poisoned"]),
    ("grown=panic-twice", &["panic", "poisoned"]),
    ("grown=out-of-memory", &["out_of_memory", "out_of_memory"]),
    ("grown=unsupported", &["unsupported", "unsupported"]),
    ("grown=fail,rank=1", &["plugin_error", "plugin_error"]),
    ("bound=panic,after=1", &["panic", "poisoned"]),
    ("damage=out-of-range,after=1", &["bad_index", "bad_index"]),
    ("damage=fewer,after=1,rank=2", &["bad_count", "bad_count"]),
];

#[test]
fn an_answer_goes_on_when_on_grown_fails() {
    let tokens = novel(1200, 49);
    for (cache, lag) in [(of_ranks(3, CONTIGUOUS), 0), (of_ranks(3, paged(16, 12)), 1)] {
        let configs: Vec<String> = GROWN.iter().map(|(config, _)| format!("{config},every=4")).collect();
        let mut arms = vec![("once", "faulty", ""), ("often", "faulty", "every=4")];
        arms.extend(GROWN.iter().zip(&configs).map(|((name, _), config)| (*name, "faulty", config.as_str())));
        // Names of arms hold no `=` or `,`.
        let names: Vec<String> = arms.iter().map(|(name, ..)| name.replace(['=', ','], "-")).collect();
        let arms: Vec<_> = names.iter().zip(&arms).map(|(name, arm)| (name.as_str(), arm.1, arm.2)).collect();
        let mut runner = with(cache, &PluginConfig { commit_lag: lag, ..plugins(&arms) });
        let mut run = |arm: &str| {
            let begin = Begin { arm: Some(arm), prefix_limit: 0, ..Begin::new(&tokens[..40]) };
            let (id, _) = runner.prefill_on(&begin, 64).unwrap();
            let answer = score(&mut runner, id, &tokens[40..]);
            let (rows, report) = (rows_of(&runner, id), runner.report(id).unwrap());
            runner.free(id).unwrap();
            ((answer, rows), report, figures(&runner, arm))
        };
        let (once, ..) = run("once");
        // Where nothing fails, the answer is compressed, so that a failure is seen.
        let (often, report, _) = run("often");
        assert!(report.commits.len() == 3 - lag && often != once);
        for (name, (config, expected)) in names[2..].iter().zip(GROWN) {
            let (found, report, figures) = run(name);
            assert!(found == once, "{config}");
            assert_eq!((report.commits.len(), report.commits[0].lengths_after[7]), (1, 20 + lag), "{config}");
            assert_eq!(report.kept.values().sum::<u64>(), 2, "{config}");
            for reason in *expected {
                let counted = figures.reasons.iter().find(|(known, _)| known.name() == *reason);
                let occasions = expected.iter().filter(|other| *other == reason).count() as u64;
                assert!(counted.is_some_and(|(_, count)| *count >= occasions), "{config}: {:?}", figures.reasons);
            }
            assert_eq!((figures.commits, figures.live), (1, 0), "{config}");
        }
        assert_eq!(runner.usable_blocks(), common::runner(cache).usable_blocks());
    }
}

#[test]
fn forms_are_honoured_or_refused_with_what_to_do() {
    let form = |text: &str, source, commit_lag| {
        let config = PluginConfig { kv_plugin: text.into(), source, commit_lag, ..plugins(&[]) };
        Runner::with_plugins(model(), common::placed(of_ranks(3, CONTIGUOUS)), &config)
    };
    let library = "libkvhook_noop.so";
    let beside = std::env::current_exe().unwrap().with_file_name(library);
    let path = format!(r#"{{"kv_plugin": {{"plugin": {:?}}}}}"#, beside.to_str().unwrap());
    assert_refused(form(&path, Source::Model, 0), "model_path", "only bare names");
    assert_refused(form(r#"{"plugin": "../noop"}"#, Source::Model, 0), "model_path", "only bare names");
    assert!(form(&path, Source::Operator, 0).is_ok());
    let outside = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(library);
    std::fs::copy(&beside, &outside).unwrap();
    let outside = format!(r#"{{"plugin": {:?}}}"#, outside.to_str().unwrap());
    assert_refused(form(&outside, Source::Operator, 0), "path_not_allowed", "not inside an allowed folder");
    for (text, name, words) in [
        (r#"{"kv_plugin": {"plugin": "noop", "min_token": 4}}"#, "spec", "min_tokens"),
        (r#"{"kv_plugin": {"plugin": "noop"}, "other": 1}"#, "spec", "other"),
        (r#"{"plugin": "noop", "layers": "0-30"}"#, "spec", "0-29"),
        (r#"{"plugin": "noop""#, "spec", "not JSON"),
        (r#"{"plugin": "no-such-plugin"}"#, "file_missing", "no such file"),
        (r#"{"plugin": "truncate", "config": {"budgt": 4}}"#, "config", "budget"),
        (r#"{"plugin": "truncate", "config": {"keep": 2}}"#, "config", "keep"),
        (r#"{"plugin": "truncate", "config": "keep=0.5,budget=4"}"#, "config", "budget"),
        (r#"{"plugin": "faulty", "config": {"must": 8}}"#, "need_not_offered", "KVH_CAN_DATA_COUNTS"),
        (r#"{"plugin": "faulty", "config": {"create": "unsupported"}}"#, "unsupported", "goes wrong"),
        (r#"{"plugin": "faulty", "config": "needs=panic,rank=1"}"#, "create_panic", "needs"),
        (
            r#"{"arms": [{"name": "a", "plugin": "noop"}, {"name": "b", "plugin": "no-such-plugin"}]}"#,
            "file_missing",
            "",
        ),
    ] {
        for source in [Source::Operator, Source::Model] {
            assert_refused(form(text, source, 0), name, words);
        }
    }
    // Positions are moved only where a commit is never late.
    let moves = r#"{"plugin": "faulty", "config": {"must": 64}}"#;
    assert!(form(moves, Source::Operator, 0).is_ok());
    assert_refused(form(moves, Source::Operator, 1), "need_not_offered", "KVH_CAN_MOVE_POSITIONS");

    let tokens = novel(700, 64);
    let text = r#"{"kv_plugin": {"plugin": "truncate", "config": {"budget": 16, "recent": 8}, "min_tokens": 40,
        "layers": "0-9,20-"}}"#;
    let mut runner = form(text, Source::Model, 0).unwrap();
    let short = prefill_on(&mut runner, &tokens[..39], "default", 64);
    // Its prompt is too short to be asked about at all.
    let report = runner.report(short).unwrap();
    assert_eq!((kept(&report), &report.lengths), (vec![], &vec![39; 30]));
    // The form's arm is also what serves those that name none.
    let (long, _) = runner.prefill(&tokens, 64).unwrap();
    let lengths: Vec<usize> = (0..30).map(|layer| if (10..20).contains(&layer) { 64 } else { 16 }).collect();
    assert_eq!(runner.report(long).unwrap().lengths, lengths);
    let none = form(r#"{"kv_plugin": null}"#, Source::Model, 0).unwrap().prefill(&tokens, 64);
    assert!(none.is_ok());
}

#[test]
fn all_ranks_keep_what_one_of_them_cannot_plan() {
    let faults = [
        ("prefill_done=fail", "plugin_error"),
        ("prefill_done=out-of-memory", "out_of_memory"),
        ("damage=out-of-range", "bad_index"),
        ("damage=repeated,plan=select-heads,layer=29", "bad_index"),
        ("damage=both", "bad_plan"),
        ("damage=moved", "bad_plan"),
        ("damage=moved,plan=rewrite,must=32", "bad_plan"),
        ("before_attention=fail,phases=1,must=1", "plugin_error"),
    ];
    let tokens = novel(2500, 45);
    let mut arms = Vec::new();
    for (fault, (config, reason)) in faults.into_iter().enumerate() {
        // Every rank once with a fault that shows in its call, one rank with each other.
        let ranks = if fault % 2 == 0 { 0..3 } else { fault % 3..fault % 3 + 1 };
        arms.extend(ranks.map(|rank| (format!("f{fault}-{rank}"), format!("{config},rank={rank}"), reason)));
    }
    for (cache, lag) in [(of_ranks(3, CONTIGUOUS), 1), (of_ranks(3, paged(16, 10)), 3)] {
        let (mut full, begin) = (runner(cache), Begin { prefix_limit: 0, ..Begin::new(&tokens[..40]) });
        let (full_id, last) = full.prefill(&tokens[..40], 64).unwrap();
        let mut expected = bits(&[last]);
        expected.extend(score(&mut full, full_id, &tokens[40..]));
        let rows = rows_of(&full, full_id);
        let named: Vec<_> = arms.iter().map(|(name, config, _)| (name.as_str(), "faulty", config.as_str())).collect();
        let mut runner = with(cache, &PluginConfig { commit_lag: lag, ..plugins(&named) });
        for (name, config, reason) in &arms {
            let (id, last) = runner.prefill_on(&Begin { arm: Some(name), ..begin }, 64).unwrap();
            let mut found = bits(&[last]);
            found.extend(score(&mut runner, id, &tokens[40..]));
            assert!(found == expected && rows_of(&runner, id) == rows, "{config}");
            let report = runner.report(id).unwrap();
            assert_eq!(
                (kept(&report), report.pending, report.commits.len()),
                (vec![(*reason, 1)], false, 0),
                "{config}"
            );
            runner.free(id).unwrap();
            let figures = figures(&runner, name);
            assert_eq!((figures.commits, figures.live), (0, 0), "{config}");
            assert!(figures.reasons.iter().any(|(known, _)| known.name() == *reason), "{config}");
        }
        assert_eq!(runner.usable_blocks(), common::runner(cache).usable_blocks());
    }
}

#[test]
fn a_pool_without_a_free_block_keeps_what_needs_one() {
    let tokens = novel(3300, 108);
    let arm = truncate("budget=40,recent=8,history=top,importance=key_norm");
    let mut full = runner(paged(16, 7));
    let (full_id, last) = full.prefill(&tokens[..100], 64).unwrap();
    let mut expected = bits(&[last]);
    expected.extend(score(&mut full, full_id, &tokens[100..]));
    let rows = rows_of(&full, full_id);
    for lag in [0, 1, 3] {
        let config = PluginConfig { commit_lag: lag, ..arm.clone() };
        // Published rows are not written, and seven blocks are all there are.
        let mut runner = with(paged(16, 7), &config);
        let (id, last) = runner.prefill_on(&Begin { arm: Some("a"), ..Begin::new(&tokens[..100]) }, 64).unwrap();
        assert_eq!(runner.usable_blocks(), Some(0));
        let mut found = bits(&[last]);
        found.extend(score(&mut runner, id, &tokens[100..]));
        assert!(found == expected && rows_of(&runner, id) == rows, "lag {lag}");
        assert_eq!(kept(&runner.report(id).unwrap()), [("no_room", 1)], "lag {lag}");
        let reasons: Vec<_> = figures(&runner, "a").reasons.iter().map(|(reason, _)| reason.name()).collect();
        assert_eq!(reasons, ["no_room"]);
        runner.free(id).unwrap();
        assert_eq!(runner.usable_blocks(), Some(7));
        // Rows of its own need no room.
        let mut runner = with(unshared(paged(16, 7)), &config);
        let id = prefill_on(&mut runner, &tokens[..100], "a", 64);
        score(&mut runner, id, &tokens[100..]);
        let report = runner.report(id).unwrap();
        assert_eq!((report.commits[0].movement, &report.lengths), (Movement::InPlace, &vec![48; 30]), "lag {lag}");
        assert_eq!(runner.usable_blocks(), Some(7 - 3));
    }
}

#[test]
fn a_rewrite_with_copies_of_rows_is_a_select_of_them() {
    let tokens = novel(4400, 55);
    let bf16 = CacheConfig { dtype: KvDtype::Bf16, ..unshared(paged(7, 24)) };
    let f16 = CacheConfig { dtype: KvDtype::F16, ..of_ranks(3, paged(16, 16)) };
    for (cache, lag) in [(of_ranks(3, CONTIGUOUS), 0), (bf16, 1), (f16, 3)] {
        for more in ["", ",answer=unequal,keep=0.3"] {
            let select = format!("plan=select,every=6{more}");
            let rewrite = format!("plan=rewrite,must=32,every=6{more}");
            let arms = [("select", "faulty", select.as_str()), ("rewrite", "faulty", rewrite.as_str())];
            let mut runner = with(cache, &PluginConfig { commit_lag: lag, ..plugins(&arms) });
            let results = ["select", "rewrite"].map(|arm| {
                let begin = Begin { arm: Some(arm), prefix_limit: 0, ..Begin::new(&tokens[..40]) };
                let (id, _) = runner.prefill_on(&begin, 64).unwrap();
                let answer = score(&mut runner, id, &tokens[40..]);
                let report = runner.report(id).unwrap();
                let lengths: Vec<_> = report.commits.iter().map(|commit| commit.lengths_after.clone()).collect();
                assert_eq!((lengths.len(), kept(&report), report.failures), (3, vec![], vec![]), "{arm}{more}");
                let result = (answer, rows_of(&runner, id), runner.survivors(id).unwrap(), lengths, report.bytes);
                runner.free(id).unwrap();
                result
            });
            assert!(results[0] == results[1], "{cache:?}, lag {lag}{more}");
            assert_eq!(runner.usable_blocks(), common::runner(cache).usable_blocks());
        }
    }
}
