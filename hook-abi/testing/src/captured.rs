//! Keys, values and queries of a real model, for tests that random ones say little to: real keys have a few large
//! channels and share most of their direction, and attention goes to few of them. `captured/SOURCE.md` says where they
//! come from.

use half::f16;
use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::KVH_PHASE_PREFILL;
use serde_json::Value;

use crate::cache::{Form, Layer, PerHead};
use crate::engine::Shape;
use crate::fault::Fault;
use crate::instance::{Instance, Seen};
use crate::sequence::Sequence;

/// Base of the model's rotary positions.
pub const ROPE_BASE: f64 = 100_000.0;

static FILE: &[u8] = include_bytes!("../captured/smollm2-135m.safetensors");

/// Two layers of one prompt of SmolLM2-135M.
#[derive(Debug, Clone)]
pub struct Captured {
    /// Two layers, with 3 KV heads, 9 query heads and 64 channels.
    pub shape: Shape,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// The layers.
    pub layers: Vec<CapturedLayer>,
}

/// One layer; all values are those of f16 numbers.
#[derive(Debug, Clone)]
pub struct CapturedLayer {
    /// Which layer of the model it is.
    pub index: usize,
    /// `[kv_heads][tokens][head_dim]`, with RoPE applied.
    pub keys: PerHead,
    /// `[kv_heads][tokens][head_dim]`
    pub values: PerHead,
    /// Of the prompt's last tokens: `[tokens][q_heads][head_dim]`, with RoPE applied.
    pub queries: PerHead,
}

/// The captured prompt.
///
/// # Panics
/// Never: the file is part of the crate.
pub fn captured() -> Captured {
    let header = header();
    let names = header.as_object().expect("the header is an object").keys();
    let mut indices: Vec<usize> =
        names.filter_map(|name| name.strip_prefix("layers.")?.strip_suffix(".k")?.parse().ok()).collect();
    indices.sort_unstable();
    let layers: Vec<CapturedLayer> = indices
        .into_iter()
        .map(|index| {
            let tensor = |name: &str| tensor(&header, &format!("layers.{index}.{name}"));
            CapturedLayer { index, keys: by_head(&tensor("k")), values: by_head(&tensor("v")), queries: tensor("q") }
        })
        .collect();
    let first = &layers[0];
    let (kv_heads, q_heads) = (first.keys.len(), first.queries[0].len());
    let shape = Shape::new(layers.len(), kv_heads, q_heads, first.keys[0][0].len());
    Captured { shape, tokens: first.keys[0].len(), layers }
}

impl Captured {
    /// The prompt in a dtype and a layout; values are rounded where the dtype holds less than f16.
    pub fn sequence(&self, uid: u64, dtype: Dtype, form: Form) -> Sequence {
        let layer = |layer: &CapturedLayer| Layer::new(layer.keys.clone(), layer.values.clone(), dtype, form);
        let mut sequence = Sequence::new(uid, self.layers.iter().map(layer).collect());
        sequence.queries_seen = self.layers[0].queries.len() as u64;
        sequence
    }

    /// Shows an instance the end of the prompt in each layer that it asked for, where it asked for prompts.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn show(&self, uid: u64, instance: &mut Instance, dtype: Dtype) -> Result<(), Fault> {
        let needs = instance.needs()?;
        let wanted = |layer: &usize| needs.layer_mask[layer / 64] >> (layer % 64) & 1 == 1;
        let prompts = needs.phases & KVH_PHASE_PREFILL != 0;
        let layers = (0..self.shape.layers).filter(wanted).filter(|_| prompts);
        layers.into_iter().try_for_each(|layer| instance.see(layer, KVH_PHASE_PREFILL, &[self.seen(uid, layer)], dtype))
    }

    /// The end of the prompt in a layer, to be shown with [`Instance::see`].
    pub fn seen(&self, uid: u64, layer: usize) -> Seen {
        let queries = self.layers[layer].queries.clone();
        let first_position = (self.tokens - queries.len()) as u64;
        Seen { uid, prompt_length: self.tokens as u64, first_position, queries }
    }
}

/// The JSON before the data, which begins 8 bytes and its length into the file.
fn header() -> Value {
    let json = &FILE[8..data_start()];
    serde_json::from_slice(json).expect("the file is a safetensors file")
}

fn data_start() -> usize {
    let length = FILE.first_chunk::<8>().expect("the file has a head");
    8 + u64::from_le_bytes(*length) as usize
}

/// A tensor of three dimensions.
fn tensor(header: &Value, name: &str) -> PerHead {
    let numbers = |field: &str| -> Vec<usize> {
        let list = header[name][field].as_array().expect("each tensor has a shape and a place");
        list.iter().map(|number| number.as_u64().expect("a size is a number") as usize).collect()
    };
    let (shape, place) = (numbers("shape"), numbers("data_offsets"));
    let bytes = &FILE[data_start()..][place[0]..place[1]];
    let values: Vec<f32> =
        bytes.chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()).collect();
    let rows = values.chunks(shape[2]).map(<[f32]>::to_vec).collect::<Vec<_>>();
    rows.chunks(shape[1]).map(<[Vec<f32>]>::to_vec).collect()
}

/// `[tokens][heads][dim]` as `[heads][tokens][dim]`.
fn by_head(rows: &PerHead) -> PerHead {
    (0..rows[0].len()).map(|head| rows.iter().map(|token| token[head].clone()).collect()).collect()
}
