//! A small host for tests. It calls the plugin through its one symbol, shows it a cache, and reads the plan that it makes.
//!
//! The caches are f32 and contiguous, in ordinary memory. Hosts also have f16 and bf16 and paged caches; reading rows
//! through `LayerView` takes care of that. A query-aware scorer needs an engine: this host shows no queries.

#![allow(dead_code, clippy::missing_safety_doc)]

use core::ffi::c_void;
use core::{ptr, slice, str};
use std::cell::RefCell;

use kvhook_abi::raw::*;
use kvhook_abi::{KVH_MEMORY_1, KVH_ON_PREFILL_DONE_1, KVH_ROWS_1};
// Links the plugin.
use kvhook_plugin_name as _;

unsafe extern "C" {
    safe fn kvh_plugin_entry_v1() -> *const KvhPluginEntry;
}

/// What a cache looks like: all layers are alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// The KV cache of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Cache {
    shape: Shape,
    layers: Vec<Layer>,
}

/// K and V of one layer, each `[kv_heads, length, head_dim]`.
#[derive(Clone, Debug, PartialEq)]
struct Layer {
    length: usize,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Cache {
    /// `length` rows for each head. `value(layer, head, token)` gives what all elements of a key and of a value are.
    pub fn new(shape: &Shape, length: usize, value: impl Fn(usize, usize, usize) -> (f32, f32)) -> Self {
        Self::from_elements(shape, length, |layer, head, token, _| value(layer, head, token))
    }

    /// As [`Self::new`], each element by itself: `value(layer, head, token, channel)`.
    pub fn from_elements(
        shape: &Shape,
        length: usize,
        value: impl Fn(usize, usize, usize, usize) -> (f32, f32),
    ) -> Self {
        let mut cache = Self::zeroed(shape, &vec![length as u64; shape.layers]);
        for (index, layer) in cache.layers.iter_mut().enumerate() {
            for (at, (k, v)) in layer.k.iter_mut().zip(&mut layer.v).enumerate() {
                let (row, channel) = (at / shape.head_dim, at % shape.head_dim);
                (*k, *v) = value(index, row / length, row % length, channel);
            }
        }
        cache
    }

    fn zeroed(shape: &Shape, lengths: &[u64]) -> Self {
        let layer = |length: &u64| {
            let zeroes = vec![0.0; shape.kv_heads * *length as usize * shape.head_dim];
            Layer { length: *length as usize, k: zeroes.clone(), v: zeroes }
        };
        Self { shape: *shape, layers: lengths.iter().map(layer).collect() }
    }

    /// K and V of one entry.
    pub fn row(&self, layer: usize, head: usize, token: usize) -> (&[f32], &[f32]) {
        let layer = &self.layers[layer];
        let start = (head * layer.length + token) * self.shape.head_dim;
        let row = start..start + self.shape.head_dim;
        (&layer.k[row.clone()], &layer.v[row])
    }

    /// Layer `index` as the contract describes it.
    fn describe(&mut self, index: usize, struct_size: usize) -> KvhLayer {
        let Shape { kv_heads, head_dim, .. } = self.shape;
        let layer = &mut self.layers[index];
        let row = (head_dim * size_of::<f32>()) as i64;
        let rows = |elements: &mut Vec<f32>| KvhRows {
            base: elements.as_mut_ptr().cast(),
            stride_block: 0,
            stride_token: row,
            stride_head: layer.length as i64 * row,
            stride_element: size_of::<f32>() as i64,
            head_dim: head_dim as u32,
            dtype: F32,
        };
        KvhLayer {
            struct_size,
            layer: index as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: kv_heads as u32,
            block_size: 0,
            reserved0: 0,
            length: layer.length as u64,
            k: rows(&mut layer.k),
            v: rows(&mut layer.v),
            table: KvhBlockTable { data: ptr::null(), stride_head: 0, count: 0, dtype: I32 },
            positions: KvhPositions { data: ptr::null(), stride_head: 0, count: 0 },
        }
    }

    fn describe_all(&mut self) -> Vec<KvhLayer> {
        (0..self.layers.len()).map(|index| self.describe(index, size_of::<KvhLayer>())).collect()
    }
}

/// What a plugin answered. Counts were compared with its bound, and rows with the cache.
#[derive(Debug, PartialEq)]
pub enum Made {
    /// Everything is kept.
    Keep,
    /// The rows that stay, for each layer and head.
    Select(Vec<Vec<Vec<usize>>>),
    /// The new rows, and the position that each row of a layer stands for.
    Rewrite { cache: Cache, positions: Vec<Vec<usize>> },
}

/// An instance of the plugin.
pub struct Plugin {
    shape: Shape,
    entry: &'static KvhPluginEntry,
    instance: *mut KvhInstance,
    state: Box<State>,
    /// The instance may use it as long as it lives.
    _host: Box<KvhHost>,
}

/// What the services work on.
#[derive(Default)]
struct State {
    memory: RefCell<Vec<Vec<u64>>>,
    rows: RefCell<Option<Cache>>,
}

impl Plugin {
    /// Makes an instance; the error is what the plugin says.
    pub fn create(config: &str, shape: &Shape) -> Result<Self, String> {
        // SAFETY: never null, and static.
        let entry = unsafe { &*kvh_plugin_entry_v1() };
        let state = Box::new(State::default());
        let host = Box::new(KvhHost {
            struct_size: size_of::<KvhHost>(),
            state: ptr::from_ref(&*state).cast_mut().cast(),
            abi_major: KVH_ABI_MAJOR,
            abi_minor: KVH_ABI_MINOR,
            name: KvhStr::new("mock"),
            service: Some(service),
        });
        let layers: Vec<KvhLayerInfo> = (0..shape.layers).map(|_| layer_info(shape)).collect();
        let model = model(shape, &layers);
        let offers = KvhOffers { struct_size: size_of::<KvhOffers>(), can: !0, max_window_queries: 64, block_size: 0 };
        let args = KvhCreateArgs {
            struct_size: size_of::<KvhCreateArgs>(),
            host: &raw const *host,
            model: &raw const model,
            offers: &raw const offers,
            config: KvhStr { data: config.as_ptr().cast(), length: config.len() },
        };
        let mut instance = ptr::null_mut();
        let mut message = Message::new();
        // SAFETY: all that the arguments point to lives until the call returns, the host as long as the instance.
        let status = unsafe { entry.create.unwrap()(&raw const args, &raw mut instance, message.raw()) };
        if status != KVH_OK {
            return Err(message.text());
        }
        Ok(Self { shape: *shape, entry, instance, state, _host: host })
    }

