//! A scorer through the C tables, with a host of the same age and with a newer one.

#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test may panic; its unsafe calls are the host's side"
)]

mod mock;

use kvhook_abi::export::{Static, Tables};
use kvhook_abi::raw::*;
use kvhook_abi::scorer::Scored;
use kvhook_abi::{Can, CreateContext, LayerView, NoConfig, PluginError, Scorer};
use mock::*;
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

static FIRST: Static<KvhPluginEntry> = Tables::<Scored<First>>::entry();
static LAST_QUERY: Static<KvhPluginEntry> = Tables::<Scored<LastQuery>>::entry();

/// A score that repeats, so that ties matter.
fn score(head: usize, token: usize) -> f32 {
    ((token * 7 + head * 3) % 11) as f32 - 5.0
}

fn cache(length: usize, block_size: usize) -> Cache {
    Cache::new(2, length, 4, block_size, |head, token, channel| {
        (token as f32, if channel == 0 { score(head, token) } else { f32::MAX })
    })
}

/// The rows that should stay, by sorting everything: protected first, then the score, then the lower index.
fn expected(head: usize, length: usize, count: usize, sinks: usize, recent: usize) -> Vec<u64> {
    let mut rows: Vec<usize> = (0..length).collect();
    let protected = |row: usize| row < sinks || row + recent >= length;
    rows.sort_by(|a, b| {
        protected(*b).cmp(&protected(*a)).then(score(head, *b).total_cmp(&score(head, *a))).then(a.cmp(b))
    });
    rows.truncate(count);
    rows.sort_unstable();
    rows.into_iter().map(|row| row as u64).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn keeps_what_a_full_sort_keeps(
        length in 1usize..60,
        budget in 1usize..60,
        sinks in 0usize..6,
        recent in 0usize..10,
        block_size in prop_oneof![Just(0usize), Just(4), Just(16)],
        // A newer host: its structs and strides are larger than the plugin's.
        extra in prop_oneof![Just(0usize), Just(24)],
    ) {
        let host = MockHost::default();
        let model = Model::new(extra, 3, 2, 4, 4);
        let config = format!("budget={budget},sinks={sinks},recent={recent}");
        let loaded = Loaded::new(FIRST.get(), &host, &model, config.as_bytes()).unwrap();
        let count = budget.max(sinks + recent).min(length);
        let caches = [cache(length, block_size), cache(length, block_size), cache(length, block_size)];
        let layers = caches.iter().zip(0..).map(|(cache, index)| cache.layer(index)).collect();
        let (bound, _) = loaded.bound(&[length as u64; 3], NO_SEGMENTS, length as u64).unwrap();
        prop_assert_eq!(bound, vec![count as u64; 3]);
        let made = prepare(&loaded, extra, 1, layers, NO_SEGMENTS, length as u64).unwrap();
        if count == length {
            prop_assert_eq!((made.kind, made.reason), (KVH_PLAN_KEEP, KVH_REASON_NO_GAIN));
        } else {
            prop_assert_eq!(made.kind, KVH_PLAN_SELECT);
            for kept in &made.kept {
                for (head, kept) in kept.iter().enumerate() {
                    prop_assert_eq!(kept, &expected(head, length, count, sinks, recent));
                }
            }
        }
    }
}

#[test]
fn keep_is_a_fraction_of_the_tokens_seen() {
    let host = MockHost::default();
    let model = Model::new(0, 1, 2, 4, 4);
    let loaded = Loaded::new(FIRST.get(), &host, &model, b"keep=0.25,sinks=1,recent=1,every=8").unwrap();
    assert_eq!(loaded.bound(&[40], NO_SEGMENTS, 40), Ok((vec![10], KVH_REASON_NONE)));
    assert_eq!(loaded.bound(&[18], NO_SEGMENTS, 48), Ok((vec![12], KVH_REASON_NONE)), "compressed once before");
    assert_eq!(loaded.bound(&[10], NO_SEGMENTS, 40), Ok((vec![10], KVH_REASON_NO_GAIN)));
}

