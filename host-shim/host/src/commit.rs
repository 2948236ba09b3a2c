//! The second half of a compression: everything is checked again against the rows as they are now, then rows move.

use core::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use kvhook_abi::raw::*;
use kvhook_kernels::Rows;

use crate::ask::Ask;
use crate::device::Device;
use crate::error::HostError;
use crate::figures::{Moved, Timed};
use crate::host::Host;
use crate::model::{Model, is_planned};
use crate::plan::{Kept, LayerPlan, Plan};
use crate::prepare::PrepareRequest;
use crate::raw::*;
use crate::sequence::Sequence;
use crate::ticket::{Held, RankTicket, Settled};
use crate::view::{self, LayerRows, Layers};

/// A commit on one rank.
pub struct CommitRequest {
    /// The ticket.
    pub ticket: u64,
    /// The rows as they are now, appended ones included.
    pub layers: Layers,
    /// Fresh rows; `length` of each layer is the room for rows. None: in place.
    pub fresh: Option<Layers>,
    /// Position of the next token.
    pub next_position: u64,
    /// The engine's stream.
    pub stream: *mut c_void,
}

/// What a commit left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Rows of each layer.
    pub lengths: Vec<u64>,
    /// Position of the next token.
    pub next_position: u64,
}

/// What came of both halves in one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compressed {
    /// Rows moved.
    Done {
        /// `KVHOOK_MOVE_*`.
        movement: i32,
        /// What is left.
        committed: Committed,
    },
    /// The sequence stays as it is.
    Kept(KvhookReason),
}

/// One tensor of one layer, to be moved: the kept rows, and behind them those that were appended since.
pub struct Task<'a> {
    /// Which rows are kept.
    pub plan: &'a LayerPlan,
    /// The rows as they are, in memory of the rank's device.
    pub source: Rows,
    /// Where they go; in place: the same.
    pub destination: Rows,
    /// Lent rows, which replace the planned ones.
    pub lent: Option<Rows>,
    /// Rows behind the planned ones.
    pub appended: usize,
}

impl Host {
    /// Moves one rank's rows as its ticket says. On an error nothing was written, and the ticket is dropped if no rank
    /// has moved its rows yet.
    ///
    /// # Errors
    /// `UnknownTicket`, `NotReady`, `Dropped`; `Argument` for a rank that has committed, and where rows were cut or the
    /// ranks' positions differ; `NoRoom` where fresh rows are too few; `View`.
    ///
    /// # Safety
    /// The request's rows are as described; nobody else uses those of the sequence during the call, or writes any that
    /// others use; fresh rows are used by nobody.
    pub unsafe fn commit(&self, rank: u32, request: &CommitRequest) -> Result<Committed, HostError> {
        let rank = self.check_rank(rank)?;
        let sequence = self.tickets.lock().find(request.ticket)?;
        let (held, movement) = self.start_commit(rank, &sequence, request)?;
        let start = Instant::now();
        // SAFETY: passed on from the caller.
        let tasks = unsafe { self.check_commit(rank, request, &held.plan, movement) };
        let moved = tasks.and_then(|tasks| {
            let queue = self.devices[rank].queue(request.stream)?;
            // SAFETY: as above.
            unsafe { queue.move_rows(&held.plan, tasks, self.allocator(rank)) }
        });
        sequence.arm.took(Timed::Commit, start.elapsed());
        if let Err(error) = moved {
            self.abort_commit(rank, &sequence, request.ticket, &held, &error);
            return Err(error);
        }
        Ok(self.finish_commit(rank, &sequence, request, &held))
    }