    /// Asks for the bound and then for a plan, as a host does when a prompt is complete. The error is what the plugin
    /// says when it fails or keeps the sequence with a message.
    pub fn plan(&self, cache: &Cache) -> Result<Made, String> {
        // SAFETY: the id names a table of this type.
        let hook = unsafe { self.entry.hook.unwrap()(KvhStr::new(KVH_ON_PREFILL_DONE_1)).cast::<KvhOnPrefillDone1>() };
        // SAFETY: null or static.
        let hook = unsafe { hook.as_ref() }.ok_or("the plugin has no on_prefill_done")?;
        let lengths: Vec<u64> = cache.layers.iter().map(|layer| layer.length as u64).collect();
        let counts = self.bound(hook, &lengths)?;
        assert!(counts.iter().zip(&lengths).all(|(count, length)| count <= length), "{counts:?} of {lengths:?} rows");
        if counts == lengths {
            return Ok(Made::Keep);
        }
        *self.state.rows.borrow_mut() = Some(Cache::zeroed(&self.shape, &counts));
        let mut shown = cache.clone();
        let layers = shown.describe_all();
        // SAFETY: integers and pointers: zeroes are a value.
        let empty = || KvhLayerPlan { struct_size: size_of::<KvhLayerPlan>(), ..unsafe { core::mem::zeroed() } };
        let mut plans: Vec<KvhLayerPlan> = (0..self.shape.layers).map(|_| empty()).collect();
        let mut message = Message::new();
        let plan = self.prepare(hook, &layers, &mut plans, &mut message)?;
        assert_eq!(shown, *cache, "the plugin wrote into the cache");
        let made = match plan.kind {
            KVH_PLAN_KEEP if message.text().is_empty() => Made::Keep,
            KVH_PLAN_KEEP => return Err(message.text()),
            KVH_PLAN_SELECT => Made::Select(self.selected(&plans, &counts, &lengths)),
            KVH_PLAN_REWRITE => self.rewritten(&plans, &counts),
            kind => panic!("plan of kind {kind}"),
        };
        self.state.memory.borrow_mut().clear();
        Ok(made)
    }

    fn bound(&self, hook: &KvhOnPrefillDone1, lengths: &[u64]) -> Result<Vec<u64>, String> {
        let next_position = lengths.iter().copied().max().unwrap_or(0);
        let mut counts = lengths.to_vec();
        let args = KvhBoundArgs {
            struct_size: size_of::<KvhBoundArgs>(),
            uid: 1,
            epoch: 0,
            next_position,
            prompt_length: next_position,
            lengths: array(lengths),
            segments: array::<KvhSegment>(&[]),
        };
        let mut out = KvhBoundOut {
            struct_size: size_of::<KvhBoundOut>(),
            counts: array_mut(&mut counts),
            reason: KVH_REASON_NONE,
            reserved0: 0,
        };
        let mut message = Message::new();
        // SAFETY: all that is pointed to lives until the call returns.
        let status = unsafe { hook.bound.unwrap()(self.instance, &raw const args, &raw mut out, message.raw()) };
        if status == KVH_OK { Ok(counts) } else { Err(message.text()) }
    }

