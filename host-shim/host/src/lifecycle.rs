//! Sequences begin, fork, are cut, and end.

use core::ffi::c_void;
use core::mem::take;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvhook_abi::raw::*;

use crate::arm::{Arm, Generation};
use crate::assign::choose;
use crate::error::HostError;
use crate::figures::Timed;
use crate::host::{Host, find};
use crate::instance::Event;
use crate::raw::*;
use crate::sequence::{RankState, Sequence, State};
use crate::spec::NO_ARM;
use crate::sync::{MutexGuard, unlock_fairly};

/// A sequence that begins.
#[derive(Default)]
pub struct Begin<'a> {
    /// What the arm is chosen by when none is named; empty: the uid, as 8 bytes, little-endian.
    pub key: &'a [u8],
    /// Name of an arm; `none`: no arm; empty: by weight.
    pub arm: &'a str,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// Stretches of the prompt.
    pub segments: Vec<KvhSegment>,
}

/// What the host wants for a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Began {
    /// Its name; 0: no arm took it.
    pub uid: u64,
    /// The longest cached prefix that may be used, in tokens.
    pub max_prefix_hit: u64,
    /// Phases in which `before_attention` is wanted.
    pub phases: u32,
    /// It may be compressed when its prompt is done.
    pub on_prefill_done: bool,
    /// Ask again each time it has grown by so many tokens; 0: never.
    pub grown_every: u64,
}

impl Host {
    /// Begins a sequence on an arm, or on none.
    ///
    /// # Errors
    /// `UnknownArm` for a name that no arm has (in safe mode no arm takes it, nor does one that is draining or disabled); `Argument` for segments that overlap,
    /// descend or are empty.
    pub fn begin(&self, begin: Begin<'_>) -> Result<Began, HostError> {
        check_segments(&begin.segments)?;
        let uid = self.next_uid.fetch_add(1, Ordering::Relaxed);
        let no_arm = Began { max_prefix_hit: begin.prompt_length, ..Began::default() };
        let chosen = {
            // Arm and instances are those of one moment.
            let arms = self.arms.read();
            let arm = match begin.arm {
                NO_ARM => None,
                _ if self.is_safe_mode() => None,
                "" if begin.key.is_empty() => choose(&arms, &uid.to_le_bytes()),
                "" => choose(&arms, begin.key),
                name => Some(find(&arms, name)?).filter(|arm| arm.takes_sequences()),
            };
            arm.map(|arm| (arm.clone(), arm.current()))
        };
        let Some((arm, generation)) = chosen else { return Ok(no_arm) };
        let state = State::new(generation, begin.prompt_length);
        Ok(self.insert(Sequence::new(uid, arm, begin.prompt_length, begin.segments, 0, state)))
    }

    /// The sequence is reachable from here on.
    fn insert(&self, sequence: Sequence) -> Began {
        let (uid, prompt_length) = (sequence.uid, sequence.prompt_length);
        let generation = sequence.state.lock().generation.clone();
        let needs = &generation.needs;
        let phases = wanted_phases(&generation, prompt_length);
        let window = if phases & KVH_PHASE_PREFILL != 0 { generation.queries_needed(prompt_length) } else { 0 };
        let began = Began {
            uid,
            max_prefix_hit: prompt_length - window,
            phases,
            on_prefill_done: generation.answers(Event::PrefillDone) && prompt_length >= least_tokens(&generation),
            grown_every: if generation.answers(Event::Grown) { needs.grown_every } else { 0 },
        };
        sequence.arm.figures.began();
        let sequence = Arc::new(sequence);
        self.sequences.write().insert(uid, sequence.clone());
        // A change that did not find it among the sequences has exchanged the instances by now.
        self.migrate(&sequence);
        began
    }

    /// A new sequence with the same rows: same arm, same positions. The old one's ticket is dropped.
    ///
    /// # Errors
    /// `UnknownUid`; `ForkRefused` where the plugin keeps state for the sequence; `Argument` while it is committed.
    pub fn fork(&self, uid: u64) -> Result<Began, HostError> {
        let sequence = self.sequence(uid)?;
        let mut state = self.live(&sequence)?;
        if state.holds_state() {
            return Err(HostError::ForkRefused(uid));
        }
        refuse_while_committing(&state)?;
        let ticket = self.close(&sequence, &mut state, KVHOOK_REASON_DROPPED);
        state.failed = None;
        let mut copy = State::new(state.generation.clone(), sequence.prompt_length);
        (copy.epoch, copy.mark) = (state.epoch, state.mark);
        copy.ranks = state.ranks.iter().map(|rank| rank.anew()).collect();
        drop(state);
        drop(ticket);
        self.migrate(&sequence);
        let uid = self.next_uid.fetch_add(1, Ordering::Relaxed);
        let segments = sequence.segments.clone();
        let (arm, seen) = (sequence.arm.clone(), sequence.seen());
        Ok(self.insert(Sequence::new(uid, arm, sequence.prompt_length, segments, seen, copy)))
    }

