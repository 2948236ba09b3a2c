//! `top` and `sample`, through the C tables, against the papers' formulas.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

mod common;
#[path = "common/reference.rs"]
mod reference;

use common::*;
use kvhook_abi::raw::*;
use kvhook_testing::assertions::assert_top;
use kvhook_testing::*;

const SHAPE: Shape = Shape::new(2, 3, 9, 32);
const FORMS: [Form; 3] = [Form::HeadMajor, Form::TokenMajor, PAGED];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

fn sequence(uid: u64, seed: u64, tokens: usize, dtype: Dtype, form: Form) -> Sequence {
    let mut random = Random::new(seed);
    let layer = |_| Layer::random(SHAPE, tokens, dtype, form, &mut random);
    Sequence::new(uid, (0..SHAPE.layers).map(layer).collect())
}

fn queries(seed: u64, tokens: usize, dtype: Dtype) -> PerHead {
    let mut random = Random::new(seed);
    let mut value = || cache::round(dtype, 2.0 * random.float());
    (0..tokens).map(|_| (0..SHAPE.q_heads).map(|_| (0..SHAPE.head_dim).map(|_| value()).collect()).collect()).collect()
}

#[test]
fn top_keeps_the_best_rows_by_key_norm_and_key_diff() {
    for (word, score) in
        [("key_norm", reference::key_norm as fn(&Layer, usize) -> Vec<f64>), ("key_diff", reference::key_diff)]
    {
        let mut instance = made(&format!("history=top,importance={word},keep=0.3,recent=8"), SHAPE);
        for dtype in DTYPES {
            for form in FORMS {
                let (first, second) = (sequence(1, 7, 200, dtype, form), sequence(2, 8, 117, dtype, form));
                let both = [first, second];
                let answers = instance.plan(&both).unwrap();
                for (answer, sequence) in answers.iter().zip(&both) {
                    for (plan, layer) in answer.select().iter().zip(&sequence.layers) {
                        assert_eq!(plan.count, layer.tokens() * 3 / 10);
                        for (head, kept) in plan.rows.iter().enumerate() {
                            assert_top(&score(layer, head), kept, 4, 8, 1e-5);
                        }
                    }
                }
                assert_ne!(
                    answers[0].select()[0].rows[0],
                    answers[0].select()[0].rows[1],
                    "heads choose for themselves"
                );
            }
        }
    }
}

#[test]
fn attention_keeps_what_the_last_queries_look_at() {
    let (tokens, window) = (150, 24);
    for dtype in DTYPES {
        for form in FORMS {
            let config = format!("history=top,importance=attention,window={window},pool=5,budget=60,recent=8");
            let mut instance = made(&config, SHAPE);
            let shown: Vec<PerHead> =
                (0..SHAPE.layers as u64).map(|layer| queries(50 + layer, tokens, dtype)).collect();
            // Chunks of a prompt, one of which ends inside the window.
            for chunk in [0..70, 70..140, 140..150] {
                for (layer, queries) in shown.iter().enumerate() {
                    let part = seen(1, tokens as u64, chunk.start as u64, &queries[chunk.clone()]);
                    instance.see(layer, KVH_PHASE_PREFILL, &[part], dtype).unwrap();
                }
            }
            let one = [sequence(1, 9, tokens, dtype, form)];
            let answer = instance.plan(&one).unwrap().remove(0);
            for (index, (plan, layer)) in answer.select().iter().zip(&one[0].layers).enumerate() {
                assert_eq!(plan.count, 60);
                let last = shown[index][tokens - window..].to_vec();
                for (head, kept) in plan.rows.iter().enumerate() {
                    let scores = reference::attention(layer, head, &last, 5);
                    // The window is kept though `recent` is smaller.
                    assert_top(&scores, kept, 4, window, 1e-5);
                }
            }
        }
    }
}

/// Real keys share most of their direction, and attention goes to few of them.
#[test]
fn real_keys_and_queries_are_ranked_as_the_formulas_say() {
    let real = captured();
    for dtype in [Dtype::F32, Dtype::F16] {
        let one = [real.sequence(1, dtype, PAGED)];
        let plan = |importance: &str| {
            let mut instance = made(&format!("history=top,importance={importance},keep=0.25,recent=16"), real.shape);
            if importance.starts_with("attention") {
                for layer in 0..real.shape.layers {
                    instance.see(layer, KVH_PHASE_PREFILL, &[real.seen(1, layer)], dtype).unwrap();
                }
            }
            instance.plan(&one).unwrap().remove(0)
        };
        for (importance, plan) in ["key_norm", "key_diff", "attention,window=16,pool=7"].map(|word| (word, plan(word)))
        {
            for (index, (plan, layer)) in plan.select().iter().zip(&one[0].layers).enumerate() {
                assert_eq!(plan.count, real.tokens / 4);
                for (head, kept) in plan.rows.iter().enumerate() {
                    let scores = match importance {
                        "key_norm" => reference::key_norm(layer, head),
                        "key_diff" => reference::key_diff(layer, head),
                        _ => reference::attention(layer, head, &real.layers[index].queries, 7),
                    };
                    assert_top(&scores, kept, 4, 16, 1e-5);
                }
            }
        }
    }
}

