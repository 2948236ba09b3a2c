//! A cache of any shape behind the host's C API, as an engine in C would have it, without a model.

use std::ptr::{null, null_mut};

use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::host::Host;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
pub use kvhook_testing::{array, array_mut};

use crate::error::{Error, Result};

/// Bytes of an f16.
const ELEMENT: usize = 2;
/// What an engine's allocator aligns caches to.
const ALIGNMENT: usize = 64;

/// A cache of f16, `[kv_heads, length, head_dim]` in each layer, or `[blocks, kv_heads, block_size, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// For the table.
    pub name: &'static str,
    /// Layers.
    pub layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a row of K and of V.
    pub head_dim: usize,
    /// Rows of each layer.
    pub length: usize,
    /// Rows of a block; 0: contiguous. Must divide `length`.
    pub block_size: usize,
}

impl Shape {
    /// Bytes of K or of V of one layer.
    pub fn tensor_bytes(&self) -> usize {
        self.kv_heads * self.length * self.head_dim * ELEMENT
    }

    /// Bytes of K and V of all layers.
    pub fn bytes(&self) -> usize {
        2 * self.layers * self.tensor_bytes()
    }

    /// The model's shape; each KV head has one query head.
    fn heads(&self) -> kvhook_testing::Shape {
        kvhook_testing::Shape::new(self.layers, self.kv_heads, self.kv_heads, self.head_dim)
    }

    /// The layers as a plugin is told of them.
    pub fn layer_infos(&self) -> Vec<KvhLayerInfo> {
        self.heads().layer_infos()
    }

    /// The model as a plugin is told of it, over [`Shape::layer_infos`].
    pub fn model(&self, layers: &[KvhLayerInfo]) -> KvhModel {
        self.heads().model(F16, array(layers))
    }

    /// What such an engine offers.
    pub fn offers(&self) -> KvhOffers {
        KvhOffers {
            struct_size: size_of::<KvhOffers>(),
            can: KVH_CAN_QUERIES | KVH_CAN_STATE | KVH_CAN_GROWN,
            max_window_queries: 64,
            block_size: self.block_size as u32,
        }
    }
}

const F16: KvhDtype = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 16, lanes: 1 };
const U32: KvhDtype = KvhDtype { code: KVH_DTYPE_UINT, bits: 32, lanes: 1 };

/// Calls a function of the C API, or of a plugin, with room for its message.
///
/// # Errors
/// [`Error::Refused`] for any other status than success.
pub fn call(function: &'static str, body: impl FnOnce(*mut KvhText) -> i32) -> Result<()> {
    let mut buffer = [0u8; 1024];
    let mut text = KvhText::over(&mut buffer);
    let status = body(&mut text);
    let length = text.length.min(buffer.len());
    match status {
        KVHOOK_OK => Ok(()),
        _ => Err(Error::Refused { function, status, message: String::from_utf8_lossy(&buffer[..length]).into_owned() }),
    }
}

/// Nanoseconds that an arm took so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// In the plugin: `bound` and `on_prefill_done`.
    pub plugin: u64,
    /// In the host's commit.
    pub commit: u64,
}

/// A host with one arm, and a cache that it compresses again and again.
pub struct Rig {
    host: *mut KvhookHost,
    shape: Shape,
    memory: Vec<u8>,
    /// Of all layers.
    table: Vec<u32>,
}