#[test]
fn short_sequences_are_kept() {
    let host = MockHost::default();
    let loaded = Loaded::new(FIRST.get(), &host, &Model::new(0, 1, 2, 4, 4), b"min_tokens=20,recent=1").unwrap();
    let cache = cache(19, 0);
    assert_eq!(loaded.bound(&[19], NO_SEGMENTS, 19), Ok((vec![19], KVH_REASON_TOO_SHORT)));
    let made = prepare(&loaded, 0, 1, vec![cache.layer(0)], NO_SEGMENTS, 19).unwrap();
    assert_eq!((made.kind, made.reason), (KVH_PLAN_KEEP, KVH_REASON_TOO_SHORT));
}

#[test]
fn images_stay_whole_when_only_text_is_compressed() {
    let host = MockHost::default();
    let config = b"budget=10,sinks=1,recent=2,segments=text";
    let loaded = Loaded::new(FIRST.get(), &host, &Model::new(0, 1, 2, 4, 4), config).unwrap();
    let segment = KvhSegment { kind: KVH_SEGMENT_IMAGE, reserved0: 0, start: 5, length: 9 };
    let segments = Array::new(0, vec![segment]);
    let (bound, _) = loaded.bound(&[40], segments.raw(), 40).unwrap();
    assert_eq!(bound, [12], "9 of the image, 1 sink, 2 recent");
    let cache = cache(40, 0);
    let made = prepare(&loaded, 0, 1, vec![cache.layer(0)], segments.raw(), 40).unwrap();
    let protected: Vec<u64> = [0].into_iter().chain(5..14).chain(38..40).collect();
    assert_eq!(made.kept[0], [protected.clone(), protected]);
}

#[test]
fn layers_of_other_kinds_stay_whole() {
    let host = MockHost::default();
    let mut model = Model::new(0, 2, 2, 4, 4);
    model.layer_mut(0).kind = KVH_LAYER_SLIDING_WINDOW;
    let loaded = Loaded::new(FIRST.get(), &host, &model, b"budget=8,sinks=1,recent=1").unwrap();
    let (window, full) = (cache(16, 0), cache(40, 0));
    assert_eq!(loaded.bound(&[16, 40], NO_SEGMENTS, 40).unwrap().0, [16, 8]);
    let layers = vec![KvhLayer { kind: KVH_LAYER_SLIDING_WINDOW, ..window.layer(0) }, full.layer(1)];
    let made = prepare(&loaded, 0, 1, layers, NO_SEGMENTS, 40).unwrap();
    assert_eq!(made.kept[0][1], (0..16).collect::<Vec<u64>>());
    assert_eq!(made.kept[1][1], expected(1, 40, 8, 1, 1));
}

#[test]
fn the_last_queries_are_handed_over() {
    let host = MockHost::default();
    let loaded =
        Loaded::new(LAST_QUERY.get(), &host, &Model::new(0, 1, 2, 4, 4), b"budget=4,sinks=0,recent=0").unwrap();
    // K of token t is (t, -t, 0, 0): the query's first two channels decide which end is kept.
    let cache = Cache::new(2, 12, 4, 0, |_, token, channel| {
        let sign = [1.0, -1.0, 0.0, 0.0][channel];
        (sign * token as f32, 0.0)
    });
    let plan = || prepare(&loaded, 0, 7, vec![cache.layer(0)], NO_SEGMENTS, 12);
    assert_eq!(plan().unwrap().reason, KVH_REASON_QUERIES_MISSING);
    // 12 tokens in two chunks whose boundary lies inside the window; query heads 0 and 1 belong to KV head 0.
    let query = |token: usize| -> Vec<f32> {
        let last = if token == 11 { 1.0 } else { -1.0 };
        [[last, 0.0, 0.0, 0.0], [9.0; 4], [0.0, last, 0.0, 0.0], [9.0; 4]].concat()
    };
    let chunk = |tokens: std::ops::Range<usize>| tokens.flat_map(query).collect::<Vec<f32>>();
    assert_eq!(observe(&loaded, 0, 7, 0, 12, 4, &chunk(0..11)).0, KVH_OK);
    assert_eq!(plan().unwrap().reason, KVH_REASON_QUERIES_MISSING, "one of two queries was seen");
    assert_eq!(observe(&loaded, 0, 7, 11, 12, 4, &chunk(11..12)).0, KVH_OK);
    let made = plan().unwrap();
    // The last two entries belong to the window; the others are chosen by the last query.
    assert_eq!(made.kept[0], [vec![8, 9, 10, 11], vec![0, 1, 10, 11]]);
    assert_eq!(loaded.free(7).0, KVH_OK);
    assert_eq!(plan().unwrap().reason, KVH_REASON_QUERIES_MISSING, "dropped at on_free");
}

