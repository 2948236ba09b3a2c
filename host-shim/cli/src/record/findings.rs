//! What a record shows, in sentences: facts as they were counted, and differences only where an interval leaves no doubt.

use super::Setting;
use super::history::{ArmHistory, Counts, Period};
use super::probes::{ArmProbes, Probe};
use crate::format::{bracketed, brief, fixed, mebibytes, percent, plain};
use crate::stats::{Discordant, Estimate, Interval, Ratio};

/// Fewer periods or prompts than this tell nothing of differences, and none is spoken of.
const ENOUGH: usize = 5;

/// What one engine with one model shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Findings<'a> {
    /// The arms: those that served first, then those that were only probed.
    pub arms: Vec<Arm<'a>>,
    /// Index of the arm that the others are compared with.
    pub reference: usize,
    /// The sentences.
    pub sentences: Vec<Finding>,
}

/// An arm and what is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it did.
    pub history: Option<&'a ArmHistory>,
    /// The same by periods, which are the same for all arms; None where it was not there.
    pub periods: Vec<Option<Period>>,
    /// How its probes fared.
    pub probes: Option<&'a ArmProbes>,
}

/// One sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The sentence.
    pub text: String,
    /// What it is worth.
    pub weight: Weight,
}

/// What a sentence is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// A count of what happened.
    Fact,
    /// A difference that an interval shows.
    Difference,
    /// No difference that can be shown.
    Undecided,
    /// Something to look after.
    Fault,
}

impl<'a> Findings<'a> {
    /// Looks through a setting. The others are compared with the arm named `against`, or else with the one with the most
    /// sequences.
    pub fn of(setting: &'a Setting, against: Option<&str>) -> Self {
        let history = &setting.history;
        let served = history.arms.iter().zip(history.periods()).map(|(arm, periods)| Arm {
            name: &arm.name,
            history: Some(arm),
            periods,
            probes: setting.probes.arm(&arm.name),
        });
        let mut arms: Vec<Arm<'a>> = served.collect();
        for probes in &setting.probes.arms {
            if !arms.iter().any(|arm| arm.name == probes.name) {
                arms.push(Arm { name: &probes.name, history: None, periods: Vec::new(), probes: Some(probes) });
            }
        }
        let sequences = |arm: &Arm<'_>| arm.history.map_or(0, |history| history.total.sequences);
        // Of equal ones the first.
        let most = (0..arms.len()).rev().max_by_key(|&index| sequences(&arms[index])).unwrap_or(0);
        let reference = arms.iter().position(|arm| Some(arm.name) == against).unwrap_or(most);
        // What needs a hand, what tells arms apart, and what stands in the table as well.
        let mut sentences: Vec<Finding> = arms.iter().filter_map(faults).collect();
        if let Some(reference) = arms.get(reference) {
            let others = arms.iter().filter(|arm| arm.name != reference.name);
            sentences.extend(others.flat_map(|arm| pair(arm, reference)));
        }
        sentences.extend(arms.iter().flat_map(alone));
        Self { arms, reference, sentences }
    }
}

fn finding(weight: Weight, text: String) -> Finding {
    Finding { text, weight }
}

fn faults(arm: &Arm<'_>) -> Option<Finding> {
    let history = arm.history?;
    let faults: Vec<String> = history.faults().map(|(reason, count)| format!("{count} × {reason}")).collect();
    let (name, faults, sequences) = (arm.name, faults.join(", "), history.total.sequences);
    (!faults.is_empty()).then(|| finding(Weight::Fault, format!("{name} failed: {faults} in {sequences} sequences.")))
}

/// What one arm did.
fn alone(arm: &Arm<'_>) -> Vec<Finding> {
    let name = arm.name;
    let mut found = Vec::new();
    found.extend(arm.history.map(|history| finding(Weight::Fact, freed(name, &history.total))));
    if let Some(differing) = arm.probes.and_then(ArmProbes::differing) {
        found.push(finding(
            Weight::Fact,
            format!(
                "{name}'s answers differ from the uncompressed ones in {} of {} probes (95 % interval {} to {} %).",
                differing.yes,
                differing.asked,
                fixed(differing.low * 100.0, 1),
                fixed(differing.high * 100.0, 1),
            ),
        ));
    }
    found
}

fn freed(name: &str, total: &Counts) -> String {
    let sequences = total.sequences;
    if sequences == 0 {
        return format!("{name} served no sequence.");
    }
    if let (0, Some(kept)) = (total.commits, total.shadow_kept()) {
        let kept = fixed(kept * 100.0, 1);
        return format!("{name}, a shadow, would have kept {kept} % of the entries of {sequences} sequences.");
    }
    match total.kept() {
        Some(kept) => format!(
            "{name} kept {} % of the entries that it compressed and gave back {} MiB over {sequences} sequences.",
            fixed(kept * 100.0, 1),
            mebibytes(total.bytes_freed as f64),
        ),
        None => format!("{name} compressed nothing in {sequences} sequences."),
    }
}

/// An arm beside the reference.
fn pair(arm: &Arm<'_>, reference: &Arm<'_>) -> Vec<Finding> {
    let freed = |counts: &Counts| counts.bytes_freed as f64;
    let hooks = |counts: &Counts| counts.hook_ns as f64;
    let mut found = Vec::new();
    found.extend(rates(arm, reference, "frees", "as much for each token as", freed));
    found.extend(rates(arm, reference, "takes", "as much hook time for each token as", hooks));
    if let (Some(own), Some(other)) = (arm.probes, reference.probes) {
        found.extend(answers(arm.name, reference.name, own, other));
        found.extend(lengths(arm.name, reference.name, own, other));
        found.extend(divergence(arm.name, reference.name, own, other));
    }
    found
}

