//! Figures of one arm.

use std::time::Duration;

use kvhook_abi::raw::KvhArrayMut;
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
        let mut reasons = [KvhookReasonCount { reason: 0, reserved0: 0, count: 0 }; REASONS];
        let none = KvhookTimes { calls: 0, total_ns: 0, max_ns: 0, buckets: [0; KVHOOK_TIME_BUCKETS] };
        let mut raw = KvhookFigures {
            struct_size: size_of::<KvhookFigures>(),
            sequences: 0,
            live: 0,
            commits: 0,
            entries_before: 0,
            entries_after: 0,
            bytes_before: 0,
            bytes_after: 0,
            bytes_freed: 0,
            fallbacks: 0,
            reasons: KvhArrayMut {
                data: reasons.as_mut_ptr().cast(),
                count: REASONS as u64,
                stride: size_of::<KvhookReasonCount>() as u64,
            },
            bound: none,
            on_prefill_done: none,
            on_grown: none,
            before_attention: none,
            on_free: none,
            commit: none,
        };
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
