//! Bounds, plans by place, segments, layers, config: through the C tables.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

mod common;

use common::*;
use kvhook_abi::raw::*;
use kvhook_testing::*;

const SHAPE: Shape = Shape::new(3, 2, 4, 8);

fn sequence(tokens: usize) -> Sequence {
    let mut random = Random::new(tokens as u64);
    let layer = |_| Layer::random(SHAPE, tokens, Dtype::F32, PAGED, &mut random);
    Sequence::new(1, (0..SHAPE.layers).map(layer).collect())
}

fn rows(config: &str, tokens: usize) -> Vec<u32> {
    let answer = made(config, SHAPE).plan_one(&sequence(tokens)).unwrap();
    let layers = answer.select();
    let first = &layers[0].rows[0];
    assert!(layers.iter().flat_map(|layer| &layer.rows).all(|rows| rows == first), "heads and layers agree");
    first.clone()
}

#[test]
fn streaming_is_sinks_and_recent_rows_as_ranges() {
    for (tokens, keep) in [(100, 25), (101, 25), (37, 9)] {
        let expected: Vec<u32> = (0..4).chain(tokens - keep + 4..tokens).collect();
        assert_eq!(rows("keep=0.25", tokens as usize), expected);
    }
    let answer = made("budget=40", SHAPE).plan_one(&sequence(100)).unwrap();
    assert!(answer.select().iter().all(|layer| layer.as_ranges && layer.count == 40));
    assert_eq!(rows("budget=3", 100), [0, 1, 2], "sinks go first");
    assert_eq!(rows("budget=6", 100), [0, 1, 2, 3, 98, 99]);
    assert_eq!(rows("keep=0.001", 100), [0], "never fewer than one");
    assert_eq!(rows("budget=2,sinks=0", 100), [98, 99]);
}

#[test]
fn an_empty_config_is_streaming_at_one_half() {
    let expected: Vec<u32> = (0..4).chain(54..100).collect();
    assert_eq!(rows("", 100), expected);
}

#[test]
fn a_stride_is_even_and_shared_by_heads() {
    let answer = made("history=stride,budget=46,recent=6", SHAPE).plan_one(&sequence(118)).unwrap();
    let layer = &answer.select()[0];
    assert!(layer.shared && !layer.as_ranges);
    // 108 rows of history, 36 places: the middle of every three.
    let expected: Vec<u32> = (0..4).chain((0..36).map(|place| 4 + 3 * place + 1)).chain(112..118).collect();
    assert_eq!(layer.rows, [expected.clone(), expected]);
}

#[test]
fn every_history_meets_its_bound_at_every_length() {
    // `plan` compares counts with the bound.
    for history in ["history=none", "history=stride", "history=top", "history=sample,importance=uniform"] {
        for amount in ["keep=0.3", "budget=50"] {
            for segments in ["text", "image", "both"] {
                let mut instance = made(&format!("{history},{amount},segments={segments}"), SHAPE);
                for tokens in [1, 2, 5, 36, 51, 90] {
                    let one = [sequence(tokens).image(10, 20).image(40, 5)];
                    let bound = instance.bound(&one[0]).unwrap();
                    let answer = instance.plan(&one).unwrap().remove(0);
                    assert_eq!(matches!(bound, Bounded::Keep(_)), matches!(answer, Answer::Keep { .. }));
                }
            }
        }
    }
}

#[test]
fn nothing_to_drop_is_said_before_data_is_read() {
    assert_eq!(made("budget=100", SHAPE).bound(&sequence(100)).unwrap(), Bounded::Keep(KVH_REASON_NO_GAIN));
    assert_eq!(made("keep=1", SHAPE).bound(&sequence(100)).unwrap(), Bounded::Keep(KVH_REASON_NO_GAIN));
    let mut instance = made("budget=10,min_tokens=101", SHAPE);
    assert_eq!(instance.bound(&sequence(100)).unwrap(), Bounded::Keep(KVH_REASON_TOO_SHORT));
    assert_eq!(instance.bound(&sequence(101)).unwrap(), Bounded::Rows(vec![10; 3]));
    assert_eq!(instance.needs().unwrap().min_tokens, 101);
    let answer = instance.plan_one(&sequence(100)).unwrap();
    assert_eq!(answer, Answer::Keep { reason: KVH_REASON_TOO_SHORT, message: String::new() });
}

#[test]
fn blocks_are_kept_whole_where_that_is_asked() {
    // 4 sinks touch block 0; the last 26 of 100 rows begin in block 4.
    let expected: Vec<u32> = (0..16).chain(64..100).collect();
    assert_eq!(rows("budget=30,align=block", 100), expected);
    let contiguous = Engine { block_size: 0, ..Engine::new(SHAPE) };
    let refused = create("budget=30,align=block", &contiguous).err().unwrap();
    assert_eq!(refused.0, KVH_ERR_CONFIG);
    assert!(refused.1.contains("contiguous"), "{}", refused.1);
}

