//! What each arm did: counted without locks, read as a struct, as JSON and as Prometheus text.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use kvhook_abi::raw::*;
use serde_json::{Map, Value, json};

use crate::raw::*;

/// Every reason with its name, by number.
const REASONS: [(KvhookReason, &str); 21] = [
    (KVH_REASON_NONE, "none"),
    (KVH_REASON_TOO_SHORT, "too_short"),
    (KVH_REASON_NO_GAIN, "no_gain"),
    (KVH_REASON_QUERIES_MISSING, "queries_missing"),
    (KVH_REASON_NO_ROOM, "no_room"),
    (KVH_REASON_UNSUPPORTED, "unsupported"),
    (KVH_REASON_OTHER, "other"),
    (KVHOOK_REASON_PLUGIN_ERROR, "plugin_error"),
    (KVHOOK_REASON_PANIC, "panic"),
    (KVHOOK_REASON_POISONED, "poisoned"),
    (KVHOOK_REASON_BAD_INDEX, "bad_index"),
    (KVHOOK_REASON_BAD_COUNT, "bad_count"),
    (KVHOOK_REASON_BAD_POSITION, "bad_position"),
    (KVHOOK_REASON_BAD_PLAN, "bad_plan"),
    (KVHOOK_REASON_OUT_OF_MEMORY, "out_of_memory"),
    (KVHOOK_REASON_OTHER_RANK, "other_rank"),
    (KVHOOK_REASON_DROPPED, "dropped"),
    (KVHOOK_REASON_DISABLED, "disabled"),
    (KVHOOK_REASON_MIN_TOKENS, "min_tokens"),
    (KVHOOK_REASON_DEVICE, "device"),
    (KVHOOK_REASON_SHADOW, "shadow"),
];

/// Name of a reason, as in the figures: `no_gain`; `unknown` for any other number.
pub fn reason_name(reason: KvhookReason) -> &'static str {
    REASONS.iter().find(|(number, _)| *number == reason).map_or("unknown", |(_, name)| name)
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// The plugin's `bound`.
    Bound,
    /// The plugin's `on_prefill_done`.
    OnPrefillDone,
    /// The plugin's `on_grown`.
    OnGrown,
    /// The plugin's `before_attention`.
    BeforeAttention,
    /// The plugin's `on_free`.
    OnFree,
    /// The host's commit.
    Commit,
}

const TIMED: [(Timed, &str); 6] = [
    (Timed::Bound, "bound"),
    (Timed::OnPrefillDone, "on_prefill_done"),
    (Timed::OnGrown, "on_grown"),
    (Timed::BeforeAttention, "before_attention"),
    (Timed::OnFree, "on_free"),
    (Timed::Commit, "commit"),
];

/// A histogram of times.
#[derive(Default)]
struct Times {
    calls: AtomicU64,
    total_ns: AtomicU64,
    max_ns: AtomicU64,
    buckets: [AtomicU64; KVHOOK_TIME_BUCKETS],
}

impl Times {
    fn add(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // Bucket `i` takes times from `2^(i-1)` to below `2^i` microseconds.
        let bucket = (u64::BITS - (ns / 1000).leading_zeros()) as usize;
        self.calls.fetch_add(1, Relaxed);
        self.total_ns.fetch_add(ns, Relaxed);
        self.max_ns.fetch_max(ns, Relaxed);
        self.buckets[bucket.min(KVHOOK_TIME_BUCKETS - 1)].fetch_add(1, Relaxed);
    }

    fn read(&self) -> KvhookTimes {
        KvhookTimes {
            calls: self.calls.load(Relaxed),
            total_ns: self.total_ns.load(Relaxed),
            max_ns: self.max_ns.load(Relaxed),
            buckets: self.buckets.each_ref().map(|bucket| bucket.load(Relaxed)),
        }
    }
}

/// One commit on one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// Rows before, over layers and heads.
    pub entries_before: u64,
    /// Rows after.
    pub entries_after: u64,
    /// Bytes of those rows before.
    pub bytes_before: u64,
    /// Bytes after.
    pub bytes_after: u64,
}

/// What a shadow would have done.
#[derive(Default)]
struct Shadow {
    commits: AtomicU64,
    entries_before: AtomicU64,
    entries_after: AtomicU64,
    bytes_before: AtomicU64,
    bytes_after: AtomicU64,
}

/// Figures of one arm.
#[derive(Default)]
pub struct Figures {
    sequences: AtomicU64,
    ended: AtomicU64,
    commits: AtomicU64,
    entries_before: AtomicU64,
    entries_after: AtomicU64,
    bytes_before: AtomicU64,
    bytes_after: AtomicU64,
    bytes_freed: AtomicU64,
    tokens: AtomicU64,
    shadow: Shadow,
    reasons: [AtomicU64; REASONS.len()],
    times: [Times; TIMED.len()],
}

impl KvhookTimes {
    /// No call yet.
    pub const NONE: Self = Self { calls: 0, total_ns: 0, max_ns: 0, buckets: [0; KVHOOK_TIME_BUCKETS] };
}

