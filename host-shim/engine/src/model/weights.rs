//! The weights, dequantised to f32 and packed for the matrix product.

use super::config::Config;
use super::gguf::Gguf;
use crate::error::Result;
use crate::matmul::PackedMatrix;

/// All weights of a model.
#[derive(Debug)]
pub struct Weights {
    /// Token embedding, `[vocab, hidden]`; it is the output matrix too where the file holds no `output.weight`.
    pub embedding: PackedMatrix,
    /// The layers.
    pub layers: Vec<LayerWeights>,
    /// Weight of the last norm, `[hidden]`.
    pub output_norm: Vec<f32>,
    /// Output matrix, `[vocab, hidden]`, where it is not tied to the embedding.
    pub output: Option<PackedMatrix>,
}

/// The weights of one layer.
#[derive(Debug)]
pub struct LayerWeights {
    /// Weight of the norm before attention, `[hidden]`.
    pub attention_norm: Vec<f32>,
    /// q, k and v under one another, `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    pub qkv: PackedMatrix,
    /// Output projection of attention, `[hidden, heads * head_dim]`.
    pub attention_output: PackedMatrix,
    /// Weight of the norm before the feed-forward block, `[hidden]`.
    pub feed_forward_norm: Vec<f32>,
    /// Gate and up under one another, `[2 * feed_forward, hidden]`.
    pub gate_up: PackedMatrix,
    /// Down projection, `[hidden, feed_forward]`.
    pub down: PackedMatrix,
}

impl Weights {
    pub(super) fn read(gguf: &mut Gguf, config: &Config) -> Result<Self> {
        let (hidden, width) = (config.hidden, config.feed_forward);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let embedding = PackedMatrix::pack(&[&gguf.tensor("token_embd.weight", &[config.vocab, hidden])?], hidden);
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            layers.push(LayerWeights {
                attention_norm: gguf.tensor(&name("attn_norm"), &[hidden])?,
                qkv: PackedMatrix::pack(
                    &[
                        &gguf.tensor(&name("attn_q"), &[q, hidden])?,
                        &gguf.tensor(&name("attn_k"), &[kv, hidden])?,
                        &gguf.tensor(&name("attn_v"), &[kv, hidden])?,
                    ],
                    hidden,
                ),
                attention_output: PackedMatrix::pack(&[&gguf.tensor(&name("attn_output"), &[hidden, q])?], q),
                feed_forward_norm: gguf.tensor(&name("ffn_norm"), &[hidden])?,
                gate_up: PackedMatrix::pack(
                    &[
                        &gguf.tensor(&name("ffn_gate"), &[width, hidden])?,
                        &gguf.tensor(&name("ffn_up"), &[width, hidden])?,
                    ],
                    hidden,
                ),
                down: PackedMatrix::pack(&[&gguf.tensor(&name("ffn_down"), &[hidden, width])?], width),
            });
        }
        let output_norm = gguf.tensor("output_norm.weight", &[hidden])?;
        let output = match gguf.has_tensor("output.weight") {
            true => Some(PackedMatrix::pack(&[&gguf.tensor("output.weight", &[config.vocab, hidden])?], hidden)),
            false => None,
        };
        Ok(Self { embedding, layers, output_norm, output })
    }
}
