//! A scorer through the C tables, with a host of the same age and with a newer one.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;

use kvhook_abi::export::{Static, Tables};
use kvhook_abi::kernels::Rows;
use kvhook_abi::raw::*;
use kvhook_abi::scorer::Scored;
use kvhook_abi::{Can, CreateContext, LayerView, NoConfig, PluginError, Scorer, StepSequence};
use kvhook_testing::{Answer, Bounded, Dtype, Engine, Fault, Form, Instance, Layer, Message, Seen, Sequence, Shape};
use proptest::prelude::*;

/// Scores an entry by the first channel of its V.
struct First;

impl Scorer for First {
    type Config = NoConfig;
    const ID: &'static str = "first";
    const VERSION: &'static str = "1.0.0";

    fn create(_: &CreateContext<'_>, _: NoConfig) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn score(&self, layer: &LayerView<'_>, head: usize, scores: &mut [f32]) -> Result<(), PluginError> {
        let v = layer.v()?;
        let mut row = vec![0.0; v.head_dim()];
        for (token, score) in scores.iter_mut().enumerate() {
            v.load(token, head, &mut row)?;
            *score = row[0];
        }
        Ok(())
    }
}

/// Scores an entry by its key's product with the last query of the head's group.
struct LastQuery;

impl Scorer for LastQuery {
    type Config = NoConfig;
    const ID: &'static str = "last_query";
    const VERSION: &'static str = "1.0.0";
    const MAY_ASK_QUERIES: bool = true;

    fn create(_: &CreateContext<'_>, _: NoConfig) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn window_queries(&self) -> u32 {
        2
    }

    fn score(&self, layer: &LayerView<'_>, head: usize, scores: &mut [f32]) -> Result<(), PluginError> {
        let missing = || PluginError::Internal("no queries".into());
        let queries = layer.queries().ok_or_else(missing)?;
        let group = queries.q_heads() / layer.kv_heads();
        let query = queries.query(queries.tokens() - 1, head * group).ok_or_else(missing)?;
        let k = layer.k()?;
        let mut row = vec![0.0; k.head_dim()];
        for (token, score) in scores.iter_mut().enumerate() {
            k.load(token, head, &mut row)?;
            *score = row.iter().zip(query).map(|(k, q)| k * q).sum();
        }
        Ok(())
    }
}

/// Scores nothing unless it was shown every position once and in order.
#[derive(Default)]
struct All(HashMap<(u64, usize), Vec<u64>>);

impl Scorer for All {
    type Config = NoConfig;
    const ID: &'static str = "all";
    const VERSION: &'static str = "1.0.0";
    const SEES_QUERIES: bool = true;

    fn create(_: &CreateContext<'_>, _: NoConfig) -> Result<Self, PluginError> {
        Ok(Self::default())
    }

    fn see(&mut self, layer: usize, sequence: &StepSequence<'_>, queries: &Rows) -> Result<(), PluginError> {
        assert!(sequence.first_token + sequence.tokens <= queries.capacity());
        let end = sequence.first_position + sequence.tokens as u64;
        self.0.entry((sequence.uid, layer)).or_default().extend(sequence.first_position..end);
        Ok(())
    }

    fn forget(&mut self, uid: u64) {
        self.0.retain(|(of, _), _| *of != uid);
    }

    fn score(&self, layer: &LayerView<'_>, _: usize, scores: &mut [f32]) -> Result<(), PluginError> {
        let seen = layer.uid().and_then(|uid| self.0.get(&(uid, layer.index())));
        match seen {
            Some(seen) if seen.iter().copied().eq(0..layer.next_position()) => {
                scores.fill(0.0);
                Ok(())
            }
            other => Err(PluginError::Internal(format!("shown {other:?}"))),
        }
    }
}

static ALL: Static<KvhPluginEntry> = Tables::<Scored<All>>::entry();
static FIRST: Static<KvhPluginEntry> = Tables::<Scored<First>>::entry();
static LAST_QUERY: Static<KvhPluginEntry> = Tables::<Scored<LastQuery>>::entry();

/// A score that repeats, so that ties matter.
fn score(head: usize, token: usize) -> f32 {
    ((token * 7 + head * 3) % 11) as f32 - 5.0
}

const SHAPE: Shape = Shape::new(1, 2, 4, 4);

