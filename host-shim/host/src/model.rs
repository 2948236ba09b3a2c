//! The model as the host keeps it: a copy for each rank.

use kvhook_abi::boundary::{self, Structs, Values};
use kvhook_abi::raw::*;
use kvhook_abi::view;

use crate::error::HostError;

/// A rank's model, copied from the engine's. Its addresses stay the same as long as it lives.
pub struct Model {
    raw: KvhModel,
    layers: Box<[KvhLayerInfo]>,
    _name: Box<str>,
    _frequencies: Box<[f32]>,
}

// SAFETY: the pointers in `raw` lead to what the struct owns, which is never written.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Copies what the engine says.
    ///
    /// # Errors
    /// `InvalidArgument` for null pointers and sizes; `Unsupported` for a dtype that the host's kernels do not move.
    ///
    /// # Safety
    /// `raw` and what it points to is valid for reading.
    pub unsafe fn new(raw: KvhModel) -> Result<Self, HostError> {
        // SAFETY: passed on from the caller.
        let (name, layers) = unsafe {
            (
                boundary::text(raw.name, "models.name")?.into(),
                Structs::<KvhLayerInfo>::new(raw.layers, "models.layers")?,
            )
        };
        let refuse = |problem: String| Err(HostError::Unsupported(problem));
        if layers.is_empty() {
            return Err(HostError::Argument("`models.layers` is empty; expected one for each layer".to_owned()));
        }
        let dtype = raw.cache_dtype;
        if view::dtype(dtype).is_none() && (dtype.bits, dtype.lanes) != (8, 1) {
            let found = view::dtype_name(dtype);
            return refuse(format!("a cache of {found}; expected f32, f16, bf16 or elements of one byte"));
        }
        let frequencies: Box<[f32]> = if raw.rope_frequencies.is_null() {
            Box::default()
        } else {
            let array = KvhArray {
                data: raw.rope_frequencies.cast(),
                count: u64::from(raw.rotary_dim / 2),
                stride: size_of::<f32>() as u64,
            };
            // SAFETY: the contract says that there are `rotary_dim / 2` of them.
            unsafe { Values::<f32>::new(array, "models.rope_frequencies")? }.iter().collect()
        };
        let layers = (0..layers.len())
            .map(|index| Ok(KvhLayerInfo { struct_size: size_of::<KvhLayerInfo>(), ..layers.get(index)? }))
            .collect::<Result<Box<[_]>, HostError>>()?;
        let odd = |info: &KvhLayerInfo| !info.k_head_dim.is_multiple_of(2) || !info.v_head_dim.is_multiple_of(2);
        if let Some(layer) = layers.iter().position(odd).filter(|_| dtype.bits == 8) {
            let KvhLayerInfo { k_head_dim, v_head_dim, .. } = layers[layer];
            return refuse(format!(
                "layer {layer}: rows of {k_head_dim} and {v_head_dim} elements of one byte; expected even numbers, for they are \
                 moved two by two"
            ));
        }
        let name: Box<str> = name;
        let raw = KvhModel {
            struct_size: size_of::<KvhModel>(),
            name: KvhStr::new(&name),
            rope_frequencies: if frequencies.is_empty() { core::ptr::null() } else { frequencies.as_ptr() },
            layers: KvhArray {
                data: layers.as_ptr().cast(),
                count: layers.len() as u64,
                stride: size_of::<KvhLayerInfo>() as u64,
            },
            ..raw
        };
        Ok(Self { raw, layers, _name: name, _frequencies: frequencies })
    }

    /// As plugins see it.
    pub fn raw(&self) -> &KvhModel {
        &self.raw
    }

    /// Its layers.
    pub fn layers(&self) -> &[KvhLayerInfo] {
        &self.layers
    }

    /// Element type of the cache.
    pub fn dtype(&self) -> KvhDtype {
        self.raw.cache_dtype
    }

    /// Whether rows are numbers that can be written anew. Those of one-byte elements, whose meaning stands elsewhere (scales,
    /// the kind of fp8), are only kept or dropped.
    pub fn has_values(&self) -> bool {
        view::dtype(self.raw.cache_dtype).is_some()
    }

    /// Bytes of one K row and its V row in a layer.
    pub fn entry_bytes(&self, layer: usize) -> u64 {
        let info = &self.layers[layer];
        let v = if info.flags & KVH_LAYER_FLAG_V_INSIDE_K == 0 { u64::from(info.v_head_dim) } else { 0 };
        (u64::from(info.k_head_dim) + v) * u64::from(self.raw.cache_dtype.bits) / 8
    }
}

/// Whether a layer holds rows of its own in which every token sees all earlier ones: only these are planned.
pub fn is_planned(info: &KvhLayerInfo) -> bool {
    info.kind == KVH_LAYER_FULL && info.shared_with < 0
}