    /// Takes the rank's plan, after the checks that need no rows.
    fn start_commit(
        &self,
        rank: usize,
        sequence: &Sequence,
        request: &CommitRequest,
    ) -> Result<(Arc<Held>, i32), HostError> {
        let mut state = sequence.state.lock();
        let id = request.ticket;
        let settled = self.settle(sequence, &mut state, id);
        if let Settled::Dropped(reason, ticket) = settled {
            drop(state);
            drop(ticket);
            self.migrate(sequence);
            return Err(HostError::Dropped { ticket: id, reason });
        }
        let ticket = state.ticket.as_mut().filter(|ticket| ticket.id == id).ok_or(HostError::UnknownTicket(id))?;
        let movement = ticket.movement.filter(|_| matches!(settled, Settled::Ready)).ok_or(HostError::NotReady(id))?;
        let RankTicket::Planned(held) = &ticket.ranks[rank] else {
            return Err(HostError::Argument(format!("`rank` {rank} has committed ticket {id} already")));
        };
        let held = held.clone();
        if let Some(position) = ticket.commit_position.filter(|&position| position != request.next_position) {
            return Err(HostError::Argument(format!(
                "`next_position` is {}, but another rank committed at {position}; all ranks commit at one position",
                request.next_position
            )));
        }
        ticket.commit_position = Some(request.next_position);
        ticket.ranks[rank] = RankTicket::Committing(held.clone());
        Ok((held, movement))
    }

    /// Nothing was written: the rank may try again if others have moved theirs, else the ticket is dropped.
    fn abort_commit(&self, rank: usize, sequence: &Sequence, id: u64, held: &Arc<Held>, error: &HostError) {
        self.callbacks.log(
            KVH_LOG_WARN,
            format_args!("sequence {}: ticket {id} cannot be committed on rank {rank}: {error}", sequence.uid),
        );
        let mut state = sequence.state.lock();
        let Some(ticket) = state.ticket.as_mut().filter(|ticket| ticket.id == id) else { return };
        ticket.ranks[rank] = RankTicket::Planned(held.clone());
        let others =
            ticket.ranks.iter().any(|rank| matches!(rank, RankTicket::Committing(_) | RankTicket::Committed(_)));
        let dropped = if others {
            None
        } else {
            ticket.commit_position = None;
            let reason = match error {
                HostError::NoRoom { .. } => KVH_REASON_NO_ROOM,
                HostError::View { .. } | HostError::Unsupported(_) => KVH_REASON_UNSUPPORTED,
                HostError::OutOfMemory { .. } => KVHOOK_REASON_OUT_OF_MEMORY,
                HostError::Device(_) => KVHOOK_REASON_DEVICE,
                _ => KVHOOK_REASON_DROPPED,
            };
            self.close(sequence, &mut state, reason)
        };
        drop(state);
        drop(dropped);
        self.migrate(sequence);
    }