impl KvhookReasonCount {
    /// An element to be filled.
    pub const NONE: Self = Self { reason: KVH_REASON_NONE, reserved0: 0, count: 0 };
}

impl KvhookFigures {
    /// Figures for `kvhook_figures` to fill, with room for reasons in `reasons`, which is lent as long as the figures are
    /// handed on.
    pub fn to_fill(reasons: &mut [KvhookReasonCount]) -> Self {
        Self {
            struct_size: size_of::<Self>(),
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
                count: reasons.len() as u64,
                stride: size_of::<KvhookReasonCount>() as u64,
            },
            bound: KvhookTimes::NONE,
            on_prefill_done: KvhookTimes::NONE,
            on_grown: KvhookTimes::NONE,
            before_attention: KvhookTimes::NONE,
            on_free: KvhookTimes::NONE,
            commit: KvhookTimes::NONE,
        }
    }
}

impl Figures {
    /// A sequence began.
    pub fn began(&self) {
        self.sequences.fetch_add(1, Relaxed);
    }

    /// A sequence ended.
    pub fn ended(&self) {
        self.ended.fetch_add(1, Relaxed);
    }

    /// A ticket was carried out on every rank.
    pub fn committed(&self) {
        self.commits.fetch_add(1, Relaxed);
    }

    /// Rows moved on one rank.
    pub fn moved(&self, moved: Moved) {
        self.entries_before.fetch_add(moved.entries_before, Relaxed);
        self.entries_after.fetch_add(moved.entries_after, Relaxed);
        self.bytes_before.fetch_add(moved.bytes_before, Relaxed);
        self.bytes_after.fetch_add(moved.bytes_after, Relaxed);
    }

    /// Rows of a shadow's plan would have moved on one rank.
    pub fn shadowed(&self, moved: Moved) {
        self.shadow.entries_before.fetch_add(moved.entries_before, Relaxed);
        self.shadow.entries_after.fetch_add(moved.entries_after, Relaxed);
        self.shadow.bytes_before.fetch_add(moved.bytes_before, Relaxed);
        self.shadow.bytes_after.fetch_add(moved.bytes_after, Relaxed);
    }

    /// A shadow's ticket was good on every rank.
    pub fn shadow_ended(&self) {
        self.shadow.commits.fetch_add(1, Relaxed);
    }

    /// Sequences grew by some tokens.
    pub fn grew(&self, tokens: u64) {
        self.tokens.fetch_add(tokens, Relaxed);
    }

    /// The engine got bytes back.
    pub fn freed(&self, bytes: u64) {
        self.bytes_freed.fetch_add(bytes, Relaxed);
    }

    /// A sequence stays as it is. `KVH_REASON_NONE` is not counted.
    pub fn fell_back(&self, reason: KvhookReason) {
        let place = REASONS.iter().position(|(number, _)| *number == reason);
        if let Some(place) = place.filter(|_| reason != KVH_REASON_NONE) {
            self.reasons[place].fetch_add(1, Relaxed);
        }
    }

    /// A call took some time.
    pub fn took(&self, what: Timed, time: Duration) {
        self.times[what as usize].add(time);
    }

    /// How often sequences stayed as they were, for each reason that occurred.
    pub fn reasons(&self) -> Vec<KvhookReasonCount> {
        REASONS
            .iter()
            .zip(&self.reasons)
            .map(|((reason, _), count)| KvhookReasonCount { reason: *reason, reserved0: 0, count: count.load(Relaxed) })
            .filter(|entry| entry.count > 0)
            .collect()
    }

    /// All figures, with no room for reasons.
    pub fn read(&self) -> KvhookFigures {
        let times = |what: Timed| self.times[what as usize].read();
        // In this order a sequence that ends meanwhile is not counted as ended before it began.
        let ended = self.ended.load(Relaxed);
        let sequences = self.sequences.load(Relaxed);
        KvhookFigures {
            struct_size: size_of::<KvhookFigures>(),
            sequences,
            live: sequences.saturating_sub(ended),
            commits: self.commits.load(Relaxed),
            entries_before: self.entries_before.load(Relaxed),
            entries_after: self.entries_after.load(Relaxed),
            bytes_before: self.bytes_before.load(Relaxed),
            bytes_after: self.bytes_after.load(Relaxed),
            bytes_freed: self.bytes_freed.load(Relaxed),
            fallbacks: self.reasons.iter().map(|count| count.load(Relaxed)).sum(),
            reasons: KvhArrayMut { data: core::ptr::null_mut(), count: 0, stride: 0 },
            bound: times(Timed::Bound),
            on_prefill_done: times(Timed::OnPrefillDone),
            on_grown: times(Timed::OnGrown),
            before_attention: times(Timed::BeforeAttention),
            on_free: times(Timed::OnFree),
            commit: times(Timed::Commit),
        }
    }

