//! The host of one model: its arms, sequences and tickets.
//!
//! Locks, in the order in which they may be held together: an instance's, a sequence's state, then one of the maps.
//! A plugin runs under its instance's lock only; the engine's callbacks for memory never run under a map's.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use kvhook_abi::raw::*;
use serde_json::{Map, Value, json};

use crate::arm::{Arm, Generation, RankInstance, Wants};
use crate::callbacks::Callbacks;
use crate::control::Change;
use crate::device::Device;
use crate::error::HostError;
use crate::figures;
use crate::guard::is_fault;
use crate::instance::{CallError, Event, Instance};
use crate::load::{self, Library, Policy, Source};
use crate::memory::Allocator;
use crate::model::Model;
use crate::raw::*;
use crate::sequence::Sequence;
use crate::services::Services;
use crate::spec::{self, ArmSpec, LayerSet};
use crate::sync::{AtomicBool, AtomicU64, Mutex, RwLock};
use crate::ticket::Tickets;

/// How to make a host.
pub struct HostConfig {
    /// Name and version of the engine, for messages.
    pub engine: String,
    /// The engine's log and memory.
    pub callbacks: Callbacks,
    /// One for each rank of this process.
    pub models: Vec<Model>,
    /// What the engine offers.
    pub offers: KvhOffers,
    /// Folders in which plugins are looked up; empty: from the environment.
    pub plugin_folders: Vec<PathBuf>,
    /// Folder for private copies; none: in the user's cache.
    pub copy_folder: Option<PathBuf>,
}

/// Sequences that are looked up at once where all are gone through.
const PAGE: usize = 32;

/// The host of one model in this process.
pub struct Host {
    pub(crate) callbacks: Callbacks,
    pub(crate) models: Vec<Arc<Model>>,
    /// Where each rank's cache lies.
    pub(crate) devices: Vec<Device>,
    pub(crate) offers: KvhOffers,
    /// By uid, so that it can be gone through in pages.
    pub(crate) sequences: RwLock<BTreeMap<u64, Arc<Sequence>>>,
    pub(crate) tickets: Mutex<Tickets>,
    pub(crate) next_uid: AtomicU64,
    pub(crate) next_ticket: AtomicU64,
    pub(crate) policy: Policy,
    /// Written for the exchange of pointers only.
    pub(crate) arms: RwLock<Vec<Arc<Arm>>>,
    /// One change that loads at a time.
    pub(crate) loading: Mutex<()>,
    /// One exchange of the arms at a time. Taken after `loading`; nothing is loaded under it.
    pub(crate) changing: Mutex<()>,
    /// Instances that were replaced, each with its arm's name, until they are gone.
    pub(crate) older: Mutex<Vec<(String, Weak<Generation>)>>,
    safe_mode: AtomicBool,
    engine: String,
    /// Plugins that are part of this program, by name.
    provided: Mutex<HashMap<String, Arc<Library>>>,
    wants: Arc<Wants>,
}

impl Host {
    /// A host without arms.
    ///
    /// # Errors
    /// `Argument` without models, or when they differ in their number of layers; those of [`Device::open`].
    pub fn new(config: HostConfig) -> Result<Self, HostError> {
        let layers = config.models.first().map(|model| model.layers().len());
        if layers.is_none() || config.models.iter().any(|model| Some(model.layers().len()) != layers) {
            return Err(HostError::Argument(
                "`models` is empty, or the ranks differ in their number of layers; expected one model for each rank"
                    .into(),
            ));
        }
        let mut offers = KvhOffers { struct_size: size_of::<KvhOffers>(), ..config.offers };
        if let Some(model) = config.models.iter().find(|model| !model.has_values()) {
            let dtype = kvhook_abi::view::dtype_name(model.dtype());
            if offers.can & KVH_CAN_REWRITE != 0 {
                let text =
                    format_args!("rows of {dtype} are kept or dropped, not written anew: `rewrite` is not offered");
                config.callbacks.log(KVH_LOG_WARN, text);
            }
            offers.can &= !KVH_CAN_REWRITE;
        }
        let open = |model: &Model| Device::open(model.raw().device, &config.callbacks);
        let devices = config.models.iter().map(open).collect::<Result<_, _>>()?;
        let policy = Policy::new(config.plugin_folders, config.copy_folder);
        Ok(Self {
            callbacks: config.callbacks,
            devices,
            models: config.models.into_iter().map(Arc::new).collect(),
            offers,
            sequences: RwLock::default(),
            tickets: Mutex::default(),
            next_uid: AtomicU64::new(1),
            next_ticket: AtomicU64::new(1),
            safe_mode: AtomicBool::new(policy.safe_mode),
            policy,
            arms: RwLock::default(),
            loading: Mutex::default(),
            changing: Mutex::default(),
            older: Mutex::default(),
            engine: config.engine,
            provided: Mutex::default(),
            wants: Arc::default(),
        })
    }

    /// Whether no arm serves any sequence: the environment says so, or a command did.
    pub fn is_safe_mode(&self) -> bool {
        self.safe_mode.load(Ordering::Relaxed)
    }

