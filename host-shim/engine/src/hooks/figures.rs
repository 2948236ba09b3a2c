//! Figures of one arm.

use std::time::Duration;

use kvhook_host::raw::*;

use super::report::Reason;

/// Time spent in one hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HookTime {
    /// Calls.
    pub calls: u64,
    /// Time of all calls.
    pub total: Duration,
    /// The longest call.
    pub longest: Duration,
}

impl From<KvhookTimes> for HookTime {
    fn from(times: KvhookTimes) -> Self {
        let (total, longest) = (Duration::from_nanos(times.total_ns), Duration::from_nanos(times.max_ns));
        Self { calls: times.calls, total, longest }
    }
}

/// What an arm did since it was made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Figures {
    /// Sequences that began on it.
    pub sequences: u64,
    /// Sequences that are live now.
    pub live: u64,
    /// Commits.
    pub commits: u64,
    /// Entries before, summed over commits, ranks, layers and KV heads.
    pub entries_before: u64,
    /// Entries after.
    pub entries_after: u64,
    /// Bytes of those entries before.
    pub bytes_before: u64,
    /// Bytes after.
    pub bytes_after: u64,
    /// Bytes that went back to the pool or to the heap.
    pub bytes_freed: u64,
    /// How often sequences stayed as they were, for any reason.
    pub fallbacks: u64,
    /// The same by reason.
    pub reasons: Vec<(Reason, u64)>,
    /// Time of `bound`.
    pub bound: HookTime,
    /// Time of `on_prefill_done`.
    pub on_prefill_done: HookTime,
    /// Time of `on_grown`.
    pub on_grown: HookTime,
    /// Time of `before_attention`.
    pub before_attention: HookTime,
    /// Time of `on_free`.
    pub on_free: HookTime,
    /// Time of the host's commits.
    pub commit: HookTime,
}

/// Reasons that there may be, and some more.
const REASONS: usize = 64;

impl Figures {
    /// Fills the figures by a call that is handed a struct with room for the reasons.
    pub(super) fn read<E>(fill: impl FnOnce(&mut KvhookFigures) -> Result<(), E>) -> Result<Self, E> {
        let mut reasons = [KvhookReasonCount::NONE; REASONS];
        let mut raw = KvhookFigures::to_fill(&mut reasons);
        fill(&mut raw)?;
        let reasons = reasons.iter().take(raw.reasons.count as usize);
        Ok(Self {
            sequences: raw.sequences,
            live: raw.live,
            commits: raw.commits,
            entries_before: raw.entries_before,
            entries_after: raw.entries_after,
            bytes_before: raw.bytes_before,
            bytes_after: raw.bytes_after,
            bytes_freed: raw.bytes_freed,
            fallbacks: raw.fallbacks,
            reasons: reasons.map(|reason| (Reason(reason.reason), reason.count)).collect(),
            bound: raw.bound.into(),
            on_prefill_done: raw.on_prefill_done.into(),
            on_grown: raw.on_grown.into(),
            before_attention: raw.before_attention.into(),
            on_free: raw.on_free.into(),
            commit: raw.commit.into(),
        })
    }
}
