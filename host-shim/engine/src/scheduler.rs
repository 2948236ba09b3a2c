//! Decides what each step runs: prompts first, in chunks; else one token of every answer. Makes room by preemption.

use std::collections::BTreeMap;

use crate::cache::SequenceId;
use crate::engine::{Event, FinishReason, Request, RequestId};
use crate::error::{Error, Result};
use crate::hooks::FreeReason;
use crate::rank::Phase;
use crate::runner::{Begin, Runner};

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) request: Request,
    /// Prompt and answer so far.
    pub(crate) tokens: Vec<u32>,
    /// Its sequence, while it holds cache.
    pub(crate) sequence: Option<SequenceId>,
    /// Tokens whose K and V were computed.
    computed: usize,
    /// Tokens that were there when it was admitted: up to here it is prefill, also after a preemption.
    prefill_end: usize,
}

/// What one request does in a step: run `tokens[from..to]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned {
    pub(crate) request: RequestId,
    pub(crate) sequence: SequenceId,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) phase: Phase,
    /// Whether this reaches the newest token, so that the next one can be sampled.
    pub(crate) samples: bool,
}

/// The requests, oldest first.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(crate) requests: BTreeMap<RequestId, Running>,
    /// Prompt tokens of one step.
    chunk: usize,
    /// Sequences that may hold cache at once.
    max_sequences: usize,
}

impl Scheduler {
    pub(crate) fn new(chunk: usize, max_sequences: usize) -> Self {
        Self { requests: BTreeMap::new(), chunk, max_sequences }
    }

    pub(crate) fn add(&mut self, id: RequestId, request: Request) {
        let tokens = request.tokens.clone();
        self.requests.insert(id, Running { request, tokens, sequence: None, computed: 0, prefill_end: 0 });
    }

    /// The next step; empty when nothing can run. All the room it needs is reserved.
    pub(crate) fn plan(&mut self, runner: &mut Runner, events: &mut Vec<Event>) -> Result<Vec<Planned>> {
        let prefill = self.plan_prefill(runner, events)?;
        if !prefill.is_empty() {
            return Ok(prefill);
        }
        self.plan_decode(runner, events)
    }

    fn plan_prefill(&mut self, runner: &mut Runner, events: &mut Vec<Event>) -> Result<Vec<Planned>> {
        let mut planned = Vec::new();
        let mut budget = self.chunk;
        let ids: Vec<RequestId> = self.requests.keys().copied().collect();
        for id in ids {
            if budget == 0 || self.waits_for_prefix(id, &planned, runner) || !self.admit(id, runner) {
                break;
            }
            let Some(running) = self.requests.get(&id) else { continue };
            let Some(sequence) = running.sequence else { continue };
            let (from, end) = (running.computed, running.prefill_end);
            let to = end.min(from + budget);
            if from >= end {
                continue;
            }
            if !self.make_room(id, sequence, to - from, runner, events)? {
                if planned.is_empty() && !self.others_hold_cache(id) {
                    self.finish(id, FinishReason::OutOfBlocks, runner, events)?;
                    continue;
                }
                break;
            }
            budget -= to - from;
            planned.push(Planned { request: id, sequence, from, to, phase: Phase::Prefill, samples: to == end });
        }
        Ok(planned)
    }

    /// Whether this step computes blocks that a waiting request could take over in the next one.
    fn waits_for_prefix(&self, id: RequestId, planned: &[Planned], runner: &Runner) -> bool {
        let Some(block_size) = runner.shared_block_size() else { return false };
        let Some(waiting) = self.requests.get(&id).filter(|running| running.sequence.is_none()) else { return false };
        let prompt = &waiting.request.tokens;
        let most = waiting.request.prefix_limit.unwrap_or(prompt.len()).min(prompt.len() - 1);
        planned.iter().filter_map(|part| Some((part, self.requests.get(&part.request)?))).any(|(part, other)| {
            let common = prompt[..most].iter().zip(&other.request.tokens).take_while(|(a, b)| a == b).count();
            common / block_size * block_size > part.from
        })
    }

    /// Leading rows of a request's sequence that waiting requests could take over, in whole blocks.
    pub(crate) fn wanted_rows(&self, id: RequestId, block_size: Option<usize>) -> usize {
        let (Some(block_size), Some(holder)) = (block_size, self.requests.get(&id)) else { return 0 };
        let waiting = self.requests.values().filter(|running| running.sequence.is_none());
        let common = waiting.map(|running| {
            let prompt = &running.request.tokens;
            let most = running.request.prefix_limit.unwrap_or(prompt.len()).min(prompt.len() - 1);
            prompt[..most].iter().zip(&holder.request.tokens).take_while(|(a, b)| a == b).count()
        });
        common.max().unwrap_or(0) / block_size * block_size
    }

