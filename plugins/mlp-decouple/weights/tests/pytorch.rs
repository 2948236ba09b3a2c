//! Checkpoints written by PyTorch, and what its own computation gives on them.

#![cfg(feature = "pytorch")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::golden;
use kvhook_mlp_weights::state_dict::{Choice, Fate, from_safetensors};
use kvhook_mlp_weights::{Dtype, Mlp, Stored, Weights, WeightsError, pytorch, state_dict, v1, v2};
use safetensors::SafeTensors;
use serde_json::Value;

fn convert(name: &str, choice: &Choice) -> Result<(Stored<'static>, Vec<state_dict::Outcome>), WeightsError> {
    let bytes = std::fs::read(golden(name)).unwrap();
    state_dict::read(pytorch::read(&bytes)?, choice)
}

fn weights(name: &str) -> Weights {
    convert(name, &Choice::default()).unwrap().0.decode(true).unwrap()
}

/// Groups of a segment become one each by `mlp`, the remainder stays: rows of one head.
fn compress(rows: &[f32], mlp: &Mlp, min_groups: usize) -> Vec<f64> {
    let group = mlp.factor * mlp.head_dim;
    let groups = if rows.len() / group < min_groups { 0 } else { rows.len() / group };
    let merged = rows.chunks_exact(group).take(groups).flat_map(|x| mlp.apply_reference(x));
    merged.chain(rows[groups * group..].iter().map(|value| f64::from(*value))).collect()
}

