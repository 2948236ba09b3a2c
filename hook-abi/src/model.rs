//! The model as an instance sees it, copied at `create`.

use crate::boundary::{self, Structs};
use crate::error::PluginError;
use crate::offers::LayerKind;
use crate::raw::*;
use crate::view;
use kvhook_kernels::Dtype;

/// What stays the same for one layer of a model, on one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerInfo {
    /// What its cache holds.
    pub kind: LayerKind,
    /// V lies inside the K rows.
    pub v_inside_k: bool,
    /// Tokens that a sliding window sees; 0 otherwise.
    pub window: u32,
    /// Layer whose cache this one reads.
    pub shared_with: Option<usize>,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Query heads of this rank.
    pub q_heads: usize,
    /// Channels of a K row.
    pub k_head_dim: usize,
    /// Channels of a V row.
    pub v_head_dim: usize,
}

impl LayerInfo {
    /// Whether plans are made for this layer: its tokens see everything and its cache is its own.
    pub fn is_planned(&self) -> bool {
        self.kind == LayerKind::Full && self.shared_with.is_none()
    }
}

/// How RoPE pairs channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairing {
    /// Channel `c` with `c + rotary_dim / 2`.
    HalfSplit,
    /// Channel `2 c` with `2 c + 1`.
    Interleaved,
    /// No rotary positions.
    None,
    /// A pairing that this version does not know.
    Unknown(i32),
}

/// The model as one rank sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// Name of the model, for messages.
    pub name: String,
    /// This rank.
    pub rank: u32,
    /// Ranks.
    pub ranks: u32,
    /// KV heads of the whole model.
    pub total_kv_heads: u32,
    /// The whole model's index of this rank's first KV head.
    pub first_kv_head: u32,
    /// Device type, as DLPack numbers them: `KVH_DEVICE_*`.
    pub device_type: i32,
    /// Ordinal of the device.
    pub device_id: i32,
    /// Element type of the cache.
    pub cache_dtype: KvhDtype,
    /// Axes of a position: 3 for multimodal RoPE, else 1.
    pub position_axes: u32,
    /// Longest sequence that the model takes, in tokens.
    pub max_positions: u64,
    /// RoPE base; 0 when `rope_frequencies` gives them.
    pub rope_base: f64,
    /// Inverse frequencies; empty: from the base.
    pub rope_frequencies: Vec<f32>,
    /// Channels that are rotated.
    pub rotary_dim: u32,
    /// How channels are paired.
    pub rope_pairing: RopePairing,
    /// One for each layer.
    pub layers: Vec<LayerInfo>,
}

impl ModelInfo {
    /// Element type of the cache, for a plugin that reads rows or writes them: to be asked in `create`. One that only says
    /// which rows are kept works on every cache.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] for one that the kernels do not read, like those of one byte.
    pub fn dtype(&self) -> Result<Dtype, PluginError> {
        view::dtype(self.cache_dtype).ok_or_else(|| {
            let found = view::dtype_name(self.cache_dtype);
            PluginError::Unsupported(format!("the cache is {found}; values are read of f32, f16 and bf16"))
        })
    }

    /// Copies the host's description.
    ///
    /// # Errors
    /// [`PluginError::InvalidArgument`] naming what is null, too small or not UTF-8.
    ///
    /// # Safety
    /// `model` is null or what the contract says of [`KvhModel`].
    pub(crate) unsafe fn read(model: *const KvhModel) -> Result<Self, PluginError> {
        // SAFETY: passed on from the caller.
        let raw = unsafe { boundary::read(model, "args.model")? };
        // SAFETY: the contract makes the name and the array readable during the call.
        let (name, layers) =
            unsafe { (boundary::text(raw.name, "model.name")?, Structs::new(raw.layers, "model.layers")?) };
        let layers = (0..layers.len())
            .map(|index| layers.get(index).map(|layer| LayerInfo::from_raw(&layer)))
            .collect::<Result<_, _>>()?;
        let pairs = raw.rotary_dim as usize / 2;
        let rope_frequencies = if raw.rope_frequencies.is_null() {
            Vec::new()
        } else {
            // SAFETY: not null, so the contract says that `rotary_dim / 2` of them are there.
            unsafe { core::slice::from_raw_parts(raw.rope_frequencies, pairs) }.to_vec()
        };
        Ok(Self {
            name: name.to_owned(),
            rank: raw.rank,
            ranks: raw.ranks,
            total_kv_heads: raw.total_kv_heads,
            first_kv_head: raw.first_kv_head,
            device_type: raw.device.device_type,
            device_id: raw.device.device_id,
            cache_dtype: raw.cache_dtype,
            position_axes: raw.position_axes,
            max_positions: raw.max_positions,
            rope_base: raw.rope_base,
            rope_frequencies,
            rotary_dim: raw.rotary_dim,
            rope_pairing: match raw.rope_pairing {
                KVH_ROPE_HALF_SPLIT => RopePairing::HalfSplit,
                KVH_ROPE_INTERLEAVED => RopePairing::Interleaved,
                KVH_ROPE_NONE => RopePairing::None,
                other => RopePairing::Unknown(other),
            },
            layers,
        })
    }

    /// Whether the cache lies in ordinary memory.
    pub fn on_cpu(&self) -> bool {
        self.device_type == KVH_DEVICE_CPU
    }
}

impl LayerInfo {
    fn from_raw(raw: &KvhLayerInfo) -> Self {
        Self {
            kind: raw.kind.into(),
            v_inside_k: raw.flags & KVH_LAYER_FLAG_V_INSIDE_K != 0,
            window: raw.window,
            shared_with: usize::try_from(raw.shared_with).ok(),
            kv_heads: raw.kv_heads as usize,
            q_heads: raw.q_heads as usize,
            k_head_dim: raw.k_head_dim as usize,
            v_head_dim: raw.v_head_dim as usize,
        }
    }
}
