//! What switches an arm off by itself: too many sequences that fail, or too much time for each token.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use crate::raw::*;

/// The largest `sequences` of a guard.
pub const MAX_SEQUENCES: u32 = 1 << 20;

/// An arm's limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuardSpec {
    /// The share of sequences that may fail, 0 to 1. 1: any.
    pub failed: f64,
    /// Of the last so many; 1 to [`MAX_SEQUENCES`].
    pub sequences: u32,
    /// Time of hooks and commits for each token, on one rank, in ns. 0: no limit.
    pub ns_per_token: u64,
    /// Judged each time that so many tokens were seen; not 0.
    pub tokens: u64,
}

impl Default for GuardSpec {
    fn default() -> Self {
        Self { failed: 1.0, sequences: 100, ns_per_token: 0, tokens: 4096 }
    }
}

impl GuardSpec {
    /// Checks the ranges.
    ///
    /// # Errors
    /// What is out of its range.
    pub fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.failed) {
            return Err(format!("`failed` is {}; expected a share, 0 to 1", self.failed));
        }
        if !(1..=MAX_SEQUENCES).contains(&self.sequences) {
            return Err(format!("`sequences` is {}; expected 1 to {MAX_SEQUENCES}", self.sequences));
        }
        if self.tokens == 0 {
            return Err("`tokens` is 0; expected 1 or more".to_owned());
        }
        Ok(())
    }
}

/// Whether a reason is the plugin's fault: these are what a guard counts as a failure.
pub fn is_fault(reason: KvhookReason) -> bool {
    matches!(
        reason,
        KVHOOK_REASON_PLUGIN_ERROR
            | KVHOOK_REASON_PANIC
            | KVHOOK_REASON_POISONED
            | KVHOOK_REASON_BAD_INDEX
            | KVHOOK_REASON_BAD_COUNT
            | KVHOOK_REASON_BAD_POSITION
            | KVHOOK_REASON_BAD_PLAN
    )
}

/// Watches one arm. Each judgement gives the cause when a limit is passed.
#[derive(Default)]
pub struct Guard {
    watch: Mutex<Watch>,
    spent_ns: AtomicU64,
}

#[derive(Default)]
struct Watch {
    spec: Option<GuardSpec>,
    /// Whether they failed, oldest first; at most `sequences`.
    outcomes: VecDeque<bool>,
    failed: u32,
    tokens: u64,
}

impl Guard {
    /// Sets limits, and begins to count anew.
    pub fn set(&self, spec: Option<GuardSpec>) {
        let mut watch = self.watch.lock();
        *watch = Watch { spec, ..Watch::default() };
        self.spent_ns.store(0, Relaxed);
    }

    /// A hook or a commit took some time.
    pub fn took(&self, time: Duration) {
        self.spent_ns.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// A sequence failed, or ended without that.
    pub fn outcome(&self, failed: bool) -> Option<String> {
        let mut watch = self.watch.lock();
        let spec = watch.spec?;
        watch.outcomes.push_back(failed);
        watch.failed += u32::from(failed);
        if watch.outcomes.len() > spec.sequences as usize && watch.outcomes.pop_front() == Some(true) {
            watch.failed -= 1;
        }
        // More than this share even if all that is missing in the window goes well.
        let limit = spec.failed * f64::from(spec.sequences);
        (f64::from(watch.failed) > limit).then(|| {
            format!(
                "{} of its last {} sequences failed; {} of {} may",
                watch.failed,
                watch.outcomes.len(),
                limit.floor(),
                spec.sequences
            )
        })
    }

    /// The arm's sequences grew by some tokens, on `ranks` ranks.
    pub fn grew(&self, tokens: u64, ranks: usize) -> Option<String> {
        let mut watch = self.watch.lock();
        let spec = watch.spec.filter(|spec| spec.ns_per_token > 0)?;
        watch.tokens = watch.tokens.saturating_add(tokens);
        if watch.tokens < spec.tokens {
            return None;
        }
        let seen = core::mem::take(&mut watch.tokens);
        let each = self.spent_ns.swap(0, Relaxed) / ranks.max(1) as u64 / seen;
        (each > spec.ns_per_token).then(|| {
            format!("it took {each} ns for each of its last {seen} tokens; {} ns are allowed", spec.ns_per_token)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(spec: GuardSpec) -> Guard {
        spec.check().unwrap();
        let guard = Guard::default();
        guard.set(Some(spec));
        guard
    }

    #[test]
    fn failures_are_counted_in_a_window_that_slides() {
        let guard = guard(GuardSpec { failed: 0.2, sequences: 10, ..GuardSpec::default() });
        // Two of ten at any time are allowed, for ever.
        for round in 0..100 {
            assert_eq!(guard.outcome(round % 5 == 0), None, "round {round}");
        }
        // The window ends with failures at its places 0 and 5: the next is the third only until the first slides out.
        assert_eq!(guard.outcome(true), None);
        let cause = guard.outcome(true).unwrap();
        assert_eq!(cause, "3 of its last 10 sequences failed; 2 of 10 may");
        guard.set(Some(GuardSpec { failed: 0.2, sequences: 10, ..GuardSpec::default() }));
        assert_eq!((guard.outcome(true), guard.outcome(true)), (None, None));
        assert!(guard.outcome(true).unwrap().starts_with("3 of its last 3 "));
    }

    #[test]
    fn limits_at_their_ends() {
        let none = guard(GuardSpec { failed: 0.0, sequences: 5, ..GuardSpec::default() });
        assert_eq!(none.outcome(false), None);
        assert!(none.outcome(true).is_some());
        let any = guard(GuardSpec::default());
        assert!((0..1000).all(|_| any.outcome(true).is_none()));
        let unset = Guard::default();
        assert_eq!((unset.outcome(true), unset.grew(1 << 40, 1)), (None, None));
    }

    #[test]
    fn time_is_that_of_one_rank_over_the_tokens() {
        let guard = guard(GuardSpec { ns_per_token: 100, tokens: 10, ..GuardSpec::default() });
        guard.took(Duration::from_nanos(2 * 1000));
        assert_eq!(guard.grew(9, 2), None);
        assert_eq!(guard.grew(1, 2), None);
        guard.took(Duration::from_nanos(2 * 1010));
        let cause = guard.grew(10, 2).unwrap();
        assert_eq!(cause, "it took 101 ns for each of its last 10 tokens; 100 ns are allowed");
        // What was judged is not judged again.
        assert_eq!(guard.grew(10, 2), None);
    }

    #[test]
    fn ranges() {
        let good = GuardSpec::default();
        for bad in [
            GuardSpec { failed: -0.1, ..good },
            GuardSpec { failed: f64::NAN, ..good },
            GuardSpec { failed: 1.1, ..good },
            GuardSpec { sequences: 0, ..good },
            GuardSpec { sequences: MAX_SEQUENCES + 1, ..good },
            GuardSpec { tokens: 0, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
