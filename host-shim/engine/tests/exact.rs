//! Same in, same out: logits are the same bits whatever the cache, the ranks, the chunks and the batch.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CONTIGUOUS, bits, novel, paged, runner};
use kvhook_engine::cache::CacheKind;
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, Work};
use kvhook_engine::{CacheConfig, Error, KvDtype, Runner, Scoring, SequenceId};

const PROMPT: usize = 150;
const ANSWER: usize = 6;

/// Logits behind the prompt and behind each of the next tokens.
fn answer(config: CacheConfig, chunk: usize, scoring: Scoring, start: usize) -> Vec<Vec<u32>> {
    let mut runner = runner(config);
    let tokens = novel(start, PROMPT + ANSWER);
    let (id, last) = runner.prefill(&tokens[..PROMPT], chunk).unwrap();
    let mut rows = vec![last];
    rows.extend(runner.score(id, &tokens[PROMPT..], scoring).unwrap());
    bits(&rows)
}

#[test]
fn cache_kind_ranks_and_chunks_do_not_change_a_bit() {
    for dtype in [KvDtype::F32, KvDtype::F16] {
        let with = |config: CacheConfig, ranks: usize| CacheConfig { dtype, ranks, ..config };
        let expected = answer(with(CONTIGUOUS, 1), PROMPT, Scoring::OneByOne, 0);
        let variants = [
            (with(CONTIGUOUS, 1), 37, Scoring::Together),
            (with(CONTIGUOUS, 3), 64, Scoring::OneByOne),
            (with(paged(16, 20), 1), PROMPT, Scoring::OneByOne),
            (with(paged(7, 30), 3), 49, Scoring::Together),
            (with(paged(16, 20), 5), 100, Scoring::Together),
            (with(paged(32, 20), 2), 5, Scoring::Together),
            (with(CONTIGUOUS, 9), 128, Scoring::Together),
        ];
        for (config, chunk, scoring) in variants {
            assert!(answer(config, chunk, scoring, 0) == expected, "{config:?}, chunk {chunk}, {scoring:?}");
        }
    }
    // The comparison can fail: another text gives other logits.
    assert!(answer(CONTIGUOUS, PROMPT, Scoring::Together, 1) != answer(CONTIGUOUS, PROMPT, Scoring::Together, 0));
}

#[test]
fn one_token_at_a_time_equals_the_whole_prompt() {
    let tokens = novel(2000, 40);
    let whole = runner(CONTIGUOUS).prefill(&tokens, 40).unwrap().1;
    let single = runner(paged(16, 4)).prefill(&tokens, 1).unwrap().1;
    assert!(bits(&[whole]) == bits(&[single]));
}

#[test]
fn alone_equals_in_any_batch() {
    for config in [CONTIGUOUS, CacheConfig { ranks: 3, ..paged(16, 64) }] {
        let starts = [(0, 90), (3000, 33), (5000, 1), (7000, 60)];
        let alone: Vec<_> = starts
            .iter()
            .map(|&(start, prompt)| {
                let mut runner = runner(config);
                let tokens = novel(start, prompt + 3);
                let (id, _) = runner.prefill(&tokens[..prompt], 512).unwrap();
                bits(&runner.score(id, &tokens[prompt..], Scoring::OneByOne).unwrap())
            })
            .collect();

        let mut runner = runner(config);
        let texts: Vec<_> = starts.iter().map(|&(start, prompt)| novel(start, prompt + 3)).collect();
        let ids: Vec<_> = texts.iter().map(|text| runner.begin(&text[..text.len() - 3], 0)).collect();
        let work = |index: usize, tokens, logits| {
            let (sequence, phase) = (ids[index], Phase::Decode);
            Work { sequence, tokens, phase, prompt_ends: false, logits }
        };
        // Three prompts in one step; the last one joins while the others decode.
        let prompts: Vec<_> = (0..3).map(|i| work(i, &texts[i][..starts[i].1], Logits::None)).collect();
        runner.step(&prompts).unwrap();
        let mut together = vec![Vec::new(); 4];
        for step in 0..3 {
            let mut works = Vec::new();
            if step == 0 {
                works.push(work(3, &texts[3][..starts[3].1], Logits::None));
            }
            for i in 0..3 {
                let at = starts[i].1 + step;
                works.push(work(i, &texts[i][at..=at], Logits::Last));
            }
            let mut rows = runner.step(&works).unwrap();
            for (i, row) in rows.drain(works.len() - 3..).enumerate() {
                together[i].extend(bits(&row));
            }
        }
        together[3] = bits(&runner.score(ids[3], &texts[3][starts[3].1..], Scoring::Together).unwrap());
        assert!(alone == together, "{config:?}");
    }
}

