//! One plugin instance: created, asked what it needs, called, destroyed.

use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvhook_abi::ids::*;
use kvhook_abi::raw::*;

use crate::error::HostError;
use crate::load::{Hooks, Library, Planner};

/// Owner of the `KvhHost` that instances are given. An instance keeps its owner alive.
///
/// # Safety
/// The table at [`HostTable::table`] and everything in it stays valid, at one address, as long as the
/// owner lives, and may be used from any thread.
pub unsafe trait HostTable: Send + Sync {
    /// The table.
    fn table(&self) -> *const KvhHost;
}

/// Which of the two hook points that answer with a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `kvh.on_prefill_done/1`.
    PrefillDone,
    /// `kvh.on_grown/1`.
    Grown,
}

/// What an instance needs, checked against what the engine offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// `KVH_CAN_*` bits.
    pub must: u64,
    /// Phases (`KVH_PHASE_*` bits) in which `before_attention` is called.
    pub before_attention_phases: u32,
    /// How many of a prompt's last queries it wants; `u32::MAX`: all of them.
    pub window_queries: u32,
    /// Tokens between two calls of `on_grown`; 0: never.
    pub grown_every: u64,
    /// Sequences shorter than this are not shown.
    pub min_tokens: u64,
    /// Bit `l % 64` of word `l / 64`: `before_attention` is called for layer `l`.
    pub layer_mask: Vec<u64>,
}

impl Needs {
    /// Whether `before_attention` is called for a layer.
    pub fn wants_layer(&self, layer: u32) -> bool {
        let word = self.layer_mask.get(layer as usize / 64).copied().unwrap_or(0);
        word >> (layer % 64) & 1 == 1
    }
}

/// Why a call of a hook failed: the plugin's status and its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// `KVH_ERR_*`, or any other number that the plugin answered.
    pub status: KvhStatus,
    /// The plugin's message; empty when it wrote none.
    pub message: String,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {}: {}", self.status, self.message)
    }
}

impl std::error::Error for CallError {}

/// Instances that are alive in this process.
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// A plugin instance for one model and one rank. Calls take `&mut self`: they are serial. After a panic
/// the instance is poisoned and never called again, except to destroy it, which happens on drop.
pub struct Instance {
    library: Arc<Library>,
    raw: NonNull<KvhInstance>,
    needs: Needs,
    poisoned: bool,
    error: ErrorText,
    /// The instance may use the host's table until it is destroyed.
    _host: Arc<dyn HostTable>,
}

// SAFETY: the contract lets any thread call an instance as long as calls are serial, which `&mut self` makes
// them; the tables are static.
unsafe impl Send for Instance {}
// SAFETY: `&self` gives access to plain data only.
unsafe impl Sync for Instance {}

impl Instance {
    /// Makes an instance and checks what it needs against what the engine offers.
    ///
    /// # Errors
    /// The plugin's refusal (`Config`, `Unsupported`, `Create`, `CreatePanic`), `NeedNotOffered` with every missing
    /// offer, `NullFunction` for a need without its hook, `BadEntry` where the needs
    /// contradict themselves. Each carries the plugin's id.
    ///
    /// # Safety
    /// `model` and `offers` are valid as `raw.rs` says, with all that they point to; `model.rope_frequencies` stays
    /// valid as long as the instance.
    pub unsafe fn create(
        library: &Arc<Library>,
        host: Arc<dyn HostTable>,
        model: &KvhModel,
        offers: &KvhOffers,
        config: &str,
    ) -> Result<Self, HostError> {
        let about = |error: HostError| error.about(library.id());
        let args = KvhCreateArgs {
            struct_size: size_of::<KvhCreateArgs>(),
            host: host.table(),
            model,
            offers,
            config: KvhStr::new(config),
        };
        let mut error = ErrorText::new();
        let mut raw = ptr::null_mut();
        // SAFETY: the function was checked at load; the arguments are valid during the call, the host's table
        // as long as the instance, which keeps its owner.
        let status = unsafe { (library.functions().create)(&args, &mut raw, error.raw()) };
        refuse("create", status, &mut error).map_err(about)?;
        let raw = NonNull::new(raw)
            .ok_or_else(|| about(HostError::BadEntry("`create` answered success without an instance".into())))?;
        LIVE.fetch_add(1, Ordering::Relaxed);
        // From here on a failure drops, and so destroys, the instance.
        let mut instance = Self {
            library: library.clone(),
            raw,
            needs: Needs {
                must: 0,
                before_attention_phases: 0,
                window_queries: 0,
                grown_every: 0,
                min_tokens: 0,
                layer_mask: Vec::new(),
            },
            poisoned: false,
            error,
            _host: host,
        };
        instance.needs = instance.ask_needs(model.layers.count).map_err(about)?;
        check_hooks(&instance.needs, library.hooks()).map_err(about)?;
        check_offers(&instance.needs, offers).map_err(about)?;
        Ok(instance)
    }

