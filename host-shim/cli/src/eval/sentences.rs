//! What was found, in words.

use super::controls::{CONTROLS, Control};
use super::{Against, ENOUGH, Verdict, passkeys};
use crate::account::FAULTS;
use crate::arm::FULL;
use crate::format::{bracketed, brief, fixed, listed, mebibytes, percent, plain};
use crate::results::{Arm, Comparison};
use crate::stats::{Estimate, Interval, Proportion, Ratio};

/// Entries kept that differ by more than this share are not the same number.
const SAME_COUNT: f64 = 0.01;

/// What a reader must know before the figures.
pub(super) fn problems(comparison: &Comparison, plugin: &str, wanted: usize) -> Vec<String> {
    let mut problems = Vec::new();
    let find = |name: &str| comparison.arms.iter().find(|arm| arm.name == name);
    let Some(own) = find(plugin) else { return problems };
    if !own.fallbacks.is_empty() {
        let fault = own.fallbacks.keys().any(|reason| FAULTS.contains(&reason.as_str()));
        let reasons: Vec<String> = own.fallbacks.iter().map(|(reason, count)| format!("{count} × {reason}")).collect();
        let what = if fault { "failed" } else { "did not compress everything" };
        let meaning = "docs/errors.md says what they mean, and figures below hold those prompts uncompressed";
        problems.push(format!("{plugin} {what}: {}; {meaning}.", reasons.join(", ")));
    }
    let after = |arm: &Arm| arm.measures.iter().map(|measures| measures.entries_after as f64).sum::<f64>();
    for control in &CONTROLS {
        let share = find(control.name).map(|arm| after(arm) / after(own));
        if let Some(share) = share.filter(|share| (share - 1.0).abs() > SAME_COUNT) {
            let share = fixed(share * 100.0, 0);
            problems.push(format!(
                "{} kept {share} % of the entries that {plugin} kept: not like for like.",
                control.title
            ));
        }
    }
    if own.measures.iter().any(|measures| measures.hook_ms.contains_key("on_grown")) {
        problems.push(format!("{plugin} compresses again while an answer grows; the figures hold that, too."));
    }
    let measured = comparison.passages.len();
    if measured < wanted {
        problems.push(format!("The time was over after {measured} of {wanted} passages; --minutes gives more."));
    }
    problems
}

/// What compression costs against the full cache.
pub(super) fn costs(comparison: &Comparison, own: &Arm) -> Vec<String> {
    let summary = comparison.summary();
    let find = |name: &str| summary.iter().find(|arm| arm.name == name);
    let Some(of_own) = find(&own.name) else { return Vec::new() };
    let mut costs = vec![
        format!(
            "Keeps {} of {} entries a head ({} %): {} of {} MiB.",
            fixed(of_own.entries_per_head_after, 0),
            fixed(of_own.entries_per_head_before, 0),
            fixed(of_own.kept_fraction.mean * 100.0, 1),
            mebibytes(of_own.bytes_after),
            mebibytes(of_own.bytes_before),
        ),
        format!(
            "KL to the full cache {} nats a token{}; the same likeliest token in {} % of places{}.",
            plain(of_own.kl.mean),
            bracketed(of_own.kl.interval().map(|i| not_beyond(i, f64::INFINITY))),
            plain(of_own.top1_agreement.mean * 100.0),
            bracketed(percent(&of_own.top1_agreement).interval().map(|i| not_beyond(i, 100.0))),
        ),
        perplexity(comparison, own),
    ];
    costs.extend(passkey(comparison, own));
    let tokens = comparison.settings.prefix.saturating_sub(1);
    costs.push(format!(
        "Its hooks take {} ms for a prompt of {tokens} tokens{}, {} us a token.",
        plain(of_own.hook_ms.mean),
        bracketed(of_own.hook_ms.interval().map(|i| not_beyond(i, f64::INFINITY))),
        plain(of_own.hook_ms.mean * 1e3 / tokens.max(1) as f64),
    ));
    costs
}

/// Student's interval knows nothing of the ends that a measure has.
fn not_beyond(interval: Interval, most: f64) -> Interval {
    Interval { low: interval.low.max(0.0), high: interval.high.min(most) }
}

