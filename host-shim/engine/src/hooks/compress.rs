//! The first half of a compression, after each step: who is due, is there a gain, and what would be kept.

use std::collections::HashMap;
use std::sync::Arc;

use super::host::{Answer, Candidate, Occasion, Prepared};
use super::observer::{Observer, StepTag};
use super::report::{FreeReason, Reason, SequenceReport};
use super::tracked::{Pending, Tracked};
use super::{KvPlugins, PluginConfig};
use crate::cache::{BlockPool, CacheConfig, SequenceCache, SequenceId};
use crate::error::{Error, Result};
use crate::model::Config;
use crate::rank::{RankState, Ranks};
use crate::runner::{Begin, Work};

/// What a compression changes: the parts of a [`Runner`](crate::Runner).
pub(crate) struct Cache<'a> {
    pub(crate) ranks: &'a Ranks,
    pub(crate) pool: Option<&'a mut BlockPool>,
    pub(crate) sequences: &'a mut HashMap<SequenceId, SequenceCache>,
    /// Bytes of one entry of all KV heads of all ranks.
    pub(crate) row_bytes: usize,
}

/// The plugins of a runner and the sequences that they serve.
#[derive(Debug)]
pub(crate) struct Hooks {
    pub(super) plugins: Arc<KvPlugins>,
    commit_lag: usize,
    pub(super) sequences: HashMap<SequenceId, Tracked>,
}

impl Hooks {
    /// Makes the host and sets an observer on each rank.
    pub(crate) fn new(model: &Config, cache: &CacheConfig, config: &PluginConfig, ranks: &Ranks) -> Result<Self> {
        let plugins = KvPlugins::new(model, cache, config, ranks.backend())?;
        let observed = Arc::clone(&plugins);
        ranks.run(move |rank| {
            rank.observer = Some(Box::new(Observer { plugins: Arc::clone(&observed), rank: rank.rank }));
        })?;
        Ok(Self { plugins, commit_lag: config.commit_lag, sequences: HashMap::new() })
    }

    pub(crate) fn plugins(&self) -> &Arc<KvPlugins> {
        &self.plugins
    }

    /// Begins a sequence on its arm; the longest prefix that it may take over.
    ///
    /// # Errors
    /// [`Error::Plugin`] for an unknown arm.
    pub(crate) fn begin(&mut self, id: SequenceId, begin: &Begin<'_>) -> Result<usize> {
        let began = self.plugins.begin(begin.arm.unwrap_or(""), begin.key, begin.prefill)?;
        if began.uid != 0 {
            self.sequences.insert(id, Tracked::new(&began, begin.prefill));
        }
        Ok(began.max_prefix_hit)
    }

    /// What a step carries of the sequence for the plugins.
    pub(crate) fn tag(&self, id: SequenceId) -> StepTag {
        self.sequences.get(&id).map_or_else(StepTag::default, Tracked::tag)
    }

    /// Whether a plugin will be asked about the sequence once this part of a step has run.
    pub(crate) fn will_ask(&self, part: &Work<'_>, next_position: u32) -> bool {
        let after = u64::from(next_position) + part.tokens.len() as u64;
        self.sequences.get(&part.sequence).is_some_and(|tracked| tracked.occasion(part, after).is_some())
    }

    /// Leading rows of a sequence that waiting requests would take over.
    pub(crate) fn set_wanted_rows(&mut self, id: SequenceId, rows: usize) {
        if let Some(tracked) = self.sequences.get_mut(&id) {
            tracked.wanted_rows = rows;
        }
    }