#[test]
fn a_prompt_shorter_than_the_window_uses_all_its_queries() {
    let mut instance = made("history=top,importance=attention,window=64,budget=20", SHAPE);
    let shown = queries(3, 30, Dtype::F32);
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 30, 0, &shown)], Dtype::F32).unwrap();
    }
    let answer = instance.plan_one(&sequence(1, 4, 30, Dtype::F32, Form::HeadMajor)).unwrap();
    // Everything is recent: sinks and the 16 last rows.
    let expected: Vec<u32> = (0..4).chain(14..30).collect();
    assert!(answer.select().iter().flat_map(|layer| &layer.rows).all(|rows| *rows == expected));
}

#[test]
fn missing_queries_keep_the_sequence() {
    let missing = |answer: &Answer| matches!(answer, Answer::Keep { reason: KVH_REASON_QUERIES_MISSING, .. });
    let mut instance = made("history=top,importance=attention,window=16,keep=0.5", SHAPE);
    let fresh = || sequence(1, 4, 80, Dtype::F32, Form::HeadMajor);
    assert!(missing(&instance.plan_one(&fresh()).unwrap()), "nothing was seen");
    // A prefix hit: the last 10 queries only.
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 80, 70, &queries(3, 10, Dtype::F32))], Dtype::F32).unwrap();
    }
    let Answer::Keep { message, .. } = instance.plan_one(&fresh()).unwrap() else { panic!("ten queries are too few") };
    assert_eq!(message, "layer 0: 10 of the last 16 queries were seen");
    // One sequence without queries does not change the plan of one with them.
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(2, 80, 0, &queries(3, 80, Dtype::F32))], Dtype::F32).unwrap();
    }
    let alone = instance.plan_one(&sequence(2, 4, 80, Dtype::F32, Form::HeadMajor)).unwrap();
    let both = instance.plan(&[fresh(), sequence(2, 4, 80, Dtype::F32, Form::HeadMajor)]).unwrap();
    assert!(missing(&both[0]));
    assert_eq!(both[1], alone);
    assert_eq!(alone.select().len(), SHAPE.layers);
}

#[test]
fn freed_sequences_leave_nothing() {
    let mut instance = made("history=top,importance=attention,window=16,keep=0.5", SHAPE);
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 80, 0, &queries(3, 80, Dtype::F32))], Dtype::F32).unwrap();
    }
    let ring = 16 * SHAPE.q_heads * SHAPE.head_dim * 4;
    assert_eq!(instance.host().lent(KVH_MEMORY_SEQUENCE), SHAPE.layers * ring);
    instance.free(1).unwrap();
    let answer = instance.plan_one(&sequence(1, 4, 80, Dtype::F32, Form::HeadMajor)).unwrap();
    assert!(matches!(answer, Answer::Keep { reason: KVH_REASON_QUERIES_MISSING, .. }), "{answer:?}");
}

#[test]
fn a_long_answer_is_ranked_by_its_own_last_queries() {
    let window = 8;
    let config = "history=top,importance=attention,window=8,pool=3,budget=40,recent=4,every=20";
    let mut instance = made(config, SHAPE);
    let shown = queries(77, 120, Dtype::F32);
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 100, 0, &shown[..100])], Dtype::F32).unwrap();
        for position in 100..120 {
            instance
                .see(layer, KVH_PHASE_DECODE, &[seen(1, 100, position as u64, &shown[position..=position])], Dtype::F32)
                .unwrap();
        }
    }
    // 60 rows are left of 120 tokens: rows 0..40 stand for every second position up to 80, the rest for the last 20.
    let positions: Vec<u32> = (0..40).map(|row| 2 * row).chain(100..120).collect();
    let mut random = Random::new(5);
    let layers = (0..SHAPE.layers)
        .map(|_| {
            Layer::random(SHAPE, 60, Dtype::F32, PAGED, &mut random)
                .with_positions(vec![positions.clone(); SHAPE.kv_heads])
        })
        .collect();
    let one = [Sequence { epoch: 1, next_position: 120, prompt_length: 100, ..Sequence::new(1, layers) }];
    let answer = instance.prepare(&one, Event::Grown).unwrap().remove(0);
    for (plan, layer) in answer.select().iter().zip(&one[0].layers) {
        assert_eq!(plan.count, 40);
        for (head, kept) in plan.rows.iter().enumerate() {
            let scores = reference::attention(layer, head, &shown[120 - window..].to_vec(), 3);
            assert_top(&scores, kept, 4, window, 1e-5);
        }
    }
}

