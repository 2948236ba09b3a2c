//! What arms did over time: counters that may begin anew, turned into what happened between two lines.

use std::collections::BTreeMap;

use super::line::Counters;
use crate::account::FAULTS;

/// The most periods of an arm; neighbours are put together where there are more.
const MOST_PERIODS: usize = 48;

/// All arms of one engine and model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// The arms, in the order in which they came.
    pub arms: Vec<ArmHistory>,
    /// When lines were written, in the order of the file.
    times: Vec<f64>,
    run: Option<String>,
    /// How often counting began anew, for all arms or for one.
    pub restarts: usize,
}

/// One arm.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ArmHistory {
    /// Name of the arm.
    pub name: String,
    /// All that it did, also before the first line.
    pub total: Counts,
    /// How often sequences stayed as they were, by reason.
    pub fallbacks: BTreeMap<String, u64>,
    /// Sequences that were live at the last line.
    pub live: Option<u64>,
    /// Whether the last line has it.
    pub present: bool,
    /// What it did between two lines, by the index of the later one.
    between: Vec<(usize, Counts)>,
    last: Counters,
}

/// What an arm did in some time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences that began.
    pub sequences: u64,
    /// Tokens by which sequences grew; None where the host did not count them.
    pub tokens: Option<u64>,
    /// Compressions.
    pub commits: u64,
    /// Entries before those.
    pub entries_before: u64,
    /// Entries after them.
    pub entries_after: u64,
    /// Bytes that the engine got back.
    pub bytes_freed: u64,
    /// Nanoseconds in hooks and commits.
    pub hook_ns: u64,
    /// Entries before compressions that a shadow would have made.
    pub shadow_before: u64,
    /// Entries after them.
    pub shadow_after: u64,
    /// Fallbacks.
    pub fallbacks: u64,
}

/// What an arm did from one time to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Period {
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: f64,
    /// What happened.
    pub counts: Counts,
}

impl Counts {
    fn of(counters: &Counters) -> Self {
        let get = |key: &str| counters.get(key).copied();
        let sum = |prefix: &str, suffix: &str| {
            let under = counters.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
            under.filter(|(key, _)| key.ends_with(suffix)).fold(0, |sum: u64, (_, value)| sum.saturating_add(*value))
        };
        Self {
            sequences: get("sequences").unwrap_or(0),
            tokens: get("tokens"),
            commits: get("commits").unwrap_or(0),
            entries_before: get("entries_before").unwrap_or(0),
            entries_after: get("entries_after").unwrap_or(0),
            bytes_freed: get("bytes_freed").unwrap_or(0),
            hook_ns: sum("hooks.", ".total_ns"),
            shadow_before: get("shadow.entries_before").unwrap_or(0),
            shadow_after: get("shadow.entries_after").unwrap_or(0),
            fallbacks: sum("fallbacks.", ""),
        }
    }

    fn plus(self, other: Self) -> Self {
        let tokens = match (self.tokens, other.tokens) {
            (None, tokens) | (tokens, None) => tokens,
            (Some(a), Some(b)) => Some(a.saturating_add(b)),
        };
        Self {
            sequences: self.sequences.saturating_add(other.sequences),
            tokens,
            commits: self.commits.saturating_add(other.commits),
            entries_before: self.entries_before.saturating_add(other.entries_before),
            entries_after: self.entries_after.saturating_add(other.entries_after),
            bytes_freed: self.bytes_freed.saturating_add(other.bytes_freed),
            hook_ns: self.hook_ns.saturating_add(other.hook_ns),
            shadow_before: self.shadow_before.saturating_add(other.shadow_before),
            shadow_after: self.shadow_after.saturating_add(other.shadow_after),
            fallbacks: self.fallbacks.saturating_add(other.fallbacks),
        }
    }

    /// Share of the entries that compressions left, 0 to 1; None without one.
    pub fn kept(&self) -> Option<f64> {
        share(self.entries_after, self.entries_before)
    }

    /// The same for what a shadow would have left.
    pub fn shadow_kept(&self) -> Option<f64> {
        share(self.shadow_after, self.shadow_before)
    }

