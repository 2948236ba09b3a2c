//! A small engine that uses the C API and nothing else, and a plain model of what its cache must hold.
#![allow(dead_code, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

#[cfg(feature = "cuda")]
pub mod gpu;
#[cfg(not(feature = "cuda"))]
#[path = "no_gpu.rs"]
pub mod gpu;
pub mod plugin;

use core::ffi::c_void;
use core::ptr::{null, null_mut};
use std::alloc::{Layout, alloc, dealloc};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::host::Host;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
use plugin::{Script, Style, chosen, fill, mix, rewritten_tag};

pub const F32: KvhDtype = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 };
pub const F16: KvhDtype = KvhDtype { code: KVH_DTYPE_FLOAT, bits: 16, lanes: 1 };
pub const BF16: KvhDtype = KvhDtype { code: KVH_DTYPE_BFLOAT, bits: 16, lanes: 1 };
/// DLPack's `kDLFloat8_e4m3fn`.
pub const FP8: KvhDtype = KvhDtype { code: 10, bits: 8, lanes: 1 };
pub const ALL: u64 = 0xff;
/// Bytes of rows that no sequence holds.
const UNUSED: u8 = 0xee;

/// What the C API answered: a status with its message where it is not `KVHOOK_OK`.
pub type Answer<T> = Result<T, (KvhookStatus, String)>;
/// Position and tag of each row of a head.
pub type Rows = Vec<(u64, u64)>;

/// What an engine is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub ranks: usize,
    pub layers: usize,
    pub heads: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub dtype: KvhDtype,
    /// 0: contiguous.
    pub block_size: usize,
    pub token_major: bool,
    pub can: u64,
    /// The cache lies on CUDA device 0; each rank has a stream of its own.
    pub gpu: bool,
}

pub const SMALL: Shape = Shape {
    ranks: 1,
    layers: 2,
    heads: 2,
    k_dim: 4,
    v_dim: 3,
    dtype: F32,
    block_size: 0,
    token_major: true,
    can: ALL,
    gpu: false,
};

/// Counts what the host holds, and refuses one allocation.
#[derive(Default)]
pub struct Watch {
    pub live: AtomicI64,
    /// Bytes that it holds, and the most that it held.
    pub bytes: AtomicI64,
    pub peak: AtomicI64,
    pub made: AtomicI64,
    /// The allocation that is refused, counted from 0; negative: none.
    pub refuse: AtomicI64,
    pub log: Mutex<Vec<(i32, String)>>,
    /// Runs when the host logs: the message.
    pub on_log: Mutex<Option<OnLog>>,
    pub gpu: bool,
    /// Memory of the device that the host gave back: address and bytes. Its guards are looked at when the work is done.
    pub buried: Mutex<Vec<(usize, usize)>>,
    /// Memory of the device that is given out once, without a call of the driver's, where there is any: what is left.
    pub pool: Mutex<std::ops::Range<usize>>,
}

pub type OnLog = Box<dyn Fn(&str) + Send>;

unsafe extern "C" fn allocate(
    context: *mut c_void,
    _: u32,
    bytes: u64,
    alignment: u64,
    stream: *mut c_void,
) -> *mut c_void {
    let watch = unsafe { &*context.cast::<Watch>() };
    if watch.made.fetch_add(1, Ordering::SeqCst) == watch.refuse.load(Ordering::SeqCst) {
        return null_mut();
    }
    watch.live.fetch_add(1, Ordering::SeqCst);
    let held = watch.bytes.fetch_add(bytes as i64, Ordering::SeqCst) + bytes as i64;
    watch.peak.fetch_max(held, Ordering::SeqCst);
    if watch.gpu {
        let mut pool = watch.pool.lock().unwrap();
        if pool.is_empty() {
            return gpu::alloc(bytes as usize, stream);
        }
        let start = pool.start;
        pool.start += (bytes as usize).next_multiple_of(256);
        assert!(pool.start < pool.end, "the test's pool is too small");
        return start as *mut c_void;
    }
    unsafe { alloc(Layout::from_size_align(bytes as usize, alignment as usize).unwrap()).cast() }
}

unsafe extern "C" fn free(
    context: *mut c_void,
    _: u32,
    data: *mut c_void,
    bytes: u64,
    alignment: u64,
    stream: *mut c_void,
) {
    let watch = unsafe { &*context.cast::<Watch>() };
    watch.live.fetch_sub(1, Ordering::SeqCst);
    watch.bytes.fetch_sub(bytes as i64, Ordering::SeqCst);
    if watch.gpu {
        if !watch.pool.lock().unwrap().is_empty() {
            return;
        }
        gpu::poison(data, bytes as usize, stream);
        watch.buried.lock().unwrap().push((data as usize, bytes as usize));
        return;
    }
    // Whoever reads freed memory reads nonsense.
    unsafe {
        data.cast::<u8>().write_bytes(0xdd, bytes as usize);
        dealloc(data.cast(), Layout::from_size_align(bytes as usize, alignment as usize).unwrap());
    }
}