    pub(crate) fn set_safe_mode(&self, on: bool) {
        self.safe_mode.store(on, Ordering::Relaxed);
    }

    /// Replaces all arms by those of a `kv_plugin` form, as a whole or not at all. An arm whose name stays goes on with
    /// its figures and its sequences, as in [`Host::set_arm`]. In safe mode the form is read, and no arm is made.
    ///
    /// # Errors
    /// Those of [`spec::parse`] and of loading and creating.
    pub fn configure(&self, form: &str, source: Source) -> Result<(), HostError> {
        let specs = spec::parse(form, source)?;
        if self.is_safe_mode() {
            self.callbacks.log(KVH_LOG_WARN, format_args!("safe mode: {} arms are not made", specs.len()));
            return Ok(());
        }
        self.set_all(&specs)
    }

    /// Adds an arm, or replaces the plugin of the arm of that name: new sequences take the new instances; a sequence
    /// that runs moves to them, too, unless the old ones hold state for it or a ticket of theirs is open.
    ///
    /// # Errors
    /// `Spec`, `SafeMode`, and those of loading and creating; then nothing changed.
    pub fn set_arm(&self, spec: &ArmSpec) -> Result<(), HostError> {
        self.change(&[Change::Set(spec.clone())])
    }

    /// As [`Host::set_arm`], with a plugin that is part of this program: from here on it is what the spec's `plugin` names.
    /// For tests.
    ///
    /// # Errors
    /// As [`Host::set_arm`].
    ///
    /// # Safety
    /// `entry` is a plugin's static entry.
    #[doc(hidden)]
    pub unsafe fn arm_set_entry(&self, spec: &ArmSpec, entry: *const KvhPluginEntry) -> Result<(), HostError> {
        // SAFETY: passed on from the caller.
        let library = Arc::new(unsafe { Library::from_entry(entry)? });
        self.provided.lock().insert(spec.plugin.clone(), library);
        self.set_arm(spec)
    }

    /// Loads an arm's plugin and makes its instances.
    ///
    /// # Errors
    /// `Spec`, and those of loading and creating.
    pub(crate) fn load(&self, spec: &ArmSpec) -> Result<Arc<Generation>, HostError> {
        spec.check()?;
        let provided = self.provided.lock().get(&spec.plugin).cloned();
        let library = match provided {
            Some(library) => library,
            None => load::load(&self.policy, &spec.plugin, spec.source, spec.sha256)?,
        };
        self.create(&library, spec)
    }

    /// Makes an instance for each rank.
    fn create(&self, library: &Arc<Library>, spec: &ArmSpec) -> Result<Arc<Generation>, HostError> {
        let layers = self.models.first().map_or(0, |model| model.layers().len()) as u32;
        spec.layers.as_ref().map_or(Ok(()), |set: &LayerSet| set.check(layers))?;
        let mut ranks = Vec::with_capacity(self.models.len());
        for model in &self.models {
            let services = Services::new(self.callbacks, model.clone());
            // SAFETY: the host's model and offers are as the contract says; the services keep the model alive.
            let instance =
                unsafe { Instance::create(library, services.clone(), model.raw(), &self.offers, &spec.config)? };
            ranks.push(RankInstance { instance: Mutex::new(instance), services });
        }
        let (plugin, version) = (library.id().to_owned(), library.version());
        self.callbacks.log(
            KVH_LOG_INFO,
            format_args!("arm {}: plugin {plugin} {version} for {} ({} ranks)", spec.name, self.engine, ranks.len()),
        );
        Generation::new(ranks, spec.layers.as_ref(), spec.min_tokens, plugin, self.wants.clone()).map(Arc::new)
    }

    /// Changes an arm's share of the sequences that name no arm.
    ///
    /// # Errors
    /// `UnknownArm`; `Argument` for a weight that is negative or not finite.
    pub fn set_weight(&self, name: &str, weight: f64) -> Result<(), HostError> {
        self.change(&[Change::Weight(name.to_owned(), weight)])
    }

    /// Removes an arm. Its live sequences are not compressed any more; they go on until they are freed.
    ///
    /// # Errors
    /// `UnknownArm`.
    pub fn remove_arm(&self, name: &str) -> Result<(), HostError> {
        self.change(&[Change::Remove(name.to_owned())])
    }

    /// An arm by name.
    ///
    /// # Errors
    /// `UnknownArm`.
    pub fn arm(&self, name: &str) -> Result<Arc<Arm>, HostError> {
        find(&self.arms.read(), name).cloned()
    }

    /// All arms.
    pub fn arms(&self) -> Vec<Arc<Arm>> {
        self.arms.read().clone()
    }

    /// Phases in which any live instance wants `before_attention`: `KVH_PHASE_*` bits.
    pub fn wants(&self) -> u32 {
        self.wants.phases()
    }

    /// The figures of all arms as JSON text: `{"engine": ..., "arms": {name: ...}}`.
    pub fn figures_json(&self) -> String {
        let arms: Map<String, Value> = self.arms().iter().map(|arm| (arm.name.clone(), arm.figures.json())).collect();
        json!({ "engine": self.engine, "arms": arms }).to_string()
    }

