//! Version 1, against files written byte by byte.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{DIM, FACTOR, LAYERS, V1, sample};
use kvhook_mlp_weights::{Dtype, ImageOrder, Mlp, OpenOptions, Pairing, Weights, WeightsError, read, v1, v2};

fn refused(file: &[u8]) -> WeightsError {
    let error = read(file, None).expect_err("the file is wrong");
    assert!(!error.to_string().is_empty());
    error
}

/// The MLP that begins at matrix `first` of the sample.
fn expected(first: usize) -> Mlp {
    let of = |matrix: usize, from: usize, count: usize| {
        (from..from + count).map(|i| (first + matrix) as f32 + i as f32 / 256.0).collect::<Vec<_>>()
    };
    Mlp {
        factor: FACTOR,
        head_dim: DIM,
        w1: of(0, 0, FACTOR * DIM * DIM),
        b1: of(0, FACTOR * DIM * DIM, DIM),
        w2: of(1, 0, DIM * DIM),
        b2: of(1, DIM * DIM, DIM),
        w3: of(2, 0, DIM * DIM),
        b3: vec![0.0; DIM],
    }
}

#[test]
fn a_file_from_the_table_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.bin");
    std::fs::write(&path, sample().bytes()).unwrap();
    let weights = Weights::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!((weights.version, weights.dtype, weights.factor, weights.head_dim), (1, Dtype::F32, FACTOR, DIM));
    assert_eq!((weights.terms.min_groups, weights.terms.pairing), (2, Pairing::HalfSplit));
    assert_eq!((weights.terms.positions, weights.warnings.len()), (None, 0));
    assert_eq!(weights.layers.len(), LAYERS);
    for (layer, first) in weights.layers.iter().zip([0, 12]) {
        assert_eq!(layer.text_k, expected(first));
        assert_eq!(layer.text_v, expected(first + 3));
        assert_eq!(layer.image_k, Some(expected(first + 6)));
        assert_eq!(layer.image_v, Some(expected(first + 9)));
    }
    let other = OpenOptions { image_order: Some(ImageOrder::ValueFirst), ..OpenOptions::default() };
    let swapped = Weights::open(&path, &other).unwrap();
    assert_eq!(swapped.layers[1].image_v, Some(expected(18)));
    assert_eq!(swapped.layers[1].image_k, Some(expected(21)));
}

#[test]
fn text_only_and_every_element_type() {
    for (code, dtype) in [(0, Dtype::F16), (1, Dtype::Bf16), (2, Dtype::F32)] {
        let mut file = V1 { dtype: code, weight_count: 6, min_seq_len: 0, ..sample() };
        file.matrices.truncate(LAYERS * 6);
        // Few enough bits for bf16.
        file.matrices.iter_mut().for_each(|(.., numbers)| numbers.iter_mut().for_each(|n| *n = n.round()));
        let bytes = file.bytes();
        let weights = read(&bytes, None).unwrap().decode(true).unwrap();
        assert_eq!((weights.dtype, weights.terms.min_groups), (dtype, 1));
        assert!(weights.layers.iter().all(|layer| layer.image_k.is_none() && layer.image_v.is_none()));
        assert_eq!(weights.layers[1].text_v.w3, file.matrices[11].3);
    }
}