    /// As a JSON object.
    pub fn json(&self) -> Value {
        let figures = self.read();
        let reasons: Map<String, Value> =
            self.reasons().iter().map(|entry| (reason_name(entry.reason).to_owned(), entry.count.into())).collect();
        let hooks: Map<String, Value> = TIMED
            .iter()
            .map(|(what, name)| {
                let times = self.times[*what as usize].read();
                let value = json!({
                    "calls": times.calls,
                    "total_ns": times.total_ns,
                    "max_ns": times.max_ns,
                    "buckets": times.buckets,
                });
                ((*name).to_owned(), value)
            })
            .collect();
        json!({
            "sequences": figures.sequences,
            "live": figures.live,
            "commits": figures.commits,
            "entries_before": figures.entries_before,
            "entries_after": figures.entries_after,
            "bytes_before": figures.bytes_before,
            "bytes_after": figures.bytes_after,
            "bytes_freed": figures.bytes_freed,
            "tokens": self.tokens.load(Relaxed),
            "shadow": {
                "commits": self.shadow.commits.load(Relaxed),
                "entries_before": self.shadow.entries_before.load(Relaxed),
                "entries_after": self.shadow.entries_after.load(Relaxed),
                "bytes_before": self.shadow.bytes_before.load(Relaxed),
                "bytes_after": self.shadow.bytes_after.load(Relaxed),
            },
            "fallbacks": reasons,
            "hooks": hooks,
        })
    }
}

/// A metric of the Prometheus text: its name, kind, help, and the samples of an arm as (more labels, value).
type Metric = (&'static str, &'static str, &'static str, fn(&Figures) -> Vec<(String, u64)>);

const METRICS: [Metric; 6] = [
    ("kvhook_sequences_total", "counter", "Sequences that began on the arm.", |figures| {
        vec![(String::new(), figures.read().sequences)]
    }),
    ("kvhook_sequences_live", "gauge", "Sequences that are live now.", |figures| {
        vec![(String::new(), figures.read().live)]
    }),
    ("kvhook_commits_total", "counter", "Commits.", |figures| vec![(String::new(), figures.read().commits)]),
    ("kvhook_entries_total", "counter", "Rows over commits, ranks, layers and heads.", |figures| {
        let figures = figures.read();
        before_and_after(figures.entries_before, figures.entries_after)
    }),
    ("kvhook_bytes_total", "counter", "Bytes of those rows.", |figures| {
        let figures = figures.read();
        before_and_after(figures.bytes_before, figures.bytes_after)
    }),
    ("kvhook_bytes_freed_total", "counter", "Bytes that the engine got back.", |figures| {
        vec![(String::new(), figures.read().bytes_freed)]
    }),
];

fn before_and_after(before: u64, after: u64) -> Vec<(String, u64)> {
    vec![(",when=\"before\"".to_owned(), before), (",when=\"after\"".to_owned(), after)]
}

/// Figures of arms, by name, as Prometheus text (version 0.0.4). Arms' names need no escaping.
pub fn prometheus(arms: &[(&str, &Figures)]) -> String {
    let mut text = String::new();
    for (name, kind, help, samples) in METRICS {
        head(&mut text, name, kind, help);
        for (arm, figures) in arms {
            for (labels, value) in samples(figures) {
                line(&mut text, format_args!("{name}{{arm=\"{arm}\"{labels}}} {value}"));
            }
        }
    }
    let name = "kvhook_fallbacks_total";
    head(&mut text, name, "counter", "Sequences that stayed as they were, by reason.");
    for (arm, figures) in arms {
        for entry in figures.reasons() {
            let reason = reason_name(entry.reason);
            line(&mut text, format_args!("{name}{{arm=\"{arm}\",reason=\"{reason}\"}} {}", entry.count));
        }
    }
    let name = "kvhook_hook_seconds";
    head(&mut text, name, "histogram", "Time of hooks, and of the host's commit.");
    for (arm, figures) in arms {
        for (what, hook) in TIMED {
            histogram(&mut text, name, &format!("arm=\"{arm}\",hook=\"{hook}\""), &figures.times[what as usize].read());
        }
    }
    text
}

fn histogram(text: &mut String, name: &str, labels: &str, times: &KvhookTimes) {
    let mut below = 0;
    for (bucket, count) in times.buckets[..KVHOOK_TIME_BUCKETS - 1].iter().enumerate() {
        below += count;
        let limit = (1u64 << bucket) as f64 / 1e6;
        line(text, format_args!("{name}_bucket{{{labels},le=\"{limit}\"}} {below}"));
    }
    let all: u64 = times.buckets.iter().sum();
    line(text, format_args!("{name}_bucket{{{labels},le=\"+Inf\"}} {all}"));
    line(text, format_args!("{name}_sum{{{labels}}} {}", times.total_ns as f64 / 1e9));
    line(text, format_args!("{name}_count{{{labels}}} {all}"));
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    line(text, format_args!("# HELP {name} {help}"));
    line(text, format_args!("# TYPE {name} {kind}"));
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a `String` does not fail.
    let _ = writeln!(text, "{content}");
}
