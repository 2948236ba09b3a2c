//! A plugin inside the test program, on the raw ABI. A [`Script`] says what it does; its config is the script's number.

use core::ffi::c_void;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use kvhook_abi::ids::*;
use kvhook_abi::raw::*;

use super::gpu;

/// How a plan names the rows that it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Other rows for each head.
    Heads,
    /// The same indices for all heads.
    Shared,
    /// Ranges of rows, not of blocks.
    Ranges,
    /// Whole blocks: the first, and the last ones, as ranges.
    Blocks(u64),
    /// New rows, at the positions of kept ones.
    Rewrite,
    /// New rows, at positions 0, 1, 2, ...
    Rerotate,
    /// Keep, with a reason.
    Keep(i32),
}

pub type Count = Box<dyn Fn(usize, u64) -> u64 + Send + Sync>;
pub type Inside = Box<dyn Fn(u32) + Send + Sync>;
/// Spoils a plan before it goes out: rank, plan, its layers.
pub type Tamper = Box<dyn Fn(u32, &mut KvhPlan, &mut [KvhLayerPlan]) + Send + Sync>;

/// What the plugin does, and what was done to it.
pub struct Script {
    pub must: u64,
    pub phases: u32,
    pub window: u32,
    pub grown_every: u64,
    pub min_tokens: u64,
    /// Rows that a layer keeps of its length.
    pub count: Count,
    pub style: Mutex<Style>,
    pub tamper: Mutex<Option<Tamper>>,
    /// Status that `bound`, prepare, `before_attention` answer.
    pub bound_status: Mutex<i32>,
    pub prepare_status: Mutex<i32>,
    pub attention_status: Mutex<i32>,
    /// Take sequence memory in each prepare.
    pub keeps_state: bool,
    /// Runs inside prepare, before the plan is made: rank.
    pub inside: Mutex<Option<Inside>>,
    pub freed: Mutex<Vec<(u32, u64, i32)>>,
    pub prepared: AtomicU64,
    pub attended: AtomicU64,
    pub live: AtomicU64,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            must: 0,
            phases: 0,
            window: 0,
            grown_every: 0,
            min_tokens: 0,
            count: Box::new(|_, length| (length / 2).max(1)),
            style: Mutex::new(Style::Heads),
            tamper: Mutex::default(),
            bound_status: Mutex::default(),
            prepare_status: Mutex::default(),
            attention_status: Mutex::default(),
            keeps_state: false,
            inside: Mutex::default(),
            freed: Mutex::default(),
            prepared: AtomicU64::new(0),
            attended: AtomicU64::new(0),
            live: AtomicU64::new(0),
        }
    }
}

static SCRIPTS: OnceLock<Mutex<HashMap<u64, Arc<Script>>>> = OnceLock::new();
static NEXT: AtomicU64 = AtomicU64::new(1);

impl Script {
    /// Registers a script; gives its config string.
    pub fn register(self: &Arc<Self>) -> String {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        SCRIPTS.get_or_init(Mutex::default).lock().unwrap().insert(number, self.clone());
        number.to_string()
    }

    pub fn frees_of(&self, uid: u64) -> Vec<(u32, i32)> {
        let freed = self.freed.lock().unwrap();
        freed.iter().filter(|free| free.1 == uid).map(|&(rank, _, reason)| (rank, reason)).collect()
    }
}

/// A number made of numbers, by SplitMix64.
pub fn mix(parts: &[u64]) -> u64 {
    let mut state = 0x243f_6a88_85a3_08d3u64;
    for &part in parts {
        state = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
    }
    state
}

