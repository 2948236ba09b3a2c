//! A host for tests: hands out structs like the real one, also larger ones than the plugin knows, and remembers logs.

#![allow(dead_code)]

use core::ffi::c_void;
use core::{ptr, slice, str};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use kvhook_abi::raw::*;
use kvhook_abi::{KVH_LOG_1, KVH_MEMORY_1};

/// What fills memory that nobody may write.
const CANARY: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// An array whose elements are `extra` bytes larger than `T`, as a newer host's would be.
pub struct Array<T> {
    storage: Vec<u64>,
    stride: usize,
    count: usize,
    marker: core::marker::PhantomData<T>,
}

impl<T> Array<T> {
    pub fn new(extra: usize, values: Vec<T>) -> Self {
        assert!(extra.is_multiple_of(8) && size_of::<T>().is_multiple_of(8));
        let stride = size_of::<T>() + extra;
        let count = values.len();
        let mut array = Self { storage: vec![CANARY; count * stride / 8], stride, count, marker: Default::default() };
        for (index, value) in values.into_iter().enumerate() {
            unsafe { array.at(index).write(value) };
        }
        array
    }

    /// Also writes the larger size as each element's first field.
    pub fn sized(extra: usize, values: Vec<T>) -> Self {
        let mut array = Self::new(extra, values);
        let stride = array.stride;
        for index in 0..array.count {
            unsafe { array.at(index).cast::<usize>().write(stride) };
        }
        array
    }

    pub fn at(&mut self, index: usize) -> *mut T {
        assert!(index < self.count);
        unsafe { self.storage.as_mut_ptr().cast::<u8>().add(index * self.stride).cast() }
    }

    pub fn raw(&self) -> KvhArray {
        KvhArray { data: self.storage.as_ptr().cast(), count: self.count as u64, stride: self.stride as u64 }
    }

    pub fn raw_mut(&mut self) -> KvhArrayMut {
        KvhArrayMut { data: self.storage.as_mut_ptr().cast(), count: self.count as u64, stride: self.stride as u64 }
    }

    /// Panics when the bytes behind an element were written.
    pub fn assert_tails_untouched(&self) {
        for element in self.storage.chunks(self.stride / 8) {
            assert!(element[size_of::<T>() / 8..].iter().all(|word| *word == CANARY), "written behind the element");
        }
    }
}

#[derive(Default)]
pub struct MockHost {
    pub logs: Mutex<Vec<(i32, String)>>,
    pub max_level: AtomicI32,
    pub refuse_memory: AtomicBool,
    lent: Mutex<Vec<Vec<u64>>>,
}

impl MockHost {
    pub fn with_level(level: i32) -> Self {
        Self { max_level: AtomicI32::new(level), ..Self::default() }
    }

    pub fn raw(&self) -> KvhHost {
        KvhHost {
            struct_size: size_of::<KvhHost>(),
            state: ptr::from_ref(self).cast_mut().cast(),
            abi_major: KVH_ABI_MAJOR,
            abi_minor: KVH_ABI_MINOR,
            name: KvhStr::new("mock 1"),
            service: Some(service),
        }
    }

    pub fn logged(&self, part: &str) -> bool {
        self.logs.lock().unwrap().iter().any(|(_, text)| text.contains(part))
    }
}

unsafe extern "C" fn service(_: *mut KvhHostState, id: KvhStr) -> *const c_void {
    static LOG: KvhLog1 = KvhLog1 { max_level: Some(max_level), write: Some(write) };
    static MEMORY: KvhMemory1 = KvhMemory1 { allocate: Some(allocate) };
    match unsafe { text(id) } {
        KVH_LOG_1 => (&raw const LOG).cast(),
        KVH_MEMORY_1 => (&raw const MEMORY).cast(),
        _ => ptr::null(),
    }
}

unsafe fn host<'a>(state: *mut KvhHostState) -> &'a MockHost {
    unsafe { &*state.cast() }
}

pub unsafe fn text<'a>(text: KvhStr) -> &'a str {
    if text.length == 0 {
        return "";
    }
    str::from_utf8(unsafe { slice::from_raw_parts(text.data.cast(), text.length) }).unwrap()
}

unsafe extern "C" fn max_level(state: *mut KvhHostState) -> i32 {
    unsafe { host(state) }.max_level.load(Ordering::Relaxed)
}

unsafe extern "C" fn write(state: *mut KvhHostState, record: *const KvhLogRecord) {
    let (level, message, file) = unsafe { ((*record).level, text((*record).message), text((*record).file)) };
    let line = format!("{message} [{file}]");
    unsafe { host(state) }.logs.lock().unwrap().push((level, line));
}