/// Drops rows 16..32 of every layer, and 48..64 of every third, as a commit of a select would.
fn drop_rows(runner: &mut Runner, id: SequenceId) {
    let dropped = |layer: usize| if layer.is_multiple_of(3) { vec![1, 3] } else { vec![1] };
    let before: Vec<usize> = runner.sequence(id).unwrap().layers.iter().map(|layer| layer.len).collect();
    if let CacheKind::Contiguous = runner.config().kind {
        let lens = before.clone();
        let freed = runner
            .ranks()
            .run(move |rank| {
                let kvhook_engine::cache::RankCache::Contiguous(cache) = &mut rank.cache else { return 0 };
                let mut freed = 0;
                for (layer, &len) in lens.iter().enumerate() {
                    let view = cache.layer(id, layer, len, len).unwrap();
                    let kept = (0..len).filter(|row| !dropped(layer).contains(&(row / 16)));
                    let head_dim = view.layout.head_dim;
                    for (to, from) in kept.enumerate() {
                        for head in 0..rank.shard.kv_heads.len() {
                            let place = |row| view.layout.row(&[], row, head);
                            for buffer in [&mut *view.k, &mut *view.v] {
                                let mut row = vec![0.0; head_dim];
                                buffer.read(place(from), &mut row);
                                buffer.write(place(to), &row);
                            }
                        }
                    }
                    freed += cache.shrink(id, layer, len - 16 * dropped(layer).len());
                }
                freed
            })
            .unwrap();
        assert!(freed.into_iter().all(|bytes| bytes > 0));
    }
    let usable = runner.usable_blocks();
    let (mut pool, sequence) = runner.parts_mut(id).unwrap();
    for (index, layer) in sequence.layers.iter_mut().enumerate() {
        for block in dropped(index).into_iter().rev() {
            if let Some(pool) = pool.as_deref_mut() {
                let block = layer.blocks.remove(block);
                assert_eq!(pool.release(index, &[block]), 1);
            }
            layer.len -= 16;
        }
    }
    sequence.compressed = true;
    assert_eq!(runner.usable_blocks(), usable.map(|blocks| blocks + 1));
}

#[test]
fn layers_of_different_length_go_on_at_the_same_position() {
    let tokens = novel(9000, 130);
    let mut results = Vec::new();
    let configs = [CONTIGUOUS, CacheConfig { prefix_sharing: false, ranks: 3, ..paged(16, 16) }];
    for config in configs {
        let mut runner = runner(config);
        let (id, _) = runner.prefill(&tokens[..100], 64).unwrap();
        let bytes = runner.cache_bytes().unwrap();
        drop_rows(&mut runner, id);
        if config.kind == CacheKind::Contiguous {
            assert!(runner.cache_bytes().unwrap() < bytes);
        }
        let rows = runner.score(id, &tokens[100..], Scoring::OneByOne).unwrap();
        let sequence = runner.sequence(id).unwrap();
        assert_eq!(sequence.next_position, 130);
        assert_eq!((sequence.layers[0].len, sequence.layers[1].len), (98, 114));
        assert!(!sequence.uniform());
        results.push(bits(&rows));
    }
    assert!(results[0] == results[1]);
    let mut full = runner(CONTIGUOUS);
    let (id, _) = full.prefill(&tokens[..100], 64).unwrap();
    assert!(bits(&full.score(id, &tokens[100..], Scoring::Together).unwrap()) != results[0]);
}

#[test]
fn a_step_that_cannot_run_changes_nothing() {
    let tokens = novel(0, 70);
    let mut runner = runner(paged(16, 4));
    let (id, _) = runner.prefill(&tokens[..60], 64).unwrap();
    let before = runner.sequence(id).unwrap().clone();
    let score = |runner: &mut Runner, tokens: &[u32]| runner.score(id, tokens, Scoring::Together);
    assert!(matches!(score(&mut runner, &tokens[60..]), Err(Error::OutOfBlocks { needed: 1, usable: 0, .. })));
    assert!(matches!(score(&mut runner, &[50_000]), Err(Error::UnknownToken { token: 50_000, vocab: 49_152 })));
    assert!(matches!(score(&mut runner, &vec![1; 8200]), Err(Error::ContextFull { context: 8192, .. })));
    assert!(matches!(runner.prefill(&[], 64), Err(Error::Empty { .. })));
    let work =
        Work { sequence: id, tokens: &tokens[..1], phase: Phase::Decode, prompt_ends: false, logits: Logits::Last };
    assert!(matches!(runner.step(&[work, work]), Err(Error::DuplicateSequence(_))));
    let after = runner.sequence(id).unwrap();
    assert_eq!((&before.layers, before.next_position), (&after.layers, after.next_position));
    runner.free(id).unwrap();
    assert!(matches!(runner.free(id), Err(Error::UnknownSequence(_))));
    assert_eq!(runner.usable_blocks(), Some(4));
    let ranks = |ranks| Runner::new(common::model(), CacheConfig { ranks, ..CONTIGUOUS });
    assert!(matches!(ranks(0), Err(Error::Config { setting: "ranks", .. })));
    assert!(matches!(ranks(10), Err(Error::Config { setting: "ranks", .. })));
}