    /// Commits what is ready, and asks and prepares what is due.
    ///
    /// # Errors
    /// [`Error::RankStopped`]; [`Error::SplitCommit`]; [`Error::Device`]. What plugins and host do wrong is counted, and no
    /// error.
    pub(crate) fn after_step(&mut self, cache: &mut Cache<'_>, work: &[Work<'_>]) -> Result<()> {
        for part in work {
            let Some(pending) = self.sequences.get_mut(&part.sequence).and_then(|tracked| tracked.pending.as_mut())
            else {
                continue;
            };
            pending.steps_left = pending.steps_left.saturating_sub(1);
            if pending.steps_left == 0 {
                self.settle(cache, part.sequence)?;
            }
        }
        let mut candidates = Vec::new();
        let mut reserved = Vec::new();
        for part in work {
            if let Some((candidate, fresh)) = self.ask(cache, part) {
                candidates.push(candidate);
                reserved.push(fresh);
            }
        }
        if candidates.is_empty() {
            return Ok(());
        }
        self.prepare(cache, candidates, reserved)?;
        if self.commit_lag == 0 {
            // Before the next step, then: not without the verdict.
            cache.ranks.backend().wait()?;
            for part in work {
                self.settle(cache, part.sequence)?;
            }
        }
        Ok(())
    }

    /// Asks about a sequence, if it is due, and reserves the fresh blocks that it takes.
    fn ask(&mut self, cache: &mut Cache<'_>, part: &Work<'_>) -> Option<(Candidate, Option<Vec<Vec<u32>>>)> {
        let id = part.sequence;
        let (tracked, sequence) = (self.sequences.get_mut(&id)?, cache.sequences.get(&id)?);
        let occasion = tracked.occasion(part, sequence.next_position.into())?;
        tracked.asked_at(sequence.next_position);
        let mut candidate = candidate(tracked, sequence, id, occasion, cache.pool.as_deref());
        let (counts, fresh) = match self.plugins.ask(&candidate) {
            Ok(Answer::Prepare { counts, fresh }) => (counts, fresh),
            Ok(Answer::Keep(reason)) => {
                tracked.keeps(reason);
                return None;
            }
            Err(error) => {
                self.failed(id, &error);
                return None;
            }
        };
        let reserved = match (fresh, cache.pool.as_deref_mut()) {
            (true, Some(pool)) => {
                let rows = counts.iter().zip(&candidate.layers);
                // A layer that is kept whole stays in its blocks.
                let rows = rows.map(|(&count, layer)| if count == layer.len { 0 } else { count + self.commit_lag });
                reserve(pool, rows)
            }
            _ => None,
        };
        // Without fresh blocks only a plan that edits block tables can be carried out: the host drops any other with the
        // reason `no_room`.
        candidate.fresh = reserved.is_some();
        Some((candidate, reserved))
    }

    /// Prepares on every rank at once.
    fn prepare(
        &mut self,
        cache: &mut Cache<'_>,
        candidates: Vec<Candidate>,
        reserved: Vec<Option<Vec<Vec<u32>>>>,
    ) -> Result<()> {
        let candidates = Arc::new(candidates);
        let (plugins, shared) = (Arc::clone(&self.plugins), Arc::clone(&candidates));
        let of_ranks = cache.ranks.run(move |rank: &mut RankState| plugins.prepare(rank, &shared))?;
        for (place, (candidate, fresh)) in candidates.iter().zip(reserved).enumerate() {
            let Some(tracked) = self.sequences.get_mut(&candidate.id) else { continue };
            match agreement(&of_ranks, place) {
                Ok(ticket) => {
                    let layers = candidate.layers.clone();
                    tracked.pending = Some(Pending { ticket, steps_left: self.commit_lag, layers, fresh });
                    continue;
                }
                Err(Kept::Because(reason)) => tracked.keeps(reason),
                Err(Kept::Failed(error)) => {
                    // Other ranks may have opened it.
                    if let Some(ticket) = tickets(&of_ranks, place).next() {
                        self.plugins.give_up(ticket);
                    }
                    self.failed(candidate.id, error);
                }
            }
            give_back(cache.pool.as_deref_mut(), fresh);
        }
        Ok(())
    }

    /// Gives up plans that hold fresh blocks, so that others can have them; whether there were any.
    pub(crate) fn drop_reservations(&mut self, pool: &mut BlockPool) -> bool {
        let mut any = false;
        for tracked in self.sequences.values_mut() {
            let Some(pending) = tracked.pending.take_if(|pending| pending.fresh.is_some()) else { continue };
            any = true;
            give_back(Some(&mut *pool), pending.fresh);
            match self.plugins.drop_for_room(pending.ticket) {
                Ok(()) => tracked.keeps(Reason::NO_ROOM),
                Err(error) => tracked.failures.push(error.to_string()),
            }
        }
        any
    }

    /// A sequence's cache goes away.
    pub(crate) fn free(&mut self, pool: Option<&mut BlockPool>, id: SequenceId, reason: FreeReason) {
        let Some(tracked) = self.sequences.remove(&id) else { return };
        if let Err(error) = self.plugins.free(tracked.uid, reason) {
            tracing::warn!(target: "kvhook", %id, "{error}");
        }
        give_back(pool, tracked.pending.and_then(|pending| pending.fresh));
    }

    /// All caches go away.
    pub(crate) fn reset(&mut self, mut pool: Option<&mut BlockPool>) {
        if let Err(error) = self.plugins.reset() {
            tracing::warn!(target: "kvhook", "{error}");
        }
        for (_, tracked) in self.sequences.drain() {
            give_back(pool.as_deref_mut(), tracked.pending.and_then(|pending| pending.fresh));
        }
    }

    /// A sequence's last rows are about to be taken away. An open plan is dropped, if it was about them.
    ///
    /// # Errors
    /// [`Error::Plugin`] where rows that stay have positions from `next_position` on.
    pub(crate) fn cut(
        &mut self,
        pool: Option<&mut BlockPool>,
        id: SequenceId,
        lengths: &[u64],
        next_position: u32,
    ) -> Result<()> {
        let Some(tracked) = self.sequences.get_mut(&id) else { return Ok(()) };
        self.plugins.cut(tracked.uid, lengths, next_position)?;
        tracked.cut_at(next_position);
        let below =
            |pending: &mut Pending| pending.layers.iter().zip(lengths).any(|(then, now)| then.len as u64 > *now);
        if let Some(pending) = tracked.pending.take_if(below) {
            give_back(pool, pending.fresh);
            tracked.keeps(Reason::DROPPED);
        }
        Ok(())
    }

    /// A sequence is forked: its open plan is dropped.
    ///
    /// # Errors
    /// [`Error::Plugin`] where the plugin keeps state for it.
    pub(crate) fn fork(&mut self, pool: Option<&mut BlockPool>, id: SequenceId, fork: SequenceId) -> Result<()> {
        let Some(tracked) = self.sequences.get_mut(&id) else { return Ok(()) };
        let began = self.plugins.fork(tracked.uid)?;
        if let Some(pending) = tracked.pending.take() {
            give_back(pool, pending.fresh);
            tracked.keeps(Reason::DROPPED);
        }
        let forked = tracked.forked(&began);
        self.sequences.insert(fork, forked);
        Ok(())
    }

    /// Counts what the host could not do for a sequence.
    pub(super) fn failed(&mut self, id: SequenceId, error: &Error) {
        tracing::warn!(target: "kvhook", %id, "{error}");
        if let Some(tracked) = self.sequences.get_mut(&id) {
            tracked.failures.push(error.to_string());
        }
    }

    /// Fills what the plugins' side knows of a sequence.
    pub(crate) fn report(&self, id: SequenceId, report: SequenceReport) -> SequenceReport {
        let Some(tracked) = self.sequences.get(&id) else { return report };
        SequenceReport {
            uid: tracked.uid,
            commits: tracked.commits.clone(),
            kept: tracked.kept.clone(),
            failures: tracked.failures.clone(),
            pending: tracked.pending.is_some(),
            ..report
        }
    }
}

