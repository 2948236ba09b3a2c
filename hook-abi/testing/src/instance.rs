//! An instance of a plugin, called through its C tables.

use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;
use kvhook_abi::{KVH_BEFORE_ATTENTION_1, KVH_ON_FREE_1, KVH_ON_GROWN_1, KVH_ON_PREFILL_DONE_1};

use crate::answer::{self, Answer};
use crate::arrays::{Array, Message, array};
use crate::cache::{Layer, PerHead, dtype_of, encode};
use crate::engine::Engine;
use crate::fault::Fault;
use crate::host::Host;
use crate::random::Random;
use crate::sequence::Sequence;

/// When a plan is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The prompt is complete.
    PrefillDone,
    /// The sequence has grown.
    Grown,
}

/// What an instance needs, as [`KvhNeeds`] says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// `KVH_CAN_*` bits.
    pub must: u64,
    /// `KVH_PHASE_*` bits.
    pub phases: u32,
    /// How many of a prompt's last queries it wants.
    pub window_queries: u32,
    /// Tokens from one `on_grown` to the next.
    pub grown_every: u64,
    /// Sequences shorter than this are not shown.
    pub min_tokens: u64,
    /// A bit for each layer.
    pub layer_mask: Vec<u64>,
}

/// What `bound` answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bounded {
    /// Every layer keeps its length; `KVH_REASON_*`.
    Keep(i32),
    /// The most rows of each layer.
    Rows(Vec<u64>),
}

/// One sequence's part of a step that `before_attention` is shown.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its name.
    pub uid: u64,
    /// Tokens of its prompt.
    pub prompt_length: u64,
    /// Position of its first token in this step.
    pub first_position: u64,
    /// `[tokens][q_heads][head_dim]`, with RoPE applied.
    pub queries: PerHead,
}

/// An instance; it is destroyed when dropped.
pub struct Instance {
    entry: &'static KvhPluginEntry,
    raw: *mut KvhInstance,
    engine: Engine,
    host: Box<Host>,
    _raw_host: Box<KvhHost>,
}

// SAFETY: a host may call an instance from any thread, one call at a time, and its mock host is shared by all.
unsafe impl Send for Instance {}

type Bound = unsafe extern "C" fn(*mut KvhInstance, *const KvhBoundArgs, *mut KvhBoundOut, *mut KvhText) -> KvhStatus;
type Prepare =
    unsafe extern "C" fn(*mut KvhInstance, *const KvhPrepareArgs, *mut KvhPrepareOut, *mut KvhText) -> KvhStatus;

impl Instance {
    pub(crate) fn new(
        entry: &'static KvhPluginEntry,
        raw: *mut KvhInstance,
        engine: Engine,
        host: Box<Host>,
        raw_host: Box<KvhHost>,
    ) -> Self {
        Self { entry, raw, engine, host, _raw_host: raw_host }
    }

