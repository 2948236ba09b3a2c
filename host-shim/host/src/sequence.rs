//! What the host knows of one sequence.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use kvhook_abi::raw::*;

use crate::arm::{Arm, Generation};
use crate::instance::Event;
use crate::memory::SequenceMemory;
use crate::positions::Positions;
use crate::raw::KvhookReason;
use crate::sync::{AtomicBool, AtomicU64, Mutex};
use crate::ticket::{Failed, Ticket};

/// A live sequence of an arm.
pub struct Sequence {
    /// Never used again.
    pub uid: u64,
    /// Its arm.
    pub arm: Arc<Arm>,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// Stretches of the prompt.
    pub segments: Vec<KvhSegment>,
    /// The arm's term when its instances became the sequence's.
    term: AtomicU64,
    /// One of its arm's plugins failed for it.
    failed: AtomicBool,
    /// The highest position that was seen as the next token's.
    seen: AtomicU64,
    /// What changes. Held briefly: never while a plugin runs or rows move.
    pub state: Mutex<State>,
}

impl Sequence {
    /// A sequence of which tokens up to the position `seen` were counted.
    pub fn new(
        uid: u64,
        arm: Arc<Arm>,
        prompt_length: u64,
        segments: Vec<KvhSegment>,
        seen: u64,
        state: State,
    ) -> Self {
        let term = arm.term().into();
        Self { uid, arm, prompt_length, segments, term, failed: false.into(), seen: seen.into(), state: state.into() }
    }

    /// The highest position that was seen as the next token's.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// The next token's position. Gives by how much it is above all seen.
    pub fn reached(&self, position: u64) -> u64 {
        position.saturating_sub(self.seen.fetch_max(position, Ordering::Relaxed))
    }

    /// Keys were rotated for lower positions: the next token's is this one now.
    pub fn moved_to(&self, position: u64) {
        self.seen.store(position, Ordering::Relaxed);
    }

    /// The arm's current instances are the sequence's now.
    pub fn joined(&self) {
        self.term.store(self.arm.term(), Ordering::Relaxed);
        self.failed.store(false, Ordering::Relaxed);
    }

    /// A plugin failed for it. True the first time, and only for the arm's current plugin.
    pub fn fails_first(&self) -> bool {
        !self.failed.swap(true, Ordering::Relaxed) && self.is_current()
    }

    /// Whether the arm's current plugin did not fail for it.
    pub fn went_well(&self) -> bool {
        !self.failed.load(Ordering::Relaxed) && self.is_current()
    }

    /// Whether a call of its instances is under way.
    pub fn instances_are_busy(&self) -> bool {
        self.state.lock().generation.ranks.iter().any(|rank| rank.instance.is_locked())
    }

    fn is_current(&self) -> bool {
        self.term.load(Ordering::Relaxed) == self.arm.term()
    }
}

/// What changes in a sequence's life.
pub struct State {
    /// False once it was freed. Whoever reaches the sequence later leaves it alone.
    pub live: bool,
    /// The instances that serve it.
    pub generation: Arc<Generation>,
    /// Commits so far.
    pub epoch: u64,
    /// Where the next `on_grown` is counted from.
    pub mark: u64,
    /// What the last question was answered with.
    pub asked: Option<Asked>,
    /// The open ticket.
    pub ticket: Option<Ticket>,
    /// The attempt that failed last, so that ranks which come to it later keep, too.
    pub failed: Option<Failed>,
    /// `before_attention` failed: what the plugin saw is not complete, so nothing is planned any more.
    pub broken: Option<KvhookReason>,
    /// One for each rank.
    pub ranks: Vec<RankState>,
}

/// A bound, and what it was asked for.
pub struct Asked {
    /// The event.
    pub event: Event,
    /// Position of the next token.
    pub next_position: u64,
    /// Rows stored in each layer.
    pub lengths: Vec<u64>,
    /// The most that each layer keeps.
    pub counts: Vec<u64>,
}

/// A sequence on one rank.
pub struct RankState {
    /// Positions of the rows, for each layer.
    pub positions: Vec<Positions>,
    /// What the plugin keeps for the sequence in the host's memory.
    pub memory: SequenceMemory,
    /// A hook was called: `on_free` will be.
    pub touched: bool,
    /// `before_attention` was called.
    pub attended: bool,
    /// Positions whose queries were seen, without a gap, for each layer.
    pub queries: Vec<Range<u64>>,
    /// The stream of the rank's last call; null before.
    pub stream: AtomicPtr<c_void>,
}

impl RankState {
    /// Nothing was called or seen yet.
    pub fn new(positions: Vec<Positions>) -> Self {
        Self {
            queries: vec![0..0; positions.len()],
            positions,
            memory: SequenceMemory::default(),
            touched: false,
            attended: false,
            stream: AtomicPtr::default(),
        }
    }

    /// The same rows; nothing was called or seen yet.
    pub fn anew(&self) -> Self {
        Self { stream: self.stream.load(Ordering::Relaxed).into(), ..Self::new(self.positions.clone()) }
    }

    /// How many of the prompt's last queries these instances were shown, in each layer that they want.
    pub fn queries_seen(&self, generation: &Generation, prompt_length: u64) -> u64 {
        let seen = |queries: &Range<u64>| {
            if queries.end >= prompt_length { prompt_length.saturating_sub(queries.start) } else { 0 }
        };
        self.wanted(generation).map(seen).min().unwrap_or(0)
    }

    /// Whether they were shown all queries behind the prompt, up to the next token's position.
    pub fn saw_answer(&self, generation: &Generation, prompt_length: u64, next_position: u64) -> bool {
        let seen = |queries: &Range<u64>| queries.start <= prompt_length && queries.end >= next_position;
        next_position <= prompt_length || self.wanted(generation).all(seen)
    }

    fn wanted(&self, generation: &Generation) -> impl Iterator<Item = &Range<u64>> {
        let layers = self.queries.iter().zip(&generation.planned).zip(0..);
        layers
            .filter(|((_, planned), layer)| **planned && generation.needs.wants_layer(*layer))
            .map(|((seen, _), _)| seen)
    }

    /// Queries of `tokens` tokens from `first` on were seen in a layer.
    pub fn saw_queries(&mut self, layer: usize, first: u64, tokens: u64) {
        let Some(queries) = self.queries.get_mut(layer) else { return };
        let end = first.saturating_add(tokens);
        if queries.is_empty() || first > queries.end || first < queries.start {
            *queries = first..end;
        } else {
            queries.end = queries.end.max(end);
        }
    }

    /// Nothing behind a position is there any more.
    pub fn cut(&mut self, next_position: u64) {
        for queries in &mut self.queries {
            queries.end = queries.end.min(next_position);
            queries.start = queries.start.min(queries.end);
        }
    }
}

impl State {
    /// A new sequence's state.
    pub fn new(generation: Arc<Generation>, prompt_length: u64) -> Self {
        let rank = || RankState::new(vec![Positions::default(); generation.planned.len()]);
        Self {
            live: true,
            epoch: 0,
            mark: prompt_length,
            asked: None,
            ticket: None,
            failed: None,
            broken: None,
            ranks: generation.ranks.iter().map(|_| rank()).collect(),
            generation,
        }
    }

    /// Whether the instances hold something for the sequence that another instance would not have.
    pub fn holds_state(&self) -> bool {
        let keeps = self.generation.needs.must & KVH_CAN_STATE != 0;
        self.ranks.iter().any(|rank| rank.attended || (rank.touched && keeps) || !rank.memory.is_empty())
    }
}