/// Why ranks have no ticket.
enum Kept<'a> {
    Because(Reason),
    Failed(&'a Error),
}

/// The ticket of each rank that has one, for one of the candidates.
fn tickets(of_ranks: &[Result<Vec<Prepared>>], place: usize) -> impl Iterator<Item = u64> {
    of_ranks.iter().flatten().filter_map(move |answers| answers[place].ok())
}

/// The ticket on which all ranks agree for one of the candidates, else why there is none.
fn agreement(of_ranks: &[Result<Vec<Prepared>>], place: usize) -> std::result::Result<u64, Kept<'_>> {
    let mut ticket = 0;
    let mut kept = None;
    for of_rank in of_ranks {
        match of_rank.as_ref().map(|answers| answers[place]) {
            Ok(Ok(number)) => ticket = number,
            // The rank that kept first knows the cause.
            Ok(Err(reason)) if reason == Reason::OTHER_RANK && kept.is_some() => {}
            Ok(Err(reason)) => kept = Some(Kept::Because(reason)),
            Err(error) => return Err(Kept::Failed(error)),
        }
    }
    kept.map_or(Ok(ticket), Err)
}

fn candidate(
    tracked: &Tracked,
    sequence: &SequenceCache,
    id: SequenceId,
    occasion: Occasion,
    pool: Option<&BlockPool>,
) -> Candidate {
    let (shared_rows, published_rows) = pool.map_or((0, 0), |pool| pool.protected_rows(sequence));
    Candidate {
        id,
        uid: tracked.uid,
        occasion,
        layers: sequence.layers.clone(),
        next_position: sequence.next_position,
        shared_rows: shared_rows.max(tracked.wanted_rows.min(published_rows)),
        published_rows,
        fresh: false,
    }
}

/// Takes blocks for so many rows in each layer, or none at all.
pub(super) fn reserve(pool: &mut BlockPool, rows: impl Iterator<Item = usize>) -> Option<Vec<Vec<u32>>> {
    let size = pool.block_size();
    let mut taken = Vec::new();
    for (layer, rows) in rows.enumerate() {
        match pool.allocate(layer, rows.div_ceil(size)) {
            Ok(blocks) => taken.push(blocks),
            Err(_) => {
                give_back(Some(pool), Some(taken));
                return None;
            }
        }
    }
    Some(taken)
}

/// Returns reserved blocks to the pool.
pub(super) fn give_back(pool: Option<&mut BlockPool>, fresh: Option<Vec<Vec<u32>>>) {
    let (Some(pool), Some(fresh)) = (pool, fresh) else { return };
    for (layer, blocks) in fresh.iter().enumerate() {
        pool.release(layer, blocks);
    }
}