fn cache(length: usize, form: Form) -> Layer {
    let key = |token: usize| vec![token as f32; 4];
    let value = |head, token| vec![score(head, token), f32::MAX, f32::MAX, f32::MAX];
    let keys = vec![(0..length).map(key).collect(); 2];
    let values = (0..2).map(|head| (0..length).map(|token| value(head, token)).collect()).collect();
    Layer::new(keys, values, Dtype::F32, form)
}

/// A prompt of one layer.
fn prompt(length: usize) -> Sequence {
    Sequence::new(1, vec![cache(length, Form::HeadMajor)])
}

fn made(entry: &'static Static<KvhPluginEntry>, config: &str) -> Instance {
    Engine::new(SHAPE).create(entry.get(), config).unwrap()
}

/// The rows that should stay, by sorting everything: protected first, then the score, then the lower index.
fn expected(head: usize, length: usize, count: usize, sinks: usize, recent: usize) -> Vec<u32> {
    let mut rows: Vec<usize> = (0..length).collect();
    let protected = |row: usize| row < sinks || row + recent >= length;
    rows.sort_by(|a, b| {
        protected(*b).cmp(&protected(*a)).then(score(head, *b).total_cmp(&score(head, *a))).then(a.cmp(b))
    });
    rows.truncate(count);
    rows.sort_unstable();
    rows.into_iter().map(|row| row as u32).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn keeps_what_a_full_sort_keeps(
        length in 1usize..60,
        budget in 1usize..60,
        sinks in 0usize..6,
        recent in 0usize..10,
        form in prop_oneof![Just(Form::HeadMajor), Just(Form::Paged { block: 4 }), Just(Form::Paged { block: 16 })],
        // A newer host: its structs and strides are larger than the plugin's.
        extra in prop_oneof![Just(0usize), Just(24)],
    ) {
        let engine = Engine { extra, ..Engine::new(Shape { layers: 3, ..SHAPE }) };
        let config = format!("budget={budget},sinks={sinks},recent={recent}");
        let mut instance = engine.create(FIRST.get(), config).unwrap();
        let count = budget.max(sinks + recent).min(length);
        let prompt = Sequence::new(1, vec![cache(length, form); 3]);
        let bound = instance.bound(&prompt).unwrap();
        let answer = instance.plan_one(&prompt).unwrap();
        if count == length {
            prop_assert_eq!(bound, Bounded::Keep(KVH_REASON_NO_GAIN));
            prop_assert_eq!(answer.reason(), KVH_REASON_NO_GAIN);
        } else {
            prop_assert_eq!(bound, Bounded::Rows(vec![count as u64; 3]));
            for layer in answer.select() {
                for (head, kept) in layer.rows.iter().enumerate() {
                    prop_assert_eq!(kept, &expected(head, length, count, sinks, recent));
                }
            }
        }
    }
}

#[test]
fn keep_is_a_fraction_of_the_tokens_seen() {
    let mut instance = made(&FIRST, "keep=0.25,sinks=1,recent=1,every=8");
    assert_eq!(instance.bound(&prompt(40)), Ok(Bounded::Rows(vec![10])));
    let compressed = |rows, next_position| Sequence { next_position, ..prompt(rows) };
    assert_eq!(instance.bound(&compressed(18, 48)), Ok(Bounded::Rows(vec![12])), "compressed once before");
    assert_eq!(instance.bound(&compressed(10, 40)), Ok(Bounded::Keep(KVH_REASON_NO_GAIN)));
}

#[test]
fn short_sequences_are_kept() {
    let mut instance = made(&FIRST, "min_tokens=20,recent=1");
    assert_eq!(instance.bound(&prompt(19)), Ok(Bounded::Keep(KVH_REASON_TOO_SHORT)));
    assert_eq!(instance.plan_one(&prompt(19)).unwrap().reason(), KVH_REASON_TOO_SHORT);
}

#[test]
fn images_stay_whole_when_only_text_is_compressed() {
    let mut instance = made(&FIRST, "budget=10,sinks=1,recent=2,segments=text");
    let prompt = prompt(40).image(5, 9);
    assert_eq!(instance.bound(&prompt), Ok(Bounded::Rows(vec![12])), "9 of the image, 1 sink, 2 recent");
    let protected: Vec<u32> = [0].into_iter().chain(5..14).chain(38..40).collect();
    assert_eq!(instance.plan_one(&prompt).unwrap().select()[0].rows, [protected.clone(), protected]);
}

