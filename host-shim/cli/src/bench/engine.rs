//! An engine without a model: a host with the plugins that users load, and compressions of a cache through it.

use std::collections::HashMap;
use std::ffi::c_void;
use std::marker::PhantomData;

use kvhook_abi::boundary::Structs;
use kvhook_abi::raw::*;
use kvhook_host::ask::Ask;
use kvhook_host::attention::Step;
use kvhook_host::callbacks::Callbacks;
use kvhook_host::commit::CommitRequest;
use kvhook_host::figures::reason_name;
use kvhook_host::host::{Host, HostConfig};
use kvhook_host::instance::Event;
use kvhook_host::lifecycle::Begin;
use kvhook_host::model::Model;
use kvhook_host::prepare::PrepareRequest;
use kvhook_host::raw::{
    KVHOOK_DECISION_KEEP, KVHOOK_MOVE_TABLE, KVHOOK_REASON_DROPPED, KvhookCallbacks, KvhookFigures, KvhookReason,
};
use kvhook_host::spec::ArmSpec;
use kvhook_host::ticket::Verdict;
use kvhook_host::view::Layers;
use tempfile::NamedTempFile;

use super::cache::{BF16, Cache, Sequence};
use super::error::BenchError;
use super::machine::{Machine, Memory, Work};
use super::mlp_file;
use super::rows::{Operation, Row};
use super::shapes::{Form, Shape};
use crate::plugins;

/// The host of one shape and layout, with an arm for each operation and share that was asked for.
pub struct Engine<'a> {
    host: Host,
    model: Model,
    block_size: u32,
    shape: &'static Shape,
    /// The window of queries of each arm.
    arms: HashMap<String, usize>,
    weights: HashMap<usize, NamedTempFile>,
    /// The host calls back to the machine.
    machine: PhantomData<&'a dyn Machine>,
}

impl<'a> Engine<'a> {
    /// A host without arms.
    ///
    /// # Errors
    /// [`BenchError::Host`].
    pub fn new(machine: &'a dyn Machine, shape: &'static Shape, form: Form) -> Result<Self, BenchError> {
        let block_size = form.block_size() as u32;
        let raw = KvhookCallbacks { log: Some(log), log_max_level: Some(max_level), ..machine.callbacks() };
        // SAFETY: the machine outlives this engine, and its callbacks are callable as long as it lives.
        let callbacks = unsafe { Callbacks::new(&raw)? };
        let offers = KvhOffers {
            struct_size: size_of::<KvhOffers>(),
            can: KVH_CAN_QUERIES | KVH_CAN_STATE | KVH_CAN_REWRITE,
            max_window_queries: 64,
            block_size,
        };
        let host = Host::new(HostConfig {
            engine: concat!("kvhook-bench ", env!("CARGO_PKG_VERSION")).into(),
            callbacks,
            models: vec![model(machine, shape)?],
            offers,
            plugin_folders: plugins::folders([]),
            copy_folder: None,
        })?;
        let (arms, weights) = Default::default();
        Ok(Self { host, model: model(machine, shape)?, block_size, shape, arms, weights, machine: PhantomData })
    }

    /// The arm of a row, made when it is asked for first: its name, and the queries that are shown to it.
    fn arm(&mut self, row: &Row) -> Result<(String, usize), BenchError> {
        let name = format!("{}-{}", row.operation.name(), row.keep);
        if let Some(&window) = self.arms.get(&name) {
            return Ok((name, window));
        }
        let keep = 1.0 / row.keep as f64;
        let (plugin, config, window) = match row.operation {
            Operation::KeyNorm => ("truncate", format!("keep={keep},history=top,importance=key_norm"), 0),
            Operation::KeyDiff => ("truncate", format!("keep={keep},history=top,importance=key_diff"), 0),
            Operation::Attention(window) => {
                // TOVA pools nothing.
                let pool = if window == 1 { 1 } else { 5 };
                let config = format!("keep={keep},history=top,importance=attention,window={window},pool={pool}");
                ("truncate", config, window)
            }
            Operation::Random => ("truncate", format!("keep={keep},history=sample,importance=uniform"), 0),
            Operation::StreamingBlocks => ("truncate", format!("keep={keep},history=none,align=block"), 0),
            Operation::Streaming | Operation::Commit | Operation::TopK => {
                ("truncate", format!("keep={keep},history=none"), 0)
            }
            Operation::Mlp(factor) => ("mlp-decouple", self.mlp_config(factor)?, 0),
        };
        self.host.set_arm(&ArmSpec::new(&name, plugin, config))?;
        self.arms.insert(name.clone(), window);
        Ok((name, window))
    }

