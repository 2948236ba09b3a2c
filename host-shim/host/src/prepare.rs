//! The first half of a compression: plugins are asked, their plans checked, tickets opened. The cache is only read.

use core::ffi::c_void;
use core::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvhook_abi::raw::*;

use crate::arm::{ArmState, Generation};
use crate::ask::{Ask, raw_segments};
use crate::device::Queue;
use crate::error::HostError;
use crate::figures::Timed;
use crate::host::{Host, hook_name};
use crate::instance::{Event, Instance};
use crate::memory::{Block, SequenceMemory};
use crate::model::Model;
use crate::plan::{self, Plan, Refusal, Terms};
use crate::positions::Positions;
use crate::raw::*;
use crate::sequence::{Sequence, State};
use crate::services::{Call, CallSequence, Planning};
use crate::ticket::{Failed, Held, RankTicket, Ticket};
use crate::view::{self, Layers};

/// Room for a plan's sentence about its reason, in bytes.
const MESSAGE_BYTES: usize = 512;

/// Why the other ranks keep where one does.
const OTHER: KvhookReason = KVHOOK_REASON_OTHER_RANK;

/// A sequence to prepare on one rank.
pub struct PrepareRequest {
    /// The sequence.
    pub uid: u64,
    /// Why now.
    pub event: Event,
    /// Fresh rows will be given at commit.
    pub fresh: bool,
    /// Rows move: no block table is edited.
    pub moves_rows: bool,
    /// The rows as they are.
    pub layers: Layers,
    /// Position of the next token.
    pub next_position: u64,
    /// Leading rows that others use.
    pub shared_rows: u64,
    /// Leading rows that are published.
    pub published_rows: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The ticket; 0: kept.
    pub ticket: u64,
    /// Why it is kept.
    pub reason: KvhookReason,
}

/// A sequence of which the plugin is asked.
struct Member<'a> {
    place: usize,
    ticket: u64,
    sequence: Arc<Sequence>,
    request: &'a PrepareRequest,
    lengths: Vec<u64>,
    /// Known once the instance is locked.
    counts: Vec<u64>,
    epoch: u64,
    queries_seen: u64,
    positions: Vec<Positions>,
    memory: SequenceMemory,
}