#[test]
fn the_formula_gives_what_pytorch_gives() {
    for factor in [2, 3, 5] {
        let weights = weights(&format!("f{factor}-f32.pth"));
        assert_eq!((weights.factor, weights.head_dim, weights.layers.len()), (factor, 8, 2));
        let bytes = std::fs::read(golden(&format!("f{factor}.safetensors"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let cases: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut compared = 0;
        for (name, dtype) in [("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::Bf16)] {
            for case in cases.as_array().unwrap() {
                for part in ["k", "v"] {
                    let input = file.tensor(&format!("{name}.{part}")).unwrap();
                    let [layers, heads, tokens, dim] = *input.shape() else { panic!() };
                    let rows = dtype.decode(input.data());
                    let kept = file.tensor(&format!("{name}.{}.{part}", case["name"].as_str().unwrap())).unwrap();
                    let mut kept = Dtype::F32.decode(kept.data()).into_iter();
                    for (layer, head) in (0..layers).flat_map(|layer| (0..heads).map(move |head| (layer, head))) {
                        let mut start = (layer * heads + head) * tokens * dim;
                        for segment in case["segments"].as_array().unwrap() {
                            let end = start + segment[1].as_u64().unwrap() as usize * dim;
                            let mlps = &weights.layers[layer];
                            let mlp = match (segment[0].as_str().unwrap(), part) {
                                ("text", "k") => &mlps.text_k,
                                ("text", _) => &mlps.text_v,
                                (_, "k") => mlps.image_k.as_ref().unwrap(),
                                _ => mlps.image_v.as_ref().unwrap(),
                            };
                            let min_groups = case["min_groups"].as_u64().unwrap() as usize;
                            for got in compress(&rows[start..end], mlp, min_groups) {
                                let wanted = f64::from(kept.next().unwrap());
                                assert!((got - wanted).abs() <= 1e-6 * (1.0 + wanted.abs()), "{case} {got} {wanted}");
                                compared += 1;
                            }
                            start = end;
                        }
                    }
                    assert!(kept.next().is_none(), "{case}");
                }
            }
        }
        assert!(compared > 5_000, "{compared}");
    }
}

#[test]
fn a_whole_checkpoint_is_gone_through_and_every_tensor_accounted_for() {
    let (stored, outcomes) = convert("f2-f32.pth", &Choice::default()).unwrap();
    assert_eq!((stored.dtype, stored.has_images(), stored.version), (Dtype::F32, true, 0));
    let used = outcomes.iter().filter(|outcome| matches!(outcome.fate, Fate::Used(_))).count();
    assert_eq!(used, 2 * 4 * 6);
    let fate = |name: &str| &outcomes.iter().find(|outcome| outcome.name == name).unwrap().fate;
    let prefix = "model_state_dict.compressor.";
    assert_eq!(*fate(&format!("{prefix}compress_iv.1.6.bias")), Fate::Used("layers.1.image_v.2.bias".into()));
    assert!(matches!(fate(&format!("{prefix}attention.0.weight")), Fate::Ignored(why) if why.contains("never used")));
    let moments = outcomes.iter().filter(|outcome| outcome.name.starts_with("optimizer_state_dict.state.")).count();
    assert!(moments >= 2 * used, "{moments}");
    // The same when the prefix is given, with or without its dot.
    for prefix in ["model_state_dict.compressor", "model_state_dict.compressor."] {
        let choice = Choice { prefix: Some(prefix.into()), ..Choice::default() };
        assert_eq!(convert("f2-f32.pth", &choice).unwrap().0, stored);
    }
}

#[test]
fn other_ways_of_saving_give_the_same_numbers() {
    let whole = weights("f2-f32.pth");
    let rounded = weights("plain-bf16.pth");
    assert_eq!(rounded.dtype, Dtype::Bf16);
    let near = |a: &[f32], b: &[f32], error: f32| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() <= error * a.abs().max(1e-3), "{a} {b}"));
    };
    let halves = weights("no-dropout-f16.pth");
    assert_eq!((halves.dtype, &halves.layers[0].image_k), (Dtype::F16, &None));
    for layer in 0..2 {
        let (a, b, c) = (&whole.layers[layer], &rounded.layers[layer], &halves.layers[layer]);
        near(&a.text_k.w1, &b.text_k.w1, 1.0 / 256.0);
        near(&a.image_v.as_ref().unwrap().b3, &b.image_v.as_ref().unwrap().b3, 1.0 / 256.0);
        near(&a.text_k.w1, &c.text_k.w1, 1.0 / 1024.0);
        near(&a.text_k.w3, &c.text_k.w3, 1.0 / 1024.0);
        near(&a.text_v.b2, &c.text_v.b2, 1.0 / 1024.0);
    }
    let bytes = std::fs::read(golden("state-dict.safetensors")).unwrap();
    assert!(!v2::is_ours(&bytes).unwrap());
    let (stored, outcomes) = state_dict::read(from_safetensors(&bytes).unwrap(), &Choice::default()).unwrap();
    assert_eq!(stored.decode(true).unwrap().layers, whole.layers);
    let outside = outcomes.iter().find(|outcome| outcome.name == "vision.weight").unwrap();
    assert!(matches!(outside.fate, Fate::Ignored(why) if why.contains("prefix")));
}

#[test]
fn a_converted_checkpoint_is_the_same_in_both_versions() {
    let (stored, _) = convert("f3-f32.pth", &Choice::default()).unwrap();
    let (first, second) = (v1::write(&stored, None).unwrap(), v2::write(&stored).unwrap());
    let (first, second) = (v1::read(&first, None).unwrap(), v2::read(&second).unwrap());
    assert_eq!((&first.layers, &first.terms), (&stored.layers, &stored.terms));
    assert_eq!((&second.layers, &second.terms), (&stored.layers, &stored.terms));
}

#[test]
fn what_is_no_state_dict_is_said() {
    for (name, words) in [("module.pth", "no compressor found among 0 tensors"), ("legacy.pth", "before 1.6")] {
        let error = convert(name, &Choice::default()).expect_err(name);
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    let choice = Choice { prefix: Some("other".into()), ..Choice::default() };
    assert!(matches!(convert("f2-f32.pth", &choice), Err(WeightsError::NoCompressor { .. })));
    let bytes = std::fs::read(golden("f2-f32.pth")).unwrap();
    assert!(matches!(pytorch::read(&bytes[..bytes.len() - 10]), Err(WeightsError::Archive { .. })));
    let mut damaged = bytes.clone();
    let storage = damaged.windows(8).position(|window| window == b"/data/0P" || window == b"/data/0F").unwrap();
    damaged[storage + 200] ^= 1;
    let error = pytorch::read(&damaged).expect_err("a bit is another");
    assert!(matches!(error, WeightsError::Archive { .. }), "{error}");
}

#[test]
fn state_dicts_that_are_not_whole_are_refused_by_name() {
    let bytes = std::fs::read(golden("state-dict.safetensors")).unwrap();
    type Change = fn(&mut Vec<state_dict::NamedTensor<'_>>);
    fn at(tensors: &[state_dict::NamedTensor<'_>], name: &str) -> usize {
        tensors.iter().position(|tensor| tensor.name == name).unwrap()
    }
    let cases: [(Change, &str); 9] = [
        (|t| t.clear(), "no compressor found among 0 tensors"),
        (|t| drop(t.remove(at(t, "compressor.compress_tv.1.3.bias"))), "compressor.compress_tv.1.3.bias: missing"),
        (
            |t| {
                let place = at(t, "compressor.compress_tk.0.6.bias");
                t[place].shape = vec![2, 4];
            },
            "compressor.compress_tk.0.6.bias: found shape [2, 4], expected [8]",
        ),
        (
            |t| {
                let place = at(t, "compressor.compress_tk.0.3.weight");
                t[place].dtype = Err("i64".into());
            },
            "compressor.compress_tk.0.3.weight: found i64, expected f16, bf16 or f32",
        ),
        (
            |t| {
                let place = at(t, "compressor.compress_tk.0.3.weight");
                t[place].dtype = Ok(Dtype::F16);
            },
            "choose one element type for all with --dtype",
        ),
        (
            |t| {
                let place = at(t, "compressor.compress_tk.0.3.weight");
                t[place].name = "compressor.compress_tk.0.4.weight".into();
            },
            "Sequential indices [0, 3, 4, 6]",
        ),
        (
            |t| {
                let place = at(t, "compressor.attention.0.weight");
                t[place].name = "compressor.gate.0.weight".into();
            },
            "compressor.gate.0.weight: found, but the method has no such tensor",
        ),
        (
            |t| {
                let mut copy = t[at(t, "compressor.compress_ik.1.0.bias")].clone();
                copy.name = "compressor.layers.1.image_k.0.bias".into();
                t.push(copy);
            },
            "compressor.layers.1.image_k.0.bias: found, but `compressor.compress_ik.1.0.bias` has its place",
        ),
        (
            |t| {
                let mut copy = t[at(t, "compressor.compress_ik.1.0.bias")].clone();
                copy.name = "ema.compress_ik.1.0.bias".into();
                t.push(copy);
            },
            r#"under the prefixes ["compressor.", "ema."]"#,
        ),
    ];
    for (change, words) in cases {
        let mut tensors = from_safetensors(&bytes).unwrap();
        change(&mut tensors);
        let error = state_dict::read(tensors, &Choice::default()).expect_err(words);
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

#[test]
fn element_types_are_converted_on_request() {
    for dtype in Dtype::ALL {
        let choice = Choice { dtype: Some(dtype), ..Choice::default() };
        let (stored, _) = convert("f2-f32.pth", &choice).unwrap();
        assert_eq!(stored.dtype, dtype);
        assert!(
            stored.tensors().all(|(_, shape, bytes)| bytes.len() == shape.iter().product::<usize>() * dtype.size())
        );
    }
}
