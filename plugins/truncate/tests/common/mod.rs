//! A small host: it drives the plugin's exported C tables over caches of its own.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr;

use kvhook_abi::ids::*;
use kvhook_abi::raw::*;
// Links the plugin, whose entry is declared below.
use kvhook_truncate as _;

unsafe extern "C" {
    fn kvh_plugin_entry_v1() -> *const KvhPluginEntry;
}

/// A generator of test data (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// From -1 to 1.
    pub fn float(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn raw(self) -> KvhDtype {
        match self {
            Self::F32 => KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 },
            Self::F16 => KvhDtype { code: KVH_DTYPE_FLOAT, bits: 16, lanes: 1 },
            Self::Bf16 => KvhDtype { code: KVH_DTYPE_BFLOAT, bits: 16, lanes: 1 },
        }
    }

    fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn bytes(self, value: f32) -> Vec<u8> {
        match self {
            Self::F32 => value.to_le_bytes().to_vec(),
            Self::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            Self::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    }

    /// What is left of a value that is stored.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => half::f16::from_f32(value).to_f32(),
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// `[heads, tokens, dim]`
    HeadMajor,
    /// `[tokens, heads, dim]`
    TokenMajor,
    /// `[blocks, heads, 16, dim]`, blocks in a mixed order.
    Paged,
}

pub const BLOCK: usize = 16;

/// K (and V, the same rows) of one layer, as values and as the bytes that a plugin sees.
pub struct Layer {
    pub heads: usize,
    pub dim: usize,
    /// `[heads][tokens][dim]`, rounded to the dtype.
    pub keys: Vec<Vec<Vec<f32>>>,
    /// `[heads][tokens]`: positions of the rows; empty: nothing was dropped.
    pub positions: Vec<Vec<u32>>,
    flat_positions: Vec<u32>,
    bytes: Vec<u8>,
    table: Vec<i32>,
    rows: KvhRows,
    block_size: u32,
}

impl Layer {
    pub fn new(keys: Vec<Vec<Vec<f32>>>, dtype: Dtype, placement: Placement) -> Self {
        let (heads, tokens, dim) = (keys.len(), keys[0].len(), keys[0][0].len());
        let keys: Vec<Vec<Vec<f32>>> = keys
            .iter()
            .map(|head| head.iter().map(|row| row.iter().map(|value| dtype.round(*value)).collect()).collect())
            .collect();
        let row = (dim * dtype.size()) as i64;
        let blocks = tokens.div_ceil(BLOCK);
        // Even blocks first, then odd ones.
        let table: Vec<i32> = (0..blocks as i32)
            .map(|block| if block % 2 == 0 { block / 2 } else { block / 2 + (blocks as i32 + 1) / 2 })
            .collect();
        let (stride_block, stride_token, stride_head, capacity) = match placement {
            Placement::HeadMajor => (0, row, row * tokens as i64, tokens),
            Placement::TokenMajor => (0, row * heads as i64, row, tokens),
            Placement::Paged => (row * (BLOCK * heads) as i64, row, row * BLOCK as i64, blocks * BLOCK),
        };
        let mut bytes = vec![0xffu8; capacity * heads * row as usize];
        for (h, head) in keys.iter().enumerate() {
            for (t, values) in head.iter().enumerate() {
                let at = match placement {
                    Placement::Paged => {
                        i64::from(table[t / BLOCK]) * stride_block
                            + (t % BLOCK) as i64 * stride_token
                            + h as i64 * stride_head
                    }
                    _ => t as i64 * stride_token + h as i64 * stride_head,
                } as usize;
                let encoded: Vec<u8> = values.iter().flat_map(|value| dtype.bytes(*value)).collect();
                bytes[at..at + encoded.len()].copy_from_slice(&encoded);
            }
        }
        let rows = KvhRows {
            base: ptr::null_mut(),
            stride_block,
            stride_token,
            stride_head,
            stride_element: dtype.size() as i64,
            head_dim: dim as u32,
            dtype: dtype.raw(),
        };
        let block_size = if placement == Placement::Paged { BLOCK as u32 } else { 0 };
        Self { heads, dim, keys, positions: Vec::new(), flat_positions: Vec::new(), bytes, table, rows, block_size }
    }

