//! What weights were trained for.

use serde::{Deserialize, Serialize};

/// Which two channels of a head RoPE turns together. K's weights only fit the pairing that they were trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// Channels `i` and `i + d / 2`: Hugging Face.
    #[default]
    HalfSplit,
    /// Channels `2 i` and `2 i + 1`: GGUF, whose writer permutes the rows of q and k.
    Interleaved,
}

/// The position of the first token after a compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionRule {
    /// As if nothing had been compressed.
    Logical,
    /// The compressed length.
    Compacted,
}

/// Which rows the image MLPs take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageRule {
    /// Everything up to the last image token, system text included: FastCache.
    Prefix,
    /// Image segments, wherever they stand.
    Segments,
}

/// The model whose cache the weights compress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// Name for people, such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
    pub name: String,
    /// Layers of the model; the file has weights for each.
    pub layers: usize,
    /// KV heads of a layer, over all ranks.
    pub kv_heads: usize,
    /// Values in one row of one head.
    pub head_dim: usize,
    /// Base of RoPE's frequencies.
    pub rope_base: f64,
    /// Channels that RoPE turns, counted from the first; None: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_dim: Option<usize>,
}

/// What weights were trained for, as far as the file says. A plugin refuses a config that contradicts it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Terms {
    /// The model; None when the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelIdentity>,
    /// Positions of the tokens that follow; None when the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<PositionRule>,
    /// RoPE's pairing in K's weights.
    pub pairing: Pairing,
    /// Fewest groups of `factor` rows in a segment for it to be compressed, at least 1 (FastCache's `min_seq_len`).
    pub min_groups: usize,
    /// Entries kept raw at the start; None when the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sinks: Option<u32>,
    /// Entries kept raw at the end; None when the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recent: Option<u32>,
    /// First position that the weights do not know, at least 1: K is compressed after RoPE, so weights are only good for
    /// positions that they were trained on. Rows from there on stay raw. None when the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_position: Option<u32>,
    /// Rows that the image MLPs take; None when the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_rule: Option<ImageRule>,
    /// How the weights were made: data, steps, seed, licence; empty when the file does not say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub training: String,
}

impl Default for Terms {
    /// Nothing known: half-split pairing, since PyTorch checkpoints come from Hugging Face models, and one group.
    fn default() -> Self {
        Self {
            model: None,
            positions: None,
            pairing: Pairing::default(),
            min_groups: 1,
            sinks: None,
            recent: None,
            max_position: None,
            image_rule: None,
            training: String::new(),
        }
    }
}
