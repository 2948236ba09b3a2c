//! The question before any data is read: is there something to compress, and how many rows does it take?

use std::sync::Arc;
use std::time::Instant;

use kvhook_abi::raw::*;

use crate::arm::{ArmState, Generation};
use crate::error::HostError;
use crate::figures::{Timed, reason_name};
use crate::host::{Host, hook_name};
use crate::instance::{Event, Instance};
use crate::lifecycle::least_tokens;
use crate::plan::{Refusal, counts_agree};
use crate::raw::*;
use crate::sequence::{Asked, Sequence, State};

/// What is asked about.
pub struct Ask<'a> {
    /// The sequence.
    pub uid: u64,
    /// Why now.
    pub event: Event,
    /// Rows stored in each layer.
    pub lengths: &'a [u64],
    /// Position of the next token.
    pub next_position: u64,
    /// Leading rows that others use.
    pub shared_rows: u64,
    /// Leading rows that are published.
    pub published_rows: u64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// `KVHOOK_DECISION_*`.
    pub decision: i32,
    /// Why it is a keep.
    pub reason: KvhookReason,
    /// The most rows that each layer keeps.
    pub counts: Vec<u64>,
}

impl Host {
    /// Asks the first rank's instance for its bound and decides whether and how rows would move.
    ///
    /// # Errors
    /// `UnknownUid`; `Argument` for a wrong number of layers. What a plugin does wrong is a keep with a reason.
    pub fn ask(&self, ask: &Ask<'_>) -> Result<Answer, HostError> {
        let sequence = self.sequence(ask.uid)?;
        self.migrate(&sequence);
        self.reached(&sequence, ask.next_position);
        {
            let mut state = self.live(&sequence)?;
            if ask.lengths.len() != state.generation.planned.len() {
                return Err(HostError::Argument(format!(
                    "`lengths` has {} elements; the model has {} layers",
                    ask.lengths.len(),
                    state.generation.planned.len()
                )));
            }
            if state.ticket.is_some() || !is_due(&mut state, ask) {
                return Ok(keep(KVH_REASON_NONE, ask));
            }
        }
        let (generation, epoch, answered) = loop {
            let (generation, epoch) = {
                let state = self.live(&sequence)?;
                // That was counted when it broke.
                if let Some(reason) = state.broken {
                    return Ok(keep(reason, ask));
                }
                if let Err(refusal) = self.may_be_asked(&sequence, &state, ask) {
                    drop(state);
                    return Ok(self.keep_because(&sequence, refusal, ask));
                }
                (state.generation.clone(), state.epoch)
            };
            let mut instance = generation.ranks[0].instance.lock();
            {
                // Whoever frees the sequence from here on waits for the instance before it tells it.
                let mut state = self.live(&sequence)?;
                if !Arc::ptr_eq(&state.generation, &generation) {
                    // It moved to other instances meanwhile: those are asked.
                    continue;
                }
                state.ranks[0].touched = true;
            }
            let answered = self.bound(&mut instance, &sequence, &generation, epoch, ask);
            drop(instance);
            break (generation, epoch, answered);
        };

        let decided = answered.and_then(|(counts, reason)| {
            let decision = self.decide(0, ask, &counts, reason)?;
            // Nothing will move, so no rows are asked for.
            let shadow = sequence.arm.state() == ArmState::Shadow;
            Ok((counts, if shadow { KVHOOK_DECISION_IN_PLACE } else { decision }))
        });
        match decided {
            Err(refusal) => Ok(self.keep_because(&sequence, refusal, ask)),
            Ok((counts, decision)) => {
                let mut state = self.live(&sequence)?;
                if Arc::ptr_eq(&state.generation, &generation) && state.epoch == epoch {
                    state.asked = Some(Asked {
                        event: ask.event,
                        next_position: ask.next_position,
                        lengths: ask.lengths.to_vec(),
                        counts: counts.clone(),
                    });
                }
                Ok(Answer { decision, reason: KVH_REASON_NONE, counts })
            }
        }
    }

    /// Whether every rank was shown what the plugin wants to have seen.
    fn may_be_asked(&self, sequence: &Sequence, state: &State, ask: &Ask<'_>) -> Result<(), Refusal> {
        let (generation, prompt) = (&state.generation, sequence.prompt_length);
        let queries = state.ranks.iter().map(|rank| rank.queries_seen(generation, prompt)).min().unwrap_or(0);
        let answer = state.ranks.iter().all(|rank| rank.saw_answer(generation, prompt, ask.next_position));
        self.may_compress(sequence, state, ask.event, ask.next_position, (queries, answer))
    }

