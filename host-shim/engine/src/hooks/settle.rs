//! The second half of a compression: the verdict, the commit on every rank, and what becomes free by it.

use std::sync::Arc;

use kvhook_host::raw::*;

use super::compress::{Cache, Hooks, give_back, reserve};
use super::host::{Commit, Committed, Verdict};
use super::report::{CommitReport, Movement, Reason};
use super::tracked::Pending;
use crate::cache::{BlockPool, LayerCache, SequenceCache, SequenceId};
use crate::error::{Error, Result};
use crate::rank::Ranks;

impl Hooks {
    /// Asks for the verdict of a sequence's plan, if it has one, and carries it out.
    ///
    /// # Errors
    /// [`Error::RankStopped`]; [`Error::SplitCommit`].
    pub(super) fn settle(&mut self, cache: &mut Cache<'_>, id: SequenceId) -> Result<()> {
        let Some(mut pending) = self.sequences.get_mut(&id).and_then(|tracked| tracked.pending.take()) else {
            return Ok(());
        };
        let verdict = self.plugins.verdict(pending.ticket);
        let (movement, rewrites, counts) = match verdict {
            Ok(Verdict::Ready { movement, rewrites, counts }) => (movement, rewrites, counts),
            Ok(Verdict::Pending) => {
                // Asked for again after the next step.
                if let Some(tracked) = self.sequences.get_mut(&id) {
                    tracked.pending = Some(pending);
                }
                return Ok(());
            }
            Ok(Verdict::Dropped(reason)) => {
                give_back(cache.pool.as_deref_mut(), pending.fresh);
                if let Some(tracked) = self.sequences.get_mut(&id) {
                    tracked.keeps(reason);
                }
                return Ok(());
            }
            Err(error) => {
                give_back(cache.pool.as_deref_mut(), pending.fresh);
                self.failed(id, &error);
                return Ok(());
            }
        };
        let Some(sequence) = cache.sequences.get(&id) else { return Ok(()) };
        let fresh = match movement {
            KVHOOK_MOVE_FRESH => match fit(cache.pool.as_deref_mut(), &mut pending, sequence, &counts, rewrites) {
                Some(fresh) => Some(fresh),
                None => return self.no_room(cache, id, pending),
            },
            _ => None,
        };
        let movement = match movement {
            KVHOOK_MOVE_FRESH => Movement::Fresh,
            KVHOOK_MOVE_TABLE => Movement::Table,
            _ => Movement::InPlace,
        };
        let edit = match movement {
            Movement::Table => self.plugins.table_edit(pending.ticket),
            _ => Ok(Vec::new()),
        };
        let (ticket, layers, next_position) = (pending.ticket, sequence.layers.clone(), sequence.next_position);
        let commit = Arc::new(Commit { id, ticket, layers, fresh: fresh.clone(), next_position });
        let committed = match edit {
            Ok(edit) => self.commit(cache.ranks, commit)?.map(|committed| (committed, edit)),
            Err(error) => Err(error),
        };
        let (committed, edit) = match committed {
            Ok(done) => done,
            Err(error) => {
                give_back(cache.pool.as_deref_mut(), fresh.or(pending.fresh));
                self.plugins.give_up(pending.ticket);
                self.failed(id, &error);
                return Ok(());
            }
        };
        let unused = if fresh.is_some() { None } else { pending.fresh.take() };
        give_back(cache.pool.as_deref_mut(), unused);
        self.apply(cache, id, movement, fresh, &edit, &pending, committed);
        Ok(())
    }

    fn no_room(&mut self, cache: &mut Cache<'_>, id: SequenceId, pending: Pending) -> Result<()> {
        give_back(cache.pool.as_deref_mut(), pending.fresh);
        match self.plugins.drop_for_room(pending.ticket) {
            Ok(()) => {
                if let Some(tracked) = self.sequences.get_mut(&id) {
                    tracked.keeps(Reason::NO_ROOM);
                }
            }
            Err(error) => self.failed(id, &error),
        }
        Ok(())
    }

    /// Commits on every rank. The inner error: no rank has moved anything.
    ///
    /// # Errors
    /// [`Error::SplitCommit`] where some ranks moved their rows and others cannot.
    fn commit(&self, ranks: &Ranks, commit: Arc<Commit>) -> Result<Result<Committed>> {
        let (plugins, shared) = (Arc::clone(&self.plugins), Arc::clone(&commit));
        let done = ranks.run(move |rank| plugins.commit(rank, &shared))?;
        let mut moved: Option<Committed> = None;
        let mut failure = None;
        for of_rank in done {
            match of_rank {
                Ok(committed) => {
                    let freed = moved.as_ref().map_or(0, |moved| moved.freed);
                    moved = Some(Committed { freed: freed + committed.freed, ..committed });
                }
                Err(error) => failure = Some(error),
            }
        }
        match (moved, failure) {
            (Some(moved), None) => Ok(Ok(moved)),
            (None, Some(error)) => Ok(Err(error)),
            // The ranks' rows are checked alike, so one that fails alone shows a defect, or a device that is lost or full.
            (Some(_), Some(error)) => Err(Error::SplitCommit { sequence: commit.id, reason: error.to_string() }),
            (None, None) => Err(Error::Empty { what: "the list of ranks" }),
        }
    }

