//! What compression did to one sequence.

use std::collections::BTreeMap;
use std::fmt;

use kvhook_abi::raw::*;
use kvhook_host::c_api::kvhook_reason_name;
use kvhook_host::raw::*;

use super::host::static_text;

/// Why a sequence stayed as it was: one of the host's reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reason(pub(super) KvhookReason);

impl Reason {
    pub(super) const NONE: Self = Self(KVH_REASON_NONE);
    pub(super) const NO_ROOM: Self = Self(KVH_REASON_NO_ROOM);
    pub(super) const OTHER_RANK: Self = Self(KVHOOK_REASON_OTHER_RANK);
    pub(super) const DROPPED: Self = Self(KVHOOK_REASON_DROPPED);

    /// The number, `KVH_REASON_*` or `KVHOOK_REASON_*`.
    pub fn number(self) -> i32 {
        self.0
    }

    /// The reason in one word, as in the figures: `no_gain`.
    pub fn name(self) -> &'static str {
        static_text(kvhook_reason_name(self.0))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a sequence's cache goes away, as plugins are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FreeReason {
    /// The sequence is done.
    #[default]
    Finished,
    /// Its request was cancelled.
    Cancelled,
    /// Others need the room; it will be computed again.
    Preempted,
}

impl FreeReason {
    pub(super) fn number(self) -> i32 {
        match self {
            Self::Finished => KVH_FREE_FINISHED,
            Self::Cancelled => KVH_FREE_CANCELLED,
            Self::Preempted => KVH_FREE_PREEMPTED,
        }
    }
}

/// How rows moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Movement {
    /// To the front of the sequence's own rows.
    InPlace,
    /// Into fresh blocks.
    Fresh,
    /// Not at all: blocks left the tables.
    Table,
}

/// One compression that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitReport {
    /// Position of the next token.
    pub position: u32,
    /// How rows moved.
    pub movement: Movement,
    /// Rows of each layer before.
    pub lengths_before: Vec<usize>,
    /// Rows of each layer after.
    pub lengths_after: Vec<usize>,
    /// Bytes that went back to the pool or to the heap, over all ranks, less those of fresh blocks.
    pub bytes_freed: usize,
}

/// What compression did to a live sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SequenceReport {
    /// The host's name of the sequence; 0: no plugin serves it.
    pub uid: u64,
    /// Rows of each layer now.
    pub lengths: Vec<usize>,
    /// Position of the next token.
    pub next_position: u32,
    /// Entries (a K row and its V row of one KV head) that all ranks would hold without compression.
    pub entries_full: usize,
    /// Entries that all ranks hold.
    pub entries: usize,
    /// Bytes of `entries_full`.
    pub bytes_full: usize,
    /// Bytes of `entries`.
    pub bytes: usize,
    /// Compressions, in order.
    pub commits: Vec<CommitReport>,
    /// How often it stayed as it was, by reason.
    pub kept: BTreeMap<Reason, u64>,
    /// What the host refused or could not do, in order.
    pub failures: Vec<String>,
    /// Whether a plan waits for its commit.
    pub pending: bool,
}