    fn ask_needs(&mut self, layers: u64) -> Result<Needs, HostError> {
        let words = usize::try_from(layers.div_ceil(64))
            .map_err(|_| HostError::Unsupported(format!("the model has {layers} layers")))?;
        let mut layer_mask = vec![u64::MAX; words];
        let mut needs = KvhNeeds {
            struct_size: size_of::<KvhNeeds>(),
            must: 0,
            before_attention_phases: 0,
            window_queries: 0,
            grown_every: 0,
            min_tokens: 0,
            layer_mask: layer_mask.as_mut_ptr(),
            layer_mask_words: words as u64,
        };
        // SAFETY: the instance is live, no other call is running; the outputs are ours and of the stated sizes.
        let status = unsafe { (self.library.functions().needs)(self.raw.as_ptr(), &mut needs, self.error.raw()) };
        refuse("needs", status, &mut self.error)?;
        Ok(Needs {
            must: needs.must,
            before_attention_phases: needs.before_attention_phases,
            window_queries: needs.window_queries,
            grown_every: needs.grown_every,
            min_tokens: needs.min_tokens,
            layer_mask,
        })
    }

    /// What it needs.
    pub fn needs(&self) -> &Needs {
        &self.needs
    }

    /// The library that it came from.
    pub fn library(&self) -> &Arc<Library> {
        &self.library
    }

    /// Whether it panicked: it will answer nothing any more.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Whether it answers an event with plans.
    pub fn answers(&self, event: Event) -> bool {
        match event {
            Event::PrefillDone => self.library.hooks().on_prefill_done.is_some(),
            Event::Grown => self.library.hooks().on_grown.is_some(),
        }
    }

    /// Whether it wants to hear of freed sequences.
    pub fn hears_free(&self) -> bool {
        self.library.hooks().on_free.is_some()
    }

    /// Asks for the most rows that a plan keeps.
    ///
    /// # Errors
    /// The plugin's; `KVH_ERR_UNSUPPORTED` when it does not answer the event; `KVH_ERR_POISONED` after a panic.
    ///
    /// # Safety
    /// `args` and `out` are valid as `raw.rs` says, with all that they point to.
    pub unsafe fn bound(&mut self, event: Event, args: &KvhBoundArgs, out: &mut KvhBoundOut) -> Result<(), CallError> {
        let function = self.planner(event)?.bound;
        // SAFETY: the instance is live and calls are serial; the caller vouches for the arguments.
        self.call(|raw, error| unsafe { function(raw, args, out, error) })
    }

    /// Asks for plans.
    ///
    /// # Errors
    /// As [`Instance::bound`].
    ///
    /// # Safety
    /// As [`Instance::bound`].
    pub unsafe fn prepare(
        &mut self,
        event: Event,
        args: &KvhPrepareArgs,
        out: &mut KvhPrepareOut,
    ) -> Result<(), CallError> {
        let function = self.planner(event)?.prepare;
        // SAFETY: the instance is live and calls are serial; the caller vouches for the arguments.
        self.call(|raw, error| unsafe { function(raw, args, out, error) })
    }