    fn prepare(
        &self,
        hook: &KvhOnPrefillDone1,
        layers: &[KvhLayer],
        plans: &mut [KvhLayerPlan],
        message: &mut Message,
    ) -> Result<KvhPlan, String> {
        let next_position = layers.iter().map(|layer| layer.length).max().unwrap_or(0);
        let sequence = KvhSequence {
            struct_size: size_of::<KvhSequence>(),
            uid: 1,
            epoch: 0,
            next_position,
            prompt_length: next_position,
            shared_rows: 0,
            queries_seen: 0,
            position_axes: 1,
            reserved0: 0,
            segments: array::<KvhSegment>(&[]),
            layers: array(layers),
        };
        let mut plan = KvhPlan {
            struct_size: size_of::<KvhPlan>(),
            kind: KVH_PLAN_KEEP,
            reason: KVH_REASON_NONE,
            flags: 0,
            reserved0: 0,
            next_position: 0,
            layers: array_mut(plans),
            message: message.raw(),
        };
        let args = KvhPrepareArgs {
            struct_size: size_of::<KvhPrepareArgs>(),
            call: ptr::null_mut(),
            sequences: array(slice::from_ref(&sequence)),
            stream: ptr::null_mut(),
        };
        let plan_array = array_mut(slice::from_mut(&mut plan));
        let mut out = KvhPrepareOut { struct_size: size_of::<KvhPrepareOut>(), plans: plan_array };
        let mut error = Message::new();
        // SAFETY: all that is pointed to lives until the call returns.
        let status =
            unsafe { hook.on_prefill_done.unwrap()(self.instance, &raw const args, &raw mut out, error.raw()) };
        if status == KVH_OK { Ok(plan) } else { Err(error.text()) }
    }

    /// The rows that a selection keeps, checked as a host checks them.
    fn selected(&self, plans: &[KvhLayerPlan], counts: &[u64], lengths: &[u64]) -> Vec<Vec<Vec<usize>>> {
        let rows = |layer: usize, head: usize| {
            let plan = &plans[layer];
            let kept: Vec<usize> = if plan.indices.is_null() {
                // SAFETY: the contract: so many ranges, or none.
                let ranges = unsafe { elements(plan.ranges, plan.range_count) };
                ranges.iter().flat_map(|range| range.start as usize..(range.start + range.length) as usize).collect()
            } else {
                // SAFETY: the contract: so many indices for each head, at this stride.
                let indices = unsafe {
                    elements(plan.indices.offset(head as isize * plan.index_stride_head as isize), plan.count)
                };
                indices.iter().map(|index| *index as usize).collect()
            };
            // A layer may be left alone where its bound is its length.
            let kept = if kept.is_empty() { (0..lengths[layer] as usize).collect() } else { kept };
            assert_eq!(kept.len() as u64, counts[layer], "layer {layer}, head {head}: rows kept and the bound");
            assert!(kept.is_sorted_by(|a, b| a < b), "layer {layer}, head {head}: not ascending: {kept:?}");
            assert!(kept.last().is_none_or(|last| (*last as u64) < lengths[layer]), "layer {layer}: {kept:?}");
            kept
        };
        (0..plans.len()).map(|layer| (0..self.shape.kv_heads).map(|head| rows(layer, head)).collect()).collect()
    }

    /// The rows that were lent, and the positions of the first head.
    fn rewritten(&self, plans: &[KvhLayerPlan], counts: &[u64]) -> Made {
        let cache = self.state.rows.borrow_mut().take().expect("rows were lent");
        let positions = plans.iter().zip(counts).map(|(plan, count)| {
            assert_eq!(u64::from(plan.count), *count, "rows written and the bound");
            // SAFETY: the contract: so many positions.
            let positions = unsafe { elements(plan.positions, plan.count) };
            assert!(positions.is_sorted_by(|a, b| a < b), "not ascending: {positions:?}");
            positions.iter().map(|position| *position as usize).collect()
        });
        Made::Rewrite { positions: positions.collect(), cache }
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        // SAFETY: made by the same entry, and ended once.
        unsafe { self.entry.destroy.unwrap()(self.instance) };
    }
}

const F32: KvhDtype = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 };
const I32: KvhDtype = KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 };

