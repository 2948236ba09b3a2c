//! A small engine: a cache of any layout behind the host's C API, and memory that counts itself.

use std::alloc::Layout;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use kvhook_abi::raw::*;
use kvhook_e2e::plugins::built;
use kvhook_host::c_api::*;
use kvhook_host::raw::*;
pub use kvhook_testing::Dtype;
use kvhook_testing::cache::{dtype_of, encode};
use kvhook_testing::{array, array_mut};

use super::weights::Random;

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub layers: usize,
    /// KV heads over all ranks.
    pub heads: usize,
    /// Ranks that split the KV heads evenly.
    pub ranks: usize,
    pub dim: usize,
    pub capacity: usize,
    pub dtype: Dtype,
    /// Rows of a block; 0: contiguous. Must divide the capacity.
    pub block_size: usize,
    pub pairing: i32,
    pub can: u64,
}

impl Shape {
    /// KV heads of a rank.
    fn rank_heads(self) -> usize {
        self.heads / self.ranks
    }
}

/// Bytes that the host has from the engine.
#[derive(Default)]
pub struct Counter {
    live: AtomicU64,
    peak: AtomicU64,
}

unsafe extern "C" fn allocate(
    context: *mut c_void,
    _rank: u32,
    bytes: u64,
    alignment: u64,
    _stream: *mut c_void,
) -> *mut c_void {
    // SAFETY: the context is the engine's counter; bytes and alignment are the host's.
    unsafe {
        let counter = &*context.cast::<Counter>();
        let live = counter.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        counter.peak.fetch_max(live, Ordering::Relaxed);
        std::alloc::alloc(Layout::from_size_align(bytes as usize, alignment as usize).unwrap()).cast()
    }
}

unsafe extern "C" fn free(
    context: *mut c_void,
    _rank: u32,
    data: *mut c_void,
    bytes: u64,
    alignment: u64,
    _stream: *mut c_void,
) {
    // SAFETY: as above; the memory is from `allocate`.
    unsafe {
        (*context.cast::<Counter>()).live.fetch_sub(bytes, Ordering::Relaxed);
        std::alloc::dealloc(data.cast(), Layout::from_size_align(bytes as usize, alignment as usize).unwrap());
    }
}

/// K and V of all layers, one rank behind the other; the row of (tensor `2 * layer + part`, head, token) by an address
/// rule of its own.
#[derive(Clone)]
pub struct Cache {
    shape: Shape,
    bytes: Vec<u8>,
    table: Vec<u32>,
}

impl Cache {
    fn new(shape: Shape) -> Self {
        let blocks = shape.capacity.checked_div(shape.block_size).unwrap_or(0) as u32;
        // Backwards, so that no two neighbours are adjacent.
        let table = (0..blocks).rev().collect();
        let bytes = vec![0; 2 * shape.layers * shape.heads * shape.capacity * shape.dim * shape.dtype.size()];
        Self { shape, bytes, table }
    }

    fn at(&self, tensor: usize, head: usize, token: usize) -> usize {
        let Shape { layers, capacity, dim, dtype, block_size, .. } = self.shape;
        let heads = self.shape.rank_heads();
        let (rank, head) = (head / heads, head % heads);
        let row = match block_size {
            0 => head * capacity + token,
            size => (self.table[token / size] as usize * heads + head) * size + token % size,
        };
        ((rank * 2 * layers + tensor) * heads * capacity + row) * dim * dtype.size()
    }

    fn set(&mut self, tensor: usize, head: usize, token: usize, values: &[f32]) {
        let mut at = self.at(tensor, head, token);
        for value in values {
            let size = self.shape.dtype.size();
            encode(self.shape.dtype, *value, &mut self.bytes[at..at + size]);
            at += size;
        }
    }

    pub fn get(&self, tensor: usize, head: usize, token: usize) -> Vec<f64> {
        let (at, size) = (self.at(tensor, head, token), self.shape.dtype.size());
        let value = |bytes: &[u8]| match self.shape.dtype {
            Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
            Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
            Dtype::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        };
        self.bytes[at..at + self.shape.dim * size].chunks(size).map(value).collect()
    }

