//! `noop`, from its shared library and with every hook point at work, changes no bit of any logit and no word of any answer,
//! whatever the cache, the ranks and the chunks; alone or in a batch.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use kvhook_e2e::model::{CONTIGUOUS, bits, model, paged, plugins, runner, text};
use kvhook_e2e::plugins::Place;
use kvhook_engine::quality::argmax;
use kvhook_engine::{Begin, CacheConfig, Device, Engine, EngineConfig, Event, Request, Runner, Scoring};
// Builds the plugin's shared library.
use kvhook_noop as _;

/// Tokens of each answer.
const ANSWER: usize = 6;
const NOOP: [(&str, &str, &str); 1] = [("noop", "noop", "observe=all,every=2")];

/// Twenty prompts of 8 to 1,500 tokens, some with a beginning in common.
fn prompts() -> Vec<Vec<u32>> {
    let lengths = [8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 50, 55, 63, 64, 65, 96, 300, 1_500];
    let texts = [text("moby-dick.txt"), text("state-of-the-union.txt")];
    let prompt = |(place, length): (usize, &usize)| {
        let start = if place % 4 == 0 { 0 } else { 1_000 * place };
        texts[place % 2][start..start + length].to_vec()
    };
    lengths.iter().enumerate().map(prompt).collect()
}

/// Bits of the logits behind the prompt and each token of the greedy answer, and that answer.
fn answer(runner: &mut Runner, prompt: &[u32], arm: &str, chunk: usize) -> (Vec<Vec<u32>>, Vec<u32>) {
    let (id, mut row) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(prompt) }, chunk).unwrap();
    let (mut rows, mut tokens) = (vec![bits(&row)], Vec::new());
    while tokens.len() < ANSWER {
        tokens.push(argmax(&row));
        row = runner.score(id, &tokens[tokens.len() - 1..], Scoring::OneByOne).unwrap().remove(0);
        rows.push(bits(&row));
    }
    let report = runner.report(id).unwrap();
    assert!(report.failures.is_empty() && report.commits.is_empty(), "{report:?}");
    assert_eq!(report.lengths, vec![prompt.len() + ANSWER; model().config.layers]);
    runner.free(id).unwrap();
    (rows, tokens)
}

/// Answers of an engine that serves all prompts at once.
fn served(prompts: &[Vec<u32>], device: Device) -> Vec<Vec<u32>> {
    let place = Place::new();
    let config = EngineConfig {
        cache: CacheConfig { ranks: 3, device, ..paged(16, 400) },
        chunk: 200,
        plugins: Some(plugins(&NOOP, &place)),
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(model(), config).unwrap();
    let request = |tokens: &Vec<u32>| Request {
        tokens: tokens.clone(),
        max_new_tokens: ANSWER,
        arm: Some("noop".into()),
        ..Request::default()
    };
    let ids: Vec<_> = prompts.iter().map(|prompt| engine.add(request(prompt)).unwrap()).collect();
    let mut answers: BTreeMap<_, Vec<u32>> = BTreeMap::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Token { request, token } = event {
                answers.entry(request).or_default().push(token);
            }
        }
    }
    let figures = engine.runner().plugins().unwrap().figures("noop").unwrap();
    assert_eq!(figures.sequences, prompts.len() as u64, "{figures:?}");
    ids.iter().map(|id| answers.remove(id).unwrap()).collect()
}

#[test]
fn noop_changes_nothing() {
    changes_nothing(Device::Cpu);
}

#[cfg(feature = "cuda")]
#[test]
fn noop_on_a_cuda_device_changes_nothing() {
    if let Some(device) = kvhook_e2e::model::cuda() {
        changes_nothing(device);
    }
}

fn changes_nothing(device: Device) {
    let prompts = prompts();
    let on = |cache: CacheConfig| CacheConfig { device, ..cache };
    let mut plain = Runner::new(model(), on(CONTIGUOUS)).unwrap();
    let expected: Vec<_> = prompts.iter().map(|prompt| answer(&mut plain, prompt, "none", prompt.len())).collect();

    let mut variants = [
        (runner(on(CONTIGUOUS), &NOOP, 0), 2_000),
        (runner(on(paged(16, 120)), &NOOP, 0), 128),
        (runner(on(CacheConfig { ranks: 3, ..CONTIGUOUS }), &NOOP, 1), 100),
        (runner(on(CacheConfig { ranks: 3, ..paged(7, 240) }), &NOOP, 3), 29),
    ];
    for (place, (prompt, expected)) in prompts.iter().zip(&expected).enumerate() {
        // The long ones take their time: one variant each.
        let only = (prompt.len() > 200).then_some(place % 4);
        for (number, (runner, chunk)) in variants.iter_mut().enumerate() {
            if only.is_none_or(|only| only == number) {
                let found = answer(runner, prompt, "noop", *chunk);
                assert!(found == *expected, "{} tokens, variant {number}", prompt.len());
            }
        }
    }
    // The comparison can fail: another prompt has other logits.
    assert!(expected[0] != expected[1]);

    let tokenizer = &model().tokenizer;
    for (answer, (_, tokens)) in served(&prompts, device).iter().zip(&expected) {
        assert_eq!(answer, tokens);
        assert_eq!(tokenizer.decode(answer).unwrap(), tokenizer.decode(tokens).unwrap());
    }
}