impl Rig {
    /// Makes a host with the arm `arm`: `truncate` with a config.
    ///
    /// # Errors
    /// [`Error::Refused`] where the host or the plugin refuses.
    pub fn new(shape: Shape, config: &str) -> Result<Self> {
        let callbacks = KvhookCallbacks {
            struct_size: size_of::<KvhookCallbacks>(),
            context: null_mut(),
            log: None,
            log_max_level: None,
            allocate: None,
            free: None,
        };
        let infos = shape.layer_infos();
        let (models, offers) = ([shape.model(&infos)], shape.offers());
        let folder = crate::model::plugin_folder();
        let folder = folder.to_string_lossy();
        let folders = [KvhStr::new(&folder)];
        let raw = KvhookHostConfig {
            struct_size: size_of::<KvhookHostConfig>(),
            engine: KvhStr::new("kvhook-bench"),
            callbacks: &callbacks,
            models: array(&models),
            offers: &offers,
            plugin_folders: array(&folders),
            copy_folder: KvhStr::new(""),
        };
        let mut host = null_mut();
        // SAFETY: everything that the config leads to lives until the call returns, and is copied.
        call("kvhook_host_create", |error| unsafe { kvhook_host_create(&raw, &mut host, error) })?;
        let blocks = shape.length.checked_div(shape.block_size).unwrap_or(0);
        let rig = Self { host, shape, memory: vec![1; shape.bytes() + ALIGNMENT], table: scattered(blocks) };
        let arm = KvhookArm {
            struct_size: size_of::<KvhookArm>(),
            name: KvhStr::new("arm"),
            plugin: KvhStr::new("truncate"),
            config: KvhStr::new(config),
            sha256: KvhStr::new(""),
            layers: KvhStr::new(""),
            min_tokens: 0,
            weight: 1.0,
            source: KVHOOK_SOURCE_OPERATOR,
            reserved0: 0,
        };
        // SAFETY: the host lives; the arm's texts are borrowed for the call.
        call("kvhook_arm_set", |error| unsafe { kvhook_arm_set(host, &arm, error) })?;
        Ok(rig)
    }

    /// The cache.
    pub fn memory(&mut self) -> &mut [u8] {
        let skip = self.memory.as_ptr().align_offset(ALIGNMENT);
        &mut self.memory[skip..][..self.shape.bytes()]
    }

    /// Begins a sequence that fills the cache, compresses it by `kvhook_compress`, and frees it. The rows that it keeps.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn compress(&mut self) -> Result<Vec<u64>> {
        let length = self.shape.length as u64;
        let uid = self.begin()?;
        let (before, mut after) = (vec![length; self.shape.layers], vec![0u64; self.shape.layers]);
        let layers = self.layers();
        let ask = question(uid, &before);
        let mut commit = KvhookCommit {
            struct_size: size_of::<KvhookCommit>(),
            ticket: 0,
            layers: array(&layers),
            fresh: array::<KvhLayer>(&[]),
            next_position: length,
            stream: null_mut(),
            lengths: array_mut(&mut after),
            new_next_position: 0,
        };
        let mut answer = no_answer();
        // SAFETY: the host lives; the layers describe this rig's memory, which nobody else uses meanwhile.
        call("kvhook_compress", |error| unsafe { kvhook_compress(self.host, &ask, &mut commit, &mut answer, error) })?;
        // SAFETY: the host lives; there is no stream on the CPU.
        call("kvhook_free", |error| unsafe { kvhook_free(self.host, uid, KVH_FREE_FINISHED, null_mut(), error) })?;
        Ok(after)
    }

    /// Begins a sequence that fills the cache. Its uid.
    fn begin(&self) -> Result<u64> {
        let begin = KvhookBegin {
            struct_size: size_of::<KvhookBegin>(),
            key: KvhStr::new(""),
            arm: KvhStr::new("arm"),
            prompt_length: self.shape.length as u64,
            segments: array::<KvhSegment>(&[]),
        };
        let mut sequence = KvhookSequence {
            struct_size: size_of::<KvhookSequence>(),
            uid: 0,
            max_prefix_hit: 0,
            before_attention_phases: 0,
            on_prefill_done: 0,
            grown_every: 0,
        };
        // SAFETY: the host lives; the arguments are lent for the call.
        call("kvhook_begin", |error| unsafe { kvhook_begin(self.host, &begin, &mut sequence, error) })?;
        Ok(sequence.uid)
    }

    /// Begins so many sequences, which stay. The arm's plugin was asked about each, so it hears when one leaves it.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn hold(&self, sequences: usize) -> Result<()> {
        let lengths = vec![self.shape.length as u64; self.shape.layers];
        for _ in 0..sequences {
            let (ask, mut answer) = (question(self.begin()?, &lengths), no_answer());
            // SAFETY: the host lives; the arguments are lent for the call.
            call("kvhook_ask", |error| unsafe { kvhook_ask(self.host, &ask, &mut answer, error) })?;
        }
        Ok(())
    }

    /// What changes its arm, from any thread, as long as the rig lives.
    pub fn operator(&self) -> Operator {
        Operator(self.host)
    }

    fn layers(&mut self) -> Vec<KvhLayer> {
        let Shape { kv_heads, head_dim, length, block_size, .. } = self.shape;
        let (row, bytes) = (head_dim * ELEMENT, self.shape.tensor_bytes());
        let base = self.memory().as_mut_ptr();
        let (table, count) = match block_size {
            0 => (null(), 0),
            _ => (self.table.as_ptr().cast(), self.table.len() as u32),
        };
        let rows = |tensor: usize| KvhRows {
            base: base.wrapping_add(tensor * bytes).cast(),
            stride_block: (row * block_size * kv_heads) as i64,
            stride_token: row as i64,
            stride_head: (row * if block_size == 0 { length } else { block_size }) as i64,
            stride_element: ELEMENT as i64,
            head_dim: head_dim as u32,
            dtype: F16,
        };
        let layer = |layer: usize| KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: layer as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: kv_heads as u32,
            block_size: block_size as u32,
            reserved0: 0,
            length: length as u64,
            k: rows(2 * layer),
            v: rows(2 * layer + 1),
            table: KvhBlockTable { data: table, stride_head: 0, count, dtype: U32 },
            positions: KvhPositions { data: null(), stride_head: 0, count: 0 },
        };
        (0..self.shape.layers).map(layer).collect()
    }

    /// Time of all compressions so far.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn spent(&self) -> Result<Spent> {
        let mut figures = KvhookFigures::to_fill(&mut []);
        // SAFETY: the host lives; the figures are lent for the call.
        call("kvhook_figures", |error| unsafe { kvhook_figures(self.host, KvhStr::new("arm"), &mut figures, error) })?;
        Ok(Spent { plugin: figures.bound.total_ns + figures.on_prefill_done.total_ns, commit: figures.commit.total_ns })
    }
}