    /// Bytes freed for each token.
    pub fn freed_per_token(&self) -> Option<f64> {
        share(self.bytes_freed, self.tokens?)
    }

    /// Nanoseconds of hooks and commits for each token.
    pub fn hook_ns_per_token(&self) -> Option<f64> {
        share(self.hook_ns, self.tokens?)
    }
}

fn share(part: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

/// Not a count of what happened.
fn is_gauge(key: &str) -> bool {
    key == "live" || key.ends_with(".max_ns")
}

/// What is new since `before`; None where counting began anew.
fn since(now: &Counters, before: &Counters) -> Option<Counters> {
    let counted = now.iter().filter(|(key, _)| !is_gauge(key));
    let new =
        counted.map(|(key, value)| Some((key.clone(), value.checked_sub(before.get(key).copied().unwrap_or(0))?)));
    new.collect()
}

impl History {
    /// Adds a line.
    pub(super) fn add(&mut self, at: f64, run: Option<String>, arms: BTreeMap<String, Counters>) {
        let index = self.times.len();
        self.times.push(at);
        let another_run = index > 0 && run != self.run;
        let mut anew = another_run;
        self.run = run;
        for arm in &mut self.arms {
            arm.present = false;
        }
        for (name, now) in arms {
            let place = self.arms.iter().position(|arm| arm.name == name).unwrap_or_else(|| {
                self.arms.push(ArmHistory { name, ..ArmHistory::default() });
                self.arms.len() - 1
            });
            let arm = &mut self.arms[place];
            // A removed arm takes its figures with it, and so does a process that ends.
            if another_run {
                arm.last.clear();
            }
            let new = since(&now, &arm.last).unwrap_or_else(|| {
                anew = true;
                since(&now, &Counters::new()).unwrap_or_default()
            });
            arm.add(index, now, &new);
        }
        for arm in self.arms.iter_mut().filter(|arm| !arm.present) {
            arm.last.clear();
            arm.live = None;
        }
        self.restarts += usize::from(anew);
    }

    /// Whether there are any figures.
    pub fn is_empty(&self) -> bool {
        self.arms.is_empty()
    }

    /// When the first and the last line were written.
    pub fn span(&self) -> Option<(f64, f64)> {
        let first = self.times.iter().copied().reduce(f64::min)?;
        Some((first, self.times.iter().copied().fold(first, f64::max)))
    }

    /// What the arms did between lines: the same periods for all, at most 48, None where an arm was not there.
    pub fn periods(&self) -> Vec<Vec<Option<Period>>> {
        let steps = self.times.len().saturating_sub(1);
        let together = steps.div_ceil(MOST_PERIODS).max(1);
        let of_arm = |arm: &ArmHistory| {
            let mut periods = vec![None; steps.div_ceil(together)];
            for &(index, counts) in arm.between.iter().filter(|(index, _)| *index > 0) {
                let place = (index - 1) / together;
                let (from, to) = (place * together, ((place + 1) * together).min(steps));
                let period = periods[place].get_or_insert(Period {
                    from: self.times[from],
                    to: self.times[to],
                    counts: Counts::default(),
                });
                period.counts = period.counts.plus(counts);
            }
            periods
        };
        self.arms.iter().map(of_arm).collect()
    }
}

impl ArmHistory {
    fn add(&mut self, index: usize, now: Counters, new: &Counters) {
        let counts = Counts::of(new);
        self.present = true;
        self.live = now.get("live").copied();
        self.total = self.total.plus(counts);
        self.between.push((index, counts));
        for (key, count) in new.iter().filter(|(_, count)| **count > 0) {
            if let Some(reason) = key.strip_prefix("fallbacks.") {
                let sum = self.fallbacks.entry(reason.to_owned()).or_default();
                *sum = sum.saturating_add(*count);
            }
        }
        self.last = now;
    }

    /// Fallbacks that are the plugin's fault, by reason.
    pub fn faults(&self) -> impl Iterator<Item = (&str, u64)> {
        let faults = self.fallbacks.iter().filter(|(reason, _)| FAULTS.contains(&reason.as_str()));
        faults.map(|(reason, count)| (reason.as_str(), *count))
    }
}