#[test]
fn layers_of_other_kinds_stay_whole() {
    let engine =
        Engine { kinds: vec![KVH_LAYER_SLIDING_WINDOW, KVH_LAYER_FULL], ..Engine::new(Shape { layers: 2, ..SHAPE }) };
    let mut instance = engine.create(FIRST.get(), "budget=8,sinks=1,recent=1").unwrap();
    let mut window = cache(16, Form::HeadMajor);
    window.kind = KVH_LAYER_SLIDING_WINDOW;
    let prompt = Sequence::new(1, vec![window, cache(40, Form::HeadMajor)]);
    assert_eq!(instance.bound(&prompt), Ok(Bounded::Rows(vec![16, 8])));
    let answer = instance.plan_one(&prompt).unwrap();
    assert_eq!(answer.select()[0].rows[1], (0..16).collect::<Vec<u32>>());
    assert_eq!(answer.select()[1].rows[1], expected(1, 40, 8, 1, 1));
}

#[test]
fn the_last_queries_are_handed_over() {
    let mut instance = made(&LAST_QUERY, "budget=4,sinks=0,recent=0");
    // K of token t is (t, -t, 0, 0): the query's first two channels decide which end is kept.
    let keys = vec![(0..12).map(|token| vec![token as f32, -(token as f32), 0.0, 0.0]).collect(); 2];
    let values = vec![vec![vec![0.0; 4]; 12]; 2];
    let prompt = Sequence::new(7, vec![Layer::new(keys, values, Dtype::F32, Form::HeadMajor)]);
    let reason = |instance: &mut Instance| instance.plan_one(&prompt).unwrap().reason();
    assert_eq!(reason(&mut instance), KVH_REASON_QUERIES_MISSING);
    // 12 tokens in two chunks whose boundary lies inside the window; query heads 0 and 1 belong to KV head 0.
    let query = |token: usize| {
        let last = if token == 11 { 1.0 } else { -1.0 };
        vec![vec![last, 0.0, 0.0, 0.0], vec![9.0; 4], vec![0.0, last, 0.0, 0.0], vec![9.0; 4]]
    };
    let see = |instance: &mut Instance, tokens: std::ops::Range<usize>| {
        let first_position = tokens.start as u64;
        let part = Seen { uid: 7, prompt_length: 12, first_position, queries: tokens.map(query).collect() };
        instance.see(0, KVH_PHASE_PREFILL, &[part], Dtype::F32).unwrap();
    };
    see(&mut instance, 0..11);
    assert_eq!(reason(&mut instance), KVH_REASON_QUERIES_MISSING, "one of two queries was seen");
    see(&mut instance, 11..12);
    // The last two entries belong to the window; the others are chosen by the last query.
    let answer = instance.plan_one(&prompt).unwrap();
    assert_eq!(answer.select()[0].rows, [vec![8, 9, 10, 11], vec![0, 1, 10, 11]]);
    instance.free(7).unwrap();
    assert_eq!(reason(&mut instance), KVH_REASON_QUERIES_MISSING, "dropped at on_free");
}

#[test]
fn needs_follow_the_config() {
    let mut kinds = vec![KVH_LAYER_FULL; 70];
    kinds[65] = KVH_LAYER_LINEAR;
    let engine = Engine { kinds, ..Engine::new(Shape { layers: 70, ..SHAPE }) };
    let mut instance = engine.create(LAST_QUERY.get(), "every=16,min_tokens=9").unwrap();
    let needs = instance.needs().unwrap();
    assert_eq!(needs.must, (Can::QUERIES.and(Can::STATE).and(Can::GROWN)).0);
    assert_eq!((needs.window_queries, needs.grown_every, needs.min_tokens), (2, 16, 9));
    assert_eq!(needs.phases, KVH_PHASE_PREFILL | KVH_PHASE_DECODE);
    assert_eq!(needs.layer_mask, [u64::MAX, 0b11_1101]);
    let mut word = u64::MAX;
    let mut short = KvhNeeds {
        struct_size: size_of::<KvhNeeds>(),
        must: 0,
        before_attention_phases: 0,
        window_queries: 0,
        grown_every: 0,
        min_tokens: 0,
        layer_mask: &raw mut word,
        layer_mask_words: 1,
    };
    let mut error = Message::new();
    // SAFETY: the instance lives, and so does all that is lent.
    let status = unsafe { instance.entry().needs.unwrap()(instance.raw(), &raw mut short, error.raw()) };
    assert_eq!(status, KVH_ERR_INVALID_ARGUMENT);
    assert!(error.read().unwrap().contains("layer_mask"), "{:?}", error.read());
}

