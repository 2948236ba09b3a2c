//! The plugins that are written as an outside author would, `expected-attention` and `lagkv`, from their shared libraries
//! on the real model.
//!
//! What is measured is as in `ladder.rs`: a prefix of T tokens is compressed, its last token and a continuation are fed
//! behind it, and their logits are compared with those of the full cache. The gates are those that were set before the
//! plugins were written. `KVHOOK_PASSAGES` (1 to 8, for each text) and `KVHOOK_PASSKEYS` take more of both.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

#[path = "examples/lagkv.rs"]
mod lagkv;

use std::collections::BTreeMap;

use kvhook_e2e::measured::Measured;
use kvhook_e2e::model::{bits, model, paged, plugins, text};
use kvhook_e2e::plugins::Place;
use kvhook_engine::quality::{Passkey, argmax, paired_difference, perplexity, summarise};
use kvhook_engine::runner::LogitsRow;
use kvhook_engine::{Begin, Runner, Scoring};

/// Tokens of the prefix and of the continuation.
const T: usize = 1024;
const M: usize = 128;
const BLOCK: usize = 16;
/// Prompts for passkeys, and tokens in which one must come out.
const PASSKEYS: usize = 6;
const ANSWER: usize = 8;
const TEXTS: [&str; 2] = ["moby-dick.txt", "state-of-the-union.txt"];

const RANDOM: &str = "history=sample,importance=uniform";

/// Name, plugin, config and share of an arm, and the most KL that it may have.
type Arm = (&'static str, &'static str, String, f64, Option<f64>);

fn arms() -> Vec<Arm> {
    let arm = |name, plugin, keep: f64, rest: &str, gate| (name, plugin, format!("keep={keep}{rest}"), keep, gate);
    vec![
        arm("expected-50", "expected-attention", 0.5, "", Some(0.10)),
        arm("expected-25", "expected-attention", 0.25, "", Some(0.25)),
        arm("lagkv-50", "lagkv", 0.5, "", Some(0.13)),
        arm("lagkv-25", "lagkv", 0.25, "", Some(0.35)),
        arm("random-50", "truncate", 0.5, &format!(",{RANDOM}"), None),
        arm("random-25", "truncate", 0.25, &format!(",{RANDOM}"), None),
        arm("recent-25", "truncate", 0.25, "", None),
    ]
}

/// A number from the environment, else `default`.
fn from_environment(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} is {value}")))
}

/// A runner with all arms, which shares the prefill of those that need no queries.
fn runner(arms: &[Arm]) -> Runner {
    let place = Place::new();
    lagkv::build(&place);
    let arms: Vec<_> = arms.iter().map(|(name, plugin, config, ..)| (*name, *plugin, config.as_str())).collect();
    let mut plugins = plugins(&arms, &place);
    plugins.folders.push(place.plugins());
    let blocks = 3 * (T + M).div_ceil(BLOCK) + 16;
    Runner::with_plugins(model(), paged(BLOCK, blocks), &plugins).unwrap_or_else(|error| panic!("{error}"))
}

/// Logits of the continuation behind a prefix that `arm` compressed to `kept` rows.
fn continuation(runner: &mut Runner, passage: &[u32], arm: &str, kept: usize) -> Vec<LogitsRow> {
    let (prefix, rest) = passage.split_at(T - 1);
    let (id, _) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(prefix) }, T).unwrap();
    let report = runner.report(id).unwrap();
    assert!(report.failures.is_empty(), "{arm}: {report:?}");
    assert!(report.lengths.iter().all(|length| *length == kept), "{arm}: {report:?}");
    let rows = runner.score(id, &rest[..M], Scoring::Together).unwrap();
    runner.free(id).unwrap();
    rows
}

