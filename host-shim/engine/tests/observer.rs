//! What an observer on a rank's thread sees of each step.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::mpsc::{Sender, channel};

use common::{CONTIGUOUS, bits, model, novel, runner};
use kvhook_engine::rank::{HeadRows, LayerStep, StepObserver};
use kvhook_engine::{CacheConfig, Scoring};

struct Seen {
    rank: usize,
    layer: usize,
    thread: String,
    lengths: [usize; 3],
    cached: usize,
    first_position: u32,
    prompt_ends: bool,
}

fn elements(rows: HeadRows<'_>) -> usize {
    rows.rows * rows.heads * rows.head_dim
}

struct Reporter {
    rank: usize,
    to: Sender<Seen>,
}

impl StepObserver for Reporter {
    fn before_attention(&mut self, step: &LayerStep<'_>) {
        let sequence = &step.batch.sequences[0];
        let seen = Seen {
            rank: self.rank,
            layer: step.layer,
            thread: std::thread::current().name().unwrap().to_owned(),
            lengths: [step.q, step.k, step.v].map(elements),
            cached: sequence.layers[step.layer].len,
            first_position: sequence.first_position,
            prompt_ends: sequence.prompt_ends,
        };
        self.to.send(seen).unwrap();
    }
}

#[test]
fn sees_every_layer_of_every_step_on_its_own_rank_and_changes_nothing() {
    let tokens = novel(0, 50);
    let config = CacheConfig { ranks: 3, ..CONTIGUOUS };
    let run = |observed: bool| {
        let mut runner = runner(config);
        let (to, seen) = channel();
        if observed {
            let set = move |rank: &mut kvhook_engine::rank::RankState| {
                rank.observer = Some(Box::new(Reporter { rank: rank.rank, to: to.clone() }));
            };
            runner.ranks().run(set).unwrap();
        }
        let (id, _) = runner.prefill(&tokens[..48], 32).unwrap();
        let rows = runner.score(id, &tokens[48..], Scoring::OneByOne).unwrap();
        drop(runner);
        (bits(&rows), seen.try_iter().collect::<Vec<_>>())
    };
    let (plain, none) = run(false);
    let (observed, seen) = run(true);
    assert!(none.is_empty() && plain == observed);
    for rank in 0..3 {
        let mut of_rank = seen.iter().filter(|seen| seen.rank == rank);
        for (rows, cached, prompt_ends) in [(32, 0, false), (16, 32, true), (1, 48, false), (1, 49, false)] {
            for layer in 0..model().config.layers {
                let seen = of_rank.next().unwrap();
                assert_eq!((seen.layer, seen.cached, seen.prompt_ends), (layer, cached, prompt_ends));
                assert_eq!(seen.first_position as usize, cached);
                assert_eq!(seen.lengths, [rows * 3 * 64, rows * 64, rows * 64]);
                assert_eq!(seen.thread, format!("rank {rank}"));
            }
        }
        assert!(of_rank.next().is_none());
    }
}