fn layer_info(shape: &Shape) -> KvhLayerInfo {
    KvhLayerInfo {
        struct_size: size_of::<KvhLayerInfo>(),
        kind: KVH_LAYER_FULL,
        flags: 0,
        window: 0,
        shared_with: -1,
        kv_heads: shape.kv_heads as u32,
        q_heads: shape.kv_heads as u32,
        k_head_dim: shape.head_dim as u32,
        v_head_dim: shape.head_dim as u32,
    }
}

fn model(shape: &Shape, layers: &[KvhLayerInfo]) -> KvhModel {
    KvhModel {
        struct_size: size_of::<KvhModel>(),
        name: KvhStr::new("mock model"),
        rank: 0,
        ranks: 1,
        total_kv_heads: shape.kv_heads as u32,
        first_kv_head: 0,
        device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
        cache_dtype: F32,
        position_axes: 1,
        max_positions: 4096,
        rope_base: 10_000.0,
        rope_frequencies: ptr::null(),
        rotary_dim: shape.head_dim as u32,
        rope_pairing: KVH_ROPE_HALF_SPLIT,
        layers: array(layers),
    }
}

fn array<T>(values: &[T]) -> KvhArray {
    KvhArray { data: values.as_ptr().cast(), count: values.len() as u64, stride: size_of::<T>() as u64 }
}

fn array_mut<T>(values: &mut [T]) -> KvhArrayMut {
    KvhArrayMut { data: values.as_mut_ptr().cast(), count: values.len() as u64, stride: size_of::<T>() as u64 }
}

/// # Safety
/// `count` elements can be read, or `count` is 0.
unsafe fn elements<'a, T>(first: *const T, count: u32) -> &'a [T] {
    // SAFETY: passed on from the caller.
    if count == 0 { &[] } else { unsafe { slice::from_raw_parts(first, count as usize) } }
}

/// Room for the text of an error.
struct Message {
    buffer: Vec<u8>,
    raw: KvhText,
}

impl Message {
    fn new() -> Self {
        let mut buffer = vec![0; 1024];
        let raw = KvhText::over(&mut buffer);
        Self { buffer, raw }
    }

    fn raw(&mut self) -> *mut KvhText {
        &raw mut self.raw
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.buffer[..self.raw.length]).into_owned()
    }
}

unsafe extern "C" fn service(_: *mut KvhHostState, id: KvhStr) -> *const c_void {
    static MEMORY: KvhMemory1 = KvhMemory1 { allocate: Some(allocate) };
    static ROWS: KvhRows1 = KvhRows1 { lend: Some(lend) };
    // SAFETY: the contract: readable text.
    match unsafe { slice::from_raw_parts(id.data.cast::<u8>(), id.length) } {
        id if id == KVH_MEMORY_1.as_bytes() => (&raw const MEMORY).cast(),
        id if id == KVH_ROWS_1.as_bytes() => (&raw const ROWS).cast(),
        _ => ptr::null(),
    }
}

unsafe extern "C" fn allocate(
    state: *mut KvhHostState,
    _: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    _: *mut KvhText,
) -> KvhStatus {
    // SAFETY: the contract: our own state, a request to read, a pointer to write.
    let (state, request) = unsafe { (&*state.cast::<State>(), &*request) };
    if request.alignment > align_of::<u64>() as u64 {
        return KVH_ERR_INVALID_ARGUMENT;
    }
    // Filled with what nobody may rely on.
    let mut memory = vec![0xa5a5_a5a5_a5a5_a5a5; (request.bytes as usize).div_ceil(size_of::<u64>())];
    // SAFETY: as above.
    unsafe { out.write(memory.as_mut_ptr().cast()) };
    state.memory.borrow_mut().push(memory);
    KVH_OK
}

unsafe extern "C" fn lend(
    state: *mut KvhHostState,
    _: *mut KvhCall,
    _: u64,
    layers: KvhArrayMut,
    _: *mut KvhText,
) -> KvhStatus {
    // SAFETY: the contract: our own state.
    let state = unsafe { &*state.cast::<State>() };
    let mut rows = state.rows.borrow_mut();
    let Some(rows) = rows.as_mut().filter(|rows| rows.layers.len() as u64 == layers.count) else {
        return KVH_ERR_INVALID_ARGUMENT;
    };
    for index in 0..rows.layers.len() {
        // SAFETY: the contract: so many elements, at this stride, with their sizes filled.
        unsafe {
            let layer = layers.data.cast::<u8>().add(index * layers.stride as usize).cast::<KvhLayer>();
            layer.write(rows.describe(index, (*layer).struct_size));
        }
    }
    KVH_OK
}