#[test]
fn each_costs_no_more_than_its_gate() {
    let (arms, passages) = (arms(), from_environment("KVHOOK_PASSAGES", 1));
    let mut runner = runner(&arms);
    let mut measured: BTreeMap<&str, Measured> = BTreeMap::new();
    for name in TEXTS {
        let tokens = text(name);
        for start in (0..passages).map(|passage| 3_000 + 9_000 * passage) {
            let passage = &tokens[start..start + T + M];
            let full = continuation(&mut runner, passage, "none", T - 1);
            let mut recent = Vec::new();
            for (arm, _, _, keep, _) in &arms {
                let rows = continuation(&mut runner, passage, arm, ((T - 1) as f64 * keep) as usize);
                measured.entry(arm).or_default().add(&full, &rows, &passage[T..]);
                // At a quarter of this prompt no block is left to choose from: sinks and the most recent rows stay.
                match *arm {
                    "lagkv-25" => recent = rows,
                    "recent-25" => assert!(recent.iter().zip(&rows).all(|(a, b)| bits(a) == bits(b)), "lagkv-25"),
                    _ => {}
                }
            }
        }
    }
    println!("T = {T}, M = {M}, {} passages; mean and standard error over passages", passages * TEXTS.len());
    for (name, _, _, _, gate) in &arms {
        let Measured { kl, loss, agreement } = &measured[name];
        let (kl, ppl, top1) = (summarise(kl), perplexity(summarise(loss).mean), summarise(agreement).mean);
        let gate = gate.map_or(String::new(), |gate| format!("<= {gate}"));
        println!(
            "{name:<12} KL {:.4} +- {:.4}  PPL {ppl:6.2}  top-1 {:5.1}%  {gate}",
            kl.mean,
            kl.standard_error,
            100.0 * top1
        );
    }
    for (name, _, _, _, gate) in &arms {
        let kl = measured[name].kl();
        assert!(gate.is_none_or(|gate| kl <= gate), "{name}: KL {kl:.4} is above {gate:?}");
    }
    for (good, random) in [("expected-50", "random-50"), ("expected-25", "random-25")] {
        let difference = paired_difference(&measured[good].kl, &measured[random].kl);
        println!("{good} - {random}: KL {:+.4} +- {:.4}", difference.mean, difference.standard_error);
        assert!(difference.mean < 0.0, "{good} is not better than a random choice: {difference:?}");
    }
}

/// Greedy tokens behind `tokens`, as text.
fn answer(runner: &mut Runner, prompt: &[u32], question: &[u32], arm: &str) -> String {
    let (id, _) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(prompt) }, T).unwrap();
    assert!(runner.report(id).unwrap().failures.is_empty());
    let mut words = Vec::new();
    let mut rows = runner.score(id, question, Scoring::Together).unwrap();
    while words.len() < ANSWER {
        words.push(argmax(&rows.pop().unwrap()));
        rows = runner.score(id, &words[words.len() - 1..], Scoring::OneByOne).unwrap();
    }
    runner.free(id).unwrap();
    runner.model().tokenizer.decode(&words).unwrap()
}

#[test]
fn expected_attention_at_half_finds_the_passkey() {
    let trials = from_environment("KVHOOK_PASSKEYS", PASSKEYS);
    let arms: Vec<Arm> = arms().into_iter().filter(|(name, ..)| *name == "expected-50").collect();
    let mut runner = runner(&arms);
    let mut found = 0;
    for trial in 0..trials {
        let tokens = text(TEXTS[trial % TEXTS.len()]);
        let start = 3_000 + 9_000 * (trial / TEXTS.len() % 8);
        let filler = runner.model().tokenizer.decode(&tokens[start..start + T + 64]).unwrap();
        let depth = (trial as f64 + 0.5) / trials as f64;
        let key = 10_007 + 14_983 * (trial as u32 % 6);
        let passkey = Passkey::new(&runner.model().tokenizer, &filler, key, depth, T).unwrap();
        let answer = answer(&mut runner, &passkey.prompt, &passkey.question, "expected-50");
        println!("depth {depth:.2}: {key}, answered {answer:?}");
        found += usize::from(answer.contains(&passkey.key));
    }
    println!("found {found} of {trials}");
    assert!(found * 6 >= trials * 5, "found {found} of {trials}");
}
