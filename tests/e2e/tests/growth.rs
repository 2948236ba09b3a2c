//! An old plugin on a new host: `truncate`, from its shared library, serves a host whose structs have grown at their ends.
//!
//! The test plays the host through the raw contract. In its future every struct that stands in an array (the layer's
//! description, the layer's view, the sequence, the plan, the layer's plan) is some words longer than in the plugin's, so
//! sizes and strides are larger. (`c.rs` has the other side: a plugin that knows more than its host.)

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::c_void;
use std::ptr;

use kvhook_abi::raw::*;
use kvhook_abi::{KVH_MEMORY_1, KVH_ON_PREFILL_DONE_1};
use kvhook_e2e::plugins::built;
// Builds the plugin's shared library.
use kvhook_truncate as _;

const LAYERS: usize = 2;
const HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const LENGTHS: [usize; LAYERS] = [96, 96];
const BUDGET: usize = 40;
const SINKS: usize = 4;
const RECENT: usize = 8;

/// What later fields hold: a value that is neither a size nor an address.
const LATER: u64 = 0xA5A5_A5A5_A5A5_A5A5;

/// A struct of the contract as a host knows it that has given it `WORDS` words more.
#[repr(C)]
struct Grown<T, const WORDS: usize> {
    first: T,
    later: [u64; WORDS],
}

impl<T, const WORDS: usize> Grown<T, WORDS> {
    /// `first` begins with its `struct_size`, which becomes the larger one.
    fn new(first: T) -> Self {
        let mut grown = Self { first, later: [LATER; WORDS] };
        // SAFETY: the structs that this test grows begin with a `usize`.
        unsafe { (&raw mut grown).cast::<usize>().write(size_of::<Self>()) };
        grown
    }

    /// Whether nobody has written behind the first generation.
    fn untouched(&self) -> bool {
        self.later == [LATER; WORDS]
    }
}

/// A struct of zeroes and null pointers.
fn zeroed<T>() -> T {
    // SAFETY: used for the contract's structs, which are integers, floats and nullable pointers.
    unsafe { std::mem::zeroed() }
}