    /// The layers of one rank.
    fn layers(&mut self, rank: usize, lengths: &[u64]) -> Vec<KvhLayer> {
        let Shape { layers, capacity, dim, dtype, block_size, .. } = self.shape;
        let heads = self.shape.rank_heads();
        let row = dim * dtype.size();
        let base = self.bytes.as_mut_ptr().wrapping_add(rank * 2 * layers * heads * capacity * row);
        let rows = |tensor: usize| KvhRows {
            base: base.wrapping_add(tensor * heads * capacity * row).cast(),
            stride_block: (heads * block_size * row) as i64,
            stride_token: row as i64,
            stride_head: (row * if block_size == 0 { capacity } else { block_size }) as i64,
            stride_element: dtype.size() as i64,
            head_dim: dim as u32,
            dtype: dtype_of(dtype),
        };
        let layer = |(layer, &length): (usize, &u64)| KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: layer as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: heads as u32,
            block_size: block_size as u32,
            reserved0: 0,
            length,
            k: rows(2 * layer),
            v: rows(2 * layer + 1),
            table: KvhBlockTable {
                data: if block_size == 0 { null() } else { self.table.as_ptr().cast() },
                stride_head: 0,
                count: self.table.len() as u32,
                dtype: KvhDtype { code: KVH_DTYPE_UINT, bits: 32, lanes: 1 },
            },
            positions: KvhPositions { data: null(), stride_head: 0, count: 0 },
        };
        lengths.iter().enumerate().map(layer).collect()
    }
}

fn call(body: impl FnOnce(*mut KvhText) -> i32) -> Result<(), String> {
    let mut buffer = [0u8; 2048];
    let mut text = KvhText::over(&mut buffer);
    let status = body(&mut text);
    let length = text.length;
    let message = || format!("status {status}: {}", String::from_utf8_lossy(&buffer[..length]));
    if status == KVHOOK_OK { Ok(()) } else { Err(message()) }
}

/// An engine with one sequence.
pub struct Engine {
    host: *mut KvhookHost,
    counter: Box<Counter>,
    pub shape: Shape,
    pub cache: Cache,
    pub lengths: Vec<u64>,
    pub position: u64,
    uid: u64,
}

impl Engine {
    /// Loads the plugin with a config, as the arm `arm`.
    pub fn new(shape: Shape, config: &str) -> Result<Self, String> {
        let counter = Box::<Counter>::default();
        let callbacks = KvhookCallbacks {
            struct_size: size_of::<KvhookCallbacks>(),
            context: std::ptr::from_ref(&*counter).cast_mut().cast(),
            log: None,
            log_max_level: None,
            allocate: Some(allocate),
            free: Some(free),
        };
        // Grouped-query attention: the plugin must not care.
        let heads = kvhook_testing::Shape::new(shape.layers, shape.rank_heads(), 3 * shape.rank_heads(), shape.dim);
        let infos = heads.layer_infos();
        let model = |rank: usize| KvhModel {
            rank: rank as u32,
            ranks: shape.ranks as u32,
            rope_pairing: shape.pairing,
            ..heads.part(rank * shape.rank_heads(), shape.heads).model(dtype_of(shape.dtype), array(&infos))
        };
        let models: Vec<_> = (0..shape.ranks).map(model).collect();
        let offers = KvhOffers {
            struct_size: size_of::<KvhOffers>(),
            can: shape.can,
            max_window_queries: 0,
            block_size: shape.block_size as u32,
        };
        let folder = built();
        let folder = folder.to_string_lossy();
        let folders = [KvhStr::new(&folder)];
        let raw = KvhookHostConfig {
            struct_size: size_of::<KvhookHostConfig>(),
            engine: KvhStr::new("test"),
            callbacks: &callbacks,
            models: array(&models),
            offers: &offers,
            plugin_folders: array(&folders),
            copy_folder: KvhStr::new(""),
        };
        let mut host = null_mut();
        // SAFETY: everything that the config leads to lives until the call returns, and is copied.
        call(|error| unsafe { kvhook_host_create(&raw, &mut host, error) })?;
        let cache = Cache::new(shape);
        let lengths = vec![0; shape.layers];
        let engine = Self { host, counter, shape, cache, lengths, position: 0, uid: 0 };
        engine.arm("arm", config)?;
        Ok(engine)
    }