    /// Gives a waiting request a sequence, if it may begin now. False: it and all younger ones must wait.
    fn admit(&mut self, id: RequestId, runner: &mut Runner) -> bool {
        let holders = self.requests.values().filter(|running| running.sequence.is_some()).count();
        let Some(running) = self.requests.get_mut(&id) else { return true };
        if running.sequence.is_some() {
            return true;
        }
        // A prompt that does not fit whole would only be preempted again; alone, it may try with what evicts.
        let room = runner.fits(running.tokens.len() + 1) || holders == 0;
        if holders >= self.max_sequences || !room {
            return false;
        }
        let prompt = running.request.tokens.len();
        let sequence = runner.begin_or_without(&Begin {
            prompt: &running.tokens[..prompt],
            prefill: running.tokens.len(),
            prefix_limit: running.request.prefix_limit.unwrap_or(prompt),
            arm: running.request.arm.as_deref(),
            key: &running.request.key,
        });
        running.computed = runner.sequence(sequence).map_or(0, |sequence| sequence.shared);
        running.prefill_end = running.tokens.len();
        running.sequence = Some(sequence);
        true
    }

    fn plan_decode(&mut self, runner: &mut Runner, events: &mut Vec<Event>) -> Result<Vec<Planned>> {
        let mut planned = Vec::new();
        let ids: Vec<RequestId> = self.requests.keys().copied().collect();
        for id in ids {
            let Some(running) = self.requests.get(&id) else { continue };
            // Requests still in prefill hold cache but have nothing to decode.
            let Some(sequence) = running.sequence.filter(|_| running.computed >= running.prefill_end) else {
                continue;
            };
            let (from, to) = (running.computed, running.tokens.len());
            if self.make_room(id, sequence, to - from, runner, events)? {
                let phase = Phase::Decode;
                planned.push(Planned { request: id, sequence, from, to, phase, samples: true });
            } else if self.others_hold_cache(id) {
                self.preempt(id, runner, events)?;
            } else {
                self.finish(id, FinishReason::OutOfBlocks, runner, events)?;
            }
        }
        Ok(planned)
    }

    /// Reserves rows for a sequence; preempts younger requests, the youngest first, until it can.
    fn make_room(
        &mut self,
        id: RequestId,
        sequence: SequenceId,
        rows: usize,
        runner: &mut Runner,
        events: &mut Vec<Event>,
    ) -> Result<bool> {
        loop {
            match runner.reserve(sequence, rows) {
                Ok(()) => return Ok(true),
                Err(Error::OutOfBlocks { .. }) => {}
                Err(error) => return Err(error),
            }
            let younger = self.requests.range(id..).rev().find(|(other, r)| **other != id && r.sequence.is_some());
            let Some((&victim, _)) = younger else { return Ok(false) };
            self.preempt(victim, runner, events)?;
        }
    }

    /// Whether another request holds cache, so that waiting can help.
    fn others_hold_cache(&self, id: RequestId) -> bool {
        self.requests.iter().any(|(other, running)| *other != id && running.sequence.is_some())
    }

    /// Takes a request's cache away; its tokens are computed again later.
    fn preempt(&mut self, id: RequestId, runner: &mut Runner, events: &mut Vec<Event>) -> Result<()> {
        let Some(running) = self.requests.get_mut(&id) else { return Ok(()) };
        if let Some(sequence) = running.sequence.take() {
            running.computed = 0;
            runner.free_because(sequence, FreeReason::Preempted)?;
            events.push(Event::Preempted { request: id });
        }
        Ok(())
    }

    /// Notes that a planned part was run.
    pub(crate) fn advance(&mut self, planned: &Planned) {
        if let Some(running) = self.requests.get_mut(&planned.request) {
            running.computed = planned.to;
        }
    }

    /// Ends a request and frees its cache.
    pub(crate) fn finish(
        &mut self,
        id: RequestId,
        reason: FinishReason,
        runner: &mut Runner,
        events: &mut Vec<Event>,
    ) -> Result<()> {
        let Some(running) = self.requests.remove(&id) else { return Ok(()) };
        if let Some(sequence) = running.sequence {
            let why = if reason == FinishReason::Cancelled { FreeReason::Cancelled } else { FreeReason::Finished };
            runner.free_because(sequence, why)?;
        }
        events.push(Event::Finished { request: id, reason });
        Ok(())
    }
}
