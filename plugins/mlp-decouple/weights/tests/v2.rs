//! Version 2: what is refused, and that a file says what it was told.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;

use common::{DIM, FACTOR, LAYERS, sample};
use kvhook_mlp_weights::{
    Dtype, ImageRule, Kind, ModelIdentity, Pairing, PositionRule, Stored, Terms, Weights, WeightsError, read, v1, v2,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Element, TensorView};
use serde_json::{Value, json};

fn terms() -> Terms {
    Terms {
        model: Some(ModelIdentity {
            name: "a model".into(),
            layers: LAYERS,
            kv_heads: 3,
            head_dim: DIM,
            rope_base: 1e5,
            rotary_dim: None,
        }),
        positions: Some(PositionRule::Logical),
        pairing: Pairing::HalfSplit,
        min_groups: 2,
        sinks: Some(4),
        recent: Some(32),
        max_position: Some(4096),
        image_rule: Some(ImageRule::Prefix),
        training: "none, counted up".into(),
    }
}

fn file() -> Vec<u8> {
    let bytes = sample().bytes();
    let stored = Stored { terms: terms(), ..v1::read(&bytes, None).unwrap() };
    v2::write(&stored).unwrap()
}

/// A file taken apart, to be changed and put together without the crate's writer.
struct Parts {
    tensors: HashMap<String, (Element, Vec<usize>, Vec<u8>)>,
    metadata: Option<Value>,
}

impl Parts {
    fn new() -> Self {
        let bytes = file();
        let read = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let tensors = read.iter().map(tensor).collect();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let text = &header.metadata().as_ref().unwrap()["kvhook_mlp"];
        Self { tensors, metadata: serde_json::from_str(text).ok() }
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let metadata = self.metadata.as_ref().map(|entry| HashMap::from([("kvhook_mlp".into(), entry.to_string())]));
        safetensors::serialize(views, metadata).unwrap()
    }

    fn entry(&mut self) -> &mut Value {
        self.metadata.as_mut().unwrap()
    }
}

#[test]
fn a_file_says_what_it_was_told() {
    let bytes = file();
    assert_eq!(Kind::of(&bytes), Some(Kind::Safetensors));
    assert!(v2::is_ours(&bytes).unwrap());
    let stored = read(&bytes, None).unwrap();
    assert_eq!(stored.terms, terms());
    assert_eq!((stored.version, stored.dtype, stored.factor, stored.head_dim), (2, Dtype::F32, FACTOR, DIM));
    assert_eq!(v2::write(&stored).unwrap(), bytes);
}

#[test]
fn the_sha256_is_the_documented_one() {
    use sha2::{Digest, Sha256};
    let mut parts = Parts::new();
    let mut names: Vec<_> = parts.tensors.keys().cloned().collect();
    names.sort();
    let text: Vec<u8> = names.iter().flat_map(|n| [n.as_bytes(), &[0], &parts.tensors[n].2].concat()).collect();
    let expected = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(parts.entry()["sha256"], expected);
}

#[test]
fn a_file_without_version_1_behind_it_loads() {
    let mut parts = Parts::new();
    parts.entry().as_object_mut().unwrap().remove("v1");
    let bytes = parts.bytes();
    let stored = v2::read(&bytes).unwrap();
    assert!(stored.origin.is_none());
    // In version 1 the terms are in the metadata.
    let first = v1::write(&stored, None).unwrap();
    let again = v1::read(&first, None).unwrap();
    assert_eq!((&again.terms, &again.layers), (&stored.terms, &stored.layers));
}