    /// The figures of all arms as Prometheus text.
    pub fn figures_prometheus(&self) -> String {
        let arms = self.arms();
        let arms: Vec<_> = arms.iter().map(|arm| (arm.name.as_str(), &arm.figures)).collect();
        figures::prometheus(&arms)
    }

    /// The engine got bytes back that a sequence's commit made free.
    ///
    /// # Errors
    /// `UnknownUid`.
    pub fn freed(&self, uid: u64, bytes: u64) -> Result<(), HostError> {
        self.sequence(uid)?.arm.figures.freed(bytes);
        Ok(())
    }

    /// A sequence's next token is at this position: what it grew by is counted.
    pub(crate) fn reached(&self, sequence: &Sequence, position: u64) {
        let tokens = sequence.reached(position);
        if tokens > 0 {
            sequence.arm.figures.grew(tokens);
            self.judge(&sequence.arm, sequence.arm.guard.grew(tokens, self.models.len()));
        }
    }

    /// Counts why a sequence stays as it is; where that is the plugin's fault, the guard hears of it.
    pub(crate) fn count_fallback(&self, sequence: &Sequence, reason: KvhookReason) {
        sequence.arm.figures.fell_back(reason);
        if is_fault(reason) && sequence.fails_first() {
            self.judge(&sequence.arm, sequence.arm.guard.outcome(true));
        }
    }

    /// Gives some sequences at a time to `visit`, in the order of their uids: those that are live now and stay live. Who
    /// begins or ends one waits for a page at most.
    pub(crate) fn visit_sequences(&self, mut visit: impl FnMut(&Arc<Sequence>)) {
        let end = self.next_uid.load(Ordering::Relaxed);
        let mut page = Vec::with_capacity(PAGE);
        let mut next = 0;
        while next < end {
            page.extend(self.sequences.read().range(next..end).take(PAGE).map(|(_, sequence)| sequence.clone()));
            next = page.last().filter(|_| page.len() == PAGE).map_or(end, |last| last.uid + 1);
            page.drain(..).for_each(|sequence| visit(&sequence));
        }
    }

    pub(crate) fn sequence(&self, uid: u64) -> Result<Arc<Sequence>, HostError> {
        self.sequences.read().get(&uid).cloned().ok_or(HostError::UnknownUid(uid))
    }

    pub(crate) fn check_rank(&self, rank: u32) -> Result<usize, HostError> {
        let ranks = self.models.len();
        usize::try_from(rank)
            .ok()
            .filter(|&rank| rank < ranks)
            .ok_or_else(|| HostError::Argument(format!("`rank` is {rank}; there are {ranks} ranks")))
    }

    pub(crate) fn allocator(&self, rank: usize) -> Allocator {
        Allocator::new(self.callbacks, rank as u32)
    }

    /// Records that a hook failed: in the log, and for the generation when it panicked. Gives the reason.
    pub(crate) fn hook_failed(&self, hook: &str, uid: u64, generation: &Generation, error: &CallError) -> KvhookReason {
        let reason = match error.status {
            KVH_ERR_PANIC => KVHOOK_REASON_PANIC,
            KVH_ERR_POISONED => KVHOOK_REASON_POISONED,
            KVH_ERR_OUT_OF_MEMORY => KVHOOK_REASON_OUT_OF_MEMORY,
            KVH_ERR_UNSUPPORTED => KVH_REASON_UNSUPPORTED,
            KVH_ERR_DEVICE => KVHOOK_REASON_DEVICE,
            _ => KVHOOK_REASON_PLUGIN_ERROR,
        };
        if matches!(reason, KVHOOK_REASON_PANIC | KVHOOK_REASON_POISONED) {
            generation.poison();
        }
        self.callbacks
            .log(KVH_LOG_WARN, format_args!("plugin {}: {hook} failed for sequence {uid}: {error}", generation.plugin));
        reason
    }
}

/// An arm by name.
///
/// # Errors
/// `UnknownArm`.
pub(crate) fn find<'a>(arms: &'a [Arc<Arm>], name: &str) -> Result<&'a Arc<Arm>, HostError> {
    arms.iter().find(|arm| arm.name == name).ok_or_else(|| HostError::UnknownArm {
        name: name.chars().take(80).collect(),
        known: arms.iter().map(|arm| arm.name.clone()).collect(),
    })
}

/// Name of an event's hook, for messages.
pub(crate) fn hook_name(event: Event) -> &'static str {
    match event {
        Event::PrefillDone => "on_prefill_done",
        Event::Grown => "on_grown",
    }
}

/// An event from its number.
///
/// # Errors
/// `Argument`.
pub fn event_from_raw(event: i32) -> Result<Event, HostError> {
    match event {
        KVHOOK_EVENT_PREFILL_DONE => Ok(Event::PrefillDone),
        KVHOOK_EVENT_GROWN => Ok(Event::Grown),
        other => Err(HostError::Argument(format!("`event` is {other}; expected prefill done (1) or grown (2)"))),
    }
}
