//! The passkey prompt on the real model, and what its quality measures say about a lost prefix.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CONTIGUOUS, model, novel, runner, shared_file};
use kvhook_engine::quality::{Passkey, argmax, mean_kl, nll, perplexity, recovered_context};
use kvhook_engine::{Error, Runner, Scoring, SequenceId};

fn write(runner: &mut Runner, id: SequenceId, question: &[u32], tokens: usize) -> String {
    let mut next = argmax(&runner.score(id, question, Scoring::Together).unwrap()[question.len() - 1]);
    let mut answer = vec![next];
    while answer.len() < tokens {
        next = argmax(&runner.score(id, &[next], Scoring::OneByOne).unwrap()[0]);
        answer.push(next);
    }
    model().tokenizer.decode(&answer).unwrap()
}

#[test]
fn the_full_cache_finds_the_key_and_a_prompt_without_it_does_not() {
    let (tokenizer, filler) = (&model().tokenizer, shared_file("text/state-of-the-union.txt"));
    for (key, depth) in [(71_432, 0.0), (90_613, 0.5), (28_575, 1.0)] {
        let passkey = Passkey::new(tokenizer, &filler, key, depth, 300).unwrap();
        assert_eq!(passkey.prompt.len(), 300);
        let hidden = tokenizer.decode(&passkey.prompt[passkey.needle.clone()]).unwrap();
        assert_eq!(hidden.matches(&key.to_string()).count(), 2);
        let mut runner = runner(CONTIGUOUS);
        let (id, _) = runner.prefill(&passkey.prompt, 512).unwrap();
        let answer = write(&mut runner, id, &passkey.question, 8);
        assert!(passkey.found_in(&answer), "{key} at {depth}: {answer}");
        let rest = [&passkey.prompt[..passkey.needle.start], &passkey.prompt[passkey.needle.end..]].concat();
        let (id, _) = runner.prefill(&rest, 512).unwrap();
        assert!(!passkey.found_in(&write(&mut runner, id, &passkey.question, 8)));
    }
    let short = Passkey::new(tokenizer, "too short", 12_345, 0.5, 300);
    assert!(matches!(short, Err(Error::Config { setting: "passkey length", .. })));
}

#[test]
fn a_lost_prefix_costs_what_the_measures_say() {
    let tokens = novel(14_000, 401);
    let (fed, targets) = (&tokens[300..400], &tokens[301..]);
    let mut runner = runner(CONTIGUOUS);
    let mut rows = |prefix: &[u32]| {
        let (id, _) = runner.prefill(prefix, 512).unwrap();
        runner.score(id, fed, Scoring::Together).unwrap()
    };
    let (full, lost, half) = (rows(&tokens[..300]), rows(&tokens[299..300]), rows(&tokens[150..300]));
    let losses = [&full, &half, &lost].map(|rows| nll(rows, targets));
    assert!(losses[0] < losses[1] && losses[1] < losses[2], "{losses:?}");
    assert!((5.0..100.0).contains(&perplexity(losses[0])), "{losses:?}");
    assert!(mean_kl(&full, &lost) > mean_kl(&full, &half) && mean_kl(&full, &half) > 0.01);
    let recovered = recovered_context(losses[1], losses[0], losses[2]);
    assert!(recovered > 0.0 && recovered < 1.0, "{recovered}");
}