    /// Rows have moved: lengths, tables and the pool follow.
    #[expect(clippy::too_many_arguments, reason = "all that a commit gives")]
    fn apply(
        &mut self,
        cache: &mut Cache<'_>,
        id: SequenceId,
        movement: Movement,
        fresh: Option<Vec<Vec<u32>>>,
        edit: &[Vec<usize>],
        pending: &Pending,
        committed: Committed,
    ) {
        let (Some(tracked), Some(sequence)) = (self.sequences.get_mut(&id), cache.sequences.get_mut(&id)) else {
            return;
        };
        let lengths_before: Vec<usize> = sequence.layers.iter().map(|layer| layer.len).collect();
        for (layer, &length) in sequence.layers.iter_mut().zip(&committed.lengths) {
            layer.len = length;
        }
        if sequence.next_position != committed.next_position {
            sequence.next_position = committed.next_position;
            tracked.asked_at(committed.next_position);
        }
        sequence.compressed = true;
        let bytes_freed = match cache.pool.as_deref_mut() {
            None => committed.freed,
            Some(pool) => {
                let blocks = match movement {
                    Movement::InPlace => drop_tail(pool, sequence),
                    Movement::Fresh => replace(pool, sequence, fresh.unwrap_or_default()),
                    Movement::Table => edit_tables(pool, sequence, edit, pending),
                };
                blocks * pool.block_size() * cache.row_bytes
            }
        };
        let failure = self.plugins.freed(tracked.uid, bytes_freed).err();
        tracked.commits.push(CommitReport {
            position: sequence.next_position,
            movement,
            lengths_before,
            lengths_after: committed.lengths,
            bytes_freed,
        });
        if let Some(error) = failure {
            self.failed(id, &error);
        }
    }
}

/// Makes the reserved blocks of each layer as many as its rows take now; `None`: there are not enough.
fn fit(
    pool: Option<&mut BlockPool>,
    pending: &mut Pending,
    sequence: &SequenceCache,
    counts: &[usize],
    rewrites: bool,
) -> Option<Vec<Vec<u32>>> {
    let (pool, fresh) = (pool?, pending.fresh.as_mut()?);
    let size = pool.block_size();
    let room = |((then, now), &count): ((&LayerCache, &LayerCache), &usize)| {
        // A layer that is kept whole stays in its blocks.
        let stays = count == then.len && !rewrites;
        if stays { 0 } else { (count + now.len - then.len).div_ceil(size) }
    };
    let needed: Vec<usize> = pending.layers.iter().zip(&sequence.layers).zip(counts).map(room).collect();
    let missing = fresh.iter().zip(&needed).map(|(have, &needed)| needed.saturating_sub(have.len()) * size);
    let more = reserve(pool, missing.collect::<Vec<_>>().into_iter())?;
    for (layer, ((have, more), &needed)) in fresh.iter_mut().zip(more).zip(&needed).enumerate() {
        have.extend(more);
        let surplus = have.split_off(needed);
        pool.release(layer, &surplus);
    }
    pending.fresh.take()
}

/// Releases the blocks behind the last row of each layer; how many became usable.
fn drop_tail(pool: &mut BlockPool, sequence: &mut SequenceCache) -> usize {
    let mut freed = 0;
    for (index, layer) in sequence.layers.iter_mut().enumerate() {
        let tail = layer.blocks.split_off(layer.len.div_ceil(pool.block_size()).min(layer.blocks.len()));
        freed += pool.release(index, &tail);
    }
    freed
}

/// Takes over fresh blocks and releases the old ones; how many became usable, less those that were taken.
fn replace(pool: &mut BlockPool, sequence: &mut SequenceCache, fresh: Vec<Vec<u32>>) -> usize {
    let (mut freed, mut taken) = (0, 0);
    for (index, (layer, blocks)) in sequence.layers.iter_mut().zip(fresh).enumerate() {
        if !blocks.is_empty() {
            taken += blocks.len();
            freed += pool.release(index, &std::mem::replace(&mut layer.blocks, blocks));
        }
    }
    sequence.shared = 0;
    freed.saturating_sub(taken)
}

/// Keeps some of the planned blocks of each table and all later ones; how many became usable.
fn edit_tables(pool: &mut BlockPool, sequence: &mut SequenceCache, edit: &[Vec<usize>], pending: &Pending) -> usize {
    let size = pool.block_size();
    let mut freed = 0;
    for (index, (layer, then)) in sequence.layers.iter_mut().zip(&pending.layers).enumerate() {
        let planned = then.len.div_ceil(size);
        let old = std::mem::take(&mut layer.blocks);
        let (mut kept, mut released) = (Vec::new(), Vec::new());
        for (ordinal, block) in old.into_iter().enumerate() {
            let keeps = ordinal >= planned || edit[index].binary_search(&ordinal).is_ok();
            if keeps { kept.push(block) } else { released.push(block) }
        }
        layer.blocks = kept;
        freed += pool.release(index, &released);
    }
    freed
}