/// Changes a rig's arm.
#[derive(Debug, Clone, Copy)]
pub struct Operator(*mut KvhookHost);

// SAFETY: the host's functions may be called from any thread.
unsafe impl Send for Operator {}
// SAFETY: as above.
unsafe impl Sync for Operator {}

impl Operator {
    /// Gives the arm new instances of a plugin that is loaded already.
    ///
    /// # Errors
    /// [`Error::Refused`].
    ///
    /// # Safety
    /// The rig lives; `entry` is a plugin's static entry.
    pub unsafe fn swap(&self, config: &str, entry: *const KvhPluginEntry) -> Result<()> {
        let spec = ArmSpec::new("arm", "loaded", config);
        // SAFETY: by the caller's promise; the host's handle is the host.
        let made = unsafe { (*self.0.cast::<Host>()).arm_set_entry(&spec, entry) };
        made.map_err(|error| Error::Refused {
            function: "arm_set_entry",
            status: error.status(),
            message: error.to_string(),
        })
    }
}

fn question(uid: u64, lengths: &[u64]) -> KvhookAsk {
    KvhookAsk {
        struct_size: size_of::<KvhookAsk>(),
        uid,
        event: KVHOOK_EVENT_PREFILL_DONE,
        reserved0: 0,
        lengths: array(lengths),
        next_position: lengths.first().copied().unwrap_or(0),
        shared_rows: 0,
        published_rows: 0,
    }
}

fn no_answer() -> KvhookAnswer {
    KvhookAnswer {
        struct_size: size_of::<KvhookAnswer>(),
        decision: KVHOOK_DECISION_KEEP,
        reason: KVH_REASON_NONE,
        counts: array_mut::<u64>(&mut []),
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // SAFETY: made by `kvhook_host_create`, and never used again.
        unsafe { kvhook_host_destroy(self.host) };
    }
}

/// Blocks in an order in which an allocator that has run for a while hands them out: neighbours lie apart.
fn scattered(blocks: usize) -> Vec<u32> {
    let step = (0..).map(|odd| blocks / 3 + odd).find(|&step| step > 0 && coprime(step, blocks.max(1)));
    (0..blocks).map(|block| (block * step.unwrap_or(1) % blocks) as u32).collect()
}

fn coprime(mut a: usize, mut b: usize) -> bool {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a == 1
}
