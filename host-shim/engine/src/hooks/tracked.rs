//! What the engine remembers of a sequence that a plugin serves.

use std::collections::BTreeMap;

use super::host::{Began, Occasion};
use super::observer::StepTag;
use super::report::{CommitReport, Reason};
use crate::cache::LayerCache;
use crate::runner::Work;

/// A sequence of an arm.
#[derive(Debug)]
pub(super) struct Tracked {
    pub(super) uid: u64,
    prompt_length: usize,
    phases: u32,
    on_prefill_done: bool,
    grown_every: u64,
    /// Where the next growth is counted from.
    mark: u64,
    /// Leading rows that waiting requests would take over.
    pub(super) wanted_rows: usize,
    pub(super) pending: Option<Pending>,
    pub(super) commits: Vec<CommitReport>,
    pub(super) kept: BTreeMap<Reason, u64>,
    pub(super) failures: Vec<String>,
}

/// A plan that waits for its commit.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) ticket: u64,
    /// Steps of the sequence until the verdict is asked for.
    pub(super) steps_left: usize,
    /// Each layer when the plan was made.
    pub(super) layers: Vec<LayerCache>,
    /// Reserved blocks of each layer; `None`: none are needed.
    pub(super) fresh: Option<Vec<Vec<u32>>>,
}

impl Tracked {
    pub(super) fn new(began: &Began, prompt_length: usize) -> Self {
        Self {
            uid: began.uid,
            prompt_length,
            phases: began.phases,
            on_prefill_done: began.on_prefill_done,
            grown_every: began.grown_every,
            mark: prompt_length as u64,
            wanted_rows: 0,
            pending: None,
            commits: Vec::new(),
            kept: BTreeMap::new(),
            failures: Vec::new(),
        }
    }

    /// The same for a fork.
    pub(super) fn forked(&self, began: &Began) -> Self {
        Self { mark: self.mark, ..Self::new(began, self.prompt_length) }
    }

    pub(super) fn tag(&self) -> StepTag {
        StepTag { uid: self.uid, prompt_length: self.prompt_length as u64, phases: self.phases }
    }

    /// Whether the plugin is to be asked when this part of a step has run and left the sequence at `next_position`.
    pub(super) fn occasion(&self, part: &Work<'_>, next_position: u64) -> Option<Occasion> {
        if self.pending.is_some() {
            None
        } else if part.prompt_ends && self.on_prefill_done {
            Some(Occasion::PrefillDone)
        } else if self.grown_every > 0 && next_position >= self.mark.saturating_add(self.grown_every) {
            Some(Occasion::Grown)
        } else {
            None
        }
    }

    /// Growth is counted from here on.
    pub(super) fn asked_at(&mut self, next_position: u32) {
        self.mark = next_position.into();
    }

    /// The last rows were taken away.
    pub(super) fn cut_at(&mut self, next_position: u32) {
        self.mark = self.mark.min(next_position.into());
    }

    pub(super) fn keeps(&mut self, reason: Reason) {
        // Without a reason there was nothing to decide.
        if reason != Reason::NONE {
            *self.kept.entry(reason).or_default() += 1;
        }
    }
}
