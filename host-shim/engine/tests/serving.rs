//! Requests: prefix sharing, preemption, cancelling. Answers are those of a request served alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;

use common::{CONTIGUOUS, bits, model, novel, paged, runner};
use kvhook_engine::{CacheConfig, Engine, EngineConfig, Error, Event, FinishReason, Request, RequestId, Scoring};

fn engine(cache: CacheConfig, chunk: usize) -> Engine {
    Engine::new(model(), EngineConfig { cache: common::placed(cache), chunk, max_sequences: 8, plugins: None }).unwrap()
}

fn request(start: usize, prompt: usize, max_new_tokens: usize) -> Request {
    Request { tokens: novel(start, prompt), max_new_tokens, ..Request::default() }
}

#[derive(Default)]
struct Served {
    answers: HashMap<RequestId, Vec<u32>>,
    reasons: HashMap<RequestId, FinishReason>,
    preemptions: usize,
}

fn serve(engine: &mut Engine) -> Served {
    let mut served = Served::default();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            match event {
                Event::Token { request, token } => served.answers.entry(request).or_default().push(token),
                Event::Preempted { .. } => served.preemptions += 1,
                Event::Finished { request, reason } => {
                    served.reasons.insert(request, reason);
                }
            }
        }
    }
    served
}

fn alone(request: Request) -> Vec<u32> {
    let mut engine = engine(CONTIGUOUS, 512);
    let id = engine.add(request).unwrap();
    serve(&mut engine).answers.remove(&id).unwrap()
}

#[test]
fn shared_blocks_are_counted_and_change_no_bit() {
    let (first, second) = (novel(0, 120), [novel(0, 100), novel(4000, 30)].concat());
    let mut runner = runner(paged(16, 40));
    let (a, _) = runner.prefill(&first, 64).unwrap();
    assert_eq!(runner.usable_blocks(), Some(40 - 8));
    let (b, shared_logits) = runner.prefill(&second, 64).unwrap();
    // 100 equal tokens are six full blocks; the other three are new.
    assert_eq!(runner.sequence(b).unwrap().shared, 96);
    assert_eq!(runner.usable_blocks(), Some(40 - 8 - 3));
    for layer in 0..model().config.layers {
        let blocks = |id| runner.sequence(id).unwrap().layers[layer].blocks.clone();
        assert_eq!(blocks(a)[..6], blocks(b)[..6]);
        assert!(blocks(a)[6..].iter().all(|block| !blocks(b).contains(block)));
        assert_eq!(runner.pool().unwrap().references(layer, blocks(a)[5]), 2);
    }
    // The donor goes; the rows that the other uses stay.
    runner.free(a).unwrap();
    assert_eq!(runner.usable_blocks(), Some(40 - 9));
    let tail = novel(4030, 3);
    let shared = runner.score(b, &tail, Scoring::OneByOne).unwrap();
    runner.free(b).unwrap();
    assert_eq!(runner.usable_blocks(), Some(40));

    let mut fresh = common::runner(CONTIGUOUS);
    let (id, logits) = fresh.prefill(&second, 512).unwrap();
    assert!(bits(&[shared_logits]) == bits(&[logits]));
    assert!(bits(&shared) == bits(&fresh.score(id, &tail, Scoring::OneByOne).unwrap()));

    // The same prompt again: all but its last token's block is taken over; with a limit, less.
    let whole = runner.begin(&first[..112], 200);
    assert_eq!(runner.sequence(whole).unwrap().shared, 96);
    let limited = runner.begin(&first, 50);
    assert_eq!(runner.sequence(limited).unwrap().shared, 48);
}

#[test]
fn requests_over_one_prompt_share_it_and_answer_alike() {
    let expected = alone(request(0, 100, 12));
    for prefix_sharing in [true, false] {
        let mut engine = engine(CacheConfig { prefix_sharing, ..paged(16, 64) }, 80);
        let ids: Vec<_> = (0..4).map(|_| engine.add(request(0, 100, 12)).unwrap()).collect();
        let mut fewest = 64;
        let mut answers: HashMap<RequestId, Vec<u32>> = HashMap::new();
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                if let Event::Token { request, token } = event {
                    answers.entry(request).or_default().push(token);
                }
            }
            fewest = fewest.min(engine.runner().usable_blocks().unwrap());
        }
        assert!(ids.iter().all(|id| answers[id] == expected));
        // 112 rows are seven blocks; sharing, six of them are there once.
        assert_eq!(64 - fewest, if prefix_sharing { 7 + 3 } else { 4 * 7 });
        assert_eq!(engine.runner().usable_blocks(), Some(64));
    }
}