/// Which rows are kept: the plugin's choice, which the model of the cache repeats.
pub fn chosen(style: Style, key: [u64; 4], head: u64, length: u64, count: u64) -> Vec<u64> {
    match style {
        Style::Keep(_) => (0..length).collect(),
        // The first rows, then the last.
        Style::Ranges => {
            let first = (count / 3).max(u64::from(count < length));
            (0..first.min(count)).chain(length - (count - first.min(count))..length).collect()
        }
        Style::Blocks(size) => {
            let kept: Vec<u64> = (0..size.min(length)).collect();
            let rest = count.saturating_sub(kept.len() as u64);
            kept.into_iter().chain(length - rest..length).collect()
        }
        Style::Heads | Style::Shared | Style::Rewrite | Style::Rerotate => {
            let head = if style == Style::Heads { head } else { 0 };
            let mut rows: Vec<u64> = (0..length).collect();
            rows.sort_by_key(|&row| mix(&[key[0], key[1], key[2], key[3], head, row]));
            rows.truncate(count as usize);
            rows.sort_unstable();
            rows
        }
    }
}

/// What a rewritten row holds: the tag of its bytes.
pub fn rewritten_tag(uid: u64, rank: u64, layer: u64, head: u64, place: u64) -> u64 {
    mix(&[0xbeef, uid, rank, layer, head, place])
}

/// Writes the bytes of a tag's row.
pub fn fill(row: &mut [u8], tag: u64, which: u64) {
    for (place, byte) in row.iter_mut().enumerate() {
        *byte = mix(&[tag, which, place as u64]) as u8;
    }
}

struct Instance {
    script: Arc<Script>,
    host: *const KvhHost,
    rank: u32,
    heads: Vec<u32>,
    gpu: bool,
    /// Of the call that is under way.
    stream: *mut c_void,
}

struct Entry(KvhPluginEntry);
unsafe impl Sync for Entry {}
struct Table<T>(T);
unsafe impl<T> Sync for Table<T> {}

static ENTRY: Entry = Entry(KvhPluginEntry {
    struct_size: size_of::<KvhPluginEntry>(),
    abi_major: KVH_ABI_MAJOR,
    abi_minor: KVH_ABI_MINOR,
    required_host_minor: 0,
    reserved0: 0,
    id: KvhStr::new("scripted"),
    version: KvhStr::new("1.0.0"),
    fingerprints: KvhArray { data: core::ptr::null(), count: 0, stride: 0 },
    create: Some(create),
    destroy: Some(destroy),
    needs: Some(needs),
    hook: Some(hook),
});
static DONE: Table<KvhOnPrefillDone1> = Table(KvhOnPrefillDone1 { bound: Some(bound), on_prefill_done: Some(prepare) });
static GROWN: Table<KvhOnGrown1> = Table(KvhOnGrown1 { bound: Some(bound), on_grown: Some(prepare) });
static ATTENTION: Table<KvhBeforeAttention1> = Table(KvhBeforeAttention1 { before_attention: Some(before_attention) });
static FREE: Table<KvhOnFree1> = Table(KvhOnFree1 { on_free: Some(on_free) });

pub fn entry() -> *const KvhPluginEntry {
    &ENTRY.0
}

unsafe extern "C" fn hook(id: KvhStr) -> *const c_void {
    match unsafe { kvhook_abi::boundary::text(id, "id") }.unwrap() {
        KVH_ON_PREFILL_DONE_1 => (&raw const DONE.0).cast(),
        KVH_ON_GROWN_1 => (&raw const GROWN.0).cast(),
        KVH_BEFORE_ATTENTION_1 => (&raw const ATTENTION.0).cast(),
        KVH_ON_FREE_1 => (&raw const FREE.0).cast(),
        _ => core::ptr::null(),
    }
}

