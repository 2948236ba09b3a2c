//! What a plugin is worth: a comparison with the controls, judged in sentences.
//!
//! A difference is claimed only where its 95 % interval, paired over passages, leaves no doubt of its sign.

pub mod config;
pub mod controls;
mod sentences;

use serde::Serialize;

use crate::account::FAULTS;
use crate::results::{Arm, Comparison, Measures};
use crate::stats::{Discordant, Ratio};
use controls::{CONTROLS, Control};

/// Fewer passages than this tell nothing of differences.
pub const ENOUGH: usize = 5;

/// The judgement of one plugin.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Name of the plugin's arm.
    pub plugin: String,
    /// What was wrong, one sentence each; to be read first.
    pub problems: Vec<String>,
    /// Whether the plugin failed, by a fault of its own.
    pub failed: bool,
    /// What compression costs, against the full cache, one sentence each.
    pub costs: Vec<String>,
    /// The plugin against each control.
    pub against: Vec<Against>,
    /// All in all.
    pub conclusion: String,
}

/// The plugin beside one control.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Against {
    /// Name of the control's arm.
    pub control: String,
    /// The plugin's KL over the control's; None where one of them is 0.
    pub kl: Option<Ratio>,
    /// What that means.
    pub verdict: Verdict,
    /// Whether the plugin finds more passkeys.
    pub passkeys: Verdict,
    /// The same in words.
    pub sentence: String,
}

/// What two arms' measures tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The plugin is better: its KL is less, or it finds more.
    Better,
    /// It is worse.
    Worse,
    /// The interval covers both, or there are too few passages.
    Undecided,
}

impl Evaluation {
    /// Judges the arm `plugin` of a comparison in which `wanted` passages were to be measured.
    pub fn of(comparison: &Comparison, plugin: &str, wanted: usize) -> Self {
        let arm = |name: &str| comparison.arms.iter().find(|arm| arm.name == name);
        let own = arm(plugin);
        let against: Vec<Against> =
            CONTROLS.iter().filter_map(|control| Some(Against::new(control, own?, arm(control.name)?))).collect();
        Self {
            plugin: plugin.to_owned(),
            problems: sentences::problems(comparison, plugin, wanted),
            failed: own.is_some_and(|arm| FAULTS.iter().any(|fault| arm.fallbacks.contains_key(*fault))),
            costs: own.map_or_else(Vec::new, |arm| sentences::costs(comparison, arm)),
            conclusion: sentences::conclusion(&against),
            against,
        }
    }

    /// All sentences, in the order in which they are to be read, without [`problems`](Self::problems).
    pub fn sentences(&self) -> impl Iterator<Item = &str> {
        let against = self.against.iter().map(|against| against.sentence.as_str());
        self.costs.iter().map(String::as_str).chain(against).chain([self.conclusion.as_str()])
    }
}

impl Against {
    fn new(control: &Control, own: &Arm, other: &Arm) -> Self {
        let kl = Ratio::of(&kl(own), &kl(other));
        let enough = own.measures.len() >= ENOUGH;
        let verdict = match kl.filter(|_| enough).and_then(|ratio| ratio.is_less()) {
            Some(true) => Verdict::Better,
            Some(false) => Verdict::Worse,
            None => Verdict::Undecided,
        };
        let sentence = sentences::against(control, kl, verdict, own.measures.len());
        let passkeys = match passkeys(own, other).first_more() {
            Some(true) => Verdict::Better,
            Some(false) => Verdict::Worse,
            None => Verdict::Undecided,
        };
        Self { control: control.name.into(), kl, verdict, passkeys, sentence }
    }

    /// Name of the control in sentences.
    pub fn title(&self) -> &str {
        CONTROLS.iter().find(|control| control.name == self.control).map_or(&self.control, |control| control.title)
    }
}

/// Passkeys that only one of two arms finds.
fn passkeys(own: &Arm, other: &Arm) -> Discordant {
    let pairs = own.measures.iter().zip(&other.measures);
    Discordant::of(pairs.filter_map(|(own, other)| Some((own.passkey_found?, other.passkey_found?))))
}

fn kl(arm: &Arm) -> Vec<f64> {
    values(arm, |measures| measures.quality.kl)
}

fn values(arm: &Arm, measure: impl Fn(&Measures) -> f64) -> Vec<f64> {
    arm.measures.iter().map(measure).collect()
}
