//! The weights that ship with kvhook, on the model that they were trained for: rows against the formula in f64, which
//! is written apart from the kernel.

use std::path::{Path, PathBuf};

use kvhook_e2e::model::{CONTIGUOUS, bits, model, paged, plugins, runner, text};
use kvhook_e2e::plugins::Place;
use kvhook_engine::{Begin, CacheConfig, KvDtype, Runner};
use kvhook_mlp_weights::{OpenOptions, Pairing, Weights};

use super::model::{ANSWER, PROMPT, Run, Tensors, rows, run};

/// What f32 sums may lose, relative to the row's largest number; found are 1.5e-5. It is more than for random weights:
/// hidden values lie around 4 standard deviations of a channel, and the last layer takes that shift off again.
const SUMS: f64 = 3e-5;

fn file(factor: usize) -> PathBuf {
    let name = format!("../../plugins/mlp-decouple/trained/smollm2-135m-f{factor}.safetensors");
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn tokens() -> Vec<u32> {
    text("moby-dick.txt")[3_000..3_000 + PROMPT + ANSWER].to_vec()
}

/// The prompt's rows when nothing is compressed.
fn uncompressed(cache: CacheConfig, tokens: &[u32]) -> Tensors {
    let mut runner = runner(cache, &[], 0);
    let (id, _) = runner.prefill_on(&Begin::new(&tokens[..PROMPT]), 64).unwrap();
    rows(&runner, id, false)
}

/// A row of K in the order of Hugging Face, which the file is in. The cache has GGUF's.
fn half_split(row: &[f32]) -> Vec<f32> {
    let half = row.len() / 2;
    (0..row.len()).map(|channel| row[2 * (channel % half) + channel / half]).collect()
}

/// Compares every row with what the positions say that it stands for: one token's row as it was, or a group's MLP.
/// Gives the number of groups, or the first number that is wrong.
fn check(weights: &Weights, prompt: &Tensors, run: &Run, dtype: KvDtype) -> Result<usize, String> {
    let dim = weights.head_dim;
    assert_eq!(weights.terms.pairing, Pairing::HalfSplit);
    let rounding = if dtype == KvDtype::Bf16 { 2f64.powi(-8) } else { 0.0 };
    let mut groups = 0;
    for (tensor, heads) in run.rows.iter().enumerate() {
        let layer = &weights.layers[tensor / 2];
        let mlp = if tensor % 2 == 0 { &layer.text_k } else { &layer.text_v };
        let order = |row: &[f32]| if tensor % 2 == 0 { half_split(row) } else { row.to_vec() };
        for (head, rows) in heads.iter().enumerate() {
            assert_eq!(rows.len(), run.positions.len() * dim);
            let token = |position: usize| match position.checked_sub(PROMPT) {
                None => &prompt[tensor][head][position * dim..(position + 1) * dim],
                Some(place) => run.appended[place][tensor][head].as_slice(),
            };
            let mut next = 0;
            for (row, &last) in rows.chunks(dim).zip(&run.positions) {
                let last = last as usize;
                let what = format!("tensor {tensor}, head {head}, tokens {next} to {last}");
                if next == last {
                    assert_eq!(bits(row), bits(token(last)), "{what}");
                } else {
                    assert_eq!(last + 1 - next, weights.factor, "{what}");
                    let x: Vec<f32> = (next..=last).flat_map(|position| order(token(position))).collect();
                    let expected = mlp.apply_reference(&x);
                    let largest = expected.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
                    for (found, expected) in order(row).iter().zip(expected) {
                        let error = (f64::from(*found) - expected).abs();
                        if error > SUMS * largest + rounding * expected.abs() {
                            return Err(format!("{what}: {found}, {expected}"));
                        }
                    }
                    groups += 1;
                }
                next = last + 1;
            }
            assert_eq!(next, PROMPT + ANSWER);
        }
    }
    Ok(groups / run.rows.len() / run.rows[0].len())
}

#[test]
fn rows_are_those_of_the_formula_in_every_cache_and_while_it_grows() {
    let tokens = tokens();
    for factor in [2, 4] {
        let file = file(factor);
        let weights = Weights::open(&file, &OpenOptions::default()).unwrap();
        let config = format!("weights={},every=16", file.display());
        let whole = run(CONTIGUOUS, &config, &tokens);
        assert!(whole.commits >= 4, "{} commits", whole.commits);
        let prompt = uncompressed(CONTIGUOUS, &tokens);
        let groups = check(&weights, &prompt, &whole, CONTIGUOUS.dtype).unwrap();
        // 4 sinks and 32 recent tokens stay; the last compression was up to 16 tokens ago.
        assert!(groups >= (PROMPT + ANSWER - 4 - 32 - 16) / factor, "{groups}");
        let mut wrong = weights.clone();
        wrong.layers[17].text_v.w3[70] += 0.01;
        assert!(check(&wrong, &prompt, &whole, CONTIGUOUS.dtype).is_err(), "a wrong number is noticed");
        for cache in [CacheConfig { ranks: 3, ..CONTIGUOUS }, paged(8, 80), CacheConfig { ranks: 3, ..paged(8, 80) }] {
            let other = run(cache, &config, &tokens);
            assert_eq!((&other.positions, other.commits), (&whole.positions, whole.commits), "{cache:?}");
            let equal = |a: &[Vec<f32>], b: &[Vec<f32>]| a.iter().zip(b).all(|(a, b)| bits(a) == bits(b));
            assert!(equal(&whole.logits, &other.logits), "{cache:?}");
            assert!(whole.rows.iter().zip(&other.rows).all(|(a, b)| equal(a, b)), "{cache:?}");
        }
        // As the weights were measured.
        let bf16 = CacheConfig { dtype: KvDtype::Bf16, ..CONTIGUOUS };
        let groups = check(&weights, &uncompressed(bf16, &tokens), &run(bf16, &config, &tokens), bf16.dtype);
        assert!(groups.unwrap() > 0);
    }
}

#[test]
fn rows_from_max_position_on_stay_as_they_are() {
    let tokens = tokens();
    let file = file(2);
    let weights = Weights::open(&file, &OpenOptions::default()).unwrap();
    assert_eq!(weights.terms.max_position, Some(4096));
    // The last group below 101 ends with token 99; token 100 has no other beside it.
    let run = run(CONTIGUOUS, &format!("weights={},max_position=101,every=16", file.display()), &tokens);
    let raw = 100..(PROMPT + ANSWER) as u32;
    let expected: Vec<u32> = (0..4).chain((5..100).step_by(2)).chain(raw).collect();
    assert_eq!((run.positions == expected, run.commits), (true, 1), "{:?}", run.positions);
    assert_eq!(check(&weights, &uncompressed(CONTIGUOUS, &tokens), &run, CONTIGUOUS.dtype), Ok(48));

    let place = Place::new();
    let config = format!("weights={},max_position=4097", file.display());
    let arms = [("a", "mlp-decouple", config.as_str())];
    let refused = Runner::with_plugins(model(), CONTIGUOUS, &plugins(&arms, &place)).err().unwrap().to_string();
    for text in ["max_position", "4097", "at most 4096, beyond which the weights were not trained"] {
        assert!(refused.contains(text), "{refused}");
    }
}