unsafe extern "C" fn allocate(
    state: *mut KvhHostState,
    _: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    error: *mut KvhText,
) -> KvhStatus {
    let host = unsafe { host(state) };
    if host.refuse_memory.load(Ordering::Relaxed) {
        unsafe { kvhook_abi::boundary::write_text(error, "the pool is empty") };
        return KVH_ERR_OUT_OF_MEMORY;
    }
    let request = unsafe { &*request };
    assert!(request.alignment <= 8, "the mock aligns to 8 bytes");
    let mut memory = vec![CANARY; (request.bytes as usize).div_ceil(8)];
    unsafe { out.write(memory.as_mut_ptr().cast()) };
    host.lent.lock().unwrap().push(memory);
    KVH_OK
}

/// A text buffer with room for a message.
pub struct Message {
    buffer: Vec<u8>,
    raw: KvhText,
}

impl Message {
    pub fn new() -> Self {
        let mut buffer = vec![0; 1024];
        let raw = KvhText::over(&mut buffer);
        Self { buffer, raw }
    }

    pub fn raw(&mut self) -> *mut KvhText {
        &raw mut self.raw
    }

    pub fn text(&self) -> &str {
        str::from_utf8(&self.buffer[..self.raw.length]).unwrap()
    }
}

pub const F32: KvhDtype = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 };
pub const I32: KvhDtype = KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 };
pub const NO_SEGMENTS: KvhArray = KvhArray { data: ptr::null(), count: 0, stride: 0 };

/// A model of `layers` full layers.
pub struct Model {
    layers: Array<KvhLayerInfo>,
}

impl Model {
    pub fn new(extra: usize, layers: usize, kv_heads: u32, q_heads: u32, head_dim: u32) -> Self {
        let layer = || KvhLayerInfo {
            struct_size: size_of::<KvhLayerInfo>(),
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads,
            q_heads,
            k_head_dim: head_dim,
            v_head_dim: head_dim,
        };
        Self { layers: Array::sized(extra, (0..layers).map(|_| layer()).collect()) }
    }

    pub fn layer_mut(&mut self, index: usize) -> &mut KvhLayerInfo {
        unsafe { &mut *self.layers.at(index) }
    }

    pub fn raw(&self) -> KvhModel {
        KvhModel {
            struct_size: size_of::<KvhModel>(),
            name: KvhStr::new("mock model"),
            rank: 0,
            ranks: 1,
            total_kv_heads: 1,
            first_kv_head: 0,
            device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            cache_dtype: F32,
            position_axes: 1,
            max_positions: 4096,
            rope_base: 10_000.0,
            rope_frequencies: ptr::null(),
            rotary_dim: 4,
            rope_pairing: KVH_ROPE_HALF_SPLIT,
            layers: self.layers.raw(),
        }
    }
}

/// An instance, made and ended through the entry.
pub struct Loaded<'a> {
    pub entry: &'static KvhPluginEntry,
    pub instance: *mut KvhInstance,
    _host: &'a MockHost,
    _raw_host: Box<KvhHost>,
}

impl<'a> Loaded<'a> {
    pub fn new(
        entry: &'static KvhPluginEntry,
        host: &'a MockHost,
        model: &Model,
        config: &[u8],
    ) -> Result<Self, (KvhStatus, String)> {
        let raw_host = Box::new(host.raw());
        let model = model.raw();
        let offers = KvhOffers { struct_size: size_of::<KvhOffers>(), can: !0, max_window_queries: 64, block_size: 0 };
        let args = KvhCreateArgs {
            struct_size: size_of::<KvhCreateArgs>(),
            host: &raw const *raw_host,
            model: &raw const model,
            offers: &raw const offers,
            config: KvhStr { data: config.as_ptr().cast(), length: config.len() },
        };
        let untouched = ptr::without_provenance_mut(1);
        let mut instance = untouched;
        let mut error = Message::new();
        match unsafe { entry.create.unwrap()(&raw const args, &raw mut instance, error.raw()) } {
            KVH_OK => Ok(Self { entry, instance, _host: host, _raw_host: raw_host }),
            status => {
                assert_eq!(instance, untouched, "written though create failed");
                Err((status, error.text().to_owned()))
            }
        }
    }