    /// Its log and memory.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The engine that it was made for.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The plugin's entry, for calls of a test's own.
    pub fn entry(&self) -> &'static KvhPluginEntry {
        self.entry
    }

    /// The plugin's state, for calls of a test's own.
    pub fn raw(&self) -> *mut KvhInstance {
        self.raw
    }

    /// A hook point's table.
    ///
    /// # Safety
    /// `T` is the table that the id names.
    pub unsafe fn hook<T>(&self, id: &str) -> Option<&'static T> {
        // SAFETY: the entry's function takes any text; the answer is static, and `T` by the caller's promise.
        unsafe { self.entry.hook?(KvhStr::new(id)).cast::<T>().as_ref() }
    }

    fn functions(&self, event: Event) -> Result<(Bound, Prepare), Fault> {
        // SAFETY: the tables that the ids name.
        let (hook, functions) = unsafe {
            match event {
                Event::PrefillDone => {
                    let table = self.hook::<KvhOnPrefillDone1>(KVH_ON_PREFILL_DONE_1);
                    (KVH_ON_PREFILL_DONE_1, table.and_then(|table| table.bound.zip(table.on_prefill_done)))
                }
                Event::Grown => {
                    let table = self.hook::<KvhOnGrown1>(KVH_ON_GROWN_1);
                    (KVH_ON_GROWN_1, table.and_then(|table| table.bound.zip(table.on_grown)))
                }
            }
        };
        functions.ok_or(Fault::NotImplemented { hook })
    }

    /// Asks what it needs.
    ///
    /// # Errors
    /// [`Fault::Refused`].
    pub fn needs(&mut self) -> Result<Needs, Fault> {
        let needs_of = self.entry.needs.ok_or(Fault::NotImplemented { hook: "needs" })?;
        let mut mask = vec![u64::MAX; self.engine.shape.layers.div_ceil(64)];
        let mut needs = KvhNeeds {
            struct_size: size_of::<KvhNeeds>(),
            must: 0,
            before_attention_phases: 0,
            window_queries: 0,
            grown_every: 0,
            min_tokens: 0,
            layer_mask: mask.as_mut_ptr(),
            layer_mask_words: mask.len() as u64,
        };
        let mut error = Message::new();
        // SAFETY: all of it lives here.
        let status = unsafe { needs_of(self.raw, &raw mut needs, error.raw()) };
        error.outcome(status)?;
        Ok(Needs {
            must: needs.must,
            phases: needs.before_attention_phases,
            window_queries: needs.window_queries,
            grown_every: needs.grown_every,
            min_tokens: needs.min_tokens,
            layer_mask: mask,
        })
    }

    /// Asks how much of a sequence would be kept when its prompt is complete.
    ///
    /// # Errors
    /// [`Fault::Refused`], [`Fault::Bound`], [`Fault::TailWritten`].
    pub fn bound(&mut self, sequence: &Sequence) -> Result<Bounded, Fault> {
        self.bound_at(sequence, Event::PrefillDone)
    }

    /// As [`Instance::bound`], at an event.
    ///
    /// # Errors
    /// As there.
    pub fn bound_at(&mut self, sequence: &Sequence, event: Event) -> Result<Bounded, Fault> {
        let lengths: Vec<u64> = sequence.layers.iter().map(|layer| layer.tokens() as u64).collect();
        let mut counts = Array::new(self.engine.extra, lengths.clone());
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
            counts: counts.raw_mut(),
            reason: KVH_REASON_NONE,
            reserved0: 0,
        };
        let (bound, _) = self.functions(event)?;
        let mut error = Message::new();
        // SAFETY: all of it lives here.
        let status = unsafe { bound(self.raw, &raw const args, &raw mut out, error.raw()) };
        error.outcome(status)?;
        counts.check_tails("counts")?;
        let counts: Vec<u64> = counts.iter().copied().collect();
        let above = counts.iter().zip(&lengths).position(|(bound, length)| bound > length);
        match above {
            Some(layer) => Err(Fault::Bound { layer, bound: counts[layer], length: lengths[layer] }),
            None if counts == lengths => Ok(Bounded::Keep(out.reason)),
            None => Ok(Bounded::Rows(counts)),
        }
    }

    /// Asks for plans when prompts are complete, and checks them against the contract.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn plan(&mut self, sequences: &[Sequence]) -> Result<Vec<Answer>, Fault> {
        self.prepare(sequences, Event::PrefillDone)
    }

    /// As [`Instance::plan`], for one sequence.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn plan_one(&mut self, sequence: &Sequence) -> Result<Answer, Fault> {
        let mut answers = self.plan(std::slice::from_ref(sequence))?;
        answers.pop().ok_or(Fault::NotImplemented { hook: KVH_ON_PREFILL_DONE_1 })
    }

    /// As [`Instance::plan`], at an event.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn prepare(&mut self, sequences: &[Sequence], event: Event) -> Result<Vec<Answer>, Fault> {
        let bounds: Vec<Bounded> =
            sequences.iter().map(|sequence| self.bound_at(sequence, event)).collect::<Result<_, _>>()?;
        let extra = self.engine.extra;
        let views: Vec<Array<KvhLayer>> = sequences
            .iter()
            .map(|sequence| sequence.layers.iter().enumerate().map(|(index, layer)| layer.view(index)).collect())
            .map(|views| Array::sized(extra, views))
            .collect();
        let described = sequences.iter().zip(&views).map(|(sequence, layers)| KvhSequence {
            struct_size: size_of::<KvhSequence>(),
            uid: sequence.uid,
            epoch: sequence.epoch,
            next_position: sequence.next_position,
            prompt_length: sequence.prompt_length,
            shared_rows: 0,
            queries_seen: sequence.queries_seen,
            position_axes: 1,
            reserved0: 0,
            segments: array(&sequence.segments),
            layers: layers.raw(),
        });
        let described = Array::sized(extra, described.collect());
        let mut room = Room::new(sequences, extra);
        let mut plans = Array::sized(extra, room.plans());
        let args = KvhPrepareArgs {
            struct_size: size_of::<KvhPrepareArgs>(),
            call: self.host.call(),
            sequences: described.raw(),
            stream: std::ptr::null_mut(),
        };
        let mut out = KvhPrepareOut { struct_size: size_of::<KvhPrepareOut>(), plans: plans.raw_mut() };
        let (_, prepare) = self.functions(event)?;
        let uids = sequences.iter().map(|sequence| sequence.uid).collect();
        self.host.begin(uids, sequences.iter().zip(&bounds).map(|(sequence, bound)| lent(sequence, bound)).collect());
        let mut error = Message::new();
        // SAFETY: all of it lives here.
        let status = unsafe { prepare(self.raw, &raw const args, &raw mut out, error.raw()) };
        let ended = self.host.end();
        for sequence in sequences {
            let untouched = |(index, layer): (usize, &Layer)| layer.check_untouched(index, sequence.uid);
            sequence.layers.iter().enumerate().try_for_each(untouched)?;
        }
        let lent = ended?;
        plans.check_tails("plans")?;
        room.layers.iter().try_for_each(|layers| layers.check_tails("plan.layers"))?;
        error.outcome(status)?;
        let mut answers = Vec::new();
        for (place, plan) in plans.iter().enumerate() {
            let expected = size_of::<KvhPlan>() + extra;
            if plan.struct_size != expected {
                let (found, expected) = (plan.struct_size as u64, expected as u64);
                return Err(Fault::HostField { field: "plan.struct_size", found, expected });
            }
            if plan.kind != KVH_PLAN_KEEP {
                self.check_counts(&room.layers[place], &sequences[place], &bounds[place])?;
            }
            // SAFETY: ticket memory and lent rows, which are taken back below; no count is above its bound.
            answers.push(unsafe { read(plan, &room, place, &sequences[place], &lent[place])? });
        }
        self.host.take_back(None);
        Ok(answers)
    }

    /// Before anything is read that a count speaks of.
    fn check_counts(&self, plans: &Array<KvhLayerPlan>, sequence: &Sequence, bound: &Bounded) -> Result<(), Fault> {
        let bounds = match bound {
            Bounded::Keep(reason) => return Err(Fault::Unannounced { reason: *reason }),
            Bounded::Rows(bounds) => bounds,
        };
        let fewer_allowed = self.engine.can & KVH_CAN_DATA_COUNTS != 0;
        for (layer, (plan, &bound)) in plans.iter().zip(bounds).enumerate() {
            let count = if answer::is_whole(plan) { sequence.layers[layer].tokens() as u64 } else { plan.count.into() };
            if count > bound || (count < bound && !fewer_allowed) {
                return Err(Fault::Count { layer, count, bound });
            }
        }
        Ok(())
    }

    /// Shows a layer's part of one step: `phase` is `KVH_PHASE_*`, queries are rounded to `dtype`. New keys and values,
    /// and the cache before them, are random: the same for the same sequence and layer.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn see(&mut self, layer: usize, phase: u32, parts: &[Seen], dtype: Dtype) -> Result<(), Fault> {
        // SAFETY: the table that the id names.
        let table = unsafe { self.hook::<KvhBeforeAttention1>(KVH_BEFORE_ATTENTION_1) };
        let see = table.and_then(|table| table.before_attention);
        let see = see.ok_or(Fault::NotImplemented { hook: KVH_BEFORE_ATTENTION_1 })?;
        let shape = self.engine.shape;
        let caches: Vec<Layer> = parts
            .iter()
            .map(|part| {
                let mut random = Random::new(part.uid * 1009 + layer as u64);
                let mut rows = || random.rows(shape.kv_heads, part.first_position as usize, shape.head_dim);
                Layer::new(rows(), rows(), dtype, crate::Form::HeadMajor)
            })
            .collect();
        let views: Vec<KvhLayer> = caches.iter().map(|cache| cache.view(layer)).collect();
        let mut tokens = 0;
        let mut sequences = Vec::new();
        for (part, cache) in parts.iter().zip(&views) {
            let end = part.first_position + part.queries.len() as u64;
            sequences.push(KvhStepSequence {
                struct_size: size_of::<KvhStepSequence>(),
                uid: part.uid,
                first_token: tokens,
                tokens: part.queries.len() as u64,
                first_position: part.first_position,
                prompt_length: part.prompt_length,
                flags: if phase == KVH_PHASE_PREFILL && end == part.prompt_length { KVH_STEP_PROMPT_ENDS } else { 0 },
                phase,
                cache,
            });
            tokens += part.queries.len() as u64;
        }
        let sequences = Array::sized(self.engine.extra, sequences);
        let mut random = Random::new(layer as u64);
        let queries = parts.iter().flat_map(|part| &part.queries).flatten().flatten().copied();
        let count = tokens as usize * shape.kv_heads * shape.head_dim;
        let mut new = || (0..count).map(|_| random.float()).collect::<Vec<f32>>();
        let size = |heads: usize| [tokens as i64, heads as i64, shape.head_dim as i64];
        let mut q = Step::new(queries.collect(), size(shape.q_heads), dtype);
        let mut k = Step::new(new(), size(shape.kv_heads), dtype);
        let mut v = Step::new(new(), size(shape.kv_heads), dtype);
        let args = KvhBeforeAttentionArgs {
            struct_size: size_of::<KvhBeforeAttentionArgs>(),
            call: self.host.call(),
            layer: layer as u32,
            reserved0: 0,
            q: &q.tensor(),
            k: &k.tensor(),
            v: &v.tensor(),
            sequences: sequences.raw(),
            stream: std::ptr::null_mut(),
        };
        self.host.begin(parts.iter().map(|part| part.uid).collect(), Vec::new());
        let mut error = Message::new();
        // SAFETY: all of it lives here.
        let status = unsafe { see(self.raw, &raw const args, error.raw()) };
        let ended = self.host.end();
        for (part, cache) in parts.iter().zip(&caches) {
            cache.check_untouched(layer, part.uid)?;
        }
        for (name, step) in [("q", &q), ("k", &k), ("v", &v)] {
            step.check_untouched(name)?;
        }
        ended?;
        self.host.take_back(None);
        error.outcome(status)
    }

    /// Ends a sequence (`reason`: `KVH_FREE_*`); its memory is taken back after.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn free_for(&mut self, uid: u64, reason: i32) -> Result<(), Fault> {
        let args = KvhOnFreeArgs {
            struct_size: size_of::<KvhOnFreeArgs>(),
            uid,
            reason,
            reserved0: 0,
            stream: std::ptr::null_mut(),
        };
        // SAFETY: the table that the id names.
        let table = unsafe { self.hook::<KvhOnFree1>(KVH_ON_FREE_1) };
        let on_free = table.and_then(|table| table.on_free).ok_or(Fault::NotImplemented { hook: KVH_ON_FREE_1 })?;
        let mut error = Message::new();
        // SAFETY: all of it lives here.
        let status = unsafe { on_free(self.raw, &raw const args, error.raw()) };
        let ended = self.host.end();
        self.host.take_back(Some(uid));
        error.outcome(status).and(ended.map(drop))
    }

    /// As [`Instance::free_for`]: it is finished.
    ///
    /// # Errors
    /// Any [`Fault`].
    pub fn free(&mut self, uid: u64) -> Result<(), Fault> {
        self.free_for(uid, KVH_FREE_FINISHED)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(destroy) = self.entry.destroy {
            // SAFETY: made by `create`, ended once.
            unsafe { destroy(self.raw) };
        }
    }
}