    /// Shows queries, keys and values of one layer of one step.
    ///
    /// # Errors
    /// As [`Instance::bound`].
    ///
    /// # Safety
    /// As [`Instance::bound`].
    pub unsafe fn before_attention(&mut self, args: &KvhBeforeAttentionArgs) -> Result<(), CallError> {
        let function = self.library.hooks().before_attention.ok_or_else(|| absent(KVH_BEFORE_ATTENTION_1))?;
        // SAFETY: the instance is live and calls are serial; the caller vouches for the arguments.
        self.call(|raw, error| unsafe { function(raw, args, error) })
    }

    /// Says that a sequence's KV goes away. A plugin without the hook point hears nothing.
    ///
    /// # Errors
    /// As [`Instance::bound`].
    ///
    /// # Safety
    /// As [`Instance::bound`].
    pub unsafe fn on_free(&mut self, args: &KvhOnFreeArgs) -> Result<(), CallError> {
        let Some(function) = self.library.hooks().on_free else { return Ok(()) };
        // SAFETY: the instance is live and calls are serial; the caller vouches for the arguments.
        self.call(|raw, error| unsafe { function(raw, args, error) })
    }

    fn planner(&self, event: Event) -> Result<Planner, CallError> {
        match event {
            Event::PrefillDone => self.library.hooks().on_prefill_done.ok_or_else(|| absent(KVH_ON_PREFILL_DONE_1)),
            Event::Grown => self.library.hooks().on_grown.ok_or_else(|| absent(KVH_ON_GROWN_1)),
        }
    }