#[test]
fn each_wrong_field_has_its_own_message() {
    type Change = fn(&mut V1);
    let cases: [(Change, &str); 23] = [
        (|f| f.magic = *b"KVCM", "begins with 4b 56 43 4d"),
        (|f| f.version = 2, "version: found 2"),
        (|f| f.dtype = 3, "dtype: found code 3"),
        (|f| f.reserved = 1, "reserved: found 1"),
        (|f| f.layers = 0, "num_layers: found 0"),
        (|f| f.layers = 1, "bytes; its header and first shape (1 layers"),
        (|f| f.layers = 3, "bytes; its header and first shape (3 layers"),
        (|f| f.layers = u32::MAX, "bytes; its header and first shape (4294967295 layers"),
        (|f| f.head_dim = 8, "head_dim: found 8, expected 4"),
        (|f| f.factor = 2, "compression_factor: found 2, expected 3"),
        (|f| f.weight_count = 6, "of 6 matrices"),
        (|f| f.weight_count = 9, "weight_count_per_layer: found 9"),
        (|f| f.metadata_size = u32::MAX, "metadata_size_bytes: found 4294967295"),
        // One byte of metadata is then the first of a shape.
        (|f| f.metadata_size = 4, "found shape"),
        (|f| f.matrices[0].0 = 5, "layers.0.text_k.0.weight: found shape [5, 12]"),
        (|f| f.matrices[0].1 = 13, "layers.0.text_k.0.weight: found shape [4, 13]"),
        (|f| f.matrices[3].1 = 8, "layers.0.text_v.0.weight: found shape [4, 8], expected [4, 12]"),
        (|f| f.matrices[13].0 = 3, "layers.1.text_k.1.weight: found shape [3, 4], expected [4, 4]"),
        (|f| f.matrices[23].1 = 0, "layers.1.image_v.2.weight: found shape [4, 0], expected [4, 4]"),
        (|f| f.matrices[7].2 = 2, "layers.0.image_k.1.weight, has_bias: found 2"),
        // A bias that is not announced: the next shape is read from it.
        (|f| f.matrices[0].2 = 0, "layers.0.text_k.1.weight: found shape"),
        (|f| f.matrices[23].3.push(1.0), "4 bytes follow the last matrix"),
        (|f| f.matrices[0].3[0] = f32::NAN, "layers.0.text_k.0.weight: found NaN at element 0"),
    ];
    for (change, words) in cases {
        let mut file = sample();
        change(&mut file);
        let bytes = file.bytes();
        let error = match read(&bytes, None) {
            Err(error) => error,
            Ok(stored) => stored.decode(true).expect_err(words),
        };
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

#[test]
fn fields_that_mean_nothing_are_not_compared() {
    let odd = V1 { heads: 7, min_seq_len: 9, hidden_size: 4096, ..sample() }.bytes();
    let weights = read(&odd, None).unwrap().decode(true).unwrap();
    assert_eq!(weights.terms.min_groups, 9);
    assert!(weights.warnings[0].contains("found 4096, factor * head_dim is 12"), "{:?}", weights.warnings);
    let nan = V1 { matrices: vec![], ..sample() };
    assert!(matches!(refused(&nan.bytes()), WeightsError::Truncated { .. }));
}

#[test]
fn a_cut_is_noticed_wherever_it_is() {
    let whole = sample().bytes();
    for length in 0..whole.len() {
        let error = refused(&whole[..length]);
        let fits = match length {
            0..4 => matches!(error, WeightsError::NotWeights { .. }),
            4..44 => matches!(error, WeightsError::Truncated { offset: 0, needed: 44, .. }),
            44..49 => matches!(error, WeightsError::HeaderMetadataSize { .. }),
            49..61 => matches!(error, WeightsError::Truncated { offset: 49, needed: 12, .. }),
            _ => matches!(error, WeightsError::Length { .. } | WeightsError::Truncated { .. }),
        };
        assert!(fits, "{length}: {error}");
    }
    // Cut by less than the biases hold: the length alone does not tell.
    match refused(&whole[..whole.len() - 3]) {
        WeightsError::Truncated { what, needed: 64, found: 61, .. } => assert_eq!(what, "layers.1.image_v.2.weight"),
        other => panic!("{other}"),
    }
}

#[test]
fn infinite_numbers_are_refused_on_request() {
    let mut file = sample();
    file.matrices[4].3[16] = f32::INFINITY;
    let bytes = file.bytes();
    let stored = read(&bytes, None).unwrap();
    assert!(stored.decode(false).is_ok());
    let error = stored.decode(true).unwrap_err();
    assert!(error.to_string().contains("layers.0.text_v.1.bias: found inf at element 0"), "{error}");
}

#[test]
fn version_1_to_2_and_back_is_the_same_file() {
    let odd = V1 { heads: 32, hidden_size: 1, metadata_size: 3, metadata: vec![0xff, 0, b'"'], ..sample() };
    for file in [sample(), V1 { dtype: 0, ..sample() }, odd] {
        let first = file.bytes();
        for order in [None, Some(ImageOrder::ValueFirst)] {
            let second = v2::write(&v1::read(&first, order).unwrap()).unwrap();
            let stored = v2::read(&second).unwrap();
            assert_eq!(v1::write(&stored, None).unwrap(), first);
            let (before, after) = (read(&first, order).unwrap(), stored.decode(true).unwrap());
            assert_eq!(before.decode(true).unwrap().layers, after.layers);
        }
    }
}

#[test]
fn the_converter_writes_the_order_and_the_terms_down() {
    let bytes = sample().bytes();
    let mut stored = v1::read(&bytes, None).unwrap();
    stored.origin = None;
    stored.terms.training = "by hand".into();
    let written = v1::write(&stored, Some(ImageOrder::ValueFirst)).unwrap();
    let weights = read(&written, None).unwrap().decode(true).unwrap();
    assert_eq!(weights.layers[0].image_k, Some(expected(6)));
    assert_eq!(weights.terms, stored.terms);
    assert!(matches!(
        v1::read(&written, Some(ImageOrder::KeyFirst)),
        Err(WeightsError::ImageOrder { asked: ImageOrder::KeyFirst, found: ImageOrder::ValueFirst })
    ));
    let header = v1::Header::parse(&written).unwrap();
    assert_eq!((header.hidden_size, header.min_seq_len, header.heads), (12, 2, 0));

    let quarrel = r#"{"kvhook_mlp": {"min_groups": 5}}"#.as_bytes().to_vec();
    let quarrel = V1 { metadata_size: quarrel.len() as u32, metadata: quarrel, ..sample() }.bytes();
    assert!(matches!(refused(&quarrel), WeightsError::Contradiction { field: "min_groups", .. }));
    let unknown = r#"{"kvhook_mlp": {"min_groops": 2}}"#.as_bytes().to_vec();
    let unknown = V1 { metadata_size: unknown.len() as u32, metadata: unknown, ..sample() }.bytes();
    assert!(refused(&unknown).to_string().contains("min_groops"));
}