/// What a host does: keeps the rows of a plan and their positions.
fn commit(sequence: &Sequence, answer: &Answer, grown: usize) -> Sequence {
    sequence.committed(answer, grown, &mut Random::new(99))
}

#[test]
fn images_stay_whole_through_many_compressions_of_text() {
    for history in ["none", "stride", "top"] {
        let mut instance = made(&format!("budget=50,recent=8,segments=text,every=30,history={history}"), SHAPE);
        let mut current = [sequence(120).image(20, 15)];
        for round in 0..4 {
            let answer = instance
                .prepare(&current, if round == 0 { Event::PrefillDone } else { Event::Grown })
                .unwrap()
                .remove(0);
            for (plan, layer) in answer.select().iter().zip(&current[0].layers) {
                assert_eq!(plan.count, 50 + 15);
                for (head, kept) in plan.rows.iter().enumerate() {
                    let position = |row: u32| match layer.positions.get(head) {
                        Some(positions) => positions.get(row as usize).copied(),
                        None => Some(row),
                    };
                    let images = kept.iter().filter(|row| position(**row).is_some_and(|p| (20..35).contains(&p)));
                    assert_eq!(images.count(), 15, "{history}, round {round}");
                    assert_eq!(kept[..4], [0, 1, 2, 3]);
                    assert_eq!(kept[57..], (layer.tokens() as u32 - 8..layer.tokens() as u32).collect::<Vec<_>>()[..]);
                }
            }
            current = [commit(&current[0], &answer, 30)];
        }
    }
}

#[test]
fn text_stays_whole_when_images_are_compressed() {
    let mut instance = made("keep=0.5,segments=image,history=stride", SHAPE);
    let answer = instance.plan_one(&sequence(100).image(10, 40)).unwrap();
    // The image's rows are far from sinks and recent ones: every second is kept.
    let expected: Vec<u32> = (0..10).chain((0..20).map(|place| 10 + 2 * place + 1)).chain(50..100).collect();
    assert_eq!(answer.select()[0].rows[0], expected);
    let bound = instance.bound(&sequence(100)).unwrap();
    assert_eq!(bound, Bounded::Keep(KVH_REASON_NO_GAIN), "no image, nothing to drop");
}

#[test]
fn rows_that_another_dropped_are_noticed() {
    let mut instance = made("budget=5,segments=text", SHAPE);
    let mut lost = sequence(30).image(0, 20);
    lost.next_position = 60;
    // 30 rows are left of 60 tokens, and every second position: not all 20 of the image's.
    for layer in &mut lost.layers {
        let positions = vec![(0..30).map(|row| 2 * row).collect(); SHAPE.kv_heads];
        *layer = of_keys(layer.keys.clone(), Form::HeadMajor).with_positions(positions);
    }
    let answer = instance.plan_one(&lost).unwrap();
    let Answer::Keep { reason: KVH_REASON_OTHER, message } = answer else { panic!("{answer:?}") };
    assert!(message.contains("segments=text"), "{message}");
}

#[test]
fn a_fraction_does_not_shrink_with_every_compression() {
    let mut instance = made("keep=0.25,every=40", SHAPE);
    let mut current = sequence(200);
    for round in 0..5u64 {
        let one = [current];
        let answer =
            instance.prepare(&one, if round == 0 { Event::PrefillDone } else { Event::Grown }).unwrap().remove(0);
        assert_eq!(answer.select()[0].count as u64, (200 + 40 * round) / 4);
        current = commit(&one[0], &answer, 40);
    }
}

#[test]
fn layers_may_have_fractions_of_their_own() {
    let config = r#"{"keep": 0.5, "layers": {"0": 1.0, "2-": 0.25}}"#;
    let mut instance = made(config, SHAPE);
    assert_eq!(instance.needs().unwrap().must, KVH_CAN_LAYER_COUNTS);
    assert_eq!(instance.bound(&sequence(100)).unwrap(), Bounded::Rows(vec![100, 50, 25]));
    let answer = instance.plan_one(&sequence(100)).unwrap();
    assert_eq!(answer.select()[0].rows[1], (0..100).collect::<Vec<_>>());
    let any = Engine::new(SHAPE);
    let equal = Engine { can: any.can & !KVH_CAN_LAYER_COUNTS, ..any };
    let (status, message) = create(config, &equal).err().unwrap();
    assert_eq!(status, KVH_ERR_UNSUPPORTED);
    assert!(message.contains("`layers`") && message.contains("layer_counts"), "{message}");
    let same = r#"layers={"0-2": 0.25}"#;
    let mut instance = create(same, &equal).ok().unwrap();
    assert_eq!(instance.needs().unwrap().must, 0, "one fraction for all needs nothing");
    assert_eq!(instance.bound(&sequence(100)).unwrap(), Bounded::Rows(vec![25; 3]));
}

