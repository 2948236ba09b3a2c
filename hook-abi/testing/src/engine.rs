//! The mock engine: a model's shape, and what is offered to plugins.

use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;

use crate::arrays::{Array, Message};
use crate::cache::dtype_of;
use crate::fault::Fault;
use crate::host::Host;
use crate::instance::Instance;

/// A model's shape, as one rank sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers.
    pub layers: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Query heads of this rank.
    pub q_heads: usize,
    /// Channels of a row of K and of V.
    pub head_dim: usize,
    /// The whole model's index of this rank's first KV head.
    pub first_kv_head: usize,
    /// KV heads of the whole model.
    pub total_kv_heads: usize,
}

impl Shape {
    /// The shape of a model on one rank.
    pub const fn new(layers: usize, kv_heads: usize, q_heads: usize, head_dim: usize) -> Self {
        Self { layers, kv_heads, q_heads, head_dim, first_kv_head: 0, total_kv_heads: kv_heads }
    }

    /// The same, where this rank has the heads from `first` on, of `total`.
    pub const fn part(self, first: usize, total: usize) -> Self {
        Self { first_kv_head: first, total_kv_heads: total, ..self }
    }

    /// The layers as a plugin is told of them: full ones.
    pub fn layer_infos(&self) -> Vec<KvhLayerInfo> {
        let info = |_| KvhLayerInfo {
            struct_size: size_of::<KvhLayerInfo>(),
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: self.kv_heads as u32,
            q_heads: self.q_heads as u32,
            k_head_dim: self.head_dim as u32,
            v_head_dim: self.head_dim as u32,
        };
        (0..self.layers).map(info).collect()
    }

    /// The model over [`Shape::layer_infos`]: on the CPU, RoPE of base 10,000 over halves of all channels, one rank.
    pub fn model(&self, cache_dtype: KvhDtype, layers: KvhArray) -> KvhModel {
        KvhModel {
            struct_size: size_of::<KvhModel>(),
            name: KvhStr::new("mock model"),
            rank: 0,
            ranks: 1,
            total_kv_heads: self.total_kv_heads as u32,
            first_kv_head: self.first_kv_head as u32,
            device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            cache_dtype,
            position_axes: 1,
            max_positions: 1 << 20,
            rope_base: 10_000.0,
            rope_frequencies: std::ptr::null(),
            rotary_dim: self.head_dim as u32,
            rope_pairing: KVH_ROPE_HALF_SPLIT,
            layers,
        }
    }
}

/// An engine that has a shape but no model. Its fields may be changed before [`Engine::create`].
#[derive(Debug, Clone)]
pub struct Engine {
    /// The model's shape.
    pub shape: Shape,
    /// Kinds of the layers (`KVH_LAYER_*`); those that are not named are full.
    pub kinds: Vec<i32>,
    /// What it says the cache holds.
    pub cache_dtype: KvhDtype,
    /// `KVH_CAN_*` bits that are offered.
    pub can: u64,
    /// Most queries of a prompt's end that it shows.
    pub max_window_queries: u32,
    /// Tokens of a block, as offered; 0: contiguous.
    pub block_size: u32,
    /// Bytes by which its structs in arrays are larger than this version's, as a newer host's are; a multiple of 8.
    pub extra: usize,
    /// The lowest importance of log messages that it takes: `KVH_LOG_*`.
    pub log_level: i32,
}

impl Engine {
    /// Offers everything but layers and heads of different counts by data; f32, blocks of 16.
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            kinds: Vec::new(),
            cache_dtype: dtype_of(Dtype::F32),
            can: KVH_CAN_QUERIES
                | KVH_CAN_ALL_QUERIES
                | KVH_CAN_LAYER_COUNTS
                | KVH_CAN_STATE
                | KVH_CAN_REWRITE
                | KVH_CAN_MOVE_POSITIONS
                | KVH_CAN_GROWN,
            max_window_queries: 64,
            block_size: 16,
            extra: 0,
            log_level: KVH_LOG_INFO,
        }
    }

    /// Makes an instance of a plugin.
    ///
    /// # Errors
    /// [`Fault::Refused`]; [`Fault::NotImplemented`] where the entry lacks a function; [`Fault::InstanceWritten`].
    pub fn create(&self, entry: &'static KvhPluginEntry, config: impl AsRef<[u8]>) -> Result<Instance, Fault> {
        let create = entry.create.ok_or(Fault::NotImplemented { hook: "create" })?;
        let host = Box::new(Host::new(self.log_level));
        let raw_host = Box::new(host.raw());
        let mut infos = self.shape.layer_infos();
        infos.iter_mut().zip(&self.kinds).for_each(|(info, kind)| info.kind = *kind);
        let infos = Array::sized(self.extra, infos);
        let model = self.shape.model(self.cache_dtype, infos.raw());
        let offers = KvhOffers {
            struct_size: size_of::<KvhOffers>(),
            can: self.can,
            max_window_queries: self.max_window_queries,
            block_size: self.block_size,
        };
        let config = config.as_ref();
        let args = KvhCreateArgs {
            struct_size: size_of::<KvhCreateArgs>(),
            host: &raw const *raw_host,
            model: &raw const model,
            offers: &raw const offers,
            config: KvhStr { data: config.as_ptr().cast(), length: config.len() },
        };
        let untouched = std::ptr::without_provenance_mut(1);
        let (mut raw, mut error) = (untouched, Message::new());
        // SAFETY: the arguments live until the call returns, the host as long as the instance.
        let status = unsafe { create(&raw const args, &raw mut raw, error.raw()) };
        match error.outcome(status) {
            Ok(()) => Ok(Instance::new(entry, raw, self.clone(), host, raw_host)),
            Err(_) if raw != untouched => Err(Fault::InstanceWritten),
            Err(fault) => Err(fault),
        }
    }
}
