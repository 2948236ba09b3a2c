//! The engine against an independent implementation on the same weights (`tests/goldens/logits.py`).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CONTIGUOUS, model, runner, shared_file};
use kvhook_engine::quality::log_softmax;
use kvhook_engine::{Scoring, model::fetch};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Largest difference of a logit. Logits reach 27; both sides accumulate thousands of f32 products over 30 layers in
/// different orders, which moves logits by up to 5e-5 (measured); the bound leaves room for another build
/// of either side and is far below what any wrong formula causes.
const TOLERANCE: f64 = 5e-4;

#[derive(Deserialize)]
struct Golden {
    gguf_sha256: String,
    logits: Vec<Case>,
    tokenizer: Vec<Text>,
    novel_tokens: Vec<u32>,
    novel_characters: usize,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    tokens: Vec<u32>,
    positions: Vec<Position>,
}

#[derive(Deserialize)]
struct Position {
    position: usize,
    top: Vec<(u32, f64)>,
    mean: f64,
    std: f64,
    logsumexp: f64,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: Vec<u32>,
}

fn golden() -> Golden {
    serde_json::from_str(&shared_file("goldens/logits.json")).unwrap()
}

#[test]
fn the_goldens_are_of_this_model() {
    let bytes = std::fs::read(fetch::default_model(|_, _| {}).unwrap()).unwrap();
    assert_eq!(format!("{:x}", Sha256::digest(bytes)), golden().gguf_sha256);
}

#[test]
fn logits_match() {
    let mut largest = 0.0f64;
    for case in golden().logits {
        let mut runner = runner(CONTIGUOUS);
        let (body, tail) = case.tokens.split_at(case.tokens.len() - case.positions.len());
        let (id, _) = runner.prefill(body, 512).unwrap();
        let rows = runner.score(id, tail, Scoring::Together).unwrap();
        for (row, golden) in rows.iter().zip(&case.positions) {
            let mut near = |what: &str, found: f64, expected: f64| {
                let difference = (found - expected).abs();
                largest = largest.max(difference);
                let place = format!("{} of {} at {}", what, case.name, golden.position);
                assert!(difference <= TOLERANCE, "{place}: {found}, expected {expected}");
            };
            for &(token, logit) in &golden.top {
                near(&format!("logit {token}"), f64::from(row[token as usize]), logit);
            }
            let values: Vec<f64> = row.iter().map(|&value| f64::from(value)).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
            near("mean", mean, golden.mean);
            near("standard deviation", variance.sqrt(), golden.std);
            near("log of the sum of exponentials", values[0] - log_softmax(row)[0], golden.logsumexp);
        }
    }
    println!("largest difference: {largest:.2e}");
}

#[test]
fn token_ids_match() {
    let golden = golden();
    let tokenizer = &model().tokenizer;
    for case in &golden.tokenizer {
        assert_eq!(tokenizer.encode(&case.text).unwrap(), case.tokens, "{:?}", case.text);
    }
    let novel: String = shared_file("text/moby-dick.txt").chars().take(golden.novel_characters).collect();
    assert_eq!(tokenizer.encode(&novel).unwrap(), golden.novel_tokens);
}

#[test]
fn decoding_gives_the_text_back() {
    let golden = golden();
    let tokenizer = &model().tokenizer;
    for case in golden.tokenizer.iter().filter(|case| !case.text.contains("<|")) {
        assert_eq!(tokenizer.decode(&case.tokens).unwrap(), case.text);
    }
    let chat = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    let ids = &golden.tokenizer.iter().find(|case| case.text == chat).unwrap().tokens;
    assert_eq!(tokenizer.decode(ids).unwrap(), "user\nHello\nassistant\n");
    assert_eq!(kvhook_engine::model::Tokenizer::chat(None, "Hello"), chat);
}