#[test]
fn a_failure_keeps_its_sequence_and_says_why() {
    let mut instance = made(&FIRST, "budget=8,recent=1");
    let good = cache(40, Form::HeadMajor);
    let mut values = good.values.clone();
    values[1][9][0] = f32::NAN;
    let broken = Layer::new(good.keys.clone(), values, Dtype::F32, Form::HeadMajor);
    let kept = |instance: &mut Instance, layer: Layer, reason: i32, words: &[&str]| {
        let answer = instance.plan_one(&Sequence::new(1, vec![layer])).unwrap();
        let Answer::Keep { reason: found, message } = answer else { panic!("{answer:?}") };
        assert_eq!(found, reason, "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    kept(&mut instance, broken, KVH_REASON_OTHER, &["layer 0, head 1", "token 9", "NaN"]);

    let mut odd = good.clone();
    odd.v_dtype = KvhDtype { code: 17, bits: 8, lanes: 1 };
    kept(&mut instance, odd, KVH_REASON_UNSUPPORTED, &["code 17 with 8 bits"]);

    instance.host().refuse_memory(true);
    kept(&mut instance, good, KVH_REASON_OTHER, &["the pool is empty"]);
    instance.host().refuse_memory(false);
    assert_eq!(instance.plan_one(&prompt(40)).unwrap().select().len(), 1, "an error does not poison");
}

#[test]
fn both_ways_to_say_how_much_are_refused() {
    let fault = Engine::new(SHAPE).create(FIRST.get(), "keep=0.5,budget=9").err();
    let Some(Fault::Refused { status: KVH_ERR_CONFIG, message }) = fault else { panic!("{fault:?}") };
    assert!(message.contains("`keep`") && message.contains("`budget`"), "{message}");
}

#[test]
fn a_scorer_that_sees_queries_is_shown_each_position_once_and_in_order() {
    let shape = Shape { layers: 2, ..SHAPE };
    let mut instance = Engine::new(shape).create(ALL.get(), "budget=4,sinks=1,recent=1").unwrap();
    let needs = instance.needs().unwrap();
    assert_eq!((needs.window_queries, needs.phases), (u32::MAX, KVH_PHASE_PREFILL));
    assert_eq!(needs.must & KVH_CAN_ALL_QUERIES, KVH_CAN_ALL_QUERIES);
    let prompt = |uid| Sequence::new(uid, vec![cache(10, Form::HeadMajor); 2]);
    let mut plan = |uid, steps: &[(u64, u64)]| {
        for layer in 0..2 {
            for &(start, end) in steps {
                let queries = vec![vec![vec![0.5; 4]; 4]; (end - start) as usize];
                let part = |uid| Seen { uid, prompt_length: 10, first_position: start, queries: queries.clone() };
                // Another sequence before it, which is never finished.
                instance.see(layer, KVH_PHASE_PREFILL, &[part(99), part(uid)], Dtype::F32).unwrap();
            }
        }
        let answer = instance.plan_one(&prompt(uid)).unwrap();
        instance.free(uid).unwrap();
        (answer, instance.plan_one(&prompt(uid)).unwrap())
    };
    for (uid, steps) in [vec![(0, 10)], vec![(0, 3), (3, 4), (4, 10)], vec![(0, 3), (0, 3), (3, 10)]].iter().enumerate()
    {
        let (answer, freed) = plan(uid as u64 + 1, steps);
        assert_eq!(answer.select().len(), 2, "{steps:?}");
        assert_eq!(freed.reason(), KVH_REASON_QUERIES_MISSING, "{steps:?}");
    }
    for (uid, steps) in [vec![], vec![(4, 10)], vec![(0, 3), (4, 10)], vec![(0, 9)]].iter().enumerate() {
        let (answer, _) = plan(uid as u64 + 11, steps);
        assert_eq!(answer.reason(), KVH_REASON_QUERIES_MISSING, "{steps:?}");
    }
}
