//! Arms: their states, and their generations of instances.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kvhook_abi::raw::*;

use crate::error::HostError;
use crate::figures::{Figures, Timed};
use crate::guard::Guard;
use crate::instance::{Event, Instance, Needs};
use crate::model::is_planned;
use crate::services::Services;
use crate::spec::{ArmSpec, LayerSet};
use crate::sync::{AtomicBool, AtomicU8, AtomicU64, Mutex, RwLock};

/// What an arm does with sequences. The operator sets it; a guard may set [`ArmState::Disabled`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArmState {
    /// Takes new sequences and compresses them.
    #[default]
    Serving,
    /// Takes new sequences; hooks run and plans are checked, nothing is committed.
    Shadow,
    /// Takes no new sequence; live ones are compressed until they end.
    Draining,
    /// Takes no new sequence; live ones are kept from now on.
    Disabled,
}

impl ArmState {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Serving, Self::Shadow, Self::Draining, Self::Disabled];

    /// Its name in commands: `serving`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Shadow => "shadow",
            Self::Draining => "draining",
            Self::Disabled => "disabled",
        }
    }
}

/// A plugin with a config, under a name. Replacing its plugin gives it a new generation.
pub struct Arm {
    /// Its name.
    pub name: String,
    /// What it did, over all generations.
    pub figures: Figures,
    /// What switches it off by itself.
    pub guard: Guard,
    removed: AtomicBool,
    /// Place in [`ArmState::ALL`].
    state: AtomicU8,
    /// Why the guard switched it off. Held where the state changes, before `current`.
    cause: Mutex<Option<String>>,
    /// Counts replacements.
    term: AtomicU64,
    current: RwLock<Current>,
}

/// What an arm was given last.
struct Current {
    spec: Arc<ArmSpec>,
    generation: Arc<Generation>,
}

impl Arm {
    /// A new arm.
    pub fn new(spec: ArmSpec, generation: Arc<Generation>) -> Self {
        let guard = Guard::default();
        guard.set(spec.guard);
        let arm = Self {
            name: spec.name.clone(),
            figures: Figures::default(),
            guard,
            removed: AtomicBool::new(false),
            state: AtomicU8::new(spec.state.unwrap_or_default() as u8),
            cause: Mutex::default(),
            term: AtomicU64::new(0),
            current: RwLock::new(Current { spec: Arc::new(spec), generation }),
        };
        arm.count();
        arm
    }

    /// The instances that new sequences take.
    pub fn current(&self) -> Arc<Generation> {
        self.current.read().generation.clone()
    }

    /// What it was set to. The state is that of [`Arm::state`].
    pub fn spec(&self) -> Arc<ArmSpec> {
        self.current.read().spec.clone()
    }

    /// Share of the sequences that name no arm.
    pub fn weight(&self) -> f64 {
        self.current.read().spec.weight
    }

    /// Gives it a spec, and new sequences other instances, if there are any. The old ones, which end with their last
    /// owner, are returned.
    pub(crate) fn set(&self, spec: Arc<ArmSpec>, generation: Option<Arc<Generation>>) -> Option<Arc<Generation>> {
        let _cause = self.cause.lock();
        let old = {
            let mut current = self.current.write();
            current.spec = spec;
            generation.map(|generation| core::mem::replace(&mut current.generation, generation))
        };
        if old.is_some() {
            self.term.fetch_add(1, Ordering::Relaxed);
        }
        self.count();
        old
    }

    /// Instances of an arm that is off want nothing. Called with the lock of `cause`.
    fn count(&self) {
        self.current.read().generation.count(!self.is_off());
    }

    /// How often its instances were replaced.
    pub fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    /// What it does with sequences.
    pub fn state(&self) -> ArmState {
        let state = usize::from(self.state.load(Ordering::Relaxed));
        ArmState::ALL.get(state).copied().unwrap_or(ArmState::Disabled)
    }

    /// The operator says what it does with sequences.
    pub(crate) fn set_state(&self, state: ArmState) {
        let mut cause = self.cause.lock();
        *cause = None;
        self.state.store(state as u8, Ordering::Relaxed);
        self.count();
    }

    /// The guard switches it off. False where it was off already.
    pub(crate) fn trip(&self, why: &str) -> bool {
        let mut cause = self.cause.lock();
        if self.state() == ArmState::Disabled {
            return false;
        }
        *cause = Some(why.to_owned());
        self.state.store(ArmState::Disabled as u8, Ordering::Relaxed);
        self.count();
        true
    }

    /// Why the guard switched it off.
    pub fn cause(&self) -> Option<String> {
        self.cause.lock().clone()
    }

    /// Whether new sequences may be given to it.
    pub fn takes_sequences(&self) -> bool {
        matches!(self.state(), ArmState::Serving | ArmState::Shadow) && !self.is_removed()
    }

    /// Whether its sequences are kept.
    pub fn is_off(&self) -> bool {
        self.is_removed() || self.state() == ArmState::Disabled
    }

    /// It takes part no more. Its instances, which end with their last owner, are returned.
    pub(crate) fn remove(&self) -> Arc<Generation> {
        let _cause = self.cause.lock();
        self.removed.store(true, Ordering::Relaxed);
        self.count();
        let mut current = self.current.write();
        let none = Arc::new(current.generation.without_instances());
        core::mem::replace(&mut current.generation, none)
    }

    /// Whether the arm was removed.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// A hook or a commit took some time.
    pub(crate) fn took(&self, what: Timed, time: Duration) {
        self.figures.took(what, time);
        self.guard.took(time);
    }
}

/// The instances of one plugin with one config: one for each rank, none for an arm that is gone. They are destroyed with
/// it.
pub struct Generation {
    /// One for each rank, or none.
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
    /// What it needs is in `wants`.
    counted: AtomicBool,
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
            counted: AtomicBool::new(true),
            wants,
        })
    }

    /// What the sequences of an arm have when the arm is gone: they are not compressed any more.
    fn without_instances(&self) -> Self {
        Self {
            ranks: Vec::new(),
            needs: self.needs.clone(),
            planned: self.planned.clone(),
            min_tokens: self.min_tokens,
            plugin: self.plugin.clone(),
            answers_prefill_done: self.answers_prefill_done,
            answers_grown: self.answers_grown,
            poisoned: AtomicBool::new(false),
            counted: AtomicBool::new(false),
            wants: self.wants.clone(),
        }
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

    /// Whether its wants are to be heard.
    fn count(&self, on: bool) {
        if self.counted.swap(on, Ordering::Relaxed) == on {
            return;
        }
        if on {
            self.wants.add(self.needs.before_attention_phases);
        } else {
            self.wants.remove(self.needs.before_attention_phases);
        }
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
        self.count(false);
    }
}

/// Phases in which any live instance wants `before_attention`; the current ones of an arm that is off do not count.
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