    pub fn random(
        random: &mut Random,
        heads: usize,
        tokens: usize,
        dim: usize,
        dtype: Dtype,
        placement: Placement,
    ) -> Self {
        let keys = (0..heads)
            .map(|_| {
                // A common direction and norms that differ, as real keys have.
                let mean: Vec<f32> = (0..dim).map(|_| random.float()).collect();
                (0..tokens)
                    .map(|_| {
                        let scale = 0.5 + random.float().abs();
                        mean.iter().map(|mean| scale * (mean + random.float())).collect()
                    })
                    .collect()
            })
            .collect();
        Self::new(keys, dtype, placement)
    }

    pub fn tokens(&self) -> usize {
        self.keys[0].len()
    }

    pub fn with_positions(mut self, positions: Vec<Vec<u32>>) -> Self {
        self.flat_positions = positions.concat();
        self.positions = positions;
        self
    }

    fn view(&mut self, index: usize) -> KvhLayer {
        let rows = KvhRows { base: self.bytes.as_mut_ptr().cast(), ..self.rows };
        let count = self.positions.first().map_or(0, Vec::len);
        KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: index as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: self.heads as u32,
            block_size: self.block_size,
            reserved0: 0,
            length: self.tokens() as u64,
            k: rows,
            v: rows,
            table: KvhBlockTable {
                data: if self.block_size == 0 { ptr::null() } else { self.table.as_ptr().cast() },
                stride_head: 0,
                count: if self.block_size == 0 { 0 } else { self.table.len() as u32 },
                dtype: KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 },
            },
            positions: KvhPositions {
                data: if count == 0 { ptr::null() } else { self.flat_positions.as_ptr() },
                stride_head: count as i64,
                count: count as u64,
            },
        }
    }
}

/// One sequence.
pub struct Sequence {
    pub uid: u64,
    pub epoch: u64,
    pub next_position: u64,
    pub prompt_length: u64,
    pub segments: Vec<KvhSegment>,
    pub layers: Vec<Layer>,
}

impl Sequence {
    pub fn new(uid: u64, layers: Vec<Layer>) -> Self {
        let tokens = layers[0].tokens() as u64;
        Self { uid, epoch: 0, next_position: tokens, prompt_length: tokens, segments: Vec::new(), layers }
    }

    pub fn image(mut self, start: u64, length: u64) -> Self {
        self.segments.push(KvhSegment { kind: KVH_SEGMENT_IMAGE, reserved0: 0, start, length });
        self
    }
}

/// What the plugin said of one layer: rows for each head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlan {
    pub count: usize,
    pub rows: Vec<Vec<u32>>,
    pub as_ranges: bool,
    pub shared: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Keep { reason: i32, message: String },
    Select(Vec<LayerPlan>),
}