#[test]
fn needs_follow_the_config() {
    let needs = |config: &str| made(config, SHAPE).needs().unwrap();
    let nothing =
        || Needs { must: 0, phases: 0, window_queries: 0, grown_every: 0, min_tokens: 0, layer_mask: vec![u64::MAX] };
    assert_eq!(needs("history=top"), nothing());
    assert_eq!(needs("every=64"), Needs { must: KVH_CAN_GROWN, grown_every: 64, ..nothing() });
    let attention = Needs {
        must: KVH_CAN_QUERIES | KVH_CAN_STATE,
        phases: KVH_PHASE_PREFILL,
        window_queries: 64,
        layer_mask: vec![0b111],
        ..nothing()
    };
    assert_eq!(needs("history=top,importance=attention"), attention);
    let long = needs("history=sample,importance=attention,window=32,every=64");
    assert_eq!(long.must, KVH_CAN_QUERIES | KVH_CAN_STATE | KVH_CAN_GROWN);
    assert_eq!((long.phases, long.window_queries), (KVH_PHASE_PREFILL | KVH_PHASE_DECODE, 32));
    let some = needs(r#"{"history": "top", "importance": "attention", "layers": {"1": 1.0}}"#);
    assert_eq!(some.layer_mask, [0b101], "layers that are kept whole show no queries");
}

#[test]
fn refused_memory_keeps_the_sequence() {
    for config in ["history=stride", "history=top"] {
        let mut instance = made(config, SHAPE);
        instance.host().refuse_memory(true);
        let answer = instance.plan_one(&sequence(100)).unwrap();
        let Answer::Keep { message, .. } = &answer else { panic!("{answer:?}") };
        assert!(message.contains("memory"), "{message}");
        instance.host().refuse_memory(false);
        assert_eq!(instance.plan_one(&sequence(100)).unwrap().select().len(), 3, "the next call works");
    }
}

#[test]
fn configs_that_say_nothing_useful_are_refused_with_the_reason() {
    for (config, parts) in [
        ("keep=0", ["`keep`", "above 0"]),
        ("keep=1.5", ["`keep`", "1.5"]),
        ("keep=0.5,budget=10", ["`budget`", "keep=0.5"]),
        ("budget=0", ["`budget`", "at least 1"]),
        ("history=best", ["`history`", "none, stride, top, sample"]),
        ("histroy=top", ["histroy", "did you mean `history`"]),
        ("importance=key_norm", ["`importance`", "history=top"]),
        ("history=top,importance=uniform", ["`importance`", "history=sample"]),
        ("history=top,window=8", ["`window`", "importance=attention"]),
        ("history=top,importance=key_norm,pool=3", ["`pool`", "importance=attention"]),
        ("history=top,importance=attention,pool=4", ["`pool`", "odd"]),
        ("history=top,seed=1", ["`seed`", "history=sample"]),
        ("history=stride,align=block", ["`align`", "history=none"]),
        ("segments=text,align=block", ["`align`", "segments=both"]),
        (r#"layers={"0-3": 0.5}"#, ["`layers`", "3 layers"]),
        (r#"layers={"0-1": 0.5, "1-": 0.25}"#, ["`layers`", "overlap"]),
        (r#"layers={"0": 0}"#, ["`layers`", "above 0"]),
        (r#"layers={"+1": 0.5}"#, ["`layers`", "ranges like"]),
        (r#"layers={"2-1": 0.5}"#, ["`layers`", "ranges like"]),
        ("segments=sound", ["`segments`", "text, image, both"]),
    ] {
        let Err((status, message)) = create(config, &Engine::new(SHAPE)) else { panic!("{config} is taken") };
        assert_eq!(status, KVH_ERR_CONFIG, "{config}: {message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{config}: {message}");
    }
}

/// DLPack's `kDLFloat8_e4m3fn`.
const FP8: KvhDtype = KvhDtype { code: 10, bits: 8, lanes: 1 };

#[test]
fn values_that_cannot_be_read_are_refused_where_scores_need_them() {
    let engine = Engine { cache_dtype: FP8, ..Engine::new(SHAPE) };
    let create = |config: &str| create(config, &engine);
    for config in ["keep=0.5", "history=stride", "history=sample,importance=uniform", "align=block"] {
        if let Err((status, message)) = create(config) {
            panic!("{config}: {status} {message}");
        }
    }
    for importance in ["key_norm", "key_diff", "attention"] {
        let (status, message) = create(&format!("history=top,importance={importance}")).err().unwrap();
        assert_eq!(status, KVH_ERR_UNSUPPORTED);
        assert!(message.contains("code 10 with 8 bits") && message.contains("f32, f16 and bf16"), "{message}");
    }
}