/// Two arms' sums for each token, over the periods in which both had some.
fn rates(
    arm: &Arm<'_>,
    reference: &Arm<'_>,
    verb: &str,
    as_much: &str,
    sum: impl Fn(&Counts) -> f64,
) -> Option<Finding> {
    let tokens = |period: &Period| period.counts.tokens.filter(|tokens| *tokens > 0).map(|tokens| tokens as f64);
    let both = arm.periods.iter().zip(&reference.periods).filter_map(|pair| match pair {
        (Some(own), Some(other)) => Some([sum(&own.counts), tokens(own)?, sum(&other.counts), tokens(other)?]),
        _ => None,
    });
    let samples: Vec<[f64; 4]> = both.collect();
    let (name, other) = (arm.name, reference.name);
    let ratio = Ratio::of_rates(&samples)?;
    if samples.len() < ENOUGH {
        return None;
    }
    let bracket = bracketed(ratio.interval);
    let periods = samples.len();
    Some(match ratio.is_less() {
        Some(_) => finding(
            Weight::Difference,
            format!("{name} {verb} {} times {as_much} {other}{bracket}, {periods} periods.", brief(ratio.value)),
        ),
        None => finding(
            Weight::Undecided,
            format!(
                "{name} {verb} about {as_much} {other}: no difference that {periods} periods can show, {} times{bracket}.",
                brief(ratio.value)
            ),
        ),
    })
}

/// On the same prompts: answers that differ from each other's, and from the uncompressed ones.
fn answers(name: &str, other_name: &str, own: &ArmProbes, other: &ArmProbes) -> Vec<Finding> {
    let pairs: Vec<(&Probe, &Probe)> = own.pairs(other).collect();
    let n = pairs.len();
    if n == 0 {
        return Vec::new();
    }
    let apart = pairs.iter().filter(|(own, other)| own.tokens != other.tokens).count();
    let mut found = vec![finding(
        Weight::Fact,
        format!(
            "{name}'s answers differ from {other_name}'s in {apart} of {} that both had.",
            counted(n, "probe", "probes")
        ),
    )];
    let discordant = Discordant::of(pairs.iter().map(|(own, other)| (own.differs(), other.differs())));
    let (own_only, other_only) = (discordant.first, discordant.second);
    if own_only + other_only > 0 {
        let only = format!("only {name}'s in {own_only}, only {other_name}'s in {other_only}");
        found.push(match discordant.first_more() {
            Some(more) => {
                let more = if more { "more often" } else { "less often" };
                finding(
                    Weight::Difference,
                    format!("{name} changes the uncompressed answer {more} than {other_name}: {only} of {n} probes."),
                )
            }
            None => finding(
                Weight::Undecided,
                format!("Neither changes the uncompressed answer more often, as far as {n} probes can show: {only}."),
            ),
        });
    }
    found
}

/// On the same prompts: how far answers go with the uncompressed ones.
fn lengths(name: &str, other_name: &str, own: &ArmProbes, other: &ArmProbes) -> Option<Finding> {
    let pairs =
        own.pairs(other).map(|(own, other)| [own.same_tokens(), other.same_tokens()].map(|share| share * 100.0));
    let pairs: Vec<[f64; 2]> = pairs.collect();
    let n = pairs.len();
    if n < ENOUGH || pairs.iter().all(|[own, other]| own == other) {
        return None;
    }
    let mean = |place: usize| brief(pairs.iter().map(|pair| pair[place]).sum::<f64>() / n as f64);
    let difference = Estimate::of(pairs.iter().map(|[own, other]| own - other))?;
    let interval = difference.interval()?;
    let (own, other, bracket) = (mean(0), mean(1), bracketed(Some(interval)));
    let shares = format!("{own} % of the tokens against {other} %, difference {}{bracket}", brief(difference.mean));
    Some(if interval.covers(0.0) {
        let text = format!(
            "How far {name} and {other_name} follow the uncompressed answer: no difference that {n} probes can show; {shares}."
        );
        finding(Weight::Undecided, text)
    } else {
        let longer = if difference.mean > 0.0 { "further" } else { "less far" };
        finding(
            Weight::Difference,
            format!("{name} follows the uncompressed answer {longer} than {other_name}: {shares}, {n} probes."),
        )
    })
}

fn divergence(name: &str, other_name: &str, own: &ArmProbes, other: &ArmProbes) -> Option<Finding> {
    let pairs = own.pairs(other).filter_map(|(own, other)| Some((own.kl?, other.kl?)));
    let (own, other): (Vec<f64>, Vec<f64>) = pairs.unzip();
    let ratio = Ratio::of(&own, &other)?;
    let (times, n) = (brief(ratio.value), own.len());
    let bracket = bracketed(ratio.interval);
    if n < ENOUGH {
        return None;
    }
    Some(match ratio.is_less() {
        Some(less) => {
            let which = if less { "closer to" } else { "further from" };
            finding(
                Weight::Difference,
                format!(
                    "{name} is {which} the uncompressed model than {other_name}: KL {times} times its{bracket}, {n} probes."
                ),
            )
        }
        None => finding(
            Weight::Undecided,
            format!("KL of {name} and {other_name}: no difference that {n} probes can show, {times} times{bracket}."),
        ),
    })
}

/// `12.3 % (10.1 to 14.7)` of an estimate of a share.
pub(crate) fn share(estimate: &Estimate) -> String {
    let percent = percent(estimate);
    let within =
        |interval: Interval| format!(" ({} to {})", plain(interval.low.max(0.0)), plain(interval.high.min(100.0)));
    format!("{}{}", plain(percent.mean), percent.interval().map_or_else(String::new, within))
}

pub(crate) fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}