#[test]
fn rows_that_were_dropped_near_the_end_shorten_the_window() {
    // A budget of the window's size: of the last 16 positions only 10 still have their rows.
    let config = "history=top,importance=attention,window=16,pool=1,budget=16,recent=2,every=10";
    let mut instance = made(config, SHAPE);
    let shown = queries(78, 60, Dtype::F32);
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 50, 0, &shown[..50])], Dtype::F32).unwrap();
        for position in 50..60 {
            let decoded = seen(1, 50, position as u64, &shown[position..=position]);
            instance.see(layer, KVH_PHASE_DECODE, &[decoded], Dtype::F32).unwrap();
        }
    }
    let positions: Vec<u32> = (0..16).map(|row| 3 * row).chain(50..60).collect();
    let mut random = Random::new(6);
    let layers = (0..SHAPE.layers)
        .map(|_| {
            Layer::random(SHAPE, 26, Dtype::F32, Form::HeadMajor, &mut random)
                .with_positions(vec![positions.clone(); SHAPE.kv_heads])
        })
        .collect();
    let one = [Sequence { epoch: 1, next_position: 60, prompt_length: 50, ..Sequence::new(1, layers) }];
    let answer = instance.prepare(&one, Event::Grown).unwrap().remove(0);
    for (plan, layer) in answer.select().iter().zip(&one[0].layers) {
        for (head, kept) in plan.rows.iter().enumerate() {
            // 4 sinks, the window's 10 rows, and the best two of the 12 between.
            let scores = reference::attention(layer, head, &shown[50..].to_vec(), 1);
            assert_top(&scores, kept, 4, 10, 1e-5);
        }
    }
}

#[test]
fn a_gap_in_what_was_seen_counts_as_missing() {
    let mut instance = made("history=top,importance=attention,window=16,keep=0.5", SHAPE);
    let shown = queries(3, 80, Dtype::F32);
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 80, 0, &shown[..70])], Dtype::F32).unwrap();
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 80, 72, &shown[72..])], Dtype::F32).unwrap();
    }
    let Answer::Keep { reason, message } = instance.plan_one(&sequence(1, 4, 80, Dtype::F32, Form::HeadMajor)).unwrap()
    else {
        panic!("two queries are missing")
    };
    assert_eq!(reason, KVH_REASON_QUERIES_MISSING);
    assert_eq!(message, "layer 0: 8 of the last 16 queries were seen");
}

#[test]
fn tokens_that_came_after_the_last_query_are_recent() {
    let mut instance = made("history=top,importance=attention,window=8,pool=1,budget=30,recent=4", SHAPE);
    let shown = queries(79, 60, Dtype::F32);
    for layer in 0..SHAPE.layers {
        instance.see(layer, KVH_PHASE_PREFILL, &[seen(1, 60, 0, &shown)], Dtype::F32).unwrap();
    }
    // Two tokens were decoded before the engine asked; their queries are not shown without `every`.
    let one = [Sequence { prompt_length: 60, ..sequence(1, 21, 62, Dtype::F32, Form::HeadMajor) }];
    let answer = instance.plan(&one).unwrap().remove(0);
    for (plan, layer) in answer.select().iter().zip(&one[0].layers) {
        for (head, kept) in plan.rows.iter().enumerate() {
            let mut prompt = of_keys(layer.keys.clone(), Form::HeadMajor);
            prompt.keys.iter_mut().for_each(|head| head.truncate(60));
            let mut scores = reference::attention(&prompt, head, &shown[52..].to_vec(), 1);
            scores.extend([f64::INFINITY; 2]);
            assert_top(&scores, kept, 4, 10, 1e-5);
        }
    }
}