    pub fn hook<T>(&self, id: &str) -> Option<&'static T> {
        unsafe { self.entry.hook.unwrap()(KvhStr::new(id)).cast::<T>().as_ref() }
    }

    pub fn free(&self, uid: u64) -> (KvhStatus, String) {
        let args = KvhOnFreeArgs {
            struct_size: size_of::<KvhOnFreeArgs>(),
            uid,
            reason: KVH_FREE_FINISHED,
            reserved0: 0,
            stream: ptr::null_mut(),
        };
        let mut error = Message::new();
        let on_free = self.hook::<KvhOnFree1>("kvh.on_free/1").unwrap().on_free.unwrap();
        let status = unsafe { on_free(self.instance, &raw const args, error.raw()) };
        (status, error.text().to_owned())
    }

    /// Asks for the bound: counts and reason.
    pub fn bound(&self, lengths: &[u64], segments: KvhArray, next_position: u64) -> Result<(Vec<u64>, i32), String> {
        let lengths = Array::new(0, lengths.to_vec());
        let mut counts = Array::new(8, lengths.storage.clone());
        let args = KvhBoundArgs {
            struct_size: size_of::<KvhBoundArgs>(),
            uid: 1,
            epoch: 0,
            next_position,
            prompt_length: next_position,
            lengths: lengths.raw(),
            segments,
        };
        let mut out =
            KvhBoundOut { struct_size: size_of::<KvhBoundOut>(), counts: counts.raw_mut(), reason: 0, reserved0: 0 };
        let mut error = Message::new();
        let bound = self.hook::<KvhOnPrefillDone1>("kvh.on_prefill_done/1").unwrap().bound.unwrap();
        match unsafe { bound(self.instance, &raw const args, &raw mut out, error.raw()) } {
            KVH_OK => {
                counts.assert_tails_untouched();
                Ok(((0..counts.count).map(|index| unsafe { *counts.at(index) }).collect(), out.reason))
            }
            _ => Err(error.text().to_owned()),
        }
    }
}

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        unsafe { self.entry.destroy.unwrap()(self.instance) };
    }
}

/// One layer's cache: f32, contiguous `[kv_heads, length, dim]` or paged with blocks in reverse order.
pub struct Cache {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    table: Vec<i32>,
    pub kv_heads: usize,
    pub length: usize,
    pub dim: usize,
    block_size: usize,
}

impl Cache {
    /// `value(head, token, channel)` gives K and V.
    pub fn new(
        kv_heads: usize,
        length: usize,
        dim: usize,
        block_size: usize,
        value: impl Fn(usize, usize, usize) -> (f32, f32),
    ) -> Self {
        let blocks = if block_size == 0 { 0 } else { length.div_ceil(block_size) };
        let capacity = if block_size == 0 { length } else { blocks * block_size };
        let table: Vec<i32> = (0..blocks as i32).rev().collect();
        let mut cache = Self {
            k: vec![f32::NAN; kv_heads * capacity * dim],
            v: vec![f32::NAN; kv_heads * capacity * dim],
            table,
            kv_heads,
            length,
            dim,
            block_size,
        };
        for head in 0..kv_heads {
            for token in 0..length {
                let at = cache.row(head, token);
                for channel in 0..dim {
                    (cache.k[at + channel], cache.v[at + channel]) = value(head, token, channel);
                }
            }
        }
        cache
    }

    fn row(&self, head: usize, token: usize) -> usize {
        if self.block_size == 0 {
            return (head * self.length + token) * self.dim;
        }
        let block = self.table[token / self.block_size] as usize;
        ((block * self.kv_heads + head) * self.block_size + token % self.block_size) * self.dim
    }

    pub fn layer(&self, index: u32) -> KvhLayer {
        let element = size_of::<f32>() as i64;
        let row = self.dim as i64 * element;
        let tokens = if self.block_size == 0 { self.length } else { self.block_size } as i64;
        let rows = |data: &Vec<f32>| KvhRows {
            base: data.as_ptr().cast_mut().cast(),
            stride_block: self.kv_heads as i64 * tokens * row,
            stride_token: row,
            stride_head: tokens * row,
            stride_element: element,
            head_dim: self.dim as u32,
            dtype: F32,
        };
        KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: index,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: self.kv_heads as u32,
            block_size: self.block_size as u32,
            reserved0: 0,
            length: self.length as u64,
            k: rows(&self.k),
            v: rows(&self.v),
            table: KvhBlockTable {
                data: if self.block_size == 0 { ptr::null() } else { self.table.as_ptr().cast() },
                stride_head: 0,
                count: self.table.len() as u32,
                dtype: I32,
            },
            positions: KvhPositions { data: ptr::null(), stride_head: 0, count: 0 },
        }
    }
}

/// A plan, copied out of what the plugin filled: rows kept for each layer and head.
#[derive(Debug, PartialEq)]
pub struct Made {
    pub kind: i32,
    pub reason: i32,
    pub message: String,
    pub kept: Vec<Vec<Vec<u64>>>,
}