/// What a prepare fills.
struct Room {
    layers: Vec<Array<KvhLayerPlan>>,
    messages: Vec<Message>,
}

impl Room {
    fn new(sequences: &[Sequence], extra: usize) -> Self {
        let empty = |_: &Layer| KvhLayerPlan {
            struct_size: size_of::<KvhLayerPlan>(),
            count: 0,
            range_count: 0,
            indices: std::ptr::null(),
            index_stride_head: 0,
            ranges: std::ptr::null(),
            positions: std::ptr::null(),
            position_stride_head: 0,
        };
        let layers = |sequence: &Sequence| Array::sized(extra, sequence.layers.iter().map(empty).collect());
        Self {
            layers: sequences.iter().map(layers).collect(),
            messages: sequences.iter().map(|_| Message::new()).collect(),
        }
    }

    fn plans(&mut self) -> Vec<KvhPlan> {
        let each = self.layers.iter_mut().zip(&mut self.messages);
        each.map(|(layers, message)| KvhPlan {
            struct_size: size_of::<KvhPlan>(),
            kind: KVH_PLAN_KEEP,
            reason: KVH_REASON_NONE,
            flags: 0,
            reserved0: 0,
            next_position: 0,
            layers: layers.raw_mut(),
            message: message.raw(),
        })
        .collect()
    }
}