    /// Checks everything that can go wrong, and lays out what moves.
    ///
    /// # Safety
    /// As [`Host::commit`].
    unsafe fn check_commit<'a>(
        &self,
        rank: usize,
        request: &CommitRequest,
        plan: &'a Plan,
        movement: i32,
    ) -> Result<Vec<Task<'a>>, HostError> {
        let model = &self.models[rank];
        let lengths = request.layers.lengths();
        check_lengths(model, plan, &lengths, request.next_position)?;
        let fresh = match (movement, &request.fresh) {
            (KVHOOK_MOVE_TABLE, _) => return Ok(Vec::new()),
            (KVHOOK_MOVE_FRESH, None) => {
                return Err(HostError::Argument(
                    "`fresh` is empty, but the ticket was prepared with fresh rows".into(),
                ));
            }
            (KVHOOK_MOVE_FRESH, Some(fresh)) => Some(fresh),
            _ => None,
        };
        let mut tasks = Vec::with_capacity(2 * plan.layers.len());
        for (layer, of_layer) in plan.layers.iter().enumerate() {
            let whole = matches!(of_layer.kept, Kept::All);
            let owns_rows = model.layers()[layer].shared_with < 0 && lengths[layer] > 0;
            let room = fresh.map_or(0, |fresh| fresh.as_slice()[layer].length);
            // A layer that is kept whole may stay where it is, or move to fresh rows with the others.
            if !owns_rows || (whole && room == 0) {
                continue;
            }
            let appended = lengths[layer] - of_layer.planned;
            let needed = of_layer.count + appended;
            if fresh.is_some() && room < needed {
                return Err(HostError::NoRoom { layer: layer as u32, needed, given: room });
            }
            // SAFETY: passed on from the caller.
            let (source, destination, lent) = unsafe {
                let source = request.layers.rows(layer)?;
                let destination = fresh.map_or(Ok(source), |fresh| fresh.rows(layer))?;
                let lent = match &of_layer.kept {
                    Kept::Lent(lent) => Some(view::rows(&lent.view())?),
                    _ => None,
                };
                (source, destination, lent)
            };
            tasks.extend(tasks_of(of_layer, source, destination, lent, appended as usize));
        }
        Ok(tasks)
    }

    /// The rank's rows have moved.
    fn finish_commit(&self, rank: usize, sequence: &Sequence, request: &CommitRequest, held: &Arc<Held>) -> Committed {
        let plan = &held.plan;
        let before = request.layers.lengths();
        let lengths: Vec<u64> =
            before.iter().zip(&plan.layers).map(|(&length, layer)| length_after(length, layer)).collect();
        let next_position = plan.moved_position.unwrap_or(request.next_position);
        let committed = Committed { lengths, next_position };
        sequence.arm.figures.moved(moved(&self.models[rank], &before, &committed.lengths));
        // The plan was read by the work that was just enqueued.
        held.release_on(request.stream);

        let mut state = sequence.state.lock();
        if !state.live {
            return committed;
        }
        *state.ranks[rank].stream.get_mut() = request.stream;
        for (positions, layer) in state.ranks[rank].positions.iter_mut().zip(&plan.layers) {
            positions.release_on(request.stream);
            *positions = layer.positions.clone();
        }
        if plan.moved_position.is_some() {
            state.mark = next_position;
            sequence.moved_to(next_position);
        }
        let Some(ticket) = state.ticket.as_mut().filter(|ticket| ticket.id == request.ticket) else { return committed };
        ticket.ranks[rank] = RankTicket::Committed(held.clone());
        if ticket.ranks.iter().all(|rank| matches!(rank, RankTicket::Committed(_))) {
            let done = state.ticket.take();
            state.epoch += 1;
            state.asked = None;
            state.failed = None;
            self.tickets.lock().committed(request.ticket);
            sequence.arm.figures.committed();
            drop(state);
            drop(done);
            self.migrate(sequence);
        }
        committed
    }

    /// Both halves in one call, for an engine with one rank whose rows are not shared while it runs. Block tables are not
    /// edited: rows move.
    ///
    /// # Errors
    /// As [`Host::ask`], [`Host::prepare`] and [`Host::commit`]; `Argument` with more than one rank, or on a device.
    ///
    /// # Safety
    /// As [`Host::commit`].
    pub unsafe fn compress(
        &self,
        ask: &Ask<'_>,
        layers: impl Fn() -> Result<Layers, HostError>,
        fresh: Option<Layers>,
        stream: *mut c_void,
    ) -> Result<Compressed, HostError> {
        if self.models.len() != 1 || !self.devices.iter().all(Device::is_immediate) {
            let text = "`kvhook_compress` is for one rank in ordinary memory; use prepare and commit";
            return Err(HostError::Argument(text.to_owned()));
        }
        let answer = self.ask(ask)?;
        if answer.decision == KVHOOK_DECISION_KEEP {
            return Ok(Compressed::Kept(answer.reason));
        }
        let request = PrepareRequest {
            uid: ask.uid,
            event: ask.event,
            fresh: fresh.is_some(),
            moves_rows: true,
            layers: layers()?,
            next_position: ask.next_position,
            shared_rows: ask.shared_rows,
            published_rows: ask.published_rows,
        };
        // SAFETY: passed on from the caller.
        let prepared = unsafe { self.prepare(0, &[request], stream)? };
        let Some(prepared) = prepared.first().filter(|prepared| prepared.ticket != 0) else {
            return Ok(Compressed::Kept(prepared.first().map_or(KVH_REASON_OTHER, |prepared| prepared.reason)));
        };
        let movement = if fresh.is_some() { KVHOOK_MOVE_FRESH } else { KVHOOK_MOVE_IN_PLACE };
        let request = CommitRequest {
            ticket: prepared.ticket,
            layers: layers()?,
            fresh,
            next_position: ask.next_position,
            stream,
        };
        // SAFETY: passed on from the caller.
        match unsafe { self.commit(0, &request) } {
            Ok(committed) => Ok(Compressed::Done { movement, committed }),
            Err(HostError::Dropped { reason: KVHOOK_REASON_SHADOW, .. }) => Ok(Compressed::Kept(KVHOOK_REASON_SHADOW)),
            Err(error) => Err(error),
        }
    }
}

