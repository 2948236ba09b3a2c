//! An independent forward pass of a Llama GGUF: full attention with a mask, no cache, nothing of ours.
//!
//! It shares no code with the engine, the host or the kernels: weights come from candle's GGUF reader,
//! attention is a full matrix per head, and what a compressed cache would not hold is masked out. A run
//! through a compressed cache must give the same logits to rounding.

use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Result, Tensor};
use std::fs::File;
use std::path::Path;

struct Layer {
    attention_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// The model, in f32.
pub struct Reference {
    embedding: Tensor,
    output_norm: Tensor,
    layers: Vec<Layer>,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rope_base: f64,
    epsilon: f64,
}

/// What each query may see: `visible(layer, kv_head, query, key)`, asked for `key <= query` only.
pub type Visible<'a> = dyn Fn(usize, usize, usize, usize) -> bool + 'a;

impl Reference {
    /// Loads `path`.
    pub fn load(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let content = gguf_file::Content::read(&mut file)?;
        let number = |key: &str| -> Result<f64> {
            let value = content
                .metadata
                .get(&format!("llama.{key}"))
                .ok_or_else(|| candle_core::Error::Msg(format!("no key llama.{key}")))?;
            match value {
                gguf_file::Value::F32(v) => Ok(f64::from(*v)),
                other => Ok(f64::from(other.to_u32()?)),
            }
        };
        let (width, q_heads, kv_heads) = (
            number("embedding_length")? as usize,
            number("attention.head_count")? as usize,
            number("attention.head_count_kv")? as usize,
        );
        let (blocks, rope_base, epsilon) =
            (number("block_count")? as usize, number("rope.freq_base")?, number("attention.layer_norm_rms_epsilon")?);
        let mut tensor = |name: &str| -> Result<Tensor> {
            content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?.to_dtype(DType::F32)
        };
        let mut layers = Vec::with_capacity(blocks);
        for l in 0..blocks {
            let mut part = |name: &str| tensor(&format!("blk.{l}.{name}.weight"));
            layers.push(Layer {
                attention_norm: part("attn_norm")?,
                q: part("attn_q")?,
                k: part("attn_k")?,
                v: part("attn_v")?,
                o: part("attn_output")?,
                ffn_norm: part("ffn_norm")?,
                gate: part("ffn_gate")?,
                up: part("ffn_up")?,
                down: part("ffn_down")?,
            });
        }
        Ok(Self {
            embedding: tensor("token_embd.weight")?,
            output_norm: tensor("output_norm.weight")?,
            layers,
            q_heads,
            kv_heads,
            head_dim: width / q_heads,
            rope_base,
            epsilon,
        })
    }

    /// Logits `[rows][vocab]` of the tokens from `first` on. `positions[i]` is the position that token `i`
    /// is rotated for.
    pub fn logits(&self, tokens: &[u32], positions: &[u32], first: usize, visible: &Visible) -> Result<Vec<Vec<f32>>> {
        let n = tokens.len();
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        let (cos, sin) = self.rotation(positions)?;
        for (l, layer) in self.layers.iter().enumerate() {
            let h = self.norm(&x, &layer.attention_norm)?;
            let q = self.rotate(&heads(&h, &layer.q, self.q_heads)?, &cos, &sin)?;
            let k = self.rotate(&heads(&h, &layer.k, self.kv_heads)?, &cos, &sin)?;
            let v = heads(&h, &layer.v, self.kv_heads)?;
            let group = self.q_heads / self.kv_heads;
            let mut outputs = Vec::with_capacity(self.q_heads);
            for kv in 0..self.kv_heads {
                let mut mask = vec![f32::NEG_INFINITY; n * n];
                for i in 0..n {
                    for j in 0..=i {
                        if visible(l, kv, i, j) {
                            mask[i * n + j] = 0.0;
                        }
                    }
                }
                let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?;
                let (key, value) = (k.get(kv)?.t()?.contiguous()?, v.get(kv)?.contiguous()?);
                for g in 0..group {
                    let query = q.get(kv * group + g)?.contiguous()?;
                    let scores = (query.matmul(&key)? / (self.head_dim as f64).sqrt())?;
                    let scores = (scores + &mask)?;
                    let max = scores.max_keepdim(1)?;
                    let weights = scores.broadcast_sub(&max)?.exp()?;
                    let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
                    outputs.push(weights.matmul(&value)?);
                }
            }
            let attention = Tensor::cat(&outputs, 1)?;
            x = (x + attention.matmul(&layer.o.t()?)?)?;
            let h = self.norm(&x, &layer.ffn_norm)?;
            let gate = h.matmul(&layer.gate.t()?)?.silu()?;
            let up = h.matmul(&layer.up.t()?)?;
            x = (x + (gate * up)?.matmul(&layer.down.t()?)?)?;
        }
        let rows = x.narrow(0, first, n - first)?.contiguous()?;
        self.norm(&rows, &self.output_norm)?.matmul(&self.embedding.t()?)?.to_vec2()
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = (x.sqr()?.sum_keepdim(1)? / x.dim(1)? as f64)?;
        x.broadcast_div(&(mean + self.epsilon)?.sqrt()?)?.broadcast_mul(weight)
    }

    fn rotation(&self, positions: &[u32]) -> Result<(Tensor, Tensor)> {
        let half = self.head_dim / 2;
        let angle = |i: usize| {
            let (position, pair) = (f64::from(positions[i / half]), (i % half) as f64);
            position * self.rope_base.powf(-2.0 * pair / self.head_dim as f64)
        };
        let count = positions.len() * half;
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..count).map(|i| f(angle(i)) as f32).collect();
            Tensor::from_vec(values, (positions.len(), half, 1), &Device::Cpu)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }

    /// Interleaved pairs, as the GGUF's q and k rows are permuted for. `x` is `[heads, tokens, head_dim]`.
    fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (heads, tokens, dim) = x.dims3()?;
        let pairs = x.reshape((heads, tokens, dim / 2, 2))?;
        let (a, b) = (pairs.narrow(3, 0, 1)?, pairs.narrow(3, 1, 1)?);
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
        Tensor::cat(&[first, second], 3)?.reshape((heads, tokens, dim))
    }
}

/// `[tokens, width] x [heads * head_dim, width]^T` as `[heads, tokens, head_dim]`.
fn heads(x: &Tensor, weight: &Tensor, heads: usize) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    let (tokens, width) = y.dims2()?;
    y.reshape((tokens, heads, width / heads))?.transpose(0, 1)?.contiguous()
}