/// Rows for a rewrite of a sequence: as many as the bound says.
fn lent(sequence: &Sequence, bound: &Bounded) -> Vec<Layer> {
    let rows = |layer: usize| match bound {
        Bounded::Keep(_) => 0,
        Bounded::Rows(counts) => counts.get(layer).map_or(0, |count| *count as usize),
    };
    let layers = sequence.layers.iter().enumerate();
    layers.map(|(index, layer)| layer.fresh(rows(index))).collect()
}

/// Copies a plan.
///
/// # Safety
/// What the plan points to is valid.
unsafe fn read(
    plan: &KvhPlan,
    room: &Room,
    place: usize,
    sequence: &Sequence,
    lent: &[Layer],
) -> Result<Answer, Fault> {
    let moved = plan.flags & KVH_PLAN_FLAG_MOVED_POSITIONS != 0;
    let known = plan.flags & !KVH_PLAN_FLAG_MOVED_POSITIONS == 0;
    let next_position = if moved { plan.next_position } else { sequence.next_position };
    let layers = || room.layers[place].iter().enumerate();
    match plan.kind {
        KVH_PLAN_KEEP if plan.flags == 0 => {
            Ok(Answer::Keep { reason: plan.reason, message: room.messages[place].read()? })
        }
        KVH_PLAN_SELECT if plan.flags == 0 => {
            // SAFETY: the caller's promise.
            let layer = |(index, plan)| unsafe { answer::read_select(plan, index, &sequence.layers[index]) };
            Ok(Answer::Select(layers().map(layer).collect::<Result<_, _>>()?))
        }
        KVH_PLAN_REWRITE if known => {
            // SAFETY: the caller's promise.
            let layer = |(index, layer)| unsafe {
                answer::read_rewrite(layer, index, &sequence.layers[index], &lent[index], next_position)
            };
            let layers = layers().map(layer).collect::<Result<_, _>>()?;
            Ok(Answer::Rewrite { layers, next_position: moved.then_some(next_position) })
        }
        kind => Err(Fault::Kind { kind, flags: plan.flags }),
    }
}