#[test]
fn preempted_requests_give_the_same_answers() {
    let requests = [request(0, 60, 40), request(3000, 50, 40), request(6000, 40, 40)];
    let expected: Vec<_> = requests.iter().cloned().map(alone).collect();
    // All three prompts fit (4 + 4 + 3 blocks), but not all three answers.
    let mut engine = engine(CacheConfig { prefix_sharing: false, ..paged(16, 13) }, 64);
    let ids = requests.map(|request| engine.add(request).unwrap());
    let served = serve(&mut engine);
    assert!(served.preemptions > 0);
    for (id, expected) in ids.iter().zip(&expected) {
        assert_eq!(&served.answers[id], expected);
        assert_eq!(served.reasons[id], FinishReason::Length);
    }
    assert_eq!(engine.runner().usable_blocks(), Some(13));
}

#[test]
fn what_can_never_fit_ends_with_its_reason() {
    let mut engine = engine(paged(16, 4), 32);
    let too_long = engine.add(request(0, 100, 5)).unwrap();
    let grows_out = engine.add(request(0, 60, 20)).unwrap();
    let fits = engine.add(request(500, 20, 5)).unwrap();
    let served = serve(&mut engine);
    assert_eq!(served.reasons[&too_long], FinishReason::OutOfBlocks);
    assert!(!served.answers.contains_key(&too_long));
    assert_eq!(served.reasons[&grows_out], FinishReason::OutOfBlocks);
    // 64 rows hold four answered tokens; the fifth is sampled from the last of them.
    assert_eq!(served.answers[&grows_out].len(), 5);
    assert_eq!(served.answers[&fits], alone(request(500, 20, 5)));
    assert_eq!(engine.runner().usable_blocks(), Some(4));
}

#[test]
fn cancelled_requests_free_their_cache() {
    for cache in [CONTIGUOUS, CacheConfig { ranks: 3, ..paged(16, 16) }] {
        let mut engine = engine(cache, 64);
        let start = (engine.runner().cache_bytes().unwrap(), engine.runner().usable_blocks());
        let id = engine.add(request(0, 60, 50)).unwrap();
        let kept = engine.add(request(1000, 20, 4)).unwrap();
        engine.step().unwrap();
        engine.step().unwrap();
        engine.cancel(id).unwrap();
        engine.cancel(id).unwrap();
        let served = serve(&mut engine);
        assert_eq!(served.reasons[&id], FinishReason::Cancelled);
        assert_eq!(served.reasons[&kept], FinishReason::Length);
        assert_eq!((engine.runner().cache_bytes().unwrap(), engine.runner().usable_blocks()), start);
    }
}

#[test]
fn a_chat_answer_ends_with_the_models_end_token() {
    let model = model();
    let prompt = kvhook_engine::model::Tokenizer::chat(None, "What is the capital of France?");
    let tokens = model.tokenizer.encode(&prompt).unwrap();
    let mut engine = engine(paged(16, 32), 64);
    let id = engine.add(Request { tokens, max_new_tokens: 60, stop_at_eos: true, ..Request::default() }).unwrap();
    let served = serve(&mut engine);
    assert_eq!(served.reasons[&id], FinishReason::EndToken);
    let answer = model.tokenizer.decode(&served.answers[&id]).unwrap();
    assert!(answer.contains("Paris"), "{answer}");
}

#[test]
fn prompts_that_cannot_be_run_are_refused_at_once() {
    let mut engine = engine(CONTIGUOUS, 64);
    let with = |tokens| Request { tokens, max_new_tokens: 1, ..Request::default() };
    assert!(matches!(engine.add(with(vec![])), Err(Error::Empty { .. })));
    assert!(matches!(engine.add(with(vec![49_152])), Err(Error::UnknownToken { .. })));
    assert!(matches!(engine.add(with(vec![1; 8193])), Err(Error::ContextFull { .. })));
    let zero = Engine::new(model(), EngineConfig { chunk: 0, ..EngineConfig::default() });
    assert!(matches!(zero, Err(Error::Config { setting: "chunk", .. })));
}
