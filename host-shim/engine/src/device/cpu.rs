//! A step on the CPU.
//!
//! The dense parts run on the caller's thread, over all rows at once; K, V and attention run on the ranks' threads.

use std::sync::Arc;

use crate::error::Result;
use crate::model::Model;
use crate::ops::{Rope, add, rms_norm, swiglu};
use crate::rank::{Batch, Ranks};

/// As [`forward`](crate::forward::forward).
pub(crate) fn forward(
    model: &Model,
    ranks: &Ranks,
    batch: Batch,
    tokens: &[u32],
    wanted: &[usize],
) -> Result<Vec<Vec<f32>>> {
    let (config, weights) = (&model.config, &model.weights);
    let (hidden, heads, kv_heads) = (config.hidden, config.heads, config.kv_heads);
    let mut x = vec![0.0; tokens.len() * hidden];
    for (row, &token) in x.chunks_exact_mut(hidden).zip(tokens) {
        weights.embedding.copy_row(token as usize, row);
    }
    let rope = Rope { frequencies: config.rope_frequencies.clone() };
    let positions = batch.positions();
    let batch = Arc::new(batch);
    for (layer, weight) in weights.layers.iter().enumerate() {
        let mut qkv = weight.qkv.multiply(&rms_norm(&x, &weight.attention_norm, config.rms_eps));
        // v lies behind q and k and is not turned.
        rope.rotate(&mut qkv, weight.qkv.outputs(), heads + kv_heads, &positions);
        let (qkv, shared) = (Arc::new(qkv), Arc::clone(&batch));
        let parts = ranks.run(move |rank| rank.layer_step(layer, &shared, &qkv, heads, kv_heads))?;
        let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        let attention = side_by_side(parts, tokens.len());
        add(&mut x, &weight.attention_output.multiply(&attention));
        let gate_up = weight.gate_up.multiply(&rms_norm(&x, &weight.feed_forward_norm, config.rms_eps));
        add(&mut x, &weight.down.multiply(&swiglu(&gate_up, config.feed_forward)));
    }
    let last: Vec<f32> = wanted.iter().flat_map(|row| &x[row * hidden..(row + 1) * hidden]).copied().collect();
    let output = weights.output.as_ref().unwrap_or(&weights.embedding);
    let logits = output.multiply(&rms_norm(&last, &weights.output_norm, config.rms_eps));
    Ok(logits.chunks_exact(config.vocab).map(<[f32]>::to_vec).collect())
}

/// Joins the ranks' heads to whole rows: rank by rank, which is the order of the query heads.
fn side_by_side(mut parts: Vec<Vec<f32>>, rows: usize) -> Vec<f32> {
    if parts.len() == 1 {
        return parts.pop().unwrap_or_default();
    }
    let mut out = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for row in 0..rows {
        for part in &parts {
            let width = part.len() / rows;
            out.extend_from_slice(&part[row * width..(row + 1) * width]);
        }
    }
    out
}