impl Host {
    /// Prepares sequences on one rank: one call of each plugin instance for all its sequences of one event. What a plugin
    /// does wrong, and a uid that is not live any more, is a keep with a reason.
    ///
    /// # Errors
    /// `Argument` for a rank that there is not.
    ///
    /// # Safety
    /// The requests' rows are as described, and not written during the call.
    pub unsafe fn prepare(
        &self,
        rank: u32,
        requests: &[PrepareRequest],
        stream: *mut c_void,
    ) -> Result<Vec<Prepared>, HostError> {
        let rank = self.check_rank(rank)?;
        let mut prepared = vec![Prepared { ticket: 0, reason: KVHOOK_REASON_DROPPED }; requests.len()];
        let mut groups: Vec<(Arc<Generation>, Event, Vec<Member<'_>>)> = Vec::new();
        for (place, request) in requests.iter().enumerate() {
            match self.join(rank, place, request) {
                Err(reason) => prepared[place].reason = reason,
                Ok((generation, member)) => {
                    let same = |group: &&mut (Arc<Generation>, Event, _)| {
                        Arc::ptr_eq(&group.0, &generation) && group.1 == request.event
                    };
                    match groups.iter_mut().find(same) {
                        Some(group) => group.2.push(member),
                        None => groups.push((generation, request.event, vec![member])),
                    }
                }
            }
        }
        for (generation, event, members) in groups {
            // SAFETY: passed on from the caller.
            unsafe { self.ask_for_plans(rank, &generation, event, members, stream, &mut prepared) };
        }
        // Where no ticket is left, nothing ties a sequence to instances that were replaced meanwhile.
        for (request, _) in requests.iter().zip(&prepared).filter(|(_, prepared)| prepared.ticket == 0) {
            if let Ok(sequence) = self.sequence(request.uid) {
                self.migrate(&sequence);
            }
        }
        Ok(prepared)
    }

    /// A prepare of one rank cannot be made: whatever ticket it would have joined is dropped.
    pub fn refuse_prepare(&self, rank: u32, uid: u64, event: Event, next_position: u64, why: &HostError) {
        let (Ok(rank), Ok(sequence)) = (self.check_rank(rank), self.sequence(uid)) else { return };
        let mut state = sequence.state.lock();
        if !state.live || state.ticket.as_ref().is_some_and(Ticket::is_committing) {
            return;
        }
        let ticket = self.fail(&sequence, &mut state, rank, event, next_position, OTHER);
        drop(state);
        drop(ticket);
        self.fell_back(&sequence, hook_name(event), &Refusal::new(KVH_REASON_UNSUPPORTED, why.to_string()));
    }

    /// Joins the ticket of the sequence's other ranks, or opens one.
    fn join<'a>(
        &self,
        rank: usize,
        place: usize,
        request: &'a PrepareRequest,
    ) -> Result<(Arc<Generation>, Member<'a>), KvhookReason> {
        let sequence = self.sequence(request.uid).map_err(|_| KVHOOK_REASON_DROPPED)?;
        let (event, next_position) = (request.event, request.next_position);
        let mut stale = None;
        let mut state = sequence.state.lock();
        if !state.live {
            return Err(KVHOOK_REASON_DROPPED);
        }
        if let Some(ticket) = &state.ticket {
            let waits = matches!(ticket.ranks[rank], RankTicket::Waiting);
            let same = ticket.event == event && ticket.planned_position == next_position && waits;
            if ticket.is_committing() {
                return Err(KVH_REASON_OTHER);
            }
            if !same && next_position < ticket.planned_position {
                return Err(KVHOOK_REASON_DROPPED);
            }
            if !same {
                stale = self.close(&sequence, &mut state, KVHOOK_REASON_DROPPED);
            }
        } else if let Some(failed) = &mut state.failed {
            let same = failed.event == event && failed.planned_position == next_position;
            if same && !failed.told[rank] {
                failed.told[rank] = true;
                return Err(KVHOOK_REASON_OTHER_RANK);
            }
        }
        state.failed = None;
        if let Some(reason) = state.broken {
            let ticket = self.fail(&sequence, &mut state, rank, event, next_position, OTHER);
            drop(state);
            drop((ticket, stale));
            return Err(reason);
        }
        let seen = state.ranks[rank].queries_seen(&state.generation, sequence.prompt_length);
        let answer = state.ranks[rank].saw_answer(&state.generation, sequence.prompt_length, next_position);
        let lengths = request.layers.lengths();
        let joined = self
            .may_compress(&sequence, &state, event, next_position, (seen, answer))
            .and_then(|()| self.ticket_of(&sequence, &mut state, request, &lengths));
        match joined {
            Ok(counts) => {
                if let Some(ticket) = &mut state.ticket {
                    ticket.ranks[rank] = RankTicket::Preparing;
                }
                state.mark = state.mark.max(next_position);
                let member = Member {
                    place,
                    ticket: state.ticket.as_ref().map_or(0, |ticket| ticket.id),
                    sequence: sequence.clone(),
                    request,
                    lengths,
                    counts,
                    epoch: state.epoch,
                    queries_seen: seen,
                    positions: Vec::new(),
                    memory: SequenceMemory::default(),
                };
                let generation = state.generation.clone();
                drop(state);
                drop(stale);
                Ok((generation, member))
            }
            Err(refusal) => {
                let ticket = self.fail(&sequence, &mut state, rank, event, next_position, OTHER);
                drop(state);
                drop((ticket, stale));
                self.fell_back(&sequence, hook_name(event), &refusal);
                Err(refusal.reason)
            }
        }
    }

    /// The open ticket, or a new one. Gives the bound, or nothing where this rank has to ask for it.
    fn ticket_of(
        &self,
        sequence: &Arc<Sequence>,
        state: &mut State,
        request: &PrepareRequest,
        lengths: &[u64],
    ) -> Result<Vec<u64>, Refusal> {
        if let Some(ticket) = &state.ticket {
            if ticket.lengths == lengths {
                return Ok(ticket.counts.clone().unwrap_or_default());
            }
            // Ranks have different lengths only where counts depend on data.
            return match self.offers.can & KVH_CAN_DATA_COUNTS {
                0 => Err(Refusal::new(KVH_REASON_UNSUPPORTED, "the ranks' layers have different lengths")),
                _ => Ok(Vec::new()),
            };
        }
        let asked = state.asked.take().filter(|asked| {
            asked.event == request.event && asked.next_position == request.next_position && asked.lengths == lengths
        });
        let counts = asked.map(|asked| asked.counts);
        let id = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        state.ticket = Some(Ticket {
            id,
            event: request.event,
            planned_position: request.next_position,
            lengths: lengths.to_vec(),
            counts: counts.clone(),
            ranks: state.ranks.iter().map(|_| RankTicket::Waiting).collect(),
            fresh: request.fresh,
            moves_rows: request.moves_rows,
            shadow: sequence.arm.state() == ArmState::Shadow,
            movement: None,
            commit_position: None,
        });
        self.tickets.lock().opened(id, sequence.clone());
        Ok(counts.unwrap_or_default())
    }