    /// Makes instances of the plugin, one on each rank, with a config.
    pub fn arm(&self, name: &str, config: &str) -> Result<(), String> {
        let arm = KvhookArm {
            struct_size: size_of::<KvhookArm>(),
            name: KvhStr::new(name),
            plugin: KvhStr::new("mlp-decouple"),
            config: KvhStr::new(config),
            sha256: KvhStr::new(""),
            layers: KvhStr::new(""),
            min_tokens: 0,
            weight: 1.0,
            source: KVHOOK_SOURCE_OPERATOR,
            reserved0: 0,
        };
        // SAFETY: the host lives; the arm's texts are borrowed for the call.
        call(|error| unsafe { kvhook_arm_set(self.host, &arm, error) })
    }

    /// Runs `tokens` tokens: appends rows that depend on their position, layer and head only.
    pub fn run(&mut self, tokens: u64) {
        let count = self.shape.dim + 4;
        self.append(tokens, |tensor, head, position| {
            let mut random = Random(1 + position * 1_000_003 + (tensor * 1_009 + head) as u64);
            (0..count).map(|_| random.real()).skip(4).collect()
        });
    }

    /// Appends rows: `row(tensor, head, position)`.
    pub fn append(&mut self, tokens: u64, row: impl Fn(usize, usize, u64) -> Vec<f32>) {
        for position in self.position..self.position + tokens {
            for tensor in 0..2 * self.shape.layers {
                let length = &mut self.lengths[tensor / 2];
                for head in 0..self.shape.heads {
                    self.cache.set(tensor, head, *length as usize, &row(tensor, head, position));
                }
                *length += (tensor % 2) as u64;
            }
        }
        self.position += tokens;
    }

    /// Begins the sequence: a prompt of `tokens` tokens, all run.
    pub fn begin(&mut self, tokens: u64, segments: &[KvhSegment]) {
        self.announce(tokens, segments);
        self.run(tokens);
    }

