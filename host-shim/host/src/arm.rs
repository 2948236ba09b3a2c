//! Arms, their generations of instances, and how a sequence gets its arm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use kvhook_abi::raw::*;
use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};

use crate::error::HostError;
use crate::figures::Figures;
use crate::instance::{Event, Instance, Needs};
use crate::model::is_planned;
use crate::services::Services;
use crate::spec::LayerSet;

/// A plugin with a config, under a name. Replacing its plugin gives it a new generation.
pub struct Arm {
    /// Its name.
    pub name: String,
    /// What it did, over all generations.
    pub figures: Figures,
    weight: AtomicU64,
    removed: AtomicBool,
    current: RwLock<Arc<Generation>>,
}

impl Arm {
    /// A new arm.
    pub fn new(name: String, weight: f64, generation: Arc<Generation>) -> Self {
        Self {
            name,
            figures: Figures::default(),
            weight: AtomicU64::new(weight.to_bits()),
            removed: AtomicBool::new(false),
            current: RwLock::new(generation),
        }
    }

    /// The instances that new sequences take.
    pub fn current(&self) -> Arc<Generation> {
        self.current.read().clone()
    }

    /// Gives new sequences other instances. The old ones, which end with their last owner, are returned.
    pub fn replace(&self, generation: Arc<Generation>) -> Arc<Generation> {
        core::mem::replace(&mut *self.current.write(), generation)
    }

    /// Share of the sequences that name no arm.
    pub fn weight(&self) -> f64 {
        f64::from_bits(self.weight.load(Ordering::Relaxed))
    }

    /// Changes the share.
    pub fn set_weight(&self, weight: f64) {
        self.weight.store(weight.to_bits(), Ordering::Relaxed);
    }

    /// Nothing is compressed any more.
    pub fn remove(&self) {
        self.removed.store(true, Ordering::Relaxed);
    }

    /// Whether the arm was removed.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }
}

/// The instances of one plugin with one config: one for each rank. They are destroyed with it.
pub struct Generation {
    /// One for each rank.
    pub ranks: Vec<RankInstance>,
    /// What the first rank's instance needs; all ranks have the same config.
    pub needs: Needs,
    /// Which layers may be compressed: planned by the model, and in the arm's set.
    pub planned: Vec<bool>,
    /// Sequences shorter than this are kept.
    pub min_tokens: u64,
    /// Id of the plugin, for messages.
    pub plugin: String,
    answers_prefill_done: bool,
    answers_grown: bool,
    poisoned: AtomicBool,
    wants: Arc<Wants>,
}

/// An instance with what it was given.
pub struct RankInstance {
    /// Calls are serial.
    pub instance: Mutex<Instance>,
    /// What the instance may ask of the host.
    pub services: Arc<Services>,
}

impl Generation {
    /// Puts the instances of all ranks together. `wants` hears of them as long as they live.
    ///
    /// # Errors
    /// `Internal` without any.
    pub fn new(
        ranks: Vec<RankInstance>,
        layers: Option<&LayerSet>,
        min_tokens: u64,
        plugin: String,
        wants: Arc<Wants>,
    ) -> Result<Self, HostError> {
        let first = ranks.first().ok_or_else(|| HostError::Internal("a generation without ranks".to_owned()))?;
        let planned = first.services.model().layers().iter().zip(0..);
        let planned =
            planned.map(|(info, layer)| is_planned(info) && layers.is_none_or(|set| set.contains(layer))).collect();
        let (needs, answers_prefill_done, answers_grown) = {
            let instance = first.instance.lock();
            (instance.needs().clone(), instance.answers(Event::PrefillDone), instance.answers(Event::Grown))
        };
        wants.add(needs.before_attention_phases);
        Ok(Self {
            ranks,
            needs,
            planned,
            min_tokens,
            plugin,
            answers_prefill_done,
            answers_grown,
            poisoned: AtomicBool::new(false),
            wants,
        })
    }

    /// Whether the plugin answers an event with plans.
    pub fn answers(&self, event: Event) -> bool {
        match event {
            Event::PrefillDone => self.answers_prefill_done,
            Event::Grown => self.answers_grown,
        }
    }

    /// An instance panicked: all ranks or none, so none is asked any more.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Relaxed);
    }

    /// Whether an instance panicked.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
    }

    /// Queries of a prompt's end that must be seen.
    pub fn queries_needed(&self, prompt_length: u64) -> u64 {
        match self.needs.window_queries {
            u32::MAX => prompt_length,
            window => prompt_length.min(window.into()),
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.wants.remove(self.needs.before_attention_phases);
    }
}

/// Phases in which any live instance wants `before_attention`.
#[derive(Default)]
pub struct Wants {
    phases: AtomicU32,
    prefill_and_decode: Mutex<[u32; 2]>,
}

impl Wants {
    /// The phases: `KVH_PHASE_*` bits. One relaxed load.
    pub fn phases(&self) -> u32 {
        self.phases.load(Ordering::Relaxed)
    }

    fn add(&self, phases: u32) {
        self.change(phases, |count| count + 1);
    }

    fn remove(&self, phases: u32) {
        self.change(phases, |count| count.saturating_sub(1));
    }

    fn change(&self, phases: u32, step: impl Fn(u32) -> u32) {
        let mut counts = self.prefill_and_decode.lock();
        let mut wanted = 0;
        for (count, phase) in counts.iter_mut().zip([KVH_PHASE_PREFILL, KVH_PHASE_DECODE]) {
            if phases & phase != 0 {
                *count = step(*count);
            }
            if *count > 0 {
                wanted |= phase;
            }
        }
        self.phases.store(wanted, Ordering::Relaxed);
    }
}

/// The arm of a key. Arms in the order of their names share the range 0 to 1 by their weights; the first 8 bytes of the
/// key's SHA-256, as a big-endian number over 2^64, say where in it the key falls. None when no arm has weight.
pub fn choose<'a>(arms: &'a [Arc<Arm>], key: &[u8]) -> Option<&'a Arc<Arm>> {
    let mut by_name: Vec<_> = arms.iter().filter(|arm| arm.weight() > 0.0).collect();
    by_name.sort_by(|a, b| a.name.cmp(&b.name));
    let total: f64 = by_name.iter().map(|arm| arm.weight()).sum();
    let digest: [u8; 32] = Sha256::digest(key).into();
    let head = digest.iter().take(8).fold(0u64, |head, &byte| head << 8 | u64::from(byte));
    let mut rest = head as f64 / 2f64.powi(64) * total;
    for arm in &by_name {
        if rest < arm.weight() {
            return Some(arm);
        }
        rest -= arm.weight();
    }
    by_name.last().copied()
}