    /// Calls `bound` on an instance. Gives the counts and the plugin's reason for a keep.
    pub(crate) fn bound(
        &self,
        instance: &mut Instance,
        sequence: &Sequence,
        generation: &Generation,
        epoch: u64,
        ask: &Ask<'_>,
    ) -> Result<(Vec<u64>, KvhookReason), Refusal> {
        let mut counts = ask.lengths.to_vec();
        let stride = size_of::<u64>() as u64;
        let args = KvhBoundArgs {
            struct_size: size_of::<KvhBoundArgs>(),
            uid: sequence.uid,
            epoch,
            next_position: ask.next_position,
            prompt_length: sequence.prompt_length,
            lengths: KvhArray { data: ask.lengths.as_ptr().cast(), count: ask.lengths.len() as u64, stride },
            segments: raw_segments(&sequence.segments),
        };
        let mut out = KvhBoundOut {
            struct_size: size_of::<KvhBoundOut>(),
            counts: KvhArrayMut { data: counts.as_mut_ptr().cast(), count: counts.len() as u64, stride },
            reason: KVH_REASON_NONE,
            reserved0: 0,
        };
        let start = Instant::now();
        // SAFETY: the arguments are ours and valid during the call.
        let called = unsafe { instance.bound(ask.event, &args, &mut out) };
        sequence.arm.took(Timed::Bound, start.elapsed());
        let reason =
            if (KVH_REASON_NONE..=KVH_REASON_OTHER).contains(&out.reason) { out.reason } else { KVH_REASON_OTHER };
        if let Err(error) = called {
            let reason = self.hook_failed("bound", sequence.uid, generation, &error);
            return Err(Refusal::new(reason, ""));
        }
        for (layer, (count, &length)) in counts.iter_mut().zip(ask.lengths).enumerate() {
            if !generation.planned[layer] {
                *count = length;
            } else if *count > length || (*count == 0 && length > 0) {
                return Err(Refusal::new(
                    KVHOOK_REASON_BAD_COUNT,
                    format!("layer {layer}: the bound is {count}; expected 1 to {length}"),
                ));
            }
        }
        // A layer that reads another one's cache has the other one's rows.
        for layer in 0..counts.len() {
            let owner = usize::try_from(self.models[0].layers()[layer].shared_with).ok();
            if let Some(&count) = owner.and_then(|owner| counts.get(owner)) {
                counts[layer] = count;
            }
        }
        Ok((counts, reason))
    }

    /// Whether rows would move in place or into fresh ones: `KVHOOK_DECISION_*`.
    ///
    /// # Errors
    /// Why nothing is to be done.
    pub(crate) fn decide(
        &self,
        rank: usize,
        ask: &Ask<'_>,
        counts: &[u64],
        reason: KvhookReason,
    ) -> Result<i32, Refusal> {
        let model = &self.models[rank];
        if counts == ask.lengths {
            return Err(Refusal::new(reason, ""));
        }
        if !counts_agree(model, self.offers.can, ask.lengths, counts) {
            return Err(Refusal::new(
                KVH_REASON_UNSUPPORTED,
                "the bound differs between layers, but the engine does not offer that (KVH_CAN_LAYER_COUNTS)",
            ));
        }
        let size = u64::from(self.offers.block_size).max(1);
        let in_place = ask.shared_rows == 0 && ask.published_rows == 0;
        // Blocks that others use are not freed, and stay used beside fresh ones.
        let shared = if in_place { 0 } else { ask.shared_rows.div_ceil(size) };
        let mut before = 0;
        let mut after = 0;
        for (layer, info) in model.layers().iter().enumerate() {
            if info.shared_with < 0 && counts[layer] != ask.lengths[layer] {
                before += ask.lengths[layer].div_ceil(size).saturating_sub(shared);
                after += counts[layer].div_ceil(size);
            }
        }
        if after >= before {
            return Err(Refusal::new(
                KVH_REASON_NO_GAIN,
                format!("{after} blocks of {size} tokens would be needed, and {before} would become free"),
            ));
        }
        Ok(if in_place { KVHOOK_DECISION_IN_PLACE } else { KVHOOK_DECISION_FRESH })
    }