    /// The last rows of each layer were taken away. A ticket stays open only if all that was planned is still there.
    ///
    /// # Errors
    /// `UnknownUid`; `Argument` for a wrong number of layers, for a next position that is not behind every row's
    /// position, and while the sequence is committed.
    pub fn cut(&self, uid: u64, lengths: &[u64], next_position: u64) -> Result<(), HostError> {
        let sequence = self.sequence(uid)?;
        let mut state = self.live(&sequence)?;
        if lengths.len() != state.generation.planned.len() {
            return Err(HostError::Argument(format!(
                "`lengths` has {} elements; the model has {} layers",
                lengths.len(),
                state.generation.planned.len()
            )));
        }
        refuse_while_committing(&state)?;
        self.check_cut(&state, lengths, next_position)?;
        let below = state.ticket.as_ref().is_some_and(|ticket| {
            next_position < ticket.planned_position || lengths.iter().zip(&ticket.lengths).any(|(now, then)| now < then)
        });
        let ticket = if below { self.close(&sequence, &mut state, KVHOOK_REASON_DROPPED) } else { None };
        for rank in &mut state.ranks {
            for (positions, &length) in rank.positions.iter_mut().zip(lengths) {
                positions.cut(length);
            }
            rank.cut(next_position);
        }
        state.failed = None;
        state.asked = None;
        state.mark = state.mark.min(next_position);
        drop(state);
        drop(ticket);
        self.migrate(&sequence);
        Ok(())
    }

