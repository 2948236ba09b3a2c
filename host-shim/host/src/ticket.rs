//! Tickets: plans that were made and checked, until they are carried out or dropped.

use core::ffi::c_void;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kvhook_abi::raw::KVH_REASON_NO_ROOM;

use crate::commit::moved;
use crate::device::Checked;
use crate::error::HostError;
use crate::host::{Host, hook_name};
use crate::instance::Event;
use crate::memory::Block;
use crate::plan::{Kept, Plan, Refusal};
use crate::raw::*;
use crate::sequence::{Sequence, State};

/// Dropped tickets of which the reason is remembered.
const REMEMBERED: usize = 4096;

/// A plan of every rank for one sequence.
pub struct Ticket {
    /// Its number, the same on every rank.
    pub id: u64,
    /// What it was made for.
    pub event: Event,
    /// Position of the next token when it was made.
    pub planned_position: u64,
    /// Rows of each layer that the plans are about.
    pub lengths: Vec<u64>,
    /// The most that each layer keeps, once the first rank knows it.
    pub counts: Option<Vec<u64>>,
    /// One for each rank.
    pub ranks: Vec<RankTicket>,
    /// Fresh rows will be given.
    pub fresh: bool,
    /// Nobody will edit a block table for it: rows move.
    pub moves_rows: bool,
    /// Its arm is a shadow: it ends when every plan is checked, and nothing moves.
    pub shadow: bool,
    /// How the rows move, once every rank has a plan: `KVHOOK_MOVE_*`.
    pub movement: Option<i32>,
    /// Position of the next token at commit, once the first rank began.
    pub commit_position: Option<u64>,
}

/// How far a rank is.
pub enum RankTicket {
    /// It has not prepared.
    Waiting,
    /// Its plugin is asked just now.
    Preparing,
    /// Its plan is checked.
    Planned(Arc<Held>),
    /// Its rows move just now.
    Committing(Arc<Held>),
    /// Its rows have moved. The plan is kept for the block tables' edit.
    Committed(Arc<Held>),
}

impl RankTicket {
    /// The rank's plan, if it has one.
    pub fn held(&self) -> Option<&Arc<Held>> {
        match self {
            Self::Waiting | Self::Preparing => None,
            Self::Planned(held) | Self::Committing(held) | Self::Committed(held) => Some(held),
        }
    }
}

/// A rank's plan with the memory that belongs to the ticket.
pub struct Held {
    /// The plan.
    pub plan: Plan,
    /// Where `shared_rows` and `published_rows` end: no row before is written in place.
    pub protected: u64,
    /// Ticket memory of the plugin's.
    pub memory: Vec<Block>,
}

impl Held {
    /// What it holds goes back in the order of this stream, in which it was used last.
    pub fn release_on(&self, stream: *mut c_void) {
        self.plan.check.release_on(stream);
        self.plan.layers.iter().for_each(|layer| layer.release_on(stream));
        self.memory.iter().for_each(|block| block.release_on(stream));
    }
}

/// What all ranks' devices say of an open ticket.
pub(crate) enum Settled {
    /// Some have not said it yet, or some rank has no plan yet.
    Pending,
    /// Every plan is good.
    Ready,
    /// One is not. The ticket was taken from the sequence; it is to be dropped without the lock.
    Dropped(KvhookReason, Option<Ticket>),
}

/// An attempt that failed, which other ranks may still come to.
pub struct Failed {
    /// What it was made for.
    pub event: Event,
    /// Position of the next token.
    pub planned_position: u64,
    /// Ranks that were told.
    pub told: Vec<bool>,
}

/// State of a ticket, as the engine asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Some rank has not prepared yet, or its device has not checked the plan.
    Pending,
    /// Every rank may commit.
    Ready {
        /// `KVHOOK_MOVE_*`.
        movement: i32,
        /// Whether a layer that keeps all its rows may be given new ones, and needs fresh rows with the others.
        rewrites: bool,
        /// Position of the next token when it was made.
        planned_position: u64,
        /// Rows that each layer keeps; the most of any rank.
        counts: Vec<u64>,
    },
    /// The sequence stays as it is.
    Dropped(KvhookReason),
}

impl Ticket {
    /// Whether a rank has begun to move rows: then every rank must.
    pub fn is_committing(&self) -> bool {
        self.commit_position.is_some()
    }

    /// Plans of all ranks, if all have one.
    pub fn plans(&self) -> Option<Vec<&Held>> {
        self.ranks.iter().map(|rank| rank.held().map(Arc::as_ref)).collect()
    }