fn array<T>(elements: &[T]) -> KvhArray {
    KvhArray { data: elements.as_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

fn array_mut<T>(elements: &mut [T]) -> KvhArrayMut {
    KvhArrayMut { data: elements.as_mut_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

/// Memory that is leaked: a test's.
unsafe extern "C" fn allocate(
    _host: *mut KvhHostState,
    _call: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    _error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: the plugin's request and place.
    unsafe {
        let words = (*request).bytes.div_ceil(8) as usize;
        out.write(Box::leak(vec![0u64; words].into_boxed_slice()).as_mut_ptr().cast());
    }
    KVH_OK
}

static MEMORY: KvhMemory1 = KvhMemory1 { allocate: Some(allocate) };

unsafe extern "C" fn service(_state: *mut KvhHostState, id: KvhStr) -> *const c_void {
    // SAFETY: the plugin's text.
    let id = unsafe { std::slice::from_raw_parts(id.data.cast::<u8>(), id.length) };
    if id == KVH_MEMORY_1.as_bytes() { (&raw const MEMORY).cast() } else { ptr::null() }
}

/// Keys of a layer, `[HEADS, length, HEAD_DIM]`, different in each layer.
fn keys(layer: usize) -> Vec<f32> {
    let mut state = 12_345 + layer as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24) - 0.3
    };
    (0..HEADS * LENGTHS[layer] * HEAD_DIM).map(|_| next() as f32).collect()
}

fn with_text(status: KvhStatus, buffer: &[u8]) {
    let text = String::from_utf8_lossy(buffer);
    assert_eq!(status, KVH_OK, "{}", text.trim_end_matches('\0'));
}

/// The rows that the plugin's plan keeps, by layer and head, for a host whose structs have `WORDS` words more.
fn plan<const WORDS: usize>(entry: &KvhPluginEntry, config: &str) -> Vec<Vec<Vec<u32>>> {
    let mut buffer = [0; 512];
    let mut error = KvhText::over(&mut buffer);
    let info = |_| {
        Grown::<_, WORDS>::new(KvhLayerInfo {
            kind: KVH_LAYER_FULL,
            shared_with: -1,
            kv_heads: HEADS as u32,
            q_heads: HEADS as u32,
            k_head_dim: HEAD_DIM as u32,
            v_head_dim: HEAD_DIM as u32,
            ..zeroed()
        })
    };
    let infos: [_; LAYERS] = std::array::from_fn(info);
    let float = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 };
    let model = Grown::<_, WORDS>::new(KvhModel {
        name: KvhStr::new("grown"),
        ranks: 1,
        total_kv_heads: HEADS as u32,
        device: KvhDevice { device_type: 1, device_id: 0 },
        cache_dtype: float,
        position_axes: 1,
        max_positions: 4_096,
        rope_base: 10_000.0,
        rotary_dim: HEAD_DIM as u32,
        layers: array(&infos),
        ..zeroed()
    });
    let offers = Grown::<_, WORDS>::new(KvhOffers { can: u64::MAX, ..zeroed() });
    let host = Grown::<_, WORDS>::new(KvhHost {
        abi_major: KVH_ABI_MAJOR,
        abi_minor: KVH_ABI_MINOR + 1,
        name: KvhStr::new("a later host"),
        service: Some(service),
        ..zeroed()
    });
    let args = Grown::<_, WORDS>::new(KvhCreateArgs {
        host: &host.first,
        model: &model.first,
        offers: &offers.first,
        config: KvhStr::new(config),
        ..zeroed()
    });
    let mut instance = ptr::null_mut();
    // SAFETY: arguments that live longer than the instance.
    let status = unsafe { entry.create.unwrap()(&args.first, &mut instance, &mut error) };
    with_text(status, &buffer);

    let keys: [_; LAYERS] = std::array::from_fn(keys);
    let layer = |index: usize| {
        let length = LENGTHS[index];
        let rows = KvhRows {
            base: keys[index].as_ptr().cast_mut().cast(),
            stride_block: 0,
            stride_token: 4 * HEAD_DIM as i64,
            stride_head: 4 * (length * HEAD_DIM) as i64,
            stride_element: 4,
            head_dim: HEAD_DIM as u32,
            dtype: float,
        };
        Grown::<_, WORDS>::new(KvhLayer {
            layer: index as u32,
            kind: KVH_LAYER_FULL,
            shared_with: -1,
            kv_heads: HEADS as u32,
            length: length as u64,
            k: rows,
            v: rows,
            ..zeroed()
        })
    };
    let layers: [_; LAYERS] = std::array::from_fn(layer);
    let length = LENGTHS[0] as u64;
    let sequence = [Grown::<_, WORDS>::new(KvhSequence {
        uid: 1,
        next_position: length,
        prompt_length: length,
        position_axes: 1,
        layers: array(&layers),
        ..zeroed()
    })];
    let lengths = LENGTHS.map(|length| length as u64);
    let bound_args = Grown::<_, WORDS>::new(KvhBoundArgs {
        uid: 1,
        next_position: length,
        prompt_length: length,
        lengths: array(&lengths),
        ..zeroed()
    });
    let mut counts = [0u64; LAYERS];
    let mut bound = Grown::<_, WORDS>::new(KvhBoundOut { counts: array_mut(&mut counts), ..zeroed() });
    let mut layer_plans: [_; LAYERS] = std::array::from_fn(|_| Grown::<_, WORDS>::new(zeroed::<KvhLayerPlan>()));
    let mut plans =
        [Grown::<_, WORDS>::new(KvhPlan { kind: KVH_PLAN_KEEP, layers: array_mut(&mut layer_plans), ..zeroed() })];
    let mut state = 0u64;
    let args = Grown::<_, WORDS>::new(KvhPrepareArgs {
        call: (&raw mut state).cast(),
        sequences: array(&sequence),
        ..zeroed()
    });
    let mut out = Grown::<_, WORDS>::new(KvhPrepareOut { plans: array_mut(&mut plans), ..zeroed() });
    let mut buffer = [0; 512];
    let mut error = KvhText::over(&mut buffer);
    // SAFETY: the table that the id names; arguments that live here.
    unsafe {
        let table = entry.hook.unwrap()(KvhStr::new(KVH_ON_PREFILL_DONE_1)).cast::<KvhOnPrefillDone1>();
        let status = (*table).bound.unwrap()(instance, &bound_args.first, &mut bound.first, &mut error);
        with_text(status, &buffer);
        let mut error = KvhText::over(&mut buffer);
        let status = (*table).on_prefill_done.unwrap()(instance, &args.first, &mut out.first, &mut error);
        with_text(status, &buffer);
    }
    assert!(bound.untouched() && out.untouched() && plans[0].untouched());
    assert_eq!(bound.first.struct_size, size_of::<Grown<KvhBoundOut, WORDS>>(), "the size is the host's to write");
    assert_eq!(counts, [BUDGET as u64; LAYERS]);
    assert_eq!(plans[0].first.kind, KVH_PLAN_SELECT);
    let rows = layer_plans
        .iter()
        .map(|plan| {
            assert!(plan.untouched());
            assert_eq!(plan.first.struct_size, size_of::<Grown<KvhLayerPlan, WORDS>>());
            kept(&plan.first)
        })
        .collect();
    // Ranges are the instance's until it is called again.
    // SAFETY: made above, and used by nobody any more.
    unsafe { entry.destroy.unwrap()(instance) };
    rows
}

/// Rows of each head, from ranges or indices.
fn kept(plan: &KvhLayerPlan) -> Vec<Vec<u32>> {
    // SAFETY: the plan's arrays are leaked memory, or the instance's, which was not called again.
    unsafe {
        if plan.range_count > 0 {
            let ranges = std::slice::from_raw_parts(plan.ranges, plan.range_count as usize);
            let rows = ranges.iter().flat_map(|range| range.start as u32..(range.start + range.length) as u32);
            return vec![rows.collect(); HEADS];
        }
        let of_head = |head: usize| {
            let first = plan.indices.offset(head as isize * plan.index_stride_head as isize);
            std::slice::from_raw_parts(first, plan.count as usize).to_vec()
        };
        (0..HEADS).map(of_head).collect()
    }
}

/// Sinks, the most recent rows, and between them the keys that are least like the mean direction of all.
fn expected(layer: usize, head: usize) -> Vec<u32> {
    let (keys, length) = (keys(layer), LENGTHS[layer]);
    let direction = |row: usize| {
        let start = (head * length + row) * HEAD_DIM;
        let key: Vec<f64> = keys[start..start + HEAD_DIM].iter().map(|value| f64::from(*value)).collect();
        let norm = key.iter().map(|value| value * value).sum::<f64>().sqrt();
        key.into_iter().map(|value| value / norm).collect::<Vec<_>>()
    };
    let directions: Vec<_> = (0..length).map(direction).collect();
    let mean: Vec<f64> = (0..HEAD_DIM).map(|channel| directions.iter().map(|key| key[channel]).sum()).collect();
    let likeness = |row: &usize| directions[*row].iter().zip(&mean).map(|(a, b)| a * b).sum::<f64>();
    let mut history: Vec<usize> = (SINKS..length - RECENT).collect();
    history.sort_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    history.truncate(BUDGET - SINKS - RECENT);
    let mut rows: Vec<u32> = (0..SINKS).chain(history).chain(length - RECENT..length).map(|row| row as u32).collect();
    rows.sort_unstable();
    rows
}

#[test]
fn an_old_plugin_works_on_a_host_whose_structs_have_grown() {
    let path = built().join("libkvhook_truncate.so");
    // SAFETY: our own plugin, which has no initialisers and is never unloaded.
    let library = unsafe { libloading::Library::new(path) }.unwrap();
    // SAFETY: the symbol's type by contract; the entry is static and the library stays open.
    let entry = unsafe { &*library.get::<KvhPluginEntryFn>(b"kvh_plugin_entry_v1").unwrap()() };

    let scored = format!("budget={BUDGET},recent={RECENT},history=top,importance=key_diff");
    let rows: Vec<Vec<_>> = (0..LAYERS).map(|layer| (0..HEADS).map(|head| expected(layer, head)).collect()).collect();
    assert!(rows[0] != rows[1], "a view that is read at the wrong place would not be noticed");
    assert_eq!(plan::<0>(entry, &scored), rows);
    assert_eq!(plan::<1>(entry, &scored), rows);
    assert_eq!(plan::<5>(entry, &scored), rows);

    let recent = (LENGTHS[0] - (BUDGET - SINKS)) as u32..LENGTHS[0] as u32;
    let streaming: Vec<u32> = (0..SINKS as u32).chain(recent).collect();
    let streaming = vec![vec![streaming; HEADS]; LAYERS];
    assert_eq!(plan::<0>(entry, &format!("budget={BUDGET}")), streaming);
    assert_eq!(plan::<3>(entry, &format!("budget={BUDGET}")), streaming);
}