#[test]
fn needs_follow_the_config() {
    let host = MockHost::default();
    let mut model = Model::new(0, 70, 2, 4, 4);
    model.layer_mut(65).kind = KVH_LAYER_LINEAR;
    let loaded = Loaded::new(LAST_QUERY.get(), &host, &model, b"every=16,min_tokens=9").unwrap();
    let mut mask = [u64::MAX; 2];
    let mut needs = KvhNeeds {
        struct_size: size_of::<KvhNeeds>(),
        layer_mask: mask.as_mut_ptr(),
        layer_mask_words: 2,
        ..unsafe { core::mem::zeroed() }
    };
    let mut error = Message::new();
    let status = unsafe { loaded.entry.needs.unwrap()(loaded.instance, &raw mut needs, error.raw()) };
    assert_eq!((status, error.text()), (KVH_OK, ""));
    assert_eq!(needs.must, (Can::QUERIES.and(Can::STATE).and(Can::GROWN)).0);
    assert_eq!((needs.window_queries, needs.grown_every, needs.min_tokens), (2, 16, 9));
    assert_eq!(needs.before_attention_phases, KVH_PHASE_PREFILL | KVH_PHASE_DECODE);
    assert_eq!(mask, [u64::MAX, 0b11_1101]);
    needs.layer_mask_words = 1;
    let status = unsafe { loaded.entry.needs.unwrap()(loaded.instance, &raw mut needs, error.raw()) };
    assert_eq!(status, KVH_ERR_INVALID_ARGUMENT);
    assert!(error.text().contains("layer_mask"), "{}", error.text());
}

#[test]
fn a_failure_keeps_its_sequence_and_says_why() {
    let host = MockHost::default();
    let model = Model::new(0, 1, 2, 4, 4);
    let loaded = Loaded::new(FIRST.get(), &host, &model, b"budget=8,recent=1").unwrap();
    let mut broken = cache(40, 0);
    let plan = |cache: &Cache| prepare(&loaded, 0, 1, vec![cache.layer(0)], NO_SEGMENTS, 40);
    broken.v[40 * 4 + 9 * 4] = f32::NAN;
    let kept = |made: Made, reason: i32, words: &[&str]| {
        assert_eq!((made.kind, made.reason), (KVH_PLAN_KEEP, reason), "{}", made.message);
        assert!(words.iter().all(|word| made.message.contains(word)), "{}", made.message);
    };
    kept(plan(&broken).unwrap(), KVH_REASON_OTHER, &["layer 0, head 1", "token 9", "NaN"]);

    let odd = KvhDtype { code: 17, bits: 8, lanes: 1 };
    let good = cache(40, 0);
    let mut layer = good.layer(0);
    layer.v.dtype = odd;
    let made = prepare(&loaded, 0, 1, vec![layer], NO_SEGMENTS, 40).unwrap();
    kept(made, KVH_REASON_UNSUPPORTED, &["code 17 with 8 bits"]);

    host.refuse_memory.store(true, std::sync::atomic::Ordering::Relaxed);
    kept(plan(&good).unwrap(), KVH_REASON_OTHER, &["the pool is empty"]);
    host.refuse_memory.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(plan(&good).unwrap().kind, KVH_PLAN_SELECT, "an error does not poison");
}

#[test]
fn both_ways_to_say_how_much_are_refused() {
    let host = MockHost::default();
    let both = Loaded::new(FIRST.get(), &host, &Model::new(0, 1, 2, 4, 4), b"keep=0.5,budget=9").err().unwrap();
    assert_eq!(both.0, KVH_ERR_CONFIG);
    assert!(both.1.contains("`keep`") && both.1.contains("`budget`"), "{}", both.1);
}