    /// Chooses how the rows move, when every rank has a plan.
    ///
    /// # Errors
    /// `KVH_REASON_NO_ROOM` where rows that others see would be written; `KVHOOK_REASON_BAD_POSITION` where the ranks' plans
    /// do not set the same next position.
    pub fn choose_movement(&mut self) -> Result<(), Refusal> {
        let Some(plans) = self.plans() else { return Ok(()) };
        let moved = |held: &Held| held.plan.moved_position;
        if let Some(pair) = plans.windows(2).find(|pair| moved(pair[0]) != moved(pair[1])) {
            return Err(Refusal::new(
                KVHOOK_REASON_BAD_POSITION,
                format!("the ranks' plans set different next positions: {:?} and {:?}", moved(pair[0]), moved(pair[1])),
            ));
        }
        let table = plans.first().and_then(|held| held.plan.table.as_ref());
        let movement =
            if !self.moves_rows && table.is_some() && plans.iter().all(|held| held.plan.table.as_ref() == table) {
                KVHOOK_MOVE_TABLE
            } else if self.fresh {
                KVHOOK_MOVE_FRESH
            } else if self.shadow || plans.iter().all(|held| held.plan.first_written() >= held.protected) {
                KVHOOK_MOVE_IN_PLACE
            } else {
                return Err(Refusal::new(
                    KVH_REASON_NO_ROOM,
                    "rows that others see would be written, and no fresh rows were promised",
                ));
            };
        self.movement = Some(movement);
        Ok(())
    }
}

/// Every ticket of a host.
#[derive(Default)]
pub struct Tickets {
    open: HashMap<u64, Arc<Sequence>>,
    dropped: HashMap<u64, KvhookReason>,
    order: VecDeque<u64>,
}

impl Tickets {
    /// A ticket was made.
    pub fn opened(&mut self, id: u64, sequence: Arc<Sequence>) {
        self.open.insert(id, sequence);
    }

    /// A ticket was carried out.
    pub fn committed(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// A ticket was dropped. The reasons of the last few thousand are remembered.
    pub fn dropped(&mut self, id: u64, reason: KvhookReason) {
        self.open.remove(&id);
        self.dropped.insert(id, reason);
        self.order.push_back(id);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.dropped.remove(&oldest);
        }
    }

    /// The sequence of an open ticket.
    ///
    /// # Errors
    /// `Dropped`, `UnknownTicket`.
    pub fn find(&self, id: u64) -> Result<Arc<Sequence>, HostError> {
        match (self.open.get(&id), self.dropped.get(&id)) {
            (Some(sequence), _) => Ok(sequence.clone()),
            (None, Some(&reason)) => Err(HostError::Dropped { ticket: id, reason }),
            (None, None) => Err(HostError::UnknownTicket(id)),
        }
    }
}

impl Host {
    /// State of a ticket. Never waits for a plugin or for rows that move.
    ///
    /// # Errors
    /// `UnknownTicket` for one that was never given or is committed.
    pub fn verdict(&self, id: u64) -> Result<Verdict, HostError> {
        let sequence = match self.tickets.lock().find(id) {
            Ok(sequence) => sequence,
            Err(HostError::Dropped { reason, .. }) => return Ok(Verdict::Dropped(reason)),
            Err(error) => return Err(error),
        };
        let mut state = sequence.state.lock();
        let settled = self.settle(&sequence, &mut state, id);
        if let Settled::Dropped(reason, ticket) = settled {
            drop(state);
            drop(ticket);
            // Where a plugin is busy just now, the next call for the sequence does it.
            if !sequence.instances_are_busy() {
                self.migrate(&sequence);
            }
            return Ok(Verdict::Dropped(reason));
        }
        match &state.ticket {
            Some(ticket) if ticket.id == id && matches!(settled, Settled::Pending) => Ok(Verdict::Pending),
            Some(ticket) if ticket.id == id => Ok(verdict_of(ticket)),
            // It was closed between the two locks.
            _ => match self.tickets.lock().find(id) {
                Err(HostError::Dropped { reason, .. }) => Ok(Verdict::Dropped(reason)),
                _ => Err(HostError::UnknownTicket(id)),
            },
        }
    }

    /// Reads what the ranks' devices have said so far. Never waits. A plan that is not good is a fallback, and ends the
    /// ticket.
    pub(crate) fn settle(&self, sequence: &Sequence, state: &mut State, id: u64) -> Settled {
        let Some(ticket) = state.ticket.as_ref().filter(|ticket| ticket.id == id) else { return Settled::Pending };
        // What was good before the first rank began to commit stays good.
        if ticket.is_committing() {
            return Settled::Ready;
        }
        let mut settled = if ticket.movement.is_some() { Settled::Ready } else { Settled::Pending };
        let mut bad = None;
        for (rank, held) in ticket.ranks.iter().enumerate() {
            match held.held().map(|held| held.plan.check.poll()) {
                Some(Checked::Bad(refusal)) if bad.is_none() => bad = Some((rank, refusal)),
                Some(Checked::Pending) => settled = Settled::Pending,
                _ => {}
            }
        }
        let Some((rank, refusal)) = bad else {
            return match settled {
                Settled::Ready if ticket.shadow => self.end_shadow(sequence, state),
                settled => settled,
            };
        };
        let (event, position) = (ticket.event, ticket.planned_position);
        let ticket = self.fail(sequence, state, rank, event, position, refusal.reason);
        self.log_fallback(sequence, hook_name(event), &refusal);
        Settled::Dropped(refusal.reason, ticket)
    }