impl Answer {
    pub fn select(&self) -> &[LayerPlan] {
        match self {
            Self::Select(layers) => layers,
            Self::Keep { reason, message } => panic!("kept, reason {reason}: {message}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bounded {
    Keep(i32),
    Rows(Vec<u64>),
}

/// The queries of one layer and step: `[tokens][q_heads][dim]`.
pub type Queries = Vec<Vec<Vec<f32>>>;

/// Memory that is lent.
struct Block {
    /// `KVH_MEMORY_*`
    kind: u32,
    /// 8-byte words, so that it is aligned.
    words: Box<[u64]>,
}

/// What lends memory.
#[derive(Default)]
struct Lender {
    blocks: RefCell<Vec<Block>>,
    refuse: std::cell::Cell<bool>,
}

unsafe extern "C" fn allocate(
    host: *mut KvhHostState,
    _call: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    _error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: `state` of the table below; the plugin's request and place.
    let (lender, request) = unsafe { (&*host.cast::<Lender>(), &*request) };
    assert!(request.bytes > 0 && request.alignment.is_power_of_two() && request.alignment <= 8);
    if lender.refuse.get() {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    let mut words = vec![0x5555_5555_5555_5555u64; request.bytes.div_ceil(8) as usize].into_boxed_slice();
    // SAFETY: as above.
    unsafe { out.write(words.as_mut_ptr().cast()) };
    lender.blocks.borrow_mut().push(Block { kind: request.kind, words });
    KVH_OK
}

struct Table(KvhMemory1);
// SAFETY: functions only.
unsafe impl Sync for Table {}
static MEMORY: Table = Table(KvhMemory1 { allocate: Some(allocate) });

unsafe extern "C" fn service(_state: *mut KvhHostState, id: KvhStr) -> *const c_void {
    // SAFETY: the plugin's text.
    match unsafe { text(id) }.as_str() {
        KVH_MEMORY_1 => (&raw const MEMORY.0).cast(),
        _ => ptr::null(),
    }
}

unsafe fn text(text: KvhStr) -> String {
    if text.length == 0 {
        return String::new();
    }
    // SAFETY: the caller's promise.
    String::from_utf8(unsafe { std::slice::from_raw_parts(text.data.cast(), text.length) }.to_vec()).unwrap()
}

/// A buffer for the plugin's errors and messages.
struct Text(Box<[u8; 512]>, KvhText);

impl Text {
    fn new() -> Self {
        let mut bytes = Box::new([0; 512]);
        let raw = KvhText::over(&mut bytes[..]);
        Self(bytes, raw)
    }

    fn read(&self) -> String {
        String::from_utf8(self.0[..self.1.length].to_vec()).unwrap()
    }
}

pub struct Offer {
    pub can: u64,
    pub block_size: u32,
}

pub const CAN_ALL: u64 = KVH_CAN_QUERIES | KVH_CAN_LAYER_COUNTS | KVH_CAN_STATE | KVH_CAN_GROWN;

#[derive(Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub kv_heads: usize,
    pub q_heads: usize,
    pub dim: usize,
    pub first_kv_head: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Needs {
    pub must: u64,
    pub phases: u32,
    pub window_queries: u32,
    pub grown_every: u64,
    pub min_tokens: u64,
    pub layer_mask: u64,
}

/// An instance of the plugin.
pub struct Instance {
    raw: *mut KvhInstance,
    entry: &'static KvhPluginEntry,
    lender: Box<Lender>,
    _host: Box<KvhHost>,
    pub shape: Shape,
}

pub fn array<T>(items: &[T]) -> KvhArray {
    KvhArray { data: items.as_ptr().cast(), count: items.len() as u64, stride: size_of::<T>() as u64 }
}

fn array_mut<T>(items: &mut [T]) -> KvhArrayMut {
    KvhArrayMut { data: items.as_mut_ptr().cast(), count: items.len() as u64, stride: size_of::<T>() as u64 }
}

impl Instance {
    pub fn new(config: &str, shape: Shape) -> Self {
        match Self::create(config, shape, Offer { can: CAN_ALL, block_size: BLOCK as u32 }) {
            Ok(instance) => instance,
            Err((status, message)) => panic!("{config}: {status} {message}"),
        }
    }

    pub fn create(config: &str, shape: Shape, offer: Offer) -> Result<Self, (KvhStatus, String)> {
        Self::create_for(config, shape, offer, Dtype::F32.raw())
    }

    /// As [`Instance::create`], for a cache of some dtype.
    pub fn create_for(
        config: &str,
        shape: Shape,
        offer: Offer,
        cache_dtype: KvhDtype,
    ) -> Result<Self, (KvhStatus, String)> {
        // SAFETY: returns a static.
        let entry = unsafe { &*kvh_plugin_entry_v1() };
        let mut lender = Box::new(Lender::default());
        let host = Box::new(KvhHost {
            struct_size: size_of::<KvhHost>(),
            state: ptr::from_mut(&mut *lender).cast(),
            abi_major: KVH_ABI_MAJOR,
            abi_minor: KVH_ABI_MINOR,
            name: KvhStr::new("test"),
            service: Some(service),
        });
        let layers: Vec<KvhLayerInfo> = (0..shape.layers)
            .map(|_| KvhLayerInfo {
                struct_size: size_of::<KvhLayerInfo>(),
                kind: KVH_LAYER_FULL,
                flags: 0,
                window: 0,
                shared_with: -1,
                kv_heads: shape.kv_heads as u32,
                q_heads: shape.q_heads as u32,
                k_head_dim: shape.dim as u32,
                v_head_dim: shape.dim as u32,
            })
            .collect();
        let model = KvhModel {
            struct_size: size_of::<KvhModel>(),
            name: KvhStr::new("toy"),
            rank: 0,
            ranks: 1,
            total_kv_heads: 8,
            first_kv_head: shape.first_kv_head,
            device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            cache_dtype,
            position_axes: 1,
            max_positions: 1 << 20,
            rope_base: 10_000.0,
            rope_frequencies: ptr::null(),
            rotary_dim: shape.dim as u32,
            rope_pairing: KVH_ROPE_HALF_SPLIT,
            layers: array(&layers),
        };
        let offers = KvhOffers {
            struct_size: size_of::<KvhOffers>(),
            can: offer.can,
            max_window_queries: 64,
            block_size: offer.block_size,
        };
        let args = KvhCreateArgs {
            struct_size: size_of::<KvhCreateArgs>(),
            host: &*host,
            model: &model,
            offers: &offers,
            config: KvhStr::new(config),
        };
        let (mut raw, mut error) = (ptr::null_mut(), Text::new());
        // SAFETY: all of it lives here.
        let status = unsafe { entry.create.unwrap()(&args, &mut raw, &mut error.1) };
        if status != KVH_OK {
            return Err((status, error.read()));
        }
        Ok(Self { raw, entry, lender, _host: host, shape })
    }

    fn hook<T>(&self, id: &str) -> &'static T {
        // SAFETY: the table that the id names.
        unsafe { self.entry.hook.unwrap()(KvhStr::new(id)).cast::<T>().as_ref().unwrap() }
    }

    pub fn refuse_memory(&self, refuse: bool) {
        self.lender.refuse.set(refuse);
    }

    /// Bytes of memory of one kind that is lent.
    pub fn lent(&self, kind: u32) -> usize {
        self.lender.blocks.borrow().iter().filter(|block| block.kind == kind).map(|block| block.words.len() * 8).sum()
    }

    pub fn needs(&mut self) -> Needs {
        let mut mask = u64::MAX;
        let mut needs = KvhNeeds {
            struct_size: size_of::<KvhNeeds>(),
            must: 0,
            before_attention_phases: 0,
            window_queries: 0,
            grown_every: 0,
            min_tokens: 0,
            layer_mask: &mut mask,
            layer_mask_words: 1,
        };
        let mut error = Text::new();
        // SAFETY: all of it lives here.
        let status = unsafe { self.entry.needs.unwrap()(self.raw, &mut needs, &mut error.1) };
        assert_eq!(status, KVH_OK, "{}", error.read());
        Needs {
            must: needs.must,
            phases: needs.before_attention_phases,
            window_queries: needs.window_queries,
            grown_every: needs.grown_every,
            min_tokens: needs.min_tokens,
            layer_mask: mask,
        }
    }

    pub fn bound(&mut self, sequence: &Sequence) -> Bounded {
        let lengths: Vec<u64> = sequence.layers.iter().map(|layer| layer.tokens() as u64).collect();
        let mut counts = lengths.clone();
        let args = KvhBoundArgs {
            struct_size: size_of::<KvhBoundArgs>(),
            uid: sequence.uid,
            epoch: sequence.epoch,
            next_position: sequence.next_position,
            prompt_length: sequence.prompt_length,
            lengths: array(&lengths),
            segments: array(&sequence.segments),
        };
        let mut out = KvhBoundOut {
            struct_size: size_of::<KvhBoundOut>(),
            counts: array_mut(&mut counts),
            reason: KVH_REASON_NONE,
            reserved0: 0,
        };
        let mut error = Text::new();
        let bound = self.hook::<KvhOnPrefillDone1>(KVH_ON_PREFILL_DONE_1).bound.unwrap();
        // SAFETY: all of it lives here.
        let status = unsafe { bound(self.raw, &args, &mut out, &mut error.1) };
        assert_eq!(status, KVH_OK, "{}", error.read());
        if counts == lengths { Bounded::Keep(out.reason) } else { Bounded::Rows(counts) }
    }

    /// Asks for plans, `grown` or when the prompts are done, and checks what holds for every plan: counts are the
    /// bound, rows ascend and exist.
    pub fn plan(&mut self, sequences: &mut [Sequence], grown: bool) -> Vec<Answer> {
        let bounds: Vec<Bounded> = sequences.iter().map(|sequence| self.bound(sequence)).collect();
        let views: Vec<Vec<KvhLayer>> = sequences
            .iter_mut()
            .map(|sequence| sequence.layers.iter_mut().enumerate().map(|(index, layer)| layer.view(index)).collect())
            .collect();
        let raw: Vec<KvhSequence> = sequences
            .iter()
            .zip(&views)
            .map(|(sequence, layers)| KvhSequence {
                struct_size: size_of::<KvhSequence>(),
                uid: sequence.uid,
                epoch: sequence.epoch,
                next_position: sequence.next_position,
                prompt_length: sequence.prompt_length,
                shared_rows: 0,
                queries_seen: 0,
                position_axes: 1,
                reserved0: 0,
                segments: array(&sequence.segments),
                layers: array(layers),
            })
            .collect();
        let mut layer_plans: Vec<Vec<KvhLayerPlan>> = sequences
            .iter()
            .map(|sequence| {
                let empty = |_: &Layer| KvhLayerPlan {
                    struct_size: size_of::<KvhLayerPlan>(),
                    count: 0,
                    range_count: 0,
                    indices: ptr::null(),
                    index_stride_head: 0,
                    ranges: ptr::null(),
                    positions: ptr::null(),
                    position_stride_head: 0,
                };
                sequence.layers.iter().map(empty).collect()
            })
            .collect();
        let mut messages: Vec<Text> = sequences.iter().map(|_| Text::new()).collect();
        let mut plans: Vec<KvhPlan> = layer_plans
            .iter_mut()
            .zip(&mut messages)
            .map(|(layers, message)| KvhPlan {
                struct_size: size_of::<KvhPlan>(),
                kind: KVH_PLAN_KEEP,
                reason: KVH_REASON_NONE,
                flags: 0,
                reserved0: 0,
                next_position: 0,
                layers: array_mut(layers),
                message: &mut message.1,
            })
            .collect();
        let args = KvhPrepareArgs {
            struct_size: size_of::<KvhPrepareArgs>(),
            call: ptr::null_mut(),
            sequences: array(&raw),
            stream: ptr::null_mut(),
        };
        let mut out = KvhPrepareOut { struct_size: size_of::<KvhPrepareOut>(), plans: array_mut(&mut plans) };
        let mut error = Text::new();
        let function = if grown {
            self.hook::<KvhOnGrown1>(KVH_ON_GROWN_1).on_grown.unwrap()
        } else {
            self.hook::<KvhOnPrefillDone1>(KVH_ON_PREFILL_DONE_1).on_prefill_done.unwrap()
        };
        // SAFETY: all of it lives here.
        let status = unsafe { function(self.raw, &args, &mut out, &mut error.1) };
        assert_eq!(status, KVH_OK, "{}", error.read());
        let answers = plans
            .iter()
            .zip(&layer_plans)
            .zip(sequences.iter().zip(&messages))
            .map(|((plan, layers), (sequence, message))| {
                if plan.kind == KVH_PLAN_KEEP {
                    return Answer::Keep { reason: plan.reason, message: message.read() };
                }
                assert_eq!((plan.kind, plan.flags), (KVH_PLAN_SELECT, 0));
                // SAFETY: ticket memory, which is not given back before the next call.
                Answer::Select(
                    layers.iter().zip(&sequence.layers).map(|pair| unsafe { read(pair.0, pair.1) }).collect(),
                )
            })
            .collect::<Vec<_>>();
        for (answer, bound) in answers.iter().zip(&bounds) {
            match (answer, bound) {
                (Answer::Select(layers), Bounded::Rows(counts)) => {
                    let planned: Vec<u64> = layers.iter().map(|layer| layer.count as u64).collect();
                    assert_eq!(&planned, counts, "a plan keeps exactly the bound");
                }
                (Answer::Keep { .. }, _) => {}
                (Answer::Select(_), Bounded::Keep(reason)) => panic!("the bound says keep, reason {reason}"),
            }
        }
        self.lender.blocks.borrow_mut().retain(|block| block.kind == KVH_MEMORY_SEQUENCE);
        answers
    }

    /// Asks for one plan.
    pub fn plan_one(&mut self, sequence: Sequence) -> Answer {
        self.plan(&mut [sequence], false).remove(0)
    }

    /// Shows the queries of one layer and step: for each sequence uid, prompt length, first position, its queries.
    pub fn see(&mut self, layer: usize, phase: u32, parts: &[(u64, u64, u64, Queries)], dtype: Dtype) {
        let Shape { q_heads, dim, .. } = self.shape;
        let mut bytes: Vec<u8> = Vec::new();
        let mut sequences = Vec::new();
        let mut tokens = 0;
        for (uid, prompt_length, first_position, queries) in parts {
            sequences.push(KvhStepSequence {
                struct_size: size_of::<KvhStepSequence>(),
                uid: *uid,
                first_token: tokens as u64,
                tokens: queries.len() as u64,
                first_position: *first_position,
                prompt_length: *prompt_length,
                flags: 0,
                phase,
                cache: ptr::null(),
            });
            tokens += queries.len();
            bytes.extend(queries.iter().flatten().flatten().flat_map(|value| dtype.bytes(*value)));
        }
        let mut shape = [tokens as i64, q_heads as i64, dim as i64];
        let mut strides = [(q_heads * dim) as i64, dim as i64, 1];
        let q = KvhTensor {
            data: bytes.as_mut_ptr().cast(),
            device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            ndim: 3,
            dtype: dtype.raw(),
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut_ptr(),
            byte_offset: 0,
        };
        let args = KvhBeforeAttentionArgs {
            struct_size: size_of::<KvhBeforeAttentionArgs>(),
            call: ptr::null_mut(),
            layer: layer as u32,
            reserved0: 0,
            q: &q,
            k: &q,
            v: &q,
            sequences: array(&sequences),
            stream: ptr::null_mut(),
        };
        let mut error = Text::new();
        let see = self.hook::<KvhBeforeAttention1>(KVH_BEFORE_ATTENTION_1).before_attention.unwrap();
        // SAFETY: all of it lives here.
        let status = unsafe { see(self.raw, &args, &mut error.1) };
        assert_eq!(status, KVH_OK, "{}", error.read());
    }

    /// Ends a sequence; its memory (all sequence memory: tests that free have one sequence) is given back after.
    pub fn free(&mut self, uid: u64) {
        let args = KvhOnFreeArgs {
            struct_size: size_of::<KvhOnFreeArgs>(),
            uid,
            reason: KVH_FREE_FINISHED,
            reserved0: 0,
            stream: ptr::null_mut(),
        };
        let mut error = Text::new();
        // SAFETY: all of it lives here.
        let status = unsafe { self.hook::<KvhOnFree1>(KVH_ON_FREE_1).on_free.unwrap()(self.raw, &args, &mut error.1) };
        assert_eq!(status, KVH_OK, "{}", error.read());
        self.lender.blocks.borrow_mut().clear();
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: made by `create`, ended once.
        unsafe { self.entry.destroy.unwrap()(self.raw) };
    }
}

/// Rows of a layer's plan.
unsafe fn read(plan: &KvhLayerPlan, layer: &Layer) -> LayerPlan {
    let count = plan.count as usize;
    let rows: Vec<Vec<u32>> = if plan.ranges.is_null() {
        // SAFETY: the plugin's indices.
        let row = |head: i64, i: i64| unsafe { *plan.indices.offset((head * plan.index_stride_head + i) as isize) };
        (0..layer.heads as i64).map(|head| (0..count as i64).map(|i| row(head, i)).collect()).collect()
    } else {
        // SAFETY: the plugin's ranges.
        let ranges = unsafe { std::slice::from_raw_parts(plan.ranges, plan.range_count as usize) };
        let rows: Vec<u32> =
            ranges.iter().flat_map(|range| range.start as u32..(range.start + range.length) as u32).collect();
        vec![rows; layer.heads]
    };
    for rows in &rows {
        assert_eq!(rows.len(), count);
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "not ascending: {rows:?}");
        assert!(rows.iter().all(|row| (*row as usize) < layer.tokens()), "no such row: {rows:?}");
    }
    LayerPlan { count, rows, as_ranges: !plan.ranges.is_null(), shared: plan.index_stride_head == 0 }
}