unsafe extern "C" fn create(args: *const KvhCreateArgs, out: *mut *mut KvhInstance, _: *mut KvhText) -> KvhStatus {
    let args = unsafe { &*args };
    let config = unsafe { kvhook_abi::boundary::text(args.config, "config") }.unwrap();
    let Ok(number) = config.parse::<u64>() else { return KVH_ERR_CONFIG };
    let script = SCRIPTS.get().unwrap().lock().unwrap()[&number].clone();
    let model = unsafe { &*args.model };
    let layers =
        unsafe { core::slice::from_raw_parts(model.layers.data.cast::<KvhLayerInfo>(), model.layers.count as usize) };
    script.live.fetch_add(1, Ordering::SeqCst);
    let heads = layers.iter().map(|layer| layer.kv_heads).collect();
    let gpu = model.device.device_type == KVH_DEVICE_CUDA;
    let instance = Instance { script, host: args.host, rank: model.rank, heads, gpu, stream: core::ptr::null_mut() };
    unsafe { out.write(Box::into_raw(Box::new(instance)).cast()) };
    KVH_OK
}

unsafe extern "C" fn destroy(instance: *mut KvhInstance) {
    let instance = unsafe { Box::from_raw(instance.cast::<Instance>()) };
    instance.script.live.fetch_sub(1, Ordering::SeqCst);
}

unsafe extern "C" fn needs(instance: *mut KvhInstance, needs: *mut KvhNeeds, _: *mut KvhText) -> KvhStatus {
    let (script, needs) = unsafe { (&(*instance.cast::<Instance>()).script, &mut *needs) };
    needs.must = script.must;
    needs.before_attention_phases = script.phases;
    needs.window_queries = script.window;
    needs.grown_every = script.grown_every;
    needs.min_tokens = script.min_tokens;
    KVH_OK
}

unsafe extern "C" fn bound(
    instance: *mut KvhInstance,
    args: *const KvhBoundArgs,
    out: *mut KvhBoundOut,
    _: *mut KvhText,
) -> KvhStatus {
    let (instance, args, out) = unsafe { (&*instance.cast::<Instance>(), &*args, &mut *out) };
    let counts = unsafe { core::slice::from_raw_parts_mut(out.counts.data.cast::<u64>(), args.lengths.count as usize) };
    for (layer, count) in counts.iter_mut().enumerate() {
        *count = (instance.script.count)(layer, *count);
    }
    *instance.script.bound_status.lock().unwrap()
}

impl Instance {
    unsafe fn allocate(&self, call: *mut KvhCall, kind: u32, sequence: u64, bytes: u64) -> Option<*mut u8> {
        let request = KvhAllocation {
            struct_size: size_of::<KvhAllocation>(),
            kind,
            reserved0: 0,
            sequence,
            bytes,
            alignment: 8,
        };
        let mut out = core::ptr::null_mut();
        let status = unsafe {
            let host = &*self.host;
            let memory = host.service.unwrap()(host.state, KvhStr::new(KVH_MEMORY_1)).cast::<KvhMemory1>();
            (*memory).allocate.unwrap()(host.state, call, &request, &mut out, core::ptr::null_mut())
        };
        (status == KVH_OK).then_some(out.cast())
    }

    unsafe fn numbers(&self, call: *mut KvhCall, sequence: u64, numbers: &[u32]) -> Option<*const u32> {
        let bytes = (numbers.len() * 4) as u64;
        let data = unsafe { self.allocate(call, KVH_MEMORY_TICKET, sequence, bytes)? }.cast::<u32>();
        let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        self.write(data.cast(), &numbers);
        Some(data)
    }