    /// Every position of a table must stay below those of the rows behind it.
    fn check_cut(&self, state: &State, lengths: &[u64], next_position: u64) -> Result<(), HostError> {
        for (rank, model) in state.ranks.iter().zip(&self.models) {
            for (layer, (positions, &length)) in rank.positions.iter().zip(lengths).enumerate() {
                let mut positions = positions.clone();
                positions.cut(length);
                let last = positions.last(model.layers()[layer].kv_heads as usize);
                let behind = length - positions.count() as u64;
                if let Some(last) = last.filter(|&last| u64::from(last) + behind >= next_position) {
                    return Err(HostError::Argument(format!(
                        "`next_position` is {next_position}, but layer {layer} holds position {last} and {behind} rows \
                         behind it"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Ends a sequence. Each instance that any hook was called for hears of it once.
    ///
    /// # Errors
    /// `UnknownUid`; `Argument` for an unknown reason.
    pub fn free(&self, uid: u64, reason: i32, stream: *mut c_void) -> Result<(), HostError> {
        if !(KVH_FREE_FINISHED..=KVH_FREE_RESET).contains(&reason) {
            return Err(HostError::Argument(format!("`reason` is {reason}; expected a KVH_FREE_*")));
        }
        let sequence = self.sequences.write().remove(&uid).ok_or(HostError::UnknownUid(uid))?;
        self.end(&sequence, reason, stream);
        Ok(())
    }

    /// Ends every live sequence with the reason `KVH_FREE_RESET`.
    pub fn reset(&self, stream: *mut c_void) {
        let sequences = take(&mut *self.sequences.write());
        for sequence in sequences.values() {
            self.end(sequence, KVH_FREE_RESET, stream);
        }
    }

    fn end(&self, sequence: &Sequence, reason: i32, stream: *mut c_void) {
        let mut state = sequence.state.lock();
        state.live = false;
        let ticket = self.close(sequence, &mut state, KVHOOK_REASON_DROPPED);
        let (generation, ranks) = (state.generation.clone(), take(&mut state.ranks));
        drop(state);
        drop(ticket);
        self.tell_freed(sequence, &generation, &ranks, reason, Some(stream));
        if ranks.iter().any(|rank| rank.touched) && sequence.went_well() {
            self.judge(&sequence.arm, sequence.arm.guard.outcome(false));
        }
        sequence.arm.figures.ended();
    }

    /// Calls `on_free` on the ranks whose instance knows the sequence, then gives back what was kept for it: in the order
    /// of `stream`, on the ranks of other devices and without one in that of the rank's last call.
    fn tell_freed(
        &self,
        sequence: &Sequence,
        generation: &Generation,
        ranks: &[RankState],
        reason: i32,
        stream: Option<*mut c_void>,
    ) {
        let uid = sequence.uid;
        for (place, rank) in ranks.iter().enumerate() {
            let stream = stream.filter(|&stream| self.devices[place].takes(stream));
            let stream = stream.unwrap_or_else(|| rank.stream.load(Ordering::Relaxed));
            let args = KvhOnFreeArgs { struct_size: size_of::<KvhOnFreeArgs>(), uid, reason, reserved0: 0, stream };
            if let Some(of_rank) = generation.ranks.get(place).filter(|_| rank.touched) {
                let mut instance = of_rank.instance.lock();
                if instance.hears_free() && !instance.is_poisoned() {
                    let start = Instant::now();
                    // SAFETY: the arguments are ours and valid during the call.
                    let told = unsafe { instance.on_free(&args) };
                    sequence.arm.took(Timed::OnFree, start.elapsed());
                    if let Err(error) = told {
                        self.hook_failed("on_free", uid, generation, &error);
                    }
                }
                // A swap does this for many sequences: who serves one of them meanwhile waits for one call, not for all.
                unlock_fairly(instance);
            }
            rank.memory.release(stream);
            rank.positions.iter().for_each(|positions| positions.release_on(stream));
        }
    }

    /// Moves every sequence of an arm that may to the arm's current instances. All have moved before the old instances,
    /// which then nobody waits for any more, hear of the first.
    pub(crate) fn migrate_all(&self, arm: &Arc<Arm>) {
        let mut left = Vec::new();
        self.visit_sequences(|sequence| {
            if Arc::ptr_eq(&sequence.arm, arm) {
                left.extend(self.leave(sequence).map(|left| (sequence.clone(), left)));
            }
        });
        for (sequence, (old, ranks)) in left {
            self.tell_freed(&sequence, &old, &ranks, KVH_FREE_FINISHED, None);
        }
    }

    /// Moves a sequence to its arm's current instances, unless the old ones hold state for it or a ticket is open. The old
    /// instances are told that it has ended, as far as they are concerned. Not to be called with an instance's lock.
    pub(crate) fn migrate(&self, sequence: &Sequence) {
        if let Some((old, ranks)) = self.leave(sequence) {
            self.tell_freed(sequence, &old, &ranks, KVH_FREE_FINISHED, None);
        }
    }

    /// Gives a sequence its arm's current instances, if it may have them. What it left is returned.
    fn leave(&self, sequence: &Sequence) -> Option<(Arc<Generation>, Vec<RankState>)> {
        let mut state = sequence.state.lock();
        // Read under this lock: what another thread moved it to is not older.
        let current = sequence.arm.current();
        let stays = Arc::ptr_eq(&state.generation, &current) || state.ticket.is_some() || state.holds_state();
        if !state.live || stays {
            return None;
        }
        let old = core::mem::replace(&mut state.generation, current);
        let positions = state.ranks.iter().map(|rank| rank.anew()).collect();
        let ranks = core::mem::replace(&mut state.ranks, positions);
        state.asked = None;
        state.broken = None;
        sequence.joined();
        Some((old, ranks))
    }

    /// Positions of the rows of one layer on one rank.
    ///
    /// # Errors
    /// `UnknownUid`; `Argument` for a rank or layer that there is not.
    pub fn positions(&self, rank: u32, uid: u64, layer: u32) -> Result<KvhPositions, HostError> {
        let rank = self.check_rank(rank)?;
        let sequence = self.sequence(uid)?;
        let state = self.live(&sequence)?;
        let positions = state.ranks[rank].positions.get(layer as usize);
        positions.map(|positions| positions.raw()).ok_or_else(|| {
            HostError::Argument(format!("`layer` is {layer}; the model has {} layers", state.generation.planned.len()))
        })
    }

    /// A sequence's state, if it is live.
    pub(crate) fn live<'a>(&self, sequence: &'a Sequence) -> Result<MutexGuard<'a, State>, HostError> {
        let state = sequence.state.lock();
        if state.live { Ok(state) } else { Err(HostError::UnknownUid(sequence.uid)) }
    }
}

/// Sequences shorter than this are kept.
pub(crate) fn least_tokens(generation: &Generation) -> u64 {
    generation.min_tokens.max(generation.needs.min_tokens)
}

/// Phases in which `before_attention` is wanted: none for a prompt that is too short, if it is not looked at again later.
pub(crate) fn wanted_phases(generation: &Generation, prompt_length: u64) -> u32 {
    let needs = &generation.needs;
    if prompt_length < least_tokens(generation) && needs.grown_every == 0 { 0 } else { needs.before_attention_phases }
}

fn refuse_while_committing(state: &State) -> Result<(), HostError> {
    match state.ticket.as_ref().filter(|ticket| ticket.is_committing()) {
        Some(ticket) => Err(HostError::Argument(format!(
            "`uid`: ticket {} is being committed; every rank must commit it first",
            ticket.id
        ))),
        None => Ok(()),
    }
}

fn check_segments(segments: &[KvhSegment]) -> Result<(), HostError> {
    let mut end = 0;
    for (place, segment) in segments.iter().enumerate() {
        let after = segment.start.checked_add(segment.length).filter(|_| segment.length > 0 && segment.start >= end);
        end = after.ok_or_else(|| {
            HostError::Argument(format!(
                "`segments[{place}]` has start {} and length {}; segments are ascending, not empty, and the one before \
                 ends at {end}",
                segment.start, segment.length
            ))
        })?;
    }
    Ok(())
}