    /// What must hold before a plugin is asked about a sequence, of which so many of the prompt's last queries were seen, and
    /// all behind the prompt or not.
    ///
    /// # Errors
    /// Why it is kept.
    pub(crate) fn may_compress(
        &self,
        sequence: &Sequence,
        state: &State,
        event: Event,
        next_position: u64,
        (queries_seen, answer_seen): (u64, bool),
    ) -> Result<(), Refusal> {
        let generation = &state.generation;
        let refuse = |reason, message: String| Err(Refusal { reason, message });
        if sequence.arm.is_off() || self.is_safe_mode() {
            return refuse(KVHOOK_REASON_DISABLED, String::new());
        }
        // An open ticket was opened before: the rank that panicked drops it, with its own reason.
        if generation.is_poisoned() && state.ticket.is_none() {
            return refuse(KVHOOK_REASON_POISONED, String::new());
        }
        if !generation.answers(event) {
            return refuse(KVH_REASON_NONE, String::new());
        }
        if next_position < least_tokens(generation) {
            let own = next_position < generation.min_tokens;
            let reason = if own { KVHOOK_REASON_MIN_TOKENS } else { KVH_REASON_TOO_SHORT };
            return refuse(
                reason,
                format!("{next_position} tokens, at least {} are asked for", least_tokens(generation)),
            );
        }
        let needed = generation.queries_needed(sequence.prompt_length);
        if queries_seen < needed {
            return refuse(
                KVH_REASON_QUERIES_MISSING,
                format!("{queries_seen} of the prompt's last {needed} queries were seen"),
            );
        }
        // A sequence that moved here began with the wants of other instances; and an arm that was off was shown nothing.
        if generation.needs.before_attention_phases & KVH_PHASE_DECODE != 0 && !answer_seen {
            return refuse(KVH_REASON_QUERIES_MISSING, "not all queries behind the prompt were seen".to_owned());
        }
        Ok(())
    }

    fn keep_because(&self, sequence: &Sequence, refusal: Refusal, ask: &Ask<'_>) -> Answer {
        self.fell_back(sequence, hook_name(ask.event), &refusal);
        keep(refusal.reason, ask)
    }

    /// Counts and logs why a sequence stays as it is.
    pub(crate) fn fell_back(&self, sequence: &Sequence, what: &str, refusal: &Refusal) {
        self.count_fallback(sequence, refusal.reason);
        self.log_fallback(sequence, what, refusal);
    }

    /// Logs why a sequence stays as it is.
    pub(crate) fn log_fallback(&self, sequence: &Sequence, what: &str, refusal: &Refusal) {
        let level = match refusal.reason {
            KVH_REASON_NONE..=KVH_REASON_OTHER | KVHOOK_REASON_MIN_TOKENS | KVHOOK_REASON_DISABLED => KVH_LOG_DEBUG,
            _ => KVH_LOG_WARN,
        };
        self.callbacks.log(
            level,
            format_args!(
                "arm {}: sequence {} is kept at {what}, reason {}{}{}",
                sequence.arm.name,
                sequence.uid,
                reason_name(refusal.reason),
                if refusal.message.is_empty() { "" } else { ": " },
                refusal.message
            ),
        );
    }
}

fn keep(reason: KvhookReason, ask: &Ask<'_>) -> Answer {
    Answer { decision: KVHOOK_DECISION_KEEP, reason, counts: ask.lengths.to_vec() }
}

/// Whether the plugin answers the event, and enough tokens came since the last time. Counts from here on, if so.
fn is_due(state: &mut State, ask: &Ask<'_>) -> bool {
    let generation = &state.generation;
    let grown = ask.next_position.saturating_sub(state.mark);
    let due = match ask.event {
        Event::PrefillDone => true,
        Event::Grown => generation.needs.grown_every > 0 && grown >= generation.needs.grown_every,
    };
    let due = due && generation.answers(ask.event);
    if due {
        state.mark = ask.next_position;
    }
    due
}

/// Segments, lent to a plugin.
pub(crate) fn raw_segments(segments: &[KvhSegment]) -> KvhArray {
    KvhArray { data: segments.as_ptr().cast(), count: segments.len() as u64, stride: size_of::<KvhSegment>() as u64 }
}