    /// This rank keeps: the ticket is dropped for a reason, and ranks that come later keep, too.
    pub(crate) fn fail(
        &self,
        sequence: &Sequence,
        state: &mut State,
        rank: usize,
        event: Event,
        planned_position: u64,
        reason: KvhookReason,
    ) -> Option<Ticket> {
        let mut told = vec![false; state.ranks.len()];
        if let Some(ticket) = &state.ticket {
            for (told, rank) in told.iter_mut().zip(&ticket.ranks) {
                *told = !matches!(rank, RankTicket::Waiting);
            }
        }
        told[rank] = true;
        state.failed = Some(Failed { event, planned_position, told });
        self.close(sequence, state, reason)
    }

    /// Calls one instance for all its sequences and settles what it answered.
    ///
    /// # Safety
    /// As [`Host::prepare`].
    unsafe fn ask_for_plans(
        &self,
        rank: usize,
        generation: &Generation,
        event: Event,
        members: Vec<Member<'_>>,
        stream: *mut c_void,
        prepared: &mut [Prepared],
    ) {
        let queue = match self.devices[rank].queue(stream) {
            Ok(queue) => queue,
            Err(error) => {
                let reason =
                    if matches!(error, HostError::Device(_)) { KVHOOK_REASON_DEVICE } else { KVH_REASON_UNSUPPORTED };
                let refusal = Refusal::new(reason, error.to_string());
                self.callbacks.log(KVH_LOG_WARN, format_args!("rank {rank}: {}", refusal.message));
                for member in &members {
                    let refusal = Refusal::new(refusal.reason, refusal.message.clone());
                    prepared[member.place].reason = self.give_up(rank, member, refusal);
                }
                return;
            }
        };
        let of_rank = &generation.ranks[rank];
        let mut instance = of_rank.instance.lock();
        let mut asked = Vec::with_capacity(members.len());
        for mut member in members {
            match self.enter(rank, generation, &mut instance, &mut member, stream) {
                Ok(()) => asked.push(member),
                Err(refusal) => prepared[member.place].reason = self.give_up(rank, &member, refusal),
            }
        }
        if asked.is_empty() {
            return;
        }
        // SAFETY: passed on from the caller.
        let answers = unsafe { self.call_plugin(rank, generation, &mut instance, event, &asked, (stream, &queue)) };
        drop(instance);
        for (member, answer) in asked.iter().zip(answers) {
            prepared[member.place] = match answer.and_then(|held| self.hold(rank, member, held)) {
                Ok(()) => Prepared { ticket: member.ticket, reason: KVH_REASON_NONE },
                Err(refusal) => Prepared { ticket: 0, reason: self.give_up(rank, member, refusal) },
            };
        }
    }

    /// With the instance locked: takes what the call needs from a sequence that is still live, and asks for the bound if
    /// nobody did.
    fn enter(
        &self,
        rank: usize,
        generation: &Generation,
        instance: &mut Instance,
        member: &mut Member<'_>,
        stream: *mut c_void,
    ) -> Result<(), Refusal> {
        {
            let mut state = member.sequence.state.lock();
            let open = state.ticket.as_ref().is_some_and(|ticket| ticket.id == member.ticket);
            if !state.live || !open {
                return Err(Refusal::new(KVHOOK_REASON_DROPPED, ""));
            }
            // Whoever frees the sequence from here on waits for the instance before it tells it.
            state.ranks[rank].touched = true;
            *state.ranks[rank].stream.get_mut() = stream;
            member.positions = state.ranks[rank].positions.clone();
            member.memory = state.ranks[rank].memory.clone();
        }
        let request = member.request;
        let ask = Ask {
            uid: request.uid,
            event: request.event,
            lengths: &member.lengths,
            next_position: request.next_position,
            shared_rows: request.shared_rows,
            published_rows: request.published_rows,
        };
        if member.counts.is_empty() {
            let (counts, reason) = self.bound(instance, &member.sequence, generation, member.epoch, &ask)?;
            self.decide(rank, &ask, &counts, reason)?;
            let mut state = member.sequence.state.lock();
            if let Some(ticket) = state.ticket.as_mut().filter(|ticket| ticket.lengths == member.lengths) {
                match &ticket.counts {
                    Some(of_first) if *of_first != counts => {
                        return Err(Refusal::new(
                            KVHOOK_REASON_BAD_COUNT,
                            "the ranks' instances answered different bounds; a bound may depend on lengths, segments and \
                             config only",
                        ));
                    }
                    _ => ticket.counts = Some(counts.clone()),
                }
            }
            member.counts = counts;
        }
        Ok(())
    }