    fn mlp_config(&mut self, factor: usize) -> Result<String, BenchError> {
        if !self.weights.contains_key(&factor) {
            self.weights.insert(factor, mlp_file::write(self.shape, factor)?);
        }
        let path = self.weights.get(&factor).map(|file| file.path().to_string_lossy().into_owned());
        let config = serde_json::json!({ "weights": path, "sinks": 0, "recent": 0, "positions": "logical" });
        Ok(config.to_string())
    }

    /// # Safety
    /// The layers describe a cache that nobody else uses.
    unsafe fn read(&self, layers: &[KvhLayer]) -> Result<Layers, BenchError> {
        // SAFETY: the array covers the slice.
        Ok(unsafe { Layers::read(array(layers), "layers", &self.model, self.block_size)? })
    }
}

unsafe extern "C" fn log(_: *mut c_void, record: *const KvhLogRecord) {
    // SAFETY: the host lends a record during the call.
    let text = unsafe { kvhook_abi::boundary::text((*record).message, "message") };
    if let Ok(text) = text {
        eprintln!("{text}");
    }
}

unsafe extern "C" fn max_level(_: *mut c_void) -> i32 {
    KVH_LOG_WARN
}

fn array<T>(elements: &[T]) -> KvhArray {
    KvhArray { data: elements.as_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

fn model(machine: &dyn Machine, shape: &Shape) -> Result<Model, BenchError> {
    let info = || KvhLayerInfo {
        struct_size: size_of::<KvhLayerInfo>(),
        kind: KVH_LAYER_FULL,
        flags: 0,
        window: 0,
        shared_with: -1,
        kv_heads: shape.kv_heads as u32,
        q_heads: shape.q_heads as u32,
        k_head_dim: shape.head_dim as u32,
        v_head_dim: shape.head_dim as u32,
    };
    let layers: Vec<KvhLayerInfo> = (0..shape.layers).map(|_| info()).collect();
    let raw = KvhModel {
        struct_size: size_of::<KvhModel>(),
        name: KvhStr::new(shape.name),
        rank: 0,
        ranks: 1,
        total_kv_heads: shape.kv_heads as u32,
        first_kv_head: 0,
        device: machine.device(),
        cache_dtype: BF16,
        position_axes: 1,
        max_positions: 1 << 20,
        rope_base: 5e5,
        rope_frequencies: std::ptr::null(),
        rotary_dim: shape.head_dim as u32,
        rope_pairing: KVH_ROPE_HALF_SPLIT,
        layers: array(&layers),
    };
    // SAFETY: everything that `raw` leads to lives until the call returns, and is copied.
    Ok(unsafe { Model::new(raw)? })
}

/// A compression of all sequences of a cache.
pub struct Compression<'a, 'e> {
    machine: &'a dyn Machine,
    engine: &'e Engine<'a>,
    cache: &'e Cache<'a>,
    arm: String,
    /// The last queries of each sequence, the same ones for each layer.
    window: usize,
    queries: Memory<'a>,
    /// Of each sequence.
    layers: Vec<Vec<KvhLayer>>,
    /// The same, before the tokens whose queries are shown.
    before: Vec<Vec<KvhLayer>>,
    lengths: Vec<Vec<u64>>,
    uids: Vec<u64>,
    tickets: Vec<u64>,
    /// Movement of each ticket, once it is ready.
    movements: Vec<Option<i32>>,
    /// What the arm's figures said before.
    figures: KvhookFigures,
}

impl<'a, 'e> Compression<'a, 'e> {
    /// Of a row's operation.
    ///
    /// # Errors
    /// What the host and the plugin refuse.
    pub fn new(
        machine: &'a dyn Machine,
        engine: &'e mut Engine<'a>,
        cache: &'e Cache<'a>,
        row: &Row,
    ) -> Result<Self, BenchError> {
        let (arm, window) = engine.arm(row)?;
        let shape = cache.shape;
        let queries = Memory::new(machine, cache.sequences.len() * window * shape.q_heads * shape.row_bytes())?;
        machine.refill(&queries)?;
        let of = |less: usize| -> Vec<Vec<KvhLayer>> {
            cache.sequences.iter().map(|sequence| cache.layers(sequence, sequence.tokens - less)).collect()
        };
        let figures = engine.host.arm(&arm)?.figures.read();
        let lengths = |sequence: &Sequence| vec![sequence.tokens as u64; shape.layers];
        Ok(Self {
            machine,
            engine,
            cache,
            arm,
            window,
            queries,
            layers: of(0),
            before: of(window),
            lengths: cache.sequences.iter().map(lengths).collect(),
            uids: Vec::new(),
            tickets: Vec::new(),
            movements: Vec::new(),
            figures,
        })
    }

    /// The last tokens' queries of all sequences, layer by layer, as a prefill's last step shows them.
    fn show_queries(&self) -> Result<(), BenchError> {
        let shape = self.cache.shape;
        let tokens = self.window * self.uids.len();
        let mut sizes = [shape.q_heads, shape.kv_heads].map(|heads| [tokens, heads, shape.head_dim].map(|n| n as i64));
        let mut strides = sizes.map(|[_, heads, dim]| [heads * dim, dim, 1]);
        let mut tensor = |of_keys: usize| KvhTensor {
            data: self.queries.address as *mut _,
            device: self.machine.device(),
            ndim: 3,
            dtype: BF16,
            shape: sizes[of_keys].as_mut_ptr(),
            strides: strides[of_keys].as_mut_ptr(),
            byte_offset: 0,
        };
        // K and V of the step: nobody here looks at them.
        let (q, k) = (tensor(0), tensor(1));
        for layer in 0..shape.layers {
            let steps: Vec<KvhStepSequence> = (0..self.uids.len())
                .map(|place| KvhStepSequence {
                    struct_size: size_of::<KvhStepSequence>(),
                    uid: self.uids[place],
                    first_token: (place * self.window) as u64,
                    tokens: self.window as u64,
                    first_position: (self.cache.sequences[place].tokens - self.window) as u64,
                    prompt_length: self.cache.sequences[place].tokens as u64,
                    flags: KVH_STEP_PROMPT_ENDS,
                    phase: KVH_PHASE_PREFILL,
                    cache: &self.before[place][layer],
                })
                .collect();
            // SAFETY: the array covers the vector, which lives until the call returns.
            let sequences =
                unsafe { Structs::new(array(&steps), "sequences") }.map_err(kvhook_host::HostError::from)?;
            let step = Step { layer: layer as u32, q: &q, k: &k, v: &k, sequences, stream: self.machine.stream() };
            // SAFETY: the tensors are as long as they say, and nothing writes them.
            unsafe { self.engine.host.before_attention(0, &step)? };
        }
        Ok(())
    }

    fn kept(&self, place: usize, reason: KvhookReason) -> BenchError {
        BenchError::Kept { tokens: self.cache.sequences[place].tokens, reason: reason_name(reason) }
    }
}

impl Work for Compression<'_, '_> {
    fn set_up(&mut self) -> Result<(), BenchError> {
        self.machine.refill(&self.cache.memory)?;
        self.uids.clear();
        for sequence in &self.cache.sequences {
            let begin = Begin { arm: &self.arm, prompt_length: sequence.tokens as u64, ..Begin::default() };
            self.uids.push(self.engine.host.begin(begin)?.uid);
        }
        if self.window > 0 {
            self.show_queries()?;
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let mut requests = Vec::with_capacity(self.uids.len());
        for (place, &uid) in self.uids.iter().enumerate() {
            let (lengths, next_position) = (&self.lengths[place], self.cache.sequences[place].tokens as u64);
            let event = Event::PrefillDone;
            let ask = Ask { uid, event, lengths, next_position, shared_rows: 0, published_rows: 0 };
            let answer = self.engine.host.ask(&ask)?;
            if answer.decision == KVHOOK_DECISION_KEEP {
                return Err(self.kept(place, answer.reason));
            }
            // SAFETY: the cache is as described, and this engine's own.
            let layers = unsafe { self.engine.read(&self.layers[place])? };
            requests.push(PrepareRequest {
                uid,
                event,
                fresh: false,
                moves_rows: false,
                layers,
                next_position,
                shared_rows: 0,
                published_rows: 0,
            });
        }
        // SAFETY: the rows are as described, and not written before the verdict.
        let prepared = unsafe { self.engine.host.prepare(0, &requests, self.machine.stream())? };
        self.tickets.clear();
        for (place, prepared) in prepared.iter().enumerate() {
            if prepared.ticket == 0 {
                return Err(self.kept(place, prepared.reason));
            }
            self.tickets.push(prepared.ticket);
        }
        self.movements = vec![None; self.tickets.len()];
        Ok(())
    }

    fn is_ready(&mut self) -> Result<bool, BenchError> {
        for place in 0..self.tickets.len() {
            if self.movements[place].is_none() {
                match self.engine.host.verdict(self.tickets[place])? {
                    Verdict::Pending => return Ok(false),
                    Verdict::Dropped(reason) => return Err(self.kept(place, reason)),
                    Verdict::Ready { movement, .. } => self.movements[place] = Some(movement),
                }
            }
        }
        Ok(true)
    }

    fn commit(&mut self) -> Result<(), BenchError> {
        for (place, &ticket) in self.tickets.iter().enumerate() {
            if self.movements[place] == Some(KVHOOK_MOVE_TABLE) {
                // What an engine does with its own table is its own.
                self.engine.host.table_edit(ticket, |edits| {
                    std::hint::black_box(edits);
                    Ok(())
                })?;
            }
            let request = CommitRequest {
                ticket,
                // SAFETY: as in `prepare`.
                layers: unsafe { self.engine.read(&self.layers[place])? },
                fresh: None,
                next_position: self.cache.sequences[place].tokens as u64,
                stream: self.machine.stream(),
            };
            // SAFETY: the rows are this engine's own.
            unsafe { self.engine.host.commit(0, &request)? };
        }
        Ok(())
    }

    fn abandon(&mut self) -> Result<(), BenchError> {
        for &ticket in &self.tickets {
            self.engine.host.drop_ticket(ticket, KVHOOK_REASON_DROPPED)?;
        }
        Ok(())
    }

    fn in_plugin(&self) -> Option<f64> {
        let (before, after) = (&self.figures, self.engine.host.arm(&self.arm).ok()?.figures.read());
        let calls = after.on_prefill_done.calls - before.on_prefill_done.calls;
        let spent = |figures: &KvhookFigures| figures.bound.total_ns + figures.on_prefill_done.total_ns;
        (calls > 0).then(|| (spent(&after) - spent(before)) as f64 / calls as f64 / 1e9)
    }

    fn tear_down(&mut self) -> Result<(), BenchError> {
        for &uid in &self.uids {
            self.engine.host.free(uid, KVH_FREE_FINISHED, self.machine.stream())?;
        }
        Ok(())
    }
}
