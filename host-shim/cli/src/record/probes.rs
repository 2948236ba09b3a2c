//! Prompts that were replayed on arms and uncompressed.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::arm::NO_PLUGIN;
use crate::stats::{Estimate, Proportion};

/// All probes of one engine and model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Probes {
    /// The last uncompressed answer of each prompt.
    answers: BTreeMap<String, Arc<[u32]>>,
    /// The arms, in the order in which they came.
    pub arms: Vec<ArmProbes>,
    /// Lines without an uncompressed answer above them.
    pub unpaired: usize,
}

/// One arm.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ArmProbes {
    /// Name of the arm.
    pub name: String,
    /// Its last probe of each prompt.
    pub probes: BTreeMap<String, Probe>,
}

/// One prompt on one arm.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// The arm's answer.
    pub tokens: Vec<u32>,
    /// The uncompressed answer that it belongs to.
    pub uncompressed: Arc<[u32]>,
    /// Mean KL in nats a token, where it is known.
    pub kl: Option<f64>,
    /// Entries left by the prompt's compression, and before it.
    pub kept: Option<(u64, u64)>,
}

impl Probe {
    /// Whether the answer is another than the uncompressed one.
    pub fn differs(&self) -> bool {
        self.tokens[..] != self.uncompressed[..]
    }

    /// Share of the uncompressed answer's tokens before the first that differs, 0 to 1.
    pub fn same_tokens(&self) -> f64 {
        let same = self.tokens.iter().zip(&*self.uncompressed).take_while(|(a, b)| a == b).count();
        same as f64 / self.uncompressed.len().max(self.tokens.len()).max(1) as f64
    }
}

impl Probes {
    /// Adds a line.
    pub(super) fn add(
        &mut self,
        prompt: String,
        arm: String,
        tokens: Vec<u32>,
        kl: Option<Vec<f64>>,
        kept: Option<(u64, u64)>,
    ) {
        if arm == NO_PLUGIN {
            self.answers.insert(prompt, tokens.into());
            return;
        }
        let Some(uncompressed) = self.answers.get(&prompt).cloned() else {
            self.unpaired += 1;
            return;
        };
        let kl = kl.filter(|kl| !kl.is_empty()).map(|kl| kl.iter().sum::<f64>() / kl.len() as f64);
        let place = self.arms.iter().position(|known| known.name == arm).unwrap_or_else(|| {
            self.arms.push(ArmProbes { name: arm, ..ArmProbes::default() });
            self.arms.len() - 1
        });
        self.arms[place].probes.insert(prompt, Probe { tokens, uncompressed, kl, kept });
    }

    /// The arm of a name.
    pub fn arm(&self, name: &str) -> Option<&ArmProbes> {
        self.arms.iter().find(|arm| arm.name == name)
    }
}

impl ArmProbes {
    /// Prompts whose answer differs from the uncompressed one.
    pub fn differing(&self) -> Option<Proportion> {
        Proportion::of(self.probes.values().map(Probe::differs))
    }

    /// Share of tokens before the first difference.
    pub fn same_tokens(&self) -> Option<Estimate> {
        Estimate::of(self.probes.values().map(Probe::same_tokens))
    }

    /// KL in nats a token.
    pub fn kl(&self) -> Option<Estimate> {
        Estimate::of(self.probes.values().filter_map(|probe| probe.kl))
    }

    /// Share of the entries left.
    pub fn kept(&self) -> Option<Estimate> {
        Estimate::of(self.probes.values().filter_map(|probe| probe.kept.map(|(kept, of)| kept as f64 / of as f64)))
    }

    /// Probes of prompts that another arm has, too, the other's second.
    pub fn pairs<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (&'a Probe, &'a Probe)> {
        self.probes.iter().filter_map(|(prompt, probe)| Some((probe, other.probes.get(prompt)?)))
    }
}