#[test]
fn each_wrong_entry_has_its_own_message() {
    type Change = fn(&mut Parts);
    let cases: [(Change, &str); 26] = [
        (|p| p.metadata = None, "no metadata entry `kvhook_mlp`"),
        (|p| *p.entry() = json!([1]), "metadata `kvhook_mlp`"),
        (|p| p.entry()["format_version"] = 3.into(), "format_version: found 3"),
        (|p| p.entry()["activation"] = "gelu".into(), "activation: found `gelu`"),
        (|p| p.entry()["factor"] = 4.into(), "factor: found 4, expected 3"),
        (|p| p.entry()["head_dim"] = 8.into(), "head_dim: found 8, expected 4"),
        (|p| p.entry()["pairing"] = "odd".into(), "unknown variant `odd`"),
        (|p| p.entry()["colour"] = "red".into(), "unknown field `colour`"),
        (|p| p.entry()["min_groups"] = 0.into(), "min_groups: found 0, expected 1"),
        (|p| p.entry()["max_position"] = 0.into(), "max_position: found 0, expected 1, the least"),
        (|p| p.entry()["max_position"] = (-1).into(), "expected u32"),
        (|p| p.entry()["model"]["layers"] = 3.into(), "model.layers: found 3, expected 2"),
        (|p| p.entry()["model"]["head_dim"] = 6.into(), "model.head_dim: found 6, expected 4"),
        (|p| p.entry()["model"]["rotary_dim"] = 6.into(), "model.rotary_dim: found 6, expected an even number up to"),
        (|p| p.entry()["sha256"] = "00".into(), "expected 00 by the metadata"),
        (|p| p.entry()["v1"]["header"] = "4d4".into(), "v1.header: expected pairs of hexadecimal digits, 44 of them"),
        (|p| p.entry()["v1"]["metadata"] = "zz".into(), "v1.metadata: expected pairs"),
        (|p| p.entry()["v1"]["metadata"] = "00".into(), "metadata_size_bytes: found 5, expected 1"),
        (|p| p.entry()["v1"]["image_order"] = "iv".into(), "unknown variant `iv`"),
        (|p| drop(p.tensors.remove("layers.1.text_v.1.weight")), "layers.1.text_v.1.weight: missing"),
        (|p| drop(p.tensors.remove("layers.0.text_k.0.weight")), "layers.0.text_k.0.weight: missing"),
        (
            |p| {
                let tensor = p.tensors.remove("layers.0.text_v.0.bias").unwrap();
                p.tensors.insert("layers.0.text_v.3.bias".into(), tensor);
            },
            "layers.0.text_v.3.bias: found, but the method has no such tensor",
        ),
        (
            |p| p.tensors.get_mut("layers.1.image_k.0.bias").unwrap().1 = vec![2, 2],
            "layers.1.image_k.0.bias: found shape [2, 2], expected [4]",
        ),
        (
            |p| p.tensors.get_mut("layers.1.image_k.1.weight").unwrap().1 = vec![2, 8],
            "layers.1.image_k.1.weight: found shape [2, 8], expected [4, 4]",
        ),
        (|p| p.tensors.get_mut("layers.0.text_k.2.weight").unwrap().0 = Element::I32, "I32, expected f32"),
        (|p| p.tensors.get_mut("layers.0.text_k.2.weight").unwrap().2[7] ^= 1, "the file is damaged"),
    ];
    for (change, words) in cases {
        let mut parts = Parts::new();
        change(&mut parts);
        let error = read(&parts.bytes(), None).expect_err(words);
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

#[test]
fn a_layer_in_the_middle_cannot_be_missing() {
    let mut parts = Parts::new();
    parts.tensors = std::mem::take(&mut parts.tensors)
        .into_iter()
        .map(|(name, tensor)| (name.replace("layers.1.", "layers.2."), tensor))
        .collect();
    let error = read(&parts.bytes(), None).unwrap_err();
    assert!(error.to_string().contains("layers.1.text_k.0.weight: missing"), "{error}");
}

#[test]
fn a_cut_is_noticed_wherever_it_is() {
    let whole = file();
    // Every length at first, then one of each 61: the JSON is read each time.
    for length in (0..whole.len()).filter(|length| *length < 100 || length % 61 == 0) {
        let error = read(&whole[..length], None).unwrap_err();
        let fits = match length {
            0..9 => matches!(error, WeightsError::NotWeights { .. }),
            _ => matches!(error, WeightsError::Safetensors(_)),
        };
        assert!(fits, "{length}: {error}");
    }
    let more = [whole.as_slice(), &[0]].concat();
    assert!(matches!(read(&more, None), Err(WeightsError::Safetensors(_))));
}

#[test]
fn offsets_beyond_the_file_are_refused_before_they_are_added_up() {
    let far = usize::MAX;
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{far}],"data_offsets":[0,{far}]}}}}"#);
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    assert!(matches!(read(&file, None), Err(WeightsError::Safetensors(_))));
}

#[test]
fn k_of_another_pairing_gives_the_same_rows_in_another_order() {
    let bytes = file();
    let mut half_split: Weights = read(&bytes, None).unwrap().decode(true).unwrap();
    // The sample's ramps would hide an exchange of two columns.
    for layer in &mut half_split.layers {
        for mlp in [Some(&mut layer.text_k), layer.image_k.as_mut()].into_iter().flatten() {
            for values in [&mut mlp.w1, &mut mlp.w3, &mut mlp.b3] {
                values.iter_mut().enumerate().for_each(|(i, w)| *w += (i * i * 31 % 17) as f32);
            }
        }
    }
    let mut interleaved = half_split.clone();
    interleaved.to_pairing(Pairing::Interleaved);
    assert_eq!(interleaved.terms.pairing, Pairing::Interleaved);
    // As GGUF writes a row of four: 0, 2, 1, 3 of the half-split one.
    let reorder = |row: &[f32]| -> Vec<f32> { row.chunks(4).flat_map(|r| [r[0], r[2], r[1], r[3]]).collect() };
    let x: Vec<f32> = (0..FACTOR * DIM).map(|i| (i * i % 7) as f32 - 1.0).collect();
    for (a, b) in half_split.layers.iter().zip(&interleaved.layers) {
        let (image_a, image_b) = (a.image_k.as_ref().unwrap(), b.image_k.as_ref().unwrap());
        for (a, b) in [(&a.text_k, &b.text_k), (image_a, image_b)] {
            let y = a.apply_reference(&x);
            assert_ne!(y, a.apply_reference(&reorder(&x)), "the order matters");
            for (got, wanted) in b.apply_reference(&reorder(&x)).iter().zip([y[0], y[2], y[1], y[3]]) {
                assert!((got - wanted).abs() <= 1e-12 * wanted.abs(), "{got} {wanted}");
            }
        }
        assert_eq!((&a.text_v, &a.image_v), (&b.text_v, &b.image_v));
    }
    interleaved.to_pairing(Pairing::HalfSplit);
    assert_eq!(interleaved, half_split);
}

#[test]
fn another_element_type_is_rounded_and_bounded() {
    let bytes = file();
    let stored = read(&bytes, None).unwrap();
    let f16 = stored.clone().with_dtype(Dtype::F16).unwrap();
    assert!(f16.origin.is_none());
    let second = v2::write(&f16).unwrap();
    let weights = read(&second, None).unwrap().decode(true).unwrap();
    let before = stored.decode(true).unwrap();
    for (a, b) in weights.layers[1].text_k.w1.iter().zip(&before.layers[1].text_k.w1) {
        assert!((a - b).abs() <= b.abs() / 2048.0, "{a} {b}");
    }

    let mut large = sample();
    large.matrices[0].3[5] = 1e5;
    let large = large.bytes();
    match read(&large, None).unwrap().with_dtype(Dtype::F16) {
        Err(WeightsError::Overflow { index: 5, dtype: Dtype::F16, .. }) => {}
        other => panic!("{other:?}"),
    }
}