/// Asks for the plan of one sequence.
pub fn prepare(
    loaded: &Loaded<'_>,
    extra: usize,
    uid: u64,
    layers: Vec<KvhLayer>,
    segments: KvhArray,
    next_position: u64,
) -> Result<Made, (KvhStatus, String)> {
    let heads: Vec<usize> = layers.iter().map(|layer| layer.kv_heads as usize).collect();
    let empty = || KvhLayerPlan { struct_size: 0, ..unsafe { core::mem::zeroed() } };
    let mut layer_plans = Array::sized(extra, layers.iter().map(|_| empty()).collect());
    let layers = Array::sized(extra, layers);
    let sequence = KvhSequence {
        struct_size: 0,
        uid,
        epoch: 0,
        next_position,
        prompt_length: next_position,
        shared_rows: 0,
        queries_seen: 0,
        position_axes: 1,
        reserved0: 0,
        segments,
        layers: layers.raw(),
    };
    let sequences = Array::sized(extra, vec![sequence]);
    let mut message = Message::new();
    let plan = KvhPlan {
        struct_size: 0,
        kind: 0,
        reason: 0,
        flags: 0,
        reserved0: 0,
        next_position: 0,
        layers: layer_plans.raw_mut(),
        message: message.raw(),
    };
    let mut plans = Array::sized(extra, vec![plan]);
    let args = KvhPrepareArgs {
        struct_size: size_of::<KvhPrepareArgs>(),
        call: ptr::null_mut(),
        sequences: sequences.raw(),
        stream: ptr::null_mut(),
    };
    let mut out = KvhPrepareOut { struct_size: size_of::<KvhPrepareOut>(), plans: plans.raw_mut() };
    let mut error = Message::new();
    let on_prefill_done = loaded.hook::<KvhOnPrefillDone1>("kvh.on_prefill_done/1").unwrap().on_prefill_done.unwrap();
    let status = unsafe { on_prefill_done(loaded.instance, &raw const args, &raw mut out, error.raw()) };
    if status != KVH_OK {
        return Err((status, error.text().to_owned()));
    }
    plans.assert_tails_untouched();
    layer_plans.assert_tails_untouched();
    let plan = unsafe { &*plans.at(0) };
    assert_eq!(plan.struct_size, size_of::<KvhPlan>() + extra, "the host's struct_size was changed");
    let kept = (0..heads.len())
        .map(|layer| {
            let plan = unsafe { &*layer_plans.at(layer) };
            (0..heads[layer]).map(|head| rows_of(plan, head)).collect()
        })
        .collect();
    Ok(Made { kind: plan.kind, reason: plan.reason, message: message.text().to_owned(), kept })
}

fn rows_of(plan: &KvhLayerPlan, head: usize) -> Vec<u64> {
    if !plan.indices.is_null() {
        let start = head * plan.index_stride_head as usize;
        let indices = unsafe { slice::from_raw_parts(plan.indices.add(start), plan.count as usize) };
        return indices.iter().map(|index| u64::from(*index)).collect();
    }
    let ranges = match plan.range_count {
        0 => &[],
        count => unsafe { slice::from_raw_parts(plan.ranges, count as usize) },
    };
    let rows: Vec<u64> = ranges.iter().flat_map(|range| range.start..range.start + range.length).collect();
    assert_eq!(rows.len(), plan.count as usize, "the ranges' lengths do not add up to the count");
    rows
}

/// Shows queries `[tokens, q_heads, dim]` of one layer to `before_attention`.
pub fn observe(
    loaded: &Loaded<'_>,
    layer: u32,
    uid: u64,
    first_position: u64,
    prompt_length: u64,
    q_heads: i64,
    queries: &[f32],
) -> (KvhStatus, String) {
    let dim = 4;
    let tokens = queries.len() as i64 / (q_heads * dim);
    let (mut shape, mut strides) = ([tokens, q_heads, dim], [q_heads * dim, dim, 1]);
    let tensor = KvhTensor {
        data: queries.as_ptr().cast_mut().cast(),
        device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
        ndim: 3,
        dtype: F32,
        shape: shape.as_mut_ptr(),
        strides: strides.as_mut_ptr(),
        byte_offset: 0,
    };
    let sequence = KvhStepSequence {
        struct_size: 0,
        uid,
        first_token: 0,
        tokens: tokens as u64,
        first_position,
        prompt_length,
        flags: 0,
        phase: KVH_PHASE_PREFILL,
        cache: ptr::null(),
    };
    let sequences = Array::sized(8, vec![sequence]);
    let args = KvhBeforeAttentionArgs {
        struct_size: size_of::<KvhBeforeAttentionArgs>(),
        call: ptr::null_mut(),
        layer,
        reserved0: 0,
        q: &raw const tensor,
        k: &raw const tensor,
        v: &raw const tensor,
        sequences: sequences.raw(),
        stream: ptr::null_mut(),
    };
    let mut error = Message::new();
    let hook = loaded.hook::<KvhBeforeAttention1>("kvh.before_attention/1").unwrap().before_attention.unwrap();
    let status = unsafe { hook(loaded.instance, &raw const args, error.raw()) };
    (status, error.text().to_owned())
}
