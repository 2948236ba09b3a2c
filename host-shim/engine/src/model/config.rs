//! The model's shape, from the GGUF's metadata.

use super::gguf::Gguf;
use crate::error::{Error, Result};
use crate::simd::LANES;

/// Which channels of a head RoPE turns together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Channels `2i` and `2i + 1`: the order into which GGUF files of the `llama` architecture permute q and k.
    Interleaved,
}

/// The shape of a Llama model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward block.
    pub feed_forward: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// RoPE base.
    pub rope_base: f64,
    /// Angle per position of each pair of channels, `[head_dim / 2]`.
    pub rope_frequencies: Vec<f64>,
    /// Which channels RoPE pairs.
    pub pairing: Pairing,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Positions that the model was trained for.
    pub context: usize,
    /// Vocabulary size.
    pub vocab: usize,
}

impl Config {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Whether the RoPE frequencies are other than those of the base alone.
    pub fn rope_is_scaled(&self) -> bool {
        let plain = |pair: usize| self.rope_base.powf(-2.0 * pair as f64 / self.head_dim as f64);
        self.rope_frequencies.iter().enumerate().any(|(pair, frequency)| *frequency != plain(pair))
    }

    pub(super) fn read(gguf: &mut Gguf) -> Result<Self> {
        let architecture = gguf.string("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::Architecture { found: architecture });
        }
        refuse_variants(gguf)?;
        let layers = gguf.count("llama.block_count")?;
        let hidden = gguf.count("llama.embedding_length")?;
        let heads = gguf.count("llama.attention.head_count")?;
        let kv_heads = gguf.optional_count("llama.attention.head_count_kv")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(Error::WrongKey {
                key: "llama.attention.head_count_kv".into(),
                found: kv_heads.to_string(),
                expected: format!("a divisor of the {heads} query heads"),
            });
        }
        let head_dim = gguf.optional_count("llama.attention.key_length")?.unwrap_or(hidden / heads);
        let value_dim = gguf.optional_count("llama.attention.value_length")?.unwrap_or(head_dim);
        let rotary = gguf.optional_count("llama.rope.dimension_count")?.unwrap_or(head_dim);
        for (key, found) in [("llama.attention.value_length", value_dim), ("llama.rope.dimension_count", rotary)] {
            if found != head_dim {
                return Err(Error::WrongKey {
                    key: key.into(),
                    found: found.to_string(),
                    expected: format!("the head dimension {head_dim}"),
                });
            }
        }
        for (key, found) in [("llama.attention.key_length", head_dim), ("llama.embedding_length", hidden)] {
            if found == 0 || found % LANES != 0 {
                return Err(Error::WrongKey {
                    key: key.into(),
                    found: found.to_string(),
                    expected: format!("a multiple of {LANES}"),
                });
            }
        }
        let rope_base = gguf.optional_float("llama.rope.freq_base")?.unwrap_or(10_000.0);
        let factors = match gguf.has_tensor("rope_freqs.weight") {
            true => gguf.tensor("rope_freqs.weight", &[head_dim / 2])?,
            false => vec![1.0; head_dim / 2],
        };
        let frequency =
            |(pair, factor): (usize, &f32)| rope_base.powf(-2.0 * pair as f64 / head_dim as f64) / f64::from(*factor);
        Ok(Self {
            layers,
            hidden,
            feed_forward: gguf.count("llama.feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            rope_base,
            rope_frequencies: factors.iter().enumerate().map(frequency).collect(),
            pairing: Pairing::Interleaved,
            rms_eps: gguf.float("llama.attention.layer_norm_rms_epsilon")? as f32,
            context: gguf.count("llama.context_length")?,
            vocab: gguf.rows("token_embd.weight", hidden)?,
        })
    }
}

/// Files of the `llama` architecture may hold relatives of Llama; say so instead of computing something else.
fn refuse_variants(gguf: &Gguf) -> Result<()> {
    if gguf.optional_count("llama.expert_count")?.unwrap_or(0) > 0 {
        return Err(Error::UnsupportedModel { what: "experts (llama.expert_count > 0)".into() });
    }
    if let Some(kind) = gguf.optional_string("llama.rope.scaling.type")?.filter(|kind| kind != "none") {
        return Err(Error::UnsupportedModel { what: format!("RoPE scaling (llama.rope.scaling.type = \"{kind}\")") });
    }
    for tensor in ["blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.0.ffn_up.bias"] {
        if gguf.has_tensor(tensor) {
            return Err(Error::UnsupportedModel { what: format!("the tensor {tensor}") });
        }
    }
    Ok(())
}