/// Rows of a layer after a commit.
fn length_after(now: u64, layer: &LayerPlan) -> u64 {
    now - layer.planned.min(now) + layer.count
}

/// Nothing that was planned may be gone, and every layer has grown by the tokens that came since.
fn check_lengths(model: &Model, plan: &Plan, lengths: &[u64], next_position: u64) -> Result<(), HostError> {
    let full = |layer: &usize| is_planned(&model.layers()[*layer]);
    let mut appended = None;
    for layer in (0..lengths.len()).filter(full) {
        let (now, planned) = (lengths[layer], plan.layers[layer].planned);
        let grown = now.checked_sub(planned).filter(|&grown| appended.is_none_or(|appended| appended == grown));
        let Some(grown) = grown else {
            return Err(HostError::Argument(format!(
                "`layers[{layer}].length` is {now}, {planned} rows were planned; every layer must hold those and the same \
                 number of appended ones ({})",
                appended.unwrap_or(0)
            )));
        };
        appended = Some(grown);
    }
    let appended = appended.unwrap_or(0);
    if next_position != plan.planned_position + appended {
        return Err(HostError::Argument(format!(
            "`next_position` is {next_position}; it was {} when the ticket was made, and {appended} rows were appended",
            plan.planned_position
        )));
    }
    if plan.moved_position.is_some() && appended > 0 {
        return Err(HostError::Argument(format!(
            "{appended} rows were appended since the ticket was made, but its keys are rotated for new positions, which \
             those rows have not"
        )));
    }
    Ok(())
}

fn tasks_of(
    plan: &LayerPlan,
    source: LayerRows,
    destination: LayerRows,
    lent: Option<LayerRows>,
    appended: usize,
) -> impl Iterator<Item = Task<'_>> {
    let k = Task { plan, source: source.k, destination: destination.k, lent: lent.map(|lent| lent.k), appended };
    let v = source.v.zip(destination.v).map(|(source, destination)| Task {
        plan,
        source,
        destination,
        lent: lent.and_then(|lent| lent.v),
        appended,
    });
    core::iter::once(k).chain(v)
}

/// Rows and bytes before and after, over the layers whose rows may be planned.
pub(crate) fn moved(model: &Model, before: &[u64], after: &[u64]) -> Moved {
    let mut moved = Moved::default();
    for (layer, info) in model.layers().iter().enumerate().filter(|(_, info)| is_planned(info)) {
        let entries = |length: u64| length * u64::from(info.kv_heads);
        moved.entries_before += entries(before[layer]);
        moved.entries_after += entries(after[layer]);
        moved.bytes_before += entries(before[layer]) * model.entry_bytes(layer);
        moved.bytes_after += entries(after[layer]) * model.entry_bytes(layer);
    }
    moved
}
