//! `lagkv`, which is written in C: built by its own Makefile, loaded with dlopen.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use kvhook_abi::raw::{KvhPluginEntry, KvhPluginEntryFn};
use kvhook_e2e::plugins::Place;
use kvhook_testing::conformance::{RULES, Subject};
use kvhook_testing::{Dtype, Engine, Form, Layer, PerHead, Sequence, Shape};
use safetensors::SafeTensors;

const SINKS: usize = 4;

/// Builds the library into the folder that plugins may come from, and runs the tests that come with it.
pub fn build(place: &Place) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/lagkv");
    let mut make = Command::new("make");
    make.arg("-C").arg(folder).arg(format!("OUT={}", place.plugins().display())).arg("test");
    let output = make.output().unwrap_or_else(|error| panic!("{make:?}: {error}"));
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", said(&output.stdout), said(&output.stderr));
    assert!(said(&output.stdout).contains("all tests passed"), "{}", said(&output.stdout));
}

/// The entry of the library, which stays loaded.
fn entry() -> &'static KvhPluginEntry {
    static LIBRARY: OnceLock<libloading::Library> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let place = Place::new();
        build(&place);
        // SAFETY: it has no initialisers.
        unsafe { libloading::Library::new(place.plugins().join("libkvhook_lagkv.so")) }.unwrap()
    });
    // SAFETY: the plugin's one symbol has this type, and gives a static.
    unsafe { &*library.get::<KvhPluginEntryFn>(b"kvh_plugin_entry_v1").unwrap()() }
}

#[test]
fn lagkv_keeps_every_rule() {
    for config in ["lag=8", "lag=16,keep=0.3,sinks=0", "{\"budget\": 30, \"lag\": 4}"] {
        let subject = Subject::new(entry(), config);
        // Rule 8 looks at the whole process, in which the model's tests run beside this one.
        for rule in RULES.iter().filter(|rule| rule.number != 8) {
            rule.check(&subject)
                .unwrap_or_else(|fault| panic!("`{config}` breaks rule {} ({}): {fault}", rule.number, rule.name));
        }
    }
}

#[test]
fn lagkv_keeps_what_pytorchs_scores_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/lagkv.safetensors");
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rows = |name: &str| -> PerHead {
        let tensor = tensors.tensor(name).unwrap();
        let flat: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let rows: Vec<Vec<f32>> = flat.chunks(tensor.shape()[2]).map(<[f32]>::to_vec).collect();
        rows.chunks(tensor.shape()[1]).map(<[Vec<f32>]>::to_vec).collect()
    };
    let (k, v) = (rows("k"), rows("v"));
    let (heads, tokens) = (k.len(), k[0].len());
    let engine = Engine::new(Shape::new(1, heads, heads, k[0][0].len()));
    for lag in [8, 16, 31, 73] {
        let scores = tensors.tensor(&lag.to_string()).unwrap();
        let scores: Vec<f64> = scores.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        let blocks = scores.len() / heads / lag;
        let tail = tokens - blocks * lag - SINKS;
        for chosen in [1, blocks, blocks * lag / 3, blocks * lag - 1] {
            let config = format!("lag={lag},budget={}", SINKS + chosen + tail);
            let mut instance = engine.create(entry(), config).unwrap();
            for (uid, (dtype, form)) in [
                (Dtype::F32, Form::HeadMajor),
                (Dtype::F16, Form::TokenMajor),
                (Dtype::Bf16, Form::Paged { block: 16 }),
                (Dtype::F32, Form::Paged { block: 16 }),
            ]
            .into_iter()
            .enumerate()
            {
                let prompt = Sequence::new(uid as u64 + 1, vec![Layer::new(k.clone(), v.clone(), dtype, form)]);
                let answer = instance.plan_one(&prompt).unwrap();
                for (head, kept) in answer.select()[0].rows.iter().enumerate() {
                    let expected = expected(&scores[head * blocks * lag..][..blocks * lag], lag, chosen, tokens);
                    assert_eq!(*kept, expected, "lag {lag}, {chosen} chosen, head {head}");
                }
            }
        }
    }
}

/// Sinks, of each block the rows with the highest scores, and all behind the blocks. No two of the scores are so near to
/// each other that rounding could exchange them.
fn expected(scores: &[f64], lag: usize, chosen: usize, tokens: usize) -> Vec<u32> {
    let blocks = scores.len() / lag;
    let mut kept: Vec<usize> = (0..SINKS).chain(SINKS + scores.len()..tokens).collect();
    for (block, scores) in scores.chunks(lag).enumerate() {
        let mut order: Vec<usize> = (0..lag).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let near = |pair: &[usize]| scores[pair[0]] - scores[pair[1]] < 1e-12;
        assert!(!order.windows(2).any(near), "block {block} has scores that are equal");
        // Rows are dealt out to the blocks in turn.
        let share = (0..chosen).filter(|row| row % blocks == block).count();
        kept.extend(order[..share].iter().map(|row| SINKS + block * lag + row));
    }
    kept.sort_unstable();
    kept.into_iter().map(|row| row as u32).collect()
}

#[test]
fn lagkv_refuses_elements_that_it_does_not_read() {
    let mut engine = Engine::new(Shape::new(1, 1, 1, 16));
    engine.cache_dtype.bits = 8;
    let refusal = engine.create(entry(), "").err().unwrap().to_string();
    assert!(refusal.contains("of 8 bits"), "{refusal}");
}