    /// Writes to the instance's device, in the stream's order.
    fn write(&self, data: *mut u8, bytes: &[u8]) {
        match self.gpu {
            true => gpu::put(data, bytes, self.stream),
            false => unsafe { data.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) },
        }
    }

    /// Position of a row.
    fn position(&self, layer: &KvhLayer, next_position: u64, row: u64, head: u64) -> u64 {
        let positions = layer.positions;
        if row >= positions.count {
            return next_position - (layer.length - row);
        }
        let at = positions.data.wrapping_offset(head as isize * positions.stride_head as isize + row as isize);
        u64::from(match self.gpu {
            true => u32::from_ne_bytes(gpu::get(at.cast(), 4).try_into().unwrap()),
            false => unsafe { at.read() },
        })
    }

    /// Fills a plan; none when memory is refused.
    unsafe fn plan(
        &self,
        call: *mut KvhCall,
        place: u64,
        sequence: &KvhSequence,
        plan: &mut KvhPlan,
        layer_plans: &mut [KvhLayerPlan],
    ) -> Option<()> {
        let style = *self.script.style.lock().unwrap();
        if let Style::Keep(reason) = style {
            (plan.kind, plan.reason) = (KVH_PLAN_KEEP, reason);
            return Some(());
        }
        let layers = unsafe {
            core::slice::from_raw_parts(sequence.layers.data.cast::<KvhLayer>(), sequence.layers.count as usize)
        };
        let rewrite = matches!(style, Style::Rewrite | Style::Rerotate);
        plan.kind = if rewrite { KVH_PLAN_REWRITE } else { KVH_PLAN_SELECT };
        if style == Style::Rerotate {
            plan.flags = KVH_PLAN_FLAG_MOVED_POSITIONS;
            plan.next_position = (self.script.count)(0, layers[0].length);
        }
        let lent = if rewrite { Some(unsafe { self.lend(call, place, layers.len())? }) } else { None };
        for (index, (layer, out)) in layers.iter().zip(layer_plans).enumerate() {
            let count = (self.script.count)(index, layer.length);
            let heads = u64::from(self.heads[index]);
            let key = [sequence.uid, sequence.epoch, self.rank.into(), index as u64];
            let rows = |head| chosen(style, key, head, layer.length, count);
            out.count = rows(0).len() as u32;
            match style {
                Style::Heads => {
                    let all: Vec<u32> = (0..heads).flat_map(rows).map(|row| row as u32).collect();
                    out.indices = unsafe { self.numbers(call, place, &all)? };
                    out.index_stride_head = out.count.into();
                }
                Style::Shared => {
                    let all: Vec<u32> = rows(0).into_iter().map(|row| row as u32).collect();
                    out.indices = unsafe { self.numbers(call, place, &all)? };
                }
                Style::Ranges | Style::Blocks(_) => {
                    let mut ranges: Vec<KvhRange> = Vec::new();
                    for row in rows(0) {
                        match ranges.last_mut() {
                            Some(last) if last.start + last.length == row => last.length += 1,
                            _ => ranges.push(KvhRange { start: row, length: 1 }),
                        }
                    }
                    out.range_count = ranges.len() as u32;
                    out.ranges = if self.gpu {
                        // Host memory, whatever the device.
                        ranges.leak().as_ptr()
                    } else {
                        let bytes = (ranges.len() * size_of::<KvhRange>()) as u64;
                        let data = unsafe { self.allocate(call, KVH_MEMORY_TICKET, place, bytes)? }.cast::<KvhRange>();
                        unsafe { data.copy_from_nonoverlapping(ranges.as_ptr(), ranges.len()) };
                        data
                    };
                }
                Style::Rewrite | Style::Rerotate => {
                    let positions: Vec<u32> = (0..heads)
                        .flat_map(|head| rows(0).into_iter().enumerate().map(move |(place, row)| (head, place, row)))
                        .map(|(head, place, row)| match style {
                            Style::Rerotate => place as u32,
                            _ => self.position(layer, sequence.next_position, row, head) as u32,
                        })
                        .collect();
                    out.positions = unsafe { self.numbers(call, place, &positions)? };
                    out.position_stride_head = out.count.into();
                    let lent = &lent.as_ref().unwrap()[index];
                    for head in 0..heads {
                        for row in 0..u64::from(out.count) {
                            let tag = rewritten_tag(sequence.uid, self.rank.into(), index as u64, head, row);
                            for (which, rows) in [(0, &lent.k), (1, &lent.v)] {
                                let at = row as i64 * rows.stride_token + head as i64 * rows.stride_head;
                                let bytes = rows.head_dim as usize * usize::from(rows.dtype.bits / 8);
                                let mut row = vec![0; bytes];
                                fill(&mut row, tag, which);
                                self.write(rows.base.cast::<u8>().wrapping_offset(at as isize), &row);
                            }
                        }
                    }
                }
                Style::Keep(_) => unreachable!(),
            }
        }
        Some(())
    }

    unsafe fn lend(&self, call: *mut KvhCall, sequence: u64, layers: usize) -> Option<Vec<KvhLayer>> {
        let mut out: Vec<KvhLayer> = (0..layers)
            .map(|_| KvhLayer { struct_size: size_of::<KvhLayer>(), ..unsafe { core::mem::zeroed() } })
            .collect();
        let array =
            KvhArrayMut { data: out.as_mut_ptr().cast(), count: layers as u64, stride: size_of::<KvhLayer>() as u64 };
        let status = unsafe {
            let host = &*self.host;
            let rows = host.service.unwrap()(host.state, KvhStr::new(KVH_ROWS_1)).cast::<KvhRows1>();
            (*rows).lend.unwrap()(host.state, call, sequence, array, core::ptr::null_mut())
        };
        (status == KVH_OK).then_some(out)
    }
}