    /// One call of the hook; every plan is checked and copied before the instance is called again.
    ///
    /// # Safety
    /// As [`Host::prepare`].
    unsafe fn call_plugin(
        &self,
        rank: usize,
        generation: &Generation,
        instance: &mut Instance,
        event: Event,
        members: &[Member<'_>],
        (stream, queue): (*mut c_void, &Queue<'_>),
    ) -> Vec<Result<Held, Refusal>> {
        let of_rank = &generation.ranks[rank];
        let layers: Vec<Vec<KvhLayer>> = members.iter().map(layers_with_positions).collect();
        let sequences: Vec<KvhSequence> = members
            .iter()
            .zip(&layers)
            .map(|(member, layers)| raw_sequence(member, layers, &self.models[rank]))
            .collect();
        let mut messages = vec![[0u8; MESSAGE_BYTES]; members.len()];
        let mut texts: Vec<KvhText> = messages.iter_mut().map(|message| KvhText::over(message)).collect();
        let mut layer_plans: Vec<Vec<KvhLayerPlan>> =
            layers.iter().map(|layers| layers.iter().map(|_| empty_layer_plan()).collect()).collect();
        let mut plans: Vec<KvhPlan> =
            layer_plans.iter_mut().zip(&mut texts).map(|(layers, text)| empty_plan(layers, text)).collect();
        let mut out = KvhPrepareOut {
            struct_size: size_of::<KvhPrepareOut>(),
            plans: KvhArrayMut {
                data: plans.as_mut_ptr().cast(),
                count: plans.len() as u64,
                stride: size_of::<KvhPlan>() as u64,
            },
        };
        let may_rewrite = self.offers.can & KVH_CAN_REWRITE != 0;
        let call = members.iter().map(|member| call_sequence(generation, member, may_rewrite)).collect();
        let call = Call::new(self.allocator(rank), stream, call);

        let start = Instant::now();
        let (called, call) = of_rank.services.during(call, |handle| {
            let args = KvhPrepareArgs {
                struct_size: size_of::<KvhPrepareArgs>(),
                call: handle,
                sequences: KvhArray {
                    data: sequences.as_ptr().cast(),
                    count: sequences.len() as u64,
                    stride: size_of::<KvhSequence>() as u64,
                },
                stream,
            };
            // SAFETY: the arguments are ours and valid during the call; the caller vouches for the rows.
            unsafe { instance.prepare(event, &args, &mut out) }
        });
        if let Some(first) = members.first() {
            let timed = match event {
                Event::PrefillDone => Timed::OnPrefillDone,
                Event::Grown => Timed::OnGrown,
            };
            first.sequence.arm.took(timed, start.elapsed());
        }
        if let Err(error) = called {
            return members
                .iter()
                .map(|member| {
                    let reason = self.hook_failed(hook_name(event), member.sequence.uid, generation, &error);
                    Err(Refusal::new(reason, error.to_string()))
                })
                .collect();
        }
        let mut answers = Vec::with_capacity(members.len());
        for (place, (member, of_call)) in members.iter().zip(call.sequences).enumerate() {
            let Some(planning) = of_call.planning else { continue };
            let terms = self.terms(rank, generation, member, stream, queue);
            // The arrays' addresses are ours, whatever the plugin wrote over them.
            // SAFETY: the plugin answered, so its plans point to what the contract says.
            let plan = unsafe { plan::check(&plans[place], &layer_plans[place], planning.lent, &terms) };
            answers.push(match plan {
                Ok(plan) => Ok(held(plan, planning.memory, member)),
                Err(refusal) if refusal.message.is_empty() => {
                    let length = texts[place].length.min(MESSAGE_BYTES);
                    let message = String::from_utf8_lossy(&messages[place][..length]).into_owned();
                    Err(Refusal { message, ..refusal })
                }
                Err(refusal) => {
                    Err(Refusal { message: format!("plugin {}: {}", generation.plugin, refusal.message), ..refusal })
                }
            });
        }
        answers
    }

    fn terms<'a>(
        &'a self,
        rank: usize,
        generation: &'a Generation,
        member: &'a Member<'_>,
        stream: *mut c_void,
        queue: &'a Queue<'a>,
    ) -> Terms<'a> {
        Terms {
            model: &self.models[rank],
            planned: &generation.planned,
            lengths: &member.lengths,
            bound: &member.counts,
            next_position: member.request.next_position,
            layers: &member.request.layers,
            positions: &member.positions,
            fresh: member.request.fresh,
            can: self.offers.can,
            must: generation.needs.must,
            block_size: self.offers.block_size.into(),
            shared_rows: member.request.shared_rows,
            allocator: self.allocator(rank),
            stream,
            queue,
        }
    }

