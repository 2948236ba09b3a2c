//! Weight files and checkpoints of mlp-decouple. The first byte says what the others are: a file of any kind, the pickle of
//! a checkpoint, or the metadata of a version 2 file; the last two in a file that is otherwise good, since checksums would
//! keep the fuzzer out. What is accepted must be written and read again as it was.

#![no_main]

use std::collections::HashMap;
use std::io::{Cursor, Write};

use kvhook_mlp_weights::report::Report;
use kvhook_mlp_weights::state_dict::{self, Choice, NamedTensor};
use kvhook_mlp_weights::{ImageOrder, Kind, Pairing, Stored, WeightsError, pytorch, read, v1, v2};
use libfuzzer_sys::fuzz_target;
use safetensors::tensor::{Dtype, TensorView};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fn accepted<T>(result: Result<T, WeightsError>) -> Option<T> {
    result.inspect_err(|error| assert!(!error.to_string().is_empty())).ok()
}

/// Writes weights in both versions; each must read back as it was.
fn round_trip(stored: &Stored<'_>) {
    assert!(!Report::new(stored).to_text().is_empty());
    let second = v2::write(stored).expect("weights that were read can be written");
    let again = v2::read(&second).expect("a file that was written can be read");
    assert_eq!((&again.layers, &again.terms), (&stored.layers, &stored.terms));
    if let Some(first) = accepted(v1::write(&again, None)) {
        let back = v1::read(&first, None).expect("a file that was written can be read");
        // A version 1 file that does not say its order is read in the usual one.
        let unusual = stored.origin.as_ref().is_some_and(|origin| origin.image_order != ImageOrder::default());
        assert!(unusual || back.layers == again.layers);
    }
    if let Some(mut weights) = accepted(stored.decode(true)) {
        let before = weights.clone();
        weights.to_pairing(Pairing::Interleaved);
        weights.to_pairing(before.terms.pairing);
        assert_eq!(weights, before);
    }
}

fn checkpoint(tensors: Vec<NamedTensor<'_>>) {
    if let Some((stored, outcomes)) = accepted(state_dict::read(tensors, &Choice::default())) {
        assert!(!outcomes.is_empty());
        round_trip(&stored);
    }
}

fn file(bytes: &[u8]) {
    if let Some(stored) = accepted(read(bytes, None)) {
        round_trip(&stored);
        if stored.version == 1 {
            let second = v2::write(&stored).expect("weights that were read can be written");
            let again = v2::read(&second).expect("a file that was written can be read");
            assert_eq!(v1::write(&again, None).expect("it was version 1"), bytes);
        }
    }
    match Kind::of(bytes) {
        Some(Kind::Safetensors) => drop(accepted(state_dict::from_safetensors(bytes)).map(checkpoint)),
        _ => drop(accepted(pytorch::read(bytes)).map(checkpoint)),
    }
}

/// An archive as PyTorch writes it, with 256 bytes in each of ten storages.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut entry = |name: &str, bytes: &[u8]| {
        zip.start_file(name, SimpleFileOptions::default()).expect("a new entry");
        zip.write_all(bytes).expect("memory takes it");
    };
    entry("a/data.pkl", pickle);
    for key in 0..10u8 {
        entry(&format!("a/data/{key}"), &[key; 256]);
    }
    zip.finish().expect("memory takes it").into_inner()
}

/// The smallest version 2 file, factor 2, head_dim 2, with any metadata.
fn with_metadata(text: &str) -> Vec<u8> {
    const ZEROS: [u8; 16] = [0; 16];
    let views = ["text_k", "text_v"].into_iter().flat_map(|role| {
        (0..3).map(move |matrix| {
            let cols = if matrix == 0 { 4 } else { 2 };
            let view = TensorView::new(Dtype::F16, vec![2, cols], &ZEROS[..4 * cols]).expect("the size fits");
            (format!("layers.0.{role}.{matrix}.weight"), view)
        })
    });
    let views: Vec<_> = views.collect();
    safetensors::serialize(views, Some(HashMap::from([("kvhook_mlp".into(), text.into())]))).expect("it is written")
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind {
        b'p' => drop(accepted(pytorch::read(&archive(bytes))).map(checkpoint)),
        b'm' => file(&with_metadata(&String::from_utf8_lossy(bytes))),
        _ => file(bytes),
    }
});