unsafe extern "C" fn prepare(
    instance: *mut KvhInstance,
    args: *const KvhPrepareArgs,
    out: *mut KvhPrepareOut,
    error: *mut KvhText,
) -> KvhStatus {
    let (instance, args, out) = unsafe { (&mut *instance.cast::<Instance>(), &*args, &mut *out) };
    instance.stream = args.stream;
    let instance = &*instance;
    let script = &instance.script;
    script.prepared.fetch_add(1, Ordering::SeqCst);
    if let Some(inside) = &*script.inside.lock().unwrap() {
        inside(instance.rank);
    }
    let status = *script.prepare_status.lock().unwrap();
    if status != KVH_OK {
        unsafe { kvhook_abi::boundary::write_text(error, "scripted failure") };
        return status;
    }
    for place in 0..args.sequences.count {
        let (sequence, plan) = unsafe {
            (
                &*args.sequences.data.cast::<KvhSequence>().add(place as usize),
                &mut *out.plans.data.cast::<KvhPlan>().add(place as usize),
            )
        };
        let layer_plans = unsafe {
            core::slice::from_raw_parts_mut(plan.layers.data.cast::<KvhLayerPlan>(), plan.layers.count as usize)
        };
        if script.keeps_state && unsafe { instance.allocate(args.call, KVH_MEMORY_SEQUENCE, place, 100) }.is_none() {
            return KVH_ERR_OUT_OF_MEMORY;
        }
        if unsafe { instance.plan(args.call, place, sequence, plan, layer_plans) }.is_none() {
            return KVH_ERR_OUT_OF_MEMORY;
        }
        if let Some(tamper) = &*script.tamper.lock().unwrap() {
            tamper(instance.rank, plan, layer_plans);
        }
    }
    KVH_OK
}

unsafe extern "C" fn before_attention(
    instance: *mut KvhInstance,
    args: *const KvhBeforeAttentionArgs,
    _: *mut KvhText,
) -> KvhStatus {
    let (instance, args) = unsafe { (&*instance.cast::<Instance>(), &*args) };
    instance.script.attended.fetch_add(args.sequences.count, Ordering::SeqCst);
    *instance.script.attention_status.lock().unwrap()
}

unsafe extern "C" fn on_free(instance: *mut KvhInstance, args: *const KvhOnFreeArgs, _: *mut KvhText) -> KvhStatus {
    let (instance, args) = unsafe { (&*instance.cast::<Instance>(), &*args) };
    instance.script.freed.lock().unwrap().push((instance.rank, args.uid, args.reason));
    KVH_OK
}