#[test]
fn a_draw_depends_on_bytes_and_seed_only() {
    let config = |seed| format!("history=sample,importance=key_norm,keep=0.4,seed={seed}");
    let fresh = |uid, data| sequence(uid, data, 160, Dtype::F32, Form::HeadMajor);
    let mut instance = made(&config(1), SHAPE);
    let alone = instance.plan_one(&fresh(1, 30)).unwrap();
    let batch = instance.plan(&[fresh(5, 31), fresh(6, 30), fresh(7, 32)]).unwrap();
    assert_eq!(batch[1], alone, "in a batch, under another uid");
    assert_eq!(made(&config(1), SHAPE).plan_one(&fresh(1, 30)).unwrap(), alone, "another instance");
    let paged = instance.plan_one(&sequence(1, 30, 160, Dtype::F32, PAGED)).unwrap();
    assert_eq!(paged, alone, "another layout");
    assert_ne!(made(&config(2), SHAPE).plan_one(&fresh(1, 30)).unwrap(), alone, "another seed");
    let later = instance.plan_one(&Sequence { epoch: 1, ..fresh(1, 30) }).unwrap();
    assert_ne!(later, alone, "a later compression draws anew");
    // The rank that holds heads 2, 3, 4 draws for head 2 what the rank with 0, 1, 2 draws.
    let mut other = made(&config(1), SHAPE.part(2, 8));
    let mut shifted = fresh(1, 30);
    for layer in &mut shifted.layers {
        let keys = vec![layer.keys[2].clone(), layer.keys[0].clone(), layer.keys[1].clone()];
        *layer = of_keys(keys, Form::HeadMajor);
    }
    let answer = other.plan_one(&shifted).unwrap();
    assert_eq!(answer.select()[1].rows[0], alone.select()[1].rows[2]);
}

#[test]
fn a_draw_takes_rows_in_proportion_to_their_weights() {
    // One row of the history is drawn from 12; weights are 1 / norm, norms 1 to 12.
    let keys: Vec<Vec<f32>> = (0..12).map(|row| vec![(row + 1) as f32, 0.0]).collect();
    let shape = Shape::new(1, 1, 1, 2);
    let draws = 3000;
    let mut hits = [0u32; 12];
    for seed in 0..draws {
        let config = format!("history=sample,importance=key_norm,budget=1,sinks=0,recent=0,seed={seed}");
        let layer = of_keys(vec![keys.clone()], Form::HeadMajor);
        let answer = made(&config, shape).plan_one(&Sequence::new(1, vec![layer])).unwrap();
        hits[answer.select()[0].rows[0][0] as usize] += 1;
    }
    let total: f64 = (1..=12).map(|norm| 1.0 / f64::from(norm)).sum();
    let chi_squared: f64 = hits
        .iter()
        .enumerate()
        .map(|(row, hits)| {
            let expected = f64::from(draws as u32) / (row + 1) as f64 / total;
            (f64::from(*hits) - expected).powi(2) / expected
        })
        .sum();
    // 11 degrees of freedom: 31.3 is passed once in a thousand.
    assert!(chi_squared < 31.3, "{chi_squared}: {hits:?}");
}

#[test]
fn a_uniform_draw_keeps_guard_and_budget_and_differs_between_heads() {
    let mut instance = made("history=sample,importance=uniform,keep=0.5", SHAPE);
    let answer = instance.plan_one(&sequence(1, 3, 400, Dtype::F32, Form::HeadMajor)).unwrap();
    let guard: Vec<u32> = (0..4).chain(368..400).collect();
    for layer in answer.select() {
        for rows in &layer.rows {
            assert_eq!(rows.len(), 200);
            assert!(guard.iter().all(|row| rows.binary_search(row).is_ok()));
        }
        assert_ne!(layer.rows[0], layer.rows[1]);
    }
}

#[test]
fn a_key_that_is_not_a_number_stops_its_own_sequence_only() {
    let mut instance = made("history=top,importance=key_norm,keep=0.5", SHAPE);
    let good = || sequence(2, 12, 100, Dtype::F32, Form::HeadMajor);
    let alone = instance.plan_one(&good()).unwrap();
    let mut bad = sequence(1, 11, 100, Dtype::F32, Form::HeadMajor);
    let mut keys = bad.layers[1].keys.clone();
    keys[2][50][3] = f32::NAN;
    bad.layers[1] = of_keys(keys, Form::HeadMajor);
    let answers = instance.plan(&[bad, good()]).unwrap();
    let Answer::Keep { reason: KVH_REASON_OTHER, message } = &answers[0] else { panic!("{:?}", answers[0]) };
    assert!(message.starts_with("layer 1, KV head 2: ") && message.contains("50"), "{message}");
    assert_eq!(answers[1], alone);
}
