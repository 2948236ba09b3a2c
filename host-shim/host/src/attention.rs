//! Queries, keys and values of one layer of one step, shown to the instances that asked for them.

use core::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use kvhook_abi::boundary::{self, Structs};
use kvhook_abi::raw::*;

use crate::arm::Generation;
use crate::error::HostError;
use crate::figures::Timed;
use crate::host::Host;
use crate::lifecycle::wanted_phases;
use crate::plan::Refusal;
use crate::positions::Positions;
use crate::sequence::Sequence;
use crate::services::{Call, CallSequence};

/// One layer of one step of a batch.
pub struct Step<'a> {
    /// Index of the layer.
    pub layer: u32,
    /// Queries.
    pub q: *const KvhTensor,
    /// New keys.
    pub k: *const KvhTensor,
    /// New values.
    pub v: *const KvhTensor,
    /// Sequences of the batch.
    pub sequences: Structs<'a, KvhStepSequence>,
    /// The engine's stream.
    pub stream: *mut c_void,
}

/// A sequence of the step whose instance asked for it.
struct Seen {
    sequence: Arc<Sequence>,
    step: KvhStepSequence,
    cache: KvhLayer,
    /// Kept alive during the call: `cache` points into it.
    positions: Positions,
}

impl Host {
    /// Shows a layer of a step. A sequence that is not live, or whose plugin did not ask for this phase and layer, is
    /// passed over; where a plugin fails, its sequences of the call are not compressed any more.
    ///
    /// # Errors
    /// `Argument` for a rank or layer that there is not, and for sequences that are not described as they should be;
    /// those of [`Device::queue`](crate::device::Device::queue).
    ///
    /// # Safety
    /// The tensors and rows are as described, and not written during the call.
    pub unsafe fn before_attention(&self, rank: u32, step: &Step<'_>) -> Result<(), HostError> {
        let rank = self.check_rank(rank)?;
        let layers = self.models[rank].layers().len();
        if step.layer as usize >= layers {
            return Err(HostError::Argument(format!("`layer` is {}; the model has {layers} layers", step.layer)));
        }
        let mut groups: Vec<(Arc<Generation>, Vec<Seen>)> = Vec::new();
        for index in 0..step.sequences.len() {
            let of_step = step.sequences.get(index)?;
            let Some((generation, sequence)) = self.wanted_by(&of_step, step.layer) else { continue };
            // SAFETY: the caller vouches for the rows' description.
            let cache = unsafe { boundary::read(of_step.cache, "sequences.cache")? };
            let seen = Seen { sequence, step: of_step, cache, positions: Positions::default() };
            match groups.iter_mut().find(|group| Arc::ptr_eq(&group.0, &generation)) {
                Some(group) => group.1.push(seen),
                None => groups.push((generation, vec![seen])),
            }
        }
        if groups.is_empty() {
            return Ok(());
        }
        let _queue = self.devices[rank].queue(step.stream)?;
        for (generation, seen) in groups {
            // SAFETY: passed on from the caller.
            unsafe { self.show(rank, &generation, step, seen) };
        }
        Ok(())
    }

    /// The sequence and its instances, if they asked for this layer in this phase.
    fn wanted_by(&self, step: &KvhStepSequence, layer: u32) -> Option<(Arc<Generation>, Arc<Sequence>)> {
        if step.uid == 0 {
            return None;
        }
        let sequence = self.sequence(step.uid).ok()?;
        let generation = {
            let state = sequence.state.lock();
            let generation = &state.generation;
            let wanted = wanted_phases(generation, sequence.prompt_length) & step.phase != 0
                && generation.needs.wants_layer(layer)
                && !generation.is_poisoned()
                && !sequence.arm.is_off()
                && !self.is_safe_mode();
            (state.live && state.broken.is_none() && wanted).then(|| generation.clone())?
        };
        Some((generation, sequence))
    }

    /// Calls one instance with its sequences.
    ///
    /// # Safety
    /// As [`Host::before_attention`].
    unsafe fn show(&self, rank: usize, generation: &Arc<Generation>, step: &Step<'_>, seen: Vec<Seen>) {
        let of_rank = &generation.ranks[rank];
        let mut instance = of_rank.instance.lock();
        let mut shown = Vec::with_capacity(seen.len());
        let mut memories = Vec::with_capacity(seen.len());
        for mut seen in seen {
            let mut state = seen.sequence.state.lock();
            if !state.live || !Arc::ptr_eq(&state.generation, generation) {
                continue;
            }
            // Whoever frees the sequence from here on waits for the instance before it tells it.
            let of_sequence = &mut state.ranks[rank];
            of_sequence.touched = true;
            of_sequence.attended = true;
            *of_sequence.stream.get_mut() = step.stream;
            seen.positions = of_sequence.positions[step.layer as usize].clone();
            memories.push(CallSequence { memory: of_sequence.memory.clone(), planning: None });
            drop(state);
            seen.cache.struct_size = size_of::<KvhLayer>();
            seen.cache.positions = seen.positions.raw();
            seen.step.struct_size = size_of::<KvhStepSequence>();
            shown.push(seen);
        }
        let Some(first) = shown.first() else { return };
        let arm = first.sequence.arm.clone();
        let sequences: Vec<KvhStepSequence> =
            shown.iter().map(|seen| KvhStepSequence { cache: &seen.cache, ..seen.step }).collect();
        let call = Call::new(self.allocator(rank), step.stream, memories);
        let start = Instant::now();
        let (called, call) = of_rank.services.during(call, |handle| {
            let args = KvhBeforeAttentionArgs {
                struct_size: size_of::<KvhBeforeAttentionArgs>(),
                call: handle,
                layer: step.layer,
                reserved0: 0,
                q: step.q,
                k: step.k,
                v: step.v,
                sequences: KvhArray {
                    data: sequences.as_ptr().cast(),
                    count: sequences.len() as u64,
                    stride: size_of::<KvhStepSequence>() as u64,
                },
                stream: step.stream,
            };
            // SAFETY: the arguments are ours and valid during the call; the caller vouches for tensors and rows.
            unsafe { instance.before_attention(&args) }
        });
        arm.took(Timed::BeforeAttention, start.elapsed());
        drop(call);
        drop(instance);
        for seen in &shown {
            self.reached(&seen.sequence, seen.step.first_position.saturating_add(seen.step.tokens));
            let Err(error) = &called else {
                let mut state = seen.sequence.state.lock();
                if let Some(rank) = state.ranks.get_mut(rank) {
                    rank.saw_queries(step.layer as usize, seen.step.first_position, seen.step.tokens);
                }
                continue;
            };
            let reason = self.hook_failed("before_attention", seen.sequence.uid, generation, error);
            seen.sequence.state.lock().broken = Some(reason);
            self.fell_back(&seen.sequence, "before_attention", &Refusal::new(reason, error.to_string()));
        }
    }
}