    /// A shadow's plans are good: what they would have done is counted.
    fn end_shadow(&self, sequence: &Sequence, state: &mut State) -> Settled {
        let ticket = self.close(sequence, state, KVHOOK_REASON_SHADOW);
        for (held, model) in ticket.iter().flat_map(|ticket| &ticket.ranks).zip(&self.models) {
            let Some(plan) = held.held().map(|held| &held.plan) else { continue };
            let before: Vec<u64> = plan.layers.iter().map(|layer| layer.planned).collect();
            let after: Vec<u64> = plan.layers.iter().map(|layer| layer.count).collect();
            sequence.arm.figures.shadowed(moved(model, &before, &after));
        }
        sequence.arm.figures.shadow_ended();
        Settled::Dropped(KVHOOK_REASON_SHADOW, ticket)
    }

    /// Drops a ticket.
    ///
    /// # Errors
    /// `UnknownTicket`, `Dropped`; `Argument` once a rank has begun to commit.
    pub fn drop_ticket(&self, id: u64, reason: KvhookReason) -> Result<(), HostError> {
        let sequence = self.tickets.lock().find(id)?;
        let mut state = sequence.state.lock();
        match &state.ticket {
            Some(ticket) if ticket.id == id && ticket.is_committing() => {
                Err(HostError::Argument(format!("`ticket` {id} is being committed; every rank must commit it now")))
            }
            Some(ticket) if ticket.id == id => {
                let ticket = self.close(&sequence, &mut state, reason);
                drop(state);
                drop(ticket);
                self.migrate(&sequence);
                Ok(())
            }
            _ => Err(HostError::UnknownTicket(id)),
        }
    }

    /// Blocks that each layer's table keeps.
    ///
    /// # Errors
    /// `UnknownTicket`, `Dropped`, `NotReady`; `Argument` when the ticket's rows move otherwise.
    pub fn table_edit(
        &self,
        id: u64,
        give: impl FnOnce(&[Vec<u32>]) -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let sequence = self.tickets.lock().find(id)?;
        let state = sequence.state.lock();
        let ticket = state.ticket.as_ref().filter(|ticket| ticket.id == id).ok_or(HostError::UnknownTicket(id))?;
        let good = |rank: &RankTicket| rank.held().is_some_and(|held| matches!(held.plan.check.poll(), Checked::Good));
        let good = ticket.ranks.iter().all(good);
        let movement = ticket.movement.filter(|_| good).ok_or(HostError::NotReady(id))?;
        let held = ticket.ranks.iter().find_map(RankTicket::held);
        match held.and_then(|held| held.plan.table.as_ref()).filter(|_| movement == KVHOOK_MOVE_TABLE) {
            Some(table) => give(table),
            None => {
                Err(HostError::Argument(format!("`ticket` {id} is no edit of a table: its movement is {movement}")))
            }
        }
    }

    /// Takes the open ticket away from a sequence that stays as it is, and counts why. The ticket's memory goes back when
    /// the caller drops it, without the lock.
    pub(crate) fn close(&self, sequence: &Sequence, state: &mut State, reason: KvhookReason) -> Option<Ticket> {
        let ticket = state.ticket.take()?;
        self.tickets.lock().dropped(ticket.id, reason);
        if !matches!(reason, KVHOOK_REASON_OTHER_RANK | KVHOOK_REASON_SHADOW) {
            self.count_fallback(sequence, reason);
        }
        Some(ticket)
    }
}

fn verdict_of(ticket: &Ticket) -> Verdict {
    let Some(movement) = ticket.movement else { return Verdict::Pending };
    let mut counts = vec![0; ticket.lengths.len()];
    let mut rewrites = false;
    for held in ticket.ranks.iter().filter_map(RankTicket::held) {
        rewrites |= held.plan.layers.iter().any(|layer| matches!(layer.kept, Kept::Lent(_)));
        for (count, of_rank) in counts.iter_mut().zip(held.plan.counts()) {
            *count = of_rank.max(*count);
        }
    }
    Verdict::Ready { movement, rewrites, planned_position: ticket.planned_position, counts }
}