    /// Puts a checked plan into the ticket, if that is still open.
    fn hold(&self, rank: usize, member: &Member<'_>, held: Held) -> Result<(), Refusal> {
        let mut state = member.sequence.state.lock();
        let ticket = state.ticket.as_mut().filter(|ticket| ticket.id == member.ticket);
        let Some(ticket) = ticket else {
            drop(state);
            return Err(Refusal::new(KVHOOK_REASON_DROPPED, ""));
        };
        ticket.ranks[rank] = RankTicket::Planned(Arc::new(held));
        ticket.choose_movement()
    }

    /// Drops the ticket of a member that is kept. Gives the reason.
    fn give_up(&self, rank: usize, member: &Member<'_>, refusal: Refusal) -> KvhookReason {
        let mut state = member.sequence.state.lock();
        let open = state.ticket.as_ref().is_some_and(|ticket| ticket.id == member.ticket);
        if !open {
            // Freed, cut, or another rank kept meanwhile: that was counted there.
            let reason = match self.tickets.lock().find(member.ticket) {
                Err(HostError::Dropped { reason, .. }) => reason,
                _ => KVHOOK_REASON_DROPPED,
            };
            return reason;
        }
        let request = member.request;
        let ticket = self.fail(&member.sequence, &mut state, rank, request.event, request.next_position, OTHER);
        drop(state);
        drop(ticket);
        self.fell_back(&member.sequence, hook_name(request.event), &refusal);
        refusal.reason
    }
}

fn call_sequence(generation: &Generation, member: &Member<'_>, may_rewrite: bool) -> CallSequence {
    let counts = member.counts.iter().zip(&generation.planned);
    let counts = counts.map(|(&count, &planned)| if planned { count } else { 0 }).collect();
    let planning = Planning { counts, may_rewrite, memory: Vec::new(), lent: None };
    CallSequence { memory: member.memory.clone(), planning: Some(planning) }
}

fn held(plan: Plan, memory: Vec<Block>, member: &Member<'_>) -> Held {
    let protected = member.request.shared_rows.max(member.request.published_rows);
    Held { plan, protected, memory }
}

fn layers_with_positions(member: &Member<'_>) -> Vec<KvhLayer> {
    let layers = member.request.layers.as_slice().iter().zip(&member.positions);
    layers.map(|(layer, positions)| KvhLayer { positions: positions.raw(), ..view::copy(layer) }).collect()
}

fn raw_sequence(member: &Member<'_>, layers: &[KvhLayer], model: &Model) -> KvhSequence {
    KvhSequence {
        struct_size: size_of::<KvhSequence>(),
        uid: member.sequence.uid,
        epoch: member.epoch,
        next_position: member.request.next_position,
        prompt_length: member.sequence.prompt_length,
        shared_rows: member.request.shared_rows,
        queries_seen: member.queries_seen,
        position_axes: model.raw().position_axes,
        reserved0: 0,
        segments: raw_segments(&member.sequence.segments),
        layers: KvhArray {
            data: layers.as_ptr().cast(),
            count: layers.len() as u64,
            stride: size_of::<KvhLayer>() as u64,
        },
    }
}

fn empty_layer_plan() -> KvhLayerPlan {
    KvhLayerPlan {
        struct_size: size_of::<KvhLayerPlan>(),
        count: 0,
        range_count: 0,
        indices: ptr::null(),
        index_stride_head: 0,
        ranges: ptr::null(),
        positions: ptr::null(),
        position_stride_head: 0,
    }
}

fn empty_plan(layers: &mut [KvhLayerPlan], message: &mut KvhText) -> KvhPlan {
    KvhPlan {
        struct_size: size_of::<KvhPlan>(),
        kind: KVH_PLAN_KEEP,
        reason: KVH_REASON_NONE,
        flags: 0,
        reserved0: 0,
        next_position: 0,
        layers: KvhArrayMut {
            data: layers.as_mut_ptr().cast(),
            count: layers.len() as u64,
            stride: size_of::<KvhLayerPlan>() as u64,
        },
        message,
    }
}