/// One tensor of a step.
struct Step {
    memory: crate::guarded::Guarded,
    filled: Vec<u8>,
    shape: [i64; 3],
    strides: [i64; 3],
    dtype: Dtype,
}

impl Step {
    fn new(values: Vec<f32>, shape: [i64; 3], dtype: Dtype) -> Self {
        let mut memory = crate::guarded::Guarded::new(values.len() * dtype.size(), 64, 0);
        let elements = memory.bytes_mut().chunks_mut(dtype.size());
        values.iter().zip(elements).for_each(|(value, out)| encode(dtype, *value, out));
        let filled = memory.bytes().to_vec();
        Self { memory, filled, shape, strides: [shape[1] * shape[2], shape[2], 1], dtype }
    }

    fn tensor(&mut self) -> KvhTensor {
        KvhTensor {
            data: self.memory.address().cast_mut(),
            device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            ndim: 3,
            dtype: dtype_of(self.dtype),
            shape: self.shape.as_mut_ptr(),
            strides: self.strides.as_mut_ptr(),
            byte_offset: 0,
        }
    }

    fn check_untouched(&self, name: &str) -> Result<(), Fault> {
        let now = self.memory.bytes();
        let inside = now.iter().zip(&self.filled).position(|(now, filled)| now != filled).map(|at| at as i64);
        match inside.or_else(|| self.memory.damage()) {
            Some(at) => Err(Fault::Outside { what: format!("the step's `{name}`"), at, bytes: 0 }),
            None => Ok(()),
        }
    }
}