fn perplexity(comparison: &Comparison, own: &Arm) -> String {
    let passages = own.measures.iter().zip(&comparison.passages);
    let differences = passages.map(|(measures, passage)| measures.quality.nll - passage.nll_full);
    let Some(difference) = Estimate::of(differences) else { return String::new() };
    let interval = difference.interval().map(|i| Interval { low: i.low.exp(), high: i.high.exp() });
    let times = format!("{} times the full cache's{}", plain(difference.mean.exp()), bracketed(interval));
    match interval.filter(|interval| !interval.covers(1.0)) {
        Some(_) => format!("Perplexity is {times}."),
        None => format!("Perplexity: no difference that {} can show; {times}.", passages_of(difference.n)),
    }
}

/// Passkeys of all arms; a difference to random is claimed only where the sign test finds one.
fn passkey(comparison: &Comparison, own: &Arm) -> Option<String> {
    let found = |arm: &Arm| Proportion::of(arm.measures.iter().filter_map(|measures| measures.passkey_found));
    let own_found = found(own)?;
    let others = [(FULL, "the full cache")].into_iter().chain(CONTROLS.iter().map(|c| (c.name, c.title)));
    let others: Vec<String> = others
        .filter_map(|(name, title)| {
            let arm = comparison.arms.iter().find(|arm| arm.name == name)?;
            let claim = match passkeys(own, arm).first_more() {
                Some(true) => " (fewer)",
                Some(false) => " (more)",
                None => "",
            };
            Some(format!("{title} {}{claim}", found(arm)?.yes))
        })
        .collect();
    Some(format!(
        "Finds the passkey in {} of {} prompts ({} to {} %); {}.",
        own_found.yes,
        own_found.asked,
        fixed(own_found.low * 100.0, 0),
        fixed(own_found.high * 100.0, 0),
        others.join(", "),
    ))
}

/// The plugin against one control.
pub(super) fn against(control: &Control, kl: Option<Ratio>, verdict: Verdict, passages: usize) -> String {
    let title = control.title;
    let Some(ratio) = kl else {
        return format!("Against {title}: no comparison, since a KL of 0 has no ratio.");
    };
    let of_its = format!("KL {} of its{}", brief(ratio.value), bracketed(ratio.interval));
    if passages < ENOUGH {
        return format!("Against {title}: {} cannot tell; KL {} of its.", passages_of(passages), brief(ratio.value));
    }
    match verdict {
        Verdict::Better => format!("Better than {title}: {of_its}."),
        Verdict::Worse => {
            format!("Worse than {title}: KL {} times its{}.", brief(ratio.value), bracketed(ratio.interval))
        }
        Verdict::Undecided => {
            format!("No difference from {title} that {} can show: {of_its}.", passages_of(passages))
        }
    }
}

/// Whether the idea is worth anything.
pub(super) fn conclusion(against: &[Against]) -> String {
    let where_it_is = |verdict: Verdict, measure: fn(&Against) -> Verdict| -> Vec<&str> {
        against.iter().filter(|against| measure(against) == verdict).map(Against::title).collect()
    };
    let of = |verdict| where_it_is(verdict, |against| against.verdict);
    let verdict_of = |name: &str| against.iter().find(|against| against.control == name).map(|against| against.verdict);
    let first = match (verdict_of(CONTROLS[0].name), verdict_of(CONTROLS[1].name)) {
        (None, _) => return "There is no control to judge by.".into(),
        (Some(Verdict::Worse), _) => "By KL it chooses worse than chance",
        (Some(Verdict::Undecided), _) => "KL does not show that it chooses better than chance",
        (Some(Verdict::Better), Some(Verdict::Worse)) => {
            "By KL it chooses better than chance, but keeping the most recent entries is better, and costs nothing"
        }
        (Some(Verdict::Better), _) => "By KL it chooses better than chance",
    };
    let parts = [
        ("better than", of(Verdict::Better)),
        ("worse than", of(Verdict::Worse)),
        ("not told apart from", of(Verdict::Undecided)),
    ];
    let parts: Vec<String> = parts
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(how, names)| format!("{how} {}", listed(&names)))
        .collect();
    let mut text = format!("{first}: {}.", parts.join("; "));
    for (verdict, how) in [(Verdict::Better, "more"), (Verdict::Worse, "fewer")] {
        let names = where_it_is(verdict, |against| against.passkeys);
        if !names.is_empty() {
            text += &format!(" It finds {how} passkeys than {}.", listed(&names));
        }
    }
    text
}

fn passages_of(n: usize) -> String {
    if n == 1 { "one passage".into() } else { format!("these {n} passages") }
}