    /// Begins a sequence in the place of the one before: a prompt of `tokens` tokens, none of them run.
    pub fn announce(&mut self, tokens: u64, segments: &[KvhSegment]) {
        self.lengths.fill(0);
        self.position = 0;
        let begin = KvhookBegin {
            struct_size: size_of::<KvhookBegin>(),
            key: KvhStr::new(""),
            arm: KvhStr::new("arm"),
            prompt_length: tokens,
            segments: array(segments),
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
        call(|error| unsafe { kvhook_begin(self.host, &begin, &mut sequence, error) }).unwrap();
        self.uid = sequence.uid;
    }

    fn ask(&self, event: i32, lengths: &[u64]) -> KvhookAsk {
        KvhookAsk {
            struct_size: size_of::<KvhookAsk>(),
            uid: self.uid,
            event,
            reserved0: 0,
            lengths: array(lengths),
            next_position: self.position,
            shared_rows: 0,
            published_rows: 0,
        }
    }

    fn commit(&self, ticket: u64, layers: &[KvhLayer], after: &mut [u64]) -> KvhookCommit {
        KvhookCommit {
            struct_size: size_of::<KvhookCommit>(),
            ticket,
            layers: array(layers),
            fresh: array::<KvhLayer>(&[]),
            next_position: self.position,
            stream: null_mut(),
            lengths: array_mut(after),
            new_next_position: 0,
        }
    }

    /// Asks, prepares and commits; the reason when it is kept.
    pub fn compress(&mut self, event: i32) -> Result<(), i32> {
        if self.shape.ranks > 1 {
            return self.compress_ranks(event);
        }
        let before = self.lengths.clone();
        let mut after = before.clone();
        let layers = self.cache.layers(0, &before);
        let ask = self.ask(event, &before);
        let mut commit = self.commit(0, &layers, &mut after);
        let mut answer = answer();
        // SAFETY: the host lives; the layers describe the cache's memory, which nobody else uses meanwhile.
        call(|error| unsafe { kvhook_compress(self.host, &ask, &mut commit, &mut answer, error) }).unwrap();
        if answer.decision == KVHOOK_DECISION_KEEP {
            return Err(answer.reason);
        }
        self.position = commit.new_next_position;
        self.lengths = after;
        Ok(())
    }

    /// The same in halves, as an engine of several ranks does.
    fn compress_ranks(&mut self, event: i32) -> Result<(), i32> {
        let before = self.lengths.clone();
        let layers: Vec<_> = (0..self.shape.ranks).map(|rank| self.cache.layers(rank, &before)).collect();
        let ask = self.ask(event, &before);
        let mut answer = answer();
        // SAFETY: the host lives; the arguments are lent for the call.
        call(|error| unsafe { kvhook_ask(self.host, &ask, &mut answer, error) }).unwrap();
        if answer.decision == KVHOOK_DECISION_KEEP {
            return Err(answer.reason);
        }
        let mut tickets = Vec::new();
        for (rank, layers) in layers.iter().enumerate() {
            let mut sequences = [KvhookPrepareSequence {
                struct_size: size_of::<KvhookPrepareSequence>(),
                uid: self.uid,
                event,
                fresh: 0,
                layers: array(layers),
                next_position: self.position,
                shared_rows: 0,
                published_rows: 0,
                ticket: 0,
                reason: KVH_REASON_NONE,
                reserved1: 0,
            }];
            let array = array_mut(&mut sequences);
            // SAFETY: the layers describe the cache's memory, which nobody else uses meanwhile.
            call(|error| unsafe { kvhook_prepare(self.host, rank as u32, array, null_mut(), error) }).unwrap();
            if sequences[0].ticket == 0 {
                return Err(sequences[0].reason);
            }
            tickets.push(sequences[0].ticket);
        }
        assert!(tickets.iter().all(|ticket| *ticket == tickets[0]));
        let mut verdict = KvhookVerdict {
            struct_size: size_of::<KvhookVerdict>(),
            verdict: KVHOOK_VERDICT_PENDING,
            reason: KVH_REASON_NONE,
            movement: 0,
            rewrites: 0,
            planned_position: 0,
            counts: array_mut::<u64>(&mut []),
        };
        // SAFETY: the host lives; the arguments are lent for the call.
        call(|error| unsafe { kvhook_verdict(self.host, tickets[0], &mut verdict, error) }).unwrap();
        assert_eq!(verdict.verdict, KVHOOK_VERDICT_READY);
        let mut committed = Vec::new();
        for (rank, layers) in layers.iter().enumerate() {
            let mut after = before.clone();
            let mut commit = self.commit(tickets[0], layers, &mut after);
            // SAFETY: as for `kvhook_prepare`.
            call(|error| unsafe { kvhook_commit(self.host, rank as u32, &mut commit, error) }).unwrap();
            let position = commit.new_next_position;
            committed.push((after, position));
        }
        assert!(committed.windows(2).all(|pair| pair[0] == pair[1]), "ranks agree");
        (self.lengths, self.position) = committed.remove(0);
        Ok(())
    }

    /// Most bytes that the host had at one time since the last call, beyond what it has now.
    pub fn peak(&self) -> u64 {
        let live = self.counter.live.load(Ordering::Relaxed);
        self.counter.peak.swap(live, Ordering::Relaxed) - live
    }
}

fn answer() -> KvhookAnswer {
    KvhookAnswer {
        struct_size: size_of::<KvhookAnswer>(),
        decision: KVHOOK_DECISION_KEEP,
        reason: KVH_REASON_NONE,
        counts: array_mut::<u64>(&mut []),
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: made by `kvhook_host_create`, and never used again.
        unsafe { kvhook_host_destroy(self.host) };
    }
}
