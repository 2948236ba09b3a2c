//! A model of a few thousand random weights, for tests of what happens around a model.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

/// Tokens of its vocabulary.
pub const VOCAB: usize = 64;

const LAYERS: usize = 2;
const HIDDEN: usize = 32;
const WIDTH: usize = 48;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 8;

/// Writes the model into a folder; gives its path. Each seed is another model.
///
/// # Panics
/// When it cannot be written.
pub fn write(folder: &std::path::Path, seed: u64) -> PathBuf {
    let text = |text: &str| Value::String(text.into());
    let count = |count: usize| Value::U32(count as u32);
    let words = (0..VOCAB).map(|token| text(&format!("w{token}"))).collect();
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", count(LAYERS)),
        ("llama.embedding_length", count(HIDDEN)),
        ("llama.feed_forward_length", count(WIDTH)),
        ("llama.attention.head_count", count(KV_HEADS)),
        ("llama.attention.head_count_kv", count(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.context_length", count(512)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", Value::Array(words)),
        ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1); VOCAB])),
        ("tokenizer.ggml.merges", Value::Array(Vec::new())),
    ];
    let heads = KV_HEADS * HEAD_DIM;
    let mut tensors: HashMap<String, Vec<usize>> = HashMap::new();
    tensors.insert("token_embd.weight".into(), vec![VOCAB, HIDDEN]);
    tensors.insert("output_norm.weight".into(), vec![HIDDEN]);
    for layer in 0..LAYERS {
        let of_layer = [
            ("attn_norm", vec![HIDDEN]),
            ("attn_q", vec![heads, HIDDEN]),
            ("attn_k", vec![heads, HIDDEN]),
            ("attn_v", vec![heads, HIDDEN]),
            ("attn_output", vec![HIDDEN, heads]),
            ("ffn_norm", vec![HIDDEN]),
            ("ffn_gate", vec![WIDTH, HIDDEN]),
            ("ffn_up", vec![WIDTH, HIDDEN]),
            ("ffn_down", vec![HIDDEN, WIDTH]),
        ];
        tensors.extend(of_layer.map(|(name, shape)| (format!("blk.{layer}.{name}.weight"), shape)));
    }
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut random = Random(seed);
    let made: Vec<(&str, QTensor)> = names
        .iter()
        .map(|name| {
            let shape = &tensors[*name];
            let norm = shape.len() == 1;
            // Large products of queries and keys: attention looks at few rows, so that it matters which are kept.
            let scale = if name.contains("attn_q") || name.contains("attn_k") { 0.6 } else { 0.3 };
            let value = |random: &mut Random| if norm { 1.0 } else { scale * random.signed() };
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| value(&mut random)).collect();
            let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).expect("the shape fits the values");
            (name.as_str(), QTensor::quantize(&tensor, GgmlDType::F32).expect("f32 is a kind of its own"))
        })
        .collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let made: Vec<_> = made.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let path = folder.join("tiny.gguf");
    let mut file = File::create(&path).expect("the model can be written");
    gguf_file::write(&mut file, &metadata, &made).expect("the model can be written");
    path
}

/// Repeatable random numbers: SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }

    /// One of some.
    pub fn of<'a, T>(&mut self, some: &'a [T]) -> &'a T {
        &some[self.below(some.len())]
    }

    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        (self.number() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