    fn call(&mut self, function: impl FnOnce(*mut KvhInstance, *mut KvhText) -> KvhStatus) -> Result<(), CallError> {
        if self.poisoned {
            let message = "the instance panicked earlier and is not called any more".to_owned();
            return Err(CallError { status: KVH_ERR_POISONED, message });
        }
        let status = function(self.raw.as_ptr(), self.error.raw());
        if status == KVH_OK {
            return Ok(());
        }
        self.poisoned = matches!(status, KVH_ERR_PANIC | KVH_ERR_POISONED);
        Err(CallError { status, message: self.error.take() })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: the instance is live, nobody else can reach it, and this is the last call.
        unsafe { (self.library.functions().destroy)(self.raw.as_ptr()) };
        LIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Number of instances that were created and not yet destroyed in this process.
pub fn live_instances() -> usize {
    LIVE.load(Ordering::Relaxed)
}

fn absent(hook: &str) -> CallError {
    CallError { status: KVH_ERR_UNSUPPORTED, message: format!("the plugin does not implement {hook}") }
}

fn refuse(function: &'static str, status: KvhStatus, error: &mut ErrorText) -> Result<(), HostError> {
    let message = match status {
        KVH_OK => return Ok(()),
        _ => error.take(),
    };
    Err(match status {
        KVH_ERR_CONFIG => HostError::Config(message),
        KVH_ERR_UNSUPPORTED => HostError::Unsupported(message),
        KVH_ERR_PANIC | KVH_ERR_POISONED => HostError::CreatePanic { function, message },
        _ => HostError::Create { function, status, message },
    })
}

/// A hook that the instance asks for must be there.
fn check_hooks(needs: &Needs, hooks: &Hooks) -> Result<(), HostError> {
    let missing = |id: &str, function| Err(HostError::NullFunction { table: id.to_owned(), function });
    if needs.before_attention_phases != 0 && hooks.before_attention.is_none() {
        return missing(KVH_BEFORE_ATTENTION_1, "before_attention");
    }
    if needs.grown_every != 0 && hooks.on_grown.is_none() {
        return missing(KVH_ON_GROWN_1, "on_grown");
    }
    Ok(())
}

/// What an engine has to do to offer each bit.
const OFFERS: [(u64, &str, &str); 8] = [
    (KVH_CAN_QUERIES, "KVH_CAN_QUERIES", "call kvhook_before_attention in each layer and step"),
    (KVH_CAN_ALL_QUERIES, "KVH_CAN_ALL_QUERIES", "compute every token of a prompt, without any prefix hit"),
    (KVH_CAN_LAYER_COUNTS, "KVH_CAN_LAYER_COUNTS", "take lengths that differ between layers"),
    (KVH_CAN_DATA_COUNTS, "KVH_CAN_DATA_COUNTS", "take counts below the bound, known only at the verdict"),
    (KVH_CAN_STATE, "KVH_CAN_STATE", "never fork a sequence"),
    (KVH_CAN_REWRITE, "KVH_CAN_REWRITE", "give fresh rows that a plugin may fill"),
    (KVH_CAN_MOVE_POSITIONS, "KVH_CAN_MOVE_POSITIONS", "take the next position from the commit"),
    (KVH_CAN_GROWN, "KVH_CAN_GROWN", "ask with KVHOOK_EVENT_GROWN while it decodes"),
];

fn check_offers(needs: &Needs, offers: &KvhOffers) -> Result<(), HostError> {
    let known_phases = KVH_PHASE_PREFILL | KVH_PHASE_DECODE;
    let unknown = needs.before_attention_phases & !known_phases;
    if unknown != 0 {
        return Err(HostError::BadEntry(format!(
            "`needs` asks for before_attention in the phases {:#x}; there are prefill (1) and decode (2)",
            needs.before_attention_phases
        )));
    }
    if needs.window_queries != 0 && needs.before_attention_phases & KVH_PHASE_PREFILL == 0 {
        return Err(HostError::BadEntry(format!(
            "`needs` asks for {} queries of a prompt, but not for before_attention in prefill",
            needs.window_queries
        )));
    }

    let all_queries = needs.window_queries == u32::MAX;
    let mut must = needs.must;
    if needs.before_attention_phases != 0 {
        must |= KVH_CAN_QUERIES;
    }
    if all_queries {
        must |= KVH_CAN_ALL_QUERIES;
    }
    if needs.grown_every != 0 {
        must |= KVH_CAN_GROWN;
    }
    let lacking = must & !offers.can;
    let mut missing: Vec<String> = OFFERS
        .iter()
        .filter(|(bit, ..)| lacking & bit != 0)
        .map(|(_, name, duty)| format!("{name} (the engine would have to {duty})"))
        .collect();
    let known_bits = OFFERS.iter().fold(0, |all, (bit, ..)| all | bit);
    if lacking & !known_bits != 0 {
        missing.push(format!("the offers {:#x}, which this host does not know: update it", lacking & !known_bits));
    }
    if !all_queries && needs.window_queries > offers.max_window_queries {
        missing.push(format!(
            "the last {} queries of a prompt, but the engine shows at most {} (raise max_window_queries, or ask for \
             fewer in the plugin's config)",
            needs.window_queries, offers.max_window_queries
        ));
    }
    if missing.is_empty() { Ok(()) } else { Err(HostError::NeedNotOffered { missing }) }
}

/// The buffer that a plugin writes its messages to.
struct ErrorText {
    bytes: Box<[u8]>,
    text: KvhText,
}

impl ErrorText {
    const CAPACITY: usize = 2048;

    fn new() -> Self {
        let mut bytes = vec![0; Self::CAPACITY].into_boxed_slice();
        let text = KvhText::over(&mut bytes);
        Self { bytes, text }
    }

    /// The buffer for one call, empty.
    fn raw(&mut self) -> *mut KvhText {
        self.text = KvhText::over(&mut self.bytes);
        &mut self.text
    }

    /// What the call wrote. A length beyond the buffer is cut, bytes that are not UTF-8 are replaced.
    fn take(&mut self) -> String {
        let length = self.text.length.min(self.bytes.len());
        String::from_utf8_lossy(&self.bytes[..length]).into_owned()
    }
}