unsafe extern "C" fn log(context: *mut c_void, record: *const KvhLogRecord) {
    let (watch, record) = unsafe { (&*context.cast::<Watch>(), &*record) };
    let message = unsafe { kvhook_abi::boundary::text(record.message, "message") }.unwrap().to_owned();
    if let Some(on_log) = &*watch.on_log.lock().unwrap() {
        on_log(&message);
    }
    watch.log.lock().unwrap().push((record.level, message));
}

/// A host with its watch.
pub struct Engine {
    pub raw: *mut KvhookHost,
    pub shape: Shape,
    pub watch: Box<Watch>,
    /// Each rank's.
    pub streams: Vec<*mut c_void>,
    /// Copies of caches on the device that enqueued work may read.
    placed: Mutex<Vec<Placed>>,
}

unsafe impl Send for Engine {}
unsafe impl Sync for Engine {}

fn array<T>(elements: &[T]) -> KvhArray {
    KvhArray { data: elements.as_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

fn array_mut<T>(elements: &mut [T]) -> KvhArrayMut {
    KvhArrayMut { data: elements.as_mut_ptr().cast(), count: elements.len() as u64, stride: size_of::<T>() as u64 }
}

/// Calls a function of the C API with a buffer for its message.
pub fn call(function: impl FnOnce(*mut KvhText) -> KvhookStatus) -> Answer<()> {
    let mut buffer = [0u8; 1024];
    let mut text = KvhText::over(&mut buffer);
    match function(&mut text) {
        KVHOOK_OK => Ok(()),
        status => Err((status, String::from_utf8(buffer[..text.length].to_vec()).unwrap())),
    }
}

/// Makes a host for a device, with memory of the engine's or without.
pub fn create_on(device_type: i32, device_id: i32, memory: bool) -> Answer<()> {
    create_for(SMALL, KvhDevice { device_type, device_id }, memory)
}

/// As [`create_on`], of a shape.
pub fn create_for(shape: Shape, device: KvhDevice, memory: bool) -> Answer<()> {
    let watch = Watch::default();
    let callbacks = KvhookCallbacks {
        struct_size: size_of::<KvhookCallbacks>(),
        context: (&raw const watch).cast_mut().cast(),
        log: Some(log),
        log_max_level: None,
        allocate: memory.then_some(allocate),
        free: memory.then_some(free),
    };
    let mut raw = null_mut();
    let made = create(shape, device, &callbacks, &mut raw);
    unsafe { kvhook_host_destroy(raw) };
    made
}

fn create(shape: Shape, device: KvhDevice, callbacks: &KvhookCallbacks, raw: &mut *mut KvhookHost) -> Answer<()> {
    let info = || KvhLayerInfo {
        struct_size: size_of::<KvhLayerInfo>(),
        kind: KVH_LAYER_FULL,
        flags: 0,
        window: 0,
        shared_with: -1,
        kv_heads: shape.heads as u32,
        q_heads: shape.heads as u32,
        k_head_dim: shape.k_dim as u32,
        v_head_dim: shape.v_dim as u32,
    };
    let infos: Vec<_> = (0..shape.layers).map(|_| info()).collect();
    let models: Vec<_> = (0..shape.ranks)
        .map(|rank| KvhModel {
            struct_size: size_of::<KvhModel>(),
            name: KvhStr::new("mock"),
            rank: rank as u32,
            ranks: shape.ranks as u32,
            total_kv_heads: (shape.heads * shape.ranks) as u32,
            first_kv_head: (shape.heads * rank) as u32,
            device,
            cache_dtype: shape.dtype,
            position_axes: 1,
            max_positions: 1 << 20,
            rope_base: 1e4,
            rope_frequencies: null(),
            rotary_dim: 2,
            rope_pairing: KVH_ROPE_HALF_SPLIT,
            layers: array(&infos),
        })
        .collect();
    let offers = KvhOffers {
        struct_size: size_of::<KvhOffers>(),
        can: shape.can,
        max_window_queries: 64,
        block_size: shape.block_size as u32,
    };
    let config = KvhookHostConfig {
        struct_size: size_of::<KvhookHostConfig>(),
        engine: KvhStr::new("mock 1"),
        callbacks,
        models: array(&models),
        offers: &offers,
        plugin_folders: array::<KvhStr>(&[]),
        copy_folder: KvhStr::new(""),
    };
    call(|error| unsafe { kvhook_host_create(&config, raw, error) })
}

impl Engine {
    pub fn new(shape: Shape) -> Self {
        let watch = Box::new(Watch { refuse: AtomicI64::new(-1), gpu: shape.gpu, ..Watch::default() });
        let device_type = if shape.gpu { KVH_DEVICE_CUDA } else { KVH_DEVICE_CPU };
        let streams = (0..shape.ranks).map(|_| if shape.gpu { gpu::stream() } else { null_mut() }).collect();
        let callbacks = KvhookCallbacks {
            struct_size: size_of::<KvhookCallbacks>(),
            context: (&raw const *watch).cast_mut().cast(),
            log: Some(log),
            log_max_level: None,
            allocate: Some(allocate),
            free: Some(free),
        };
        let device = KvhDevice { device_type, device_id: 0 };
        let mut raw = null_mut();
        create(shape, device, &callbacks, &mut raw).unwrap();
        Self { raw, shape, watch, streams, placed: Mutex::default() }
    }

    /// Waits for the device, and looks at the guards around what was given back since.
    pub fn sync(&self) {
        if self.shape.gpu {
            gpu::sync_all().unwrap();
            self.placed.lock().unwrap().clear();
            for (data, bytes) in self.watch.buried.lock().unwrap().drain(..) {
                gpu::release(data as *mut c_void, bytes);
            }
        }
    }

    /// An engine with one arm, `arm`, that runs a script.
    pub fn with(shape: Shape, script: &Arc<Script>) -> Self {
        let engine = Self::new(shape);
        engine.arm(&ArmSpec::new("arm", "scripted", script.register()));
        engine
    }

    pub fn arm(&self, spec: &ArmSpec) {
        self.try_arm(spec).unwrap();
    }

    pub fn try_arm(&self, spec: &ArmSpec) -> Answer<()> {
        let set = unsafe { (*self.raw.cast::<Host>()).arm_set_entry(spec, plugin::entry()) };
        set.map_err(|error| (error.status(), error.to_string()))
    }

    pub fn begin_on(&self, arm: &str, key: &str, prompt_length: u64) -> Answer<KvhookSequence> {
        let begin = KvhookBegin {
            struct_size: size_of::<KvhookBegin>(),
            key: KvhStr::new(key),
            arm: KvhStr::new(arm),
            prompt_length,
            segments: array::<KvhSegment>(&[]),
        };
        let mut out = KvhookSequence { struct_size: size_of::<KvhookSequence>(), ..unsafe { core::mem::zeroed() } };
        call(|error| unsafe { kvhook_begin(self.raw, &begin, &mut out, error) })?;
        Ok(out)
    }

    /// A sequence with a whole prompt in its cache.
    pub fn begin(&self, prompt_length: u64) -> Cache {
        let uid = self.begin_on("arm", "", prompt_length).unwrap().uid;
        let mut cache = Cache::new(self.shape, uid, prompt_length as usize + 200);
        cache.append(prompt_length);
        cache
    }

    pub fn fork(&self, uid: u64) -> Answer<u64> {
        let mut out = KvhookSequence { struct_size: size_of::<KvhookSequence>(), ..unsafe { core::mem::zeroed() } };
        call(|error| unsafe { kvhook_fork(self.raw, uid, &mut out, error) })?;
        Ok(out.uid)
    }

    pub fn free(&self, uid: u64, reason: i32) -> Answer<()> {
        call(|error| unsafe { kvhook_free(self.raw, uid, reason, self.streams[0], error) })
    }

    pub fn cut(&self, cache: &Cache) -> Answer<()> {
        let lengths = cache.lengths(0);
        let lengths = array(&lengths);
        call(|error| unsafe { kvhook_cut(self.raw, cache.uid, &lengths, cache.next_position, error) })
    }

    /// Decision, reason, counts.
    pub fn ask(&self, cache: &Cache, event: i32) -> (i32, i32, Vec<u64>) {
        self.ask_shared(cache, event, 0, 0).unwrap()
    }

    pub fn ask_shared(
        &self,
        cache: &Cache,
        event: i32,
        shared_rows: u64,
        published_rows: u64,
    ) -> Answer<(i32, i32, Vec<u64>)> {
        let lengths = cache.lengths(0);
        let ask = KvhookAsk {
            struct_size: size_of::<KvhookAsk>(),
            uid: cache.uid,
            event,
            reserved0: 0,
            lengths: array(&lengths),
            next_position: cache.next_position,
            shared_rows,
            published_rows,
        };
        let mut counts = vec![0u64; lengths.len()];
        let mut out = KvhookAnswer {
            struct_size: size_of::<KvhookAnswer>(),
            decision: -1,
            reason: -1,
            counts: array_mut(&mut counts),
        };
        call(|error| unsafe { kvhook_ask(self.raw, &ask, &mut out, error) })?;
        Ok((out.decision, out.reason, counts))
    }

    /// Prepares sequences on one rank: ticket and reason of each.
    pub fn prepare_all(
        &self,
        rank: usize,
        caches: &[&Cache],
        event: i32,
        fresh: bool,
        shared_rows: u64,
    ) -> Answer<Vec<(u64, i32)>> {
        let stream = self.streams[rank];
        let placed: Vec<Placed> = caches.iter().map(|cache| Placed::new(cache, rank, false, stream)).collect();
        let done = self.prepare_placed(rank, caches, &placed, event, (fresh, shared_rows), stream);
        self.placed.lock().unwrap().extend(placed);
        done
    }

    /// As [`Engine::prepare`], with a stream that is not the rank's.
    pub fn prepare_on(&self, rank: usize, cache: &Cache, event: i32, stream: *mut c_void) -> (u64, i32) {
        let placed = [Placed::new(cache, rank, false, self.streams[rank])];
        let done = self.prepare_placed(rank, &[cache], &placed, event, (false, 0), stream);
        self.placed.lock().unwrap().extend(placed);
        done.unwrap()[0]
    }

    /// As [`Engine::prepare_all`], of rows that were placed before.
    pub fn prepare_placed(
        &self,
        rank: usize,
        caches: &[&Cache],
        placed: &[Placed],
        event: i32,
        (fresh, shared_rows): (bool, u64),
        stream: *mut c_void,
    ) -> Answer<Vec<(u64, i32)>> {
        let mut sequences: Vec<_> = caches
            .iter()
            .zip(placed)
            .map(|(cache, placed)| KvhookPrepareSequence {
                struct_size: size_of::<KvhookPrepareSequence>(),
                uid: cache.uid,
                event,
                fresh: fresh.into(),
                layers: array(&placed.layers),
                next_position: cache.next_position,
                shared_rows,
                published_rows: 0,
                ticket: 99,
                reason: -1,
                reserved1: 0,
            })
            .collect();
        let elements = array_mut(&mut sequences);
        call(|error| unsafe { kvhook_prepare(self.raw, rank as u32, elements, stream, error) })?;
        Ok(sequences.iter().map(|sequence| (sequence.ticket, sequence.reason)).collect())
    }

    pub fn prepare(&self, rank: usize, cache: &Cache, event: i32, fresh: bool) -> (u64, i32) {
        self.prepare_all(rank, &[cache], event, fresh, 0).unwrap()[0]
    }

    /// Asks and prepares on all ranks; the ticket, or the first reason for a keep.
    pub fn plan(&self, cache: &mut Cache, event: i32, fresh: bool) -> Result<u64, i32> {
        let (decision, reason, _) = self.ask(cache, event);
        if decision == KVHOOK_DECISION_KEEP {
            return Err(reason);
        }
        cache.remember_plan();
        let answers: Vec<_> = (0..self.shape.ranks).map(|rank| self.prepare(rank, cache, event, fresh)).collect();
        match answers.iter().find(|answer| answer.0 == 0 && answer.1 != KVHOOK_REASON_OTHER_RANK) {
            Some(&(_, reason)) => Err(reason),
            None => Ok(answers[0].0),
        }
    }

    /// Verdict, reason, movement, counts, when every rank's device has said it.
    pub fn verdict(&self, ticket: u64) -> Answer<(i32, i32, i32, Vec<u64>)> {
        self.sync();
        self.verdict_now(ticket)
    }

    /// As [`Engine::verdict`], without waiting.
    pub fn verdict_now(&self, ticket: u64) -> Answer<(i32, i32, i32, Vec<u64>)> {
        let mut counts = vec![0u64; self.shape.layers];
        let mut out = KvhookVerdict {
            struct_size: size_of::<KvhookVerdict>(),
            verdict: -1,
            reason: -1,
            movement: -1,
            rewrites: 0,
            planned_position: 0,
            counts: array_mut(&mut counts),
        };
        call(|error| unsafe { kvhook_verdict(self.raw, ticket, &mut out, error) })?;
        Ok((out.verdict, out.reason, out.movement, counts))
    }

    pub fn drop_ticket(&self, ticket: u64, reason: i32) -> Answer<()> {
        call(|error| unsafe { kvhook_drop(self.raw, ticket, reason, error) })
    }

    /// Commits on one rank, into the cache's fresh rows if it has some. Gives lengths and next position.
    pub fn commit_rank(
        &self,
        rank: usize,
        cache: &Cache,
        ticket: u64,
        fresh: Option<&Cache>,
    ) -> Answer<(Vec<u64>, u64)> {
        self.commit_with(rank, cache, ticket, fresh, self.streams[rank])
    }

    /// As [`Engine::commit_rank`], in place, with a stream that is not the rank's.
    pub fn commit_on(&self, rank: usize, cache: &Cache, ticket: u64, told: *mut c_void) -> Answer<(Vec<u64>, u64)> {
        self.commit_with(rank, cache, ticket, None, told)
    }

    fn commit_with(
        &self,
        rank: usize,
        cache: &Cache,
        ticket: u64,
        fresh: Option<&Cache>,
        told: *mut c_void,
    ) -> Answer<(Vec<u64>, u64)> {
        let stream = self.streams[rank];
        let placed = Placed::new(cache, rank, false, stream);
        let fresh = fresh.map(|fresh| Placed::new(fresh, rank, true, stream));
        let done = self.commit_placed(rank, cache, ticket, &placed, fresh.as_ref(), told);
        if self.shape.gpu {
            gpu::sync(stream);
            placed.read_back();
            fresh.iter().for_each(Placed::read_back);
        }
        done
    }

    /// As [`Engine::commit_rank`], of rows that were placed before and are read back by the caller: it waits for nothing.
    pub fn commit_placed(
        &self,
        rank: usize,
        cache: &Cache,
        ticket: u64,
        placed: &Placed,
        fresh: Option<&Placed>,
        stream: *mut c_void,
    ) -> Answer<(Vec<u64>, u64)> {
        let mut lengths = vec![0u64; self.shape.layers];
        let mut commit = KvhookCommit {
            struct_size: size_of::<KvhookCommit>(),
            ticket,
            layers: array(&placed.layers),
            fresh: array(fresh.map_or(&[][..], |fresh| &fresh.layers)),
            next_position: cache.next_position,
            stream,
            lengths: array_mut(&mut lengths),
            new_next_position: 0,
        };
        call(|error| unsafe { kvhook_commit(self.raw, rank as u32, &mut commit, error) })?;
        Ok((lengths, commit.new_next_position))
    }

    /// Carries out a ticket on all ranks, however its rows move, and tells the model.
    pub fn commit(&self, cache: &mut Cache, script: &Script, ticket: u64) {
        let (verdict, _, movement, _) = self.verdict(ticket).unwrap();
        assert_eq!(verdict, KVHOOK_VERDICT_READY);
        let style = *script.style.lock().unwrap();
        let mut edits = Vec::new();
        if movement == KVHOOK_MOVE_TABLE {
            edits = self.table_edit(ticket).unwrap();
        }
        let mut fresh = (movement == KVHOOK_MOVE_FRESH).then(|| Cache::new(self.shape, cache.uid, cache.capacity));
        let mut next_position = cache.next_position;
        for rank in 0..self.shape.ranks {
            let (lengths, next) = self.commit_rank(rank, cache, ticket, fresh.as_ref()).unwrap();
            cache.expect_commit(rank, script, style);
            assert_eq!(lengths, cache.lengths(rank));
            next_position = next;
        }
        if style == Style::Rerotate {
            assert_eq!(next_position, cache.rows[0][0][0].len() as u64);
        } else {
            assert_eq!(next_position, cache.next_position);
        }
        cache.next_position = next_position;
        if let Some(fresh) = &mut fresh {
            core::mem::swap(&mut cache.stores, &mut fresh.stores);
        }
        for stores in cache.stores.iter_mut().filter(|_| movement == KVHOOK_MOVE_TABLE) {
            for (store, kept) in stores.iter_mut().zip(&edits) {
                let planned = cache.planned_lengths[0].div_ceil(self.shape.block_size as u64) as usize;
                let later = store.table.split_off(planned);
                store.table = kept.iter().map(|&block| store.table[block as usize]).chain(later).collect();
            }
        }
        cache.epoch += 1;
        assert_eq!(self.verdict(ticket).unwrap_err().0, KVHOOK_ERR_UNKNOWN_TICKET);
        self.verify(cache);
    }

    pub fn table_edit(&self, ticket: u64) -> Answer<Vec<Vec<u32>>> {
        let mut edits: Vec<_> = (0..self.shape.layers)
            .map(|_| KvhookTableEdit { struct_size: size_of::<KvhookTableEdit>(), blocks: null(), count: 0 })
            .collect();
        let elements = array_mut(&mut edits);
        call(|error| unsafe { kvhook_table_edit(self.raw, ticket, elements, error) })?;
        let blocks = |edit: &KvhookTableEdit| unsafe { core::slice::from_raw_parts(edit.blocks, edit.count as usize) };
        Ok(edits.iter().map(|edit| blocks(edit).to_vec()).collect())
    }

    /// Both halves in one call: decision and reason.
    pub fn compress(&self, cache: &mut Cache, script: &Script, event: i32) -> (i32, i32) {
        cache.remember_plan();
        let (lengths, layers) = (cache.lengths(0), cache.layers(0));
        let ask = KvhookAsk {
            struct_size: size_of::<KvhookAsk>(),
            uid: cache.uid,
            event,
            reserved0: 0,
            lengths: array(&lengths),
            next_position: cache.next_position,
            shared_rows: 0,
            published_rows: 0,
        };
        let mut after = vec![0u64; lengths.len()];
        let mut commit = KvhookCommit {
            struct_size: size_of::<KvhookCommit>(),
            ticket: 0,
            layers: array(&layers),
            fresh: array::<KvhLayer>(&[]),
            next_position: 0,
            stream: null_mut(),
            lengths: array_mut(&mut after),
            new_next_position: 0,
        };
        let mut answer = KvhookAnswer {
            struct_size: size_of::<KvhookAnswer>(),
            decision: -1,
            reason: -1,
            counts: array_mut::<u64>(&mut []),
        };
        call(|error| unsafe { kvhook_compress(self.raw, &ask, &mut commit, &mut answer, error) }).unwrap();
        if answer.decision != KVHOOK_DECISION_KEEP {
            cache.expect_commit(0, script, *script.style.lock().unwrap());
            cache.epoch += 1;
        }
        assert_eq!(after, cache.lengths(0));
        (answer.decision, answer.reason)
    }

    /// Shows the queries of `tokens` tokens from `first` on, in each layer.
    pub fn attend(&self, caches: &[&Cache], rank: usize, first: u64, tokens: u64, phase: u32) {
        for layer in 0..self.shape.layers {
            let layers: Vec<Vec<KvhLayer>> = caches.iter().map(|cache| cache.layers(rank)).collect();
            let sequences: Vec<_> = caches
                .iter()
                .zip(&layers)
                .map(|(cache, layers)| KvhStepSequence {
                    struct_size: size_of::<KvhStepSequence>(),
                    uid: cache.uid,
                    first_token: 0,
                    tokens,
                    first_position: first,
                    prompt_length: cache.prompt_length,
                    flags: 0,
                    phase,
                    cache: &layers[layer],
                })
                .collect();
            let step = KvhookStep {
                struct_size: size_of::<KvhookStep>(),
                layer: layer as u32,
                reserved0: 0,
                q: null(),
                k: null(),
                v: null(),
                sequences: array(&sequences),
                stream: null_mut(),
            };
            call(|error| unsafe { kvhook_before_attention(self.raw, rank as u32, &step, error) }).unwrap();
        }
    }

    pub fn figures(&self, arm: &str) -> (KvhookFigures, Vec<(i32, u64)>) {
        let mut reasons = [KvhookReasonCount::NONE; 32];
        let mut out = KvhookFigures::to_fill(&mut reasons);
        call(|error| unsafe { kvhook_figures(self.raw, KvhStr::new(arm), &mut out, error) }).unwrap();
        let written = out.reasons.count as usize;
        (out, reasons[..written].iter().map(|entry| (entry.reason, entry.count)).collect())
    }

    pub fn fallbacks(&self, reason: i32) -> u64 {
        self.figures("arm").1.iter().find(|entry| entry.0 == reason).map_or(0, |entry| entry.1)
    }

    /// Bytes and positions of every row, and the bytes of unused rows.
    pub fn verify(&self, cache: &Cache) {
        cache.verify_bytes();
        for rank in 0..self.shape.ranks {
            for layer in 0..self.shape.layers {
                let mut out = KvhPositions { data: null(), stride_head: 0, count: 0 };
                call(|error| unsafe {
                    kvhook_positions(self.raw, rank as u32, cache.uid, layer as u32, &mut out, error)
                })
                .unwrap();
                for (head, rows) in cache.rows[rank][layer].iter().enumerate() {
                    for (place, &(position, _)) in rows.iter().enumerate() {
                        let found = if (place as u64) < out.count {
                            let at = head as i64 * out.stride_head + place as i64;
                            u64::from(self.number(unsafe { out.data.offset(at as isize) }))
                        } else {
                            cache.next_position - (rows.len() - place) as u64
                        };
                        assert_eq!(found, position, "rank {rank}, layer {layer}, head {head}, row {place}");
                    }
                }
            }
        }
    }

    /// A number of the host's, wherever it lies.
    fn number(&self, at: *const u32) -> u32 {
        match self.shape.gpu {
            true => u32::from_ne_bytes(gpu::get(at.cast(), 4).try_into().unwrap()),
            false => unsafe { at.read() },
        }
    }

    pub fn destroy(&mut self) {
        self.sync();
        unsafe { kvhook_host_destroy(self.raw) };
        self.raw = null_mut();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.destroy();
        if !std::thread::panicking() {
            self.sync();
            self.streams.iter().filter(|_| self.shape.gpu).for_each(|&stream| gpu::end(stream));
            assert_eq!(self.watch.live.load(Ordering::SeqCst), 0, "memory that was not given back");
        }
    }
}

/// A rank's layers where its device finds them: the cache's own bytes, or a copy of them on the GPU.
pub struct Placed {
    layers: Vec<KvhLayer>,
    /// On the GPU: the copy, what it is a copy of, and its bytes.
    copies: Vec<(*mut c_void, *mut u8, usize)>,
}

unsafe impl Send for Placed {}

impl Placed {
    /// `room`: all rows, as fresh ones.
    pub fn new(cache: &Cache, rank: usize, room: bool, stream: *mut c_void) -> Self {
        let mut placed = Self { layers: if room { cache.room(rank) } else { cache.layers(rank) }, copies: Vec::new() };
        if cache.shape.gpu {
            for (layer, store) in placed.layers.iter_mut().zip(&cache.stores[rank]) {
                let mut copy = |bytes: &[u8]| {
                    let data = gpu::alloc(bytes.len(), stream);
                    gpu::put(data.cast(), bytes, stream);
                    placed.copies.push((data, bytes.as_ptr().cast_mut(), bytes.len()));
                    data
                };
                layer.k.base = copy(&store.k);
                layer.v.base = copy(&store.v);
                if !store.table.is_empty() {
                    let entries: Vec<u8> = store.table.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
                    let data = gpu::alloc(entries.len(), stream);
                    gpu::put(data.cast(), &entries, stream);
                    placed.copies.push((data, null_mut(), entries.len()));
                    layer.table.data = data;
                }
            }
        }
        placed
    }

    /// Writes the rows of another cache of the same shape over the copies.
    pub fn write(&self, cache: &Cache, rank: usize, stream: *mut c_void) {
        let content = cache.stores[rank].iter().flat_map(|store| [&store.k, &store.v]);
        for (&(copy, ..), bytes) in self.copies.iter().filter(|copy| !copy.1.is_null()).zip(content) {
            gpu::put(copy.cast(), bytes, stream);
        }
    }

    /// Copies what the GPU holds back into the cache. The stream is done.
    pub fn read_back(&self) {
        for &(copy, original, length) in self.copies.iter().filter(|copy| !copy.1.is_null()) {
            // What is a vector's content is written behind its back, as the host does on the CPU.
            unsafe { original.copy_from_nonoverlapping(gpu::get(copy.cast(), length).as_ptr(), length) };
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        for &(copy, _, length) in &self.copies {
            gpu::release(copy, length);
        }
    }
}

/// K and V of one layer on one rank.
#[derive(Clone, PartialEq, Eq)]
pub struct Store {
    k: Vec<u8>,
    v: Vec<u8>,
    pub table: Vec<i32>,
}

/// The rows of a sequence: as bytes, and as the model says that they must be: for each rank, layer and head the
/// (position, tag) of each row.
#[derive(Clone)]
pub struct Cache {
    pub uid: u64,
    pub shape: Shape,
    pub capacity: usize,
    pub prompt_length: u64,
    pub next_position: u64,
    pub epoch: u64,
    pub stores: Vec<Vec<Store>>,
    pub rows: Vec<Vec<Vec<Rows>>>,
    pub planned_lengths: Vec<u64>,
}

impl Cache {
    pub fn new(shape: Shape, uid: u64, capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(shape.block_size.max(1));
        let element = usize::from(shape.dtype.bits / 8);
        // A pool twice as large as needed, so that blocks stand apart.
        let pool = if shape.block_size == 0 { capacity } else { 2 * capacity };
        let blocks = capacity.checked_div(shape.block_size).unwrap_or(0);
        let store = |seed: u64| {
            let mut numbers: Vec<i32> = (0..2 * blocks as i32).collect();
            numbers.sort_by_key(|&number| mix(&[seed, number as u64]));
            numbers.truncate(blocks);
            Store {
                k: vec![UNUSED; pool * shape.heads * shape.k_dim * element],
                v: vec![UNUSED; pool * shape.heads * shape.v_dim * element],
                table: numbers,
            }
        };
        Self {
            uid,
            shape,
            capacity,
            prompt_length: 0,
            next_position: 0,
            epoch: 0,
            stores: (0..shape.ranks)
                .map(|rank| (0..shape.layers).map(|layer| store((rank * 100 + layer) as u64)).collect())
                .collect(),
            rows: vec![vec![vec![Vec::new(); shape.heads]; shape.layers]; shape.ranks],
            planned_lengths: Vec::new(),
        }
    }

    pub fn lengths(&self, rank: usize) -> Vec<u64> {
        self.rows[rank].iter().map(|heads| heads[0].len() as u64).collect()
    }

    fn row_bytes(&self, dim: usize) -> usize {
        dim * usize::from(self.shape.dtype.bits / 8)
    }

    /// Where a row starts, in bytes.
    fn at(&self, store: &Store, dim: usize, token: usize, head: usize) -> usize {
        let (heads, size, row) = (self.shape.heads, self.shape.block_size, self.row_bytes(dim));
        let index = match (size, self.shape.token_major) {
            (0, true) => token * heads + head,
            (0, false) => head * self.capacity + token,
            (_, true) => (store.table[token / size] as usize * size + token % size) * heads + head,
            (_, false) => (store.table[token / size] as usize * heads + head) * size + token % size,
        };
        index * row
    }

    /// K and V of the first tokens of every head.
    pub fn first_rows(&self, count: usize) -> Vec<Vec<u8>> {
        let mut rows = Vec::new();
        for store in self.stores.iter().flatten() {
            for (data, dim) in [(&store.k, self.shape.k_dim), (&store.v, self.shape.v_dim)] {
                for (head, token) in (0..self.shape.heads).flat_map(|head| (0..count).map(move |token| (head, token))) {
                    rows.push(data[self.at(store, dim, token, head)..][..self.row_bytes(dim)].to_vec());
                }
            }
        }
        rows
    }

    /// Adds tokens to every layer.
    pub fn append(&mut self, tokens: u64) {
        if self.prompt_length == 0 {
            self.prompt_length = tokens;
        }
        for _ in 0..tokens {
            for rank in 0..self.shape.ranks {
                for layer in 0..self.shape.layers {
                    for head in 0..self.shape.heads {
                        let tag = mix(&[self.uid, rank as u64, layer as u64, head as u64, self.next_position]);
                        let place = self.rows[rank][layer][head].len();
                        self.rows[rank][layer][head].push((self.next_position, tag));
                        self.write(rank, layer, head, place, tag);
                    }
                }
            }
            self.next_position += 1;
        }
    }

    fn write(&mut self, rank: usize, layer: usize, head: usize, place: usize, tag: u64) {
        for (which, dim) in [(0, self.shape.k_dim), (1, self.shape.v_dim)] {
            let at = self.at(&self.stores[rank][layer], dim, place, head);
            let bytes = self.row_bytes(dim);
            let store = &mut self.stores[rank][layer];
            let data = if which == 0 { &mut store.k } else { &mut store.v };
            fill(&mut data[at..at + bytes], tag, which);
        }
    }

    /// Takes the last tokens away.
    pub fn truncate(&mut self, tokens: u64) {
        for heads in self.rows.iter_mut().flatten() {
            for rows in heads.iter_mut() {
                rows.truncate(rows.len() - tokens as usize);
            }
        }
        self.next_position -= tokens;
    }

    pub fn remember_plan(&mut self) {
        self.planned_lengths = self.lengths(0);
    }

    /// What a commit must do to one rank: the chosen rows of those that were planned, then the later ones.
    fn expect_commit(&mut self, rank: usize, script: &Script, style: Style) {
        for layer in 0..self.shape.layers {
            let planned = self.planned_lengths[layer];
            let count = (script.count)(layer, planned);
            for head in 0..self.shape.heads {
                let key = [self.uid, self.epoch, rank as u64, layer as u64];
                let kept = chosen(style, key, head as u64, planned, count);
                let rows = &mut self.rows[rank][layer][head];
                let later = rows.split_off(planned as usize);
                let place = |(place, row): (usize, u64)| {
                    let (position, tag) = rows[row as usize];
                    let new = rewritten_tag(self.uid, rank as u64, layer as u64, head as u64, place as u64);
                    match style {
                        Style::Rewrite => (position, new),
                        Style::Rerotate => (place as u64, new),
                        _ => (position, tag),
                    }
                };
                *rows = kept.into_iter().enumerate().map(place).chain(later).collect();
            }
        }
    }

    /// As [`Cache::expect_commit`], on every rank.
    pub fn expect_all(&mut self, script: &Script) {
        for rank in 0..self.shape.ranks {
            self.expect_commit(rank, script, *script.style.lock().unwrap());
        }
        self.epoch += 1;
    }

    /// Whether rows are gone that were planned.
    pub fn below_plan(&self) -> bool {
        self.lengths(0).iter().zip(&self.planned_lengths).any(|(now, planned)| now < planned)
    }

    fn raw_layers(&self, rank: usize, lengths: &[u64]) -> Vec<KvhLayer> {
        let rows = |data: &Vec<u8>, dim: usize| {
            let (row, heads, size) = (self.row_bytes(dim), self.shape.heads, self.shape.block_size);
            let (token, head, block) = match (size, self.shape.token_major) {
                (_, true) => (row * heads, row, row * heads * size),
                (0, false) => (row, row * self.capacity, 0),
                (_, false) => (row, row * size, row * size * heads),
            };
            KvhRows {
                base: data.as_ptr().cast_mut().cast(),
                stride_block: block as i64,
                stride_token: token as i64,
                stride_head: head as i64,
                stride_element: i64::from(self.shape.dtype.bits / 8),
                head_dim: dim as u32,
                dtype: self.shape.dtype,
            }
        };
        let layer = |(layer, store): (usize, &Store)| KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: layer as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: self.shape.heads as u32,
            block_size: self.shape.block_size as u32,
            reserved0: 0,
            length: lengths[layer],
            k: rows(&store.k, self.shape.k_dim),
            v: rows(&store.v, self.shape.v_dim),
            table: KvhBlockTable {
                data: if store.table.is_empty() { null() } else { store.table.as_ptr().cast() },
                stride_head: 0,
                count: store.table.len() as u32,
                dtype: KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 },
            },
            positions: KvhPositions { data: null(), stride_head: 0, count: 0 },
        };
        self.stores[rank].iter().enumerate().map(layer).collect()
    }

    /// The rows as they are.
    pub fn layers(&self, rank: usize) -> Vec<KvhLayer> {
        self.raw_layers(rank, &self.lengths(rank))
    }

    /// All rows, as fresh ones.
    fn room(&self, rank: usize) -> Vec<KvhLayer> {
        self.raw_layers(rank, &vec![self.capacity as u64; self.shape.layers])
    }

    /// Every row holds the bytes of its tag.
    pub fn verify_bytes(&self) {
        for (rank, stores) in self.stores.iter().enumerate() {
            for (layer, store) in stores.iter().enumerate() {
                for (head, rows) in self.rows[rank][layer].iter().enumerate() {
                    for (place, &(position, tag)) in rows.iter().enumerate() {
                        for (which, dim, data) in [(0, self.shape.k_dim, &store.k), (1, self.shape.v_dim, &store.v)] {
                            let mut expected = vec![0; self.row_bytes(dim)];
                            fill(&mut expected, tag, which);
                            let at = self.at(store, dim, place, head);
                            assert_eq!(
                                data[at..at + expected.len()],
                                expected,
                                "rank {rank}, layer {layer}, head {head}, row {place} (position {position}), {}",
                                ["K", "V"][which as usize]
                            );
                        }
                    }
                }
                self.verify_unused(store);
            }
        }
    }

    /// Blocks that no table ever named are as they were.
    fn verify_unused(&self, store: &Store) {
        let size = self.shape.block_size;
        let bytes = size * self.shape.heads * self.row_bytes(self.shape.k_dim);
        let all = (2 * self.capacity).checked_div(size).unwrap_or(0);
        let never = Self::new(self.shape, 0, self.capacity).stores;
        let named = |block: i32| never.iter().flatten().any(|store| store.table.contains(&block));
        for block in (0..all).filter(|&block| !store.table.contains(&(block as i32)) && !named(block as i32)) {
            assert!(store.k[block * bytes..][..bytes].iter().all(|&byte| byte == UNUSED), "block {block} was written");
        }
    }
}
