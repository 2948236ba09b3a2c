//! From a [`Plugin`] to the C tables of the contract.

use core::marker::PhantomData;
use core::ptr;

use crate::boundary::{self, Slots, Values};
use crate::call::{Call, Host};
use crate::config::{self, Config, ConfigError};
use crate::error::PluginError;
use crate::guard::{self, Instance, guarded, on_instance};
use crate::ids::*;
use crate::layout::{FINGERPRINTS, ROW_COUNT};
use crate::log;
use crate::metadata::Description;
use crate::model::ModelInfo;
use crate::offers::{Can, Hooks, Needs, Offers};
use crate::plan::Requests;
use crate::plugin::{Bound, BoundArgs, CreateContext, Plugin};
use crate::raw::*;
use crate::step::StepView;
use crate::view::Segments;

/// A value with pointers to statics, to be a static itself.
#[repr(transparent)]
pub struct Static<T>(T);

// SAFETY: what the pointers point to is static and never written; `new` is the only way in.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    /// For tables of this crate: their pointers are to statics and functions.
    pub(crate) const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value.
    pub const fn get(&self) -> &T {
        &self.0
    }
}

/// The tables of a plugin.
pub struct Tables<P>(PhantomData<P>);

impl<P: Plugin> Tables<P> {
    const ON_PREFILL_DONE: &'static KvhOnPrefillDone1 =
        &KvhOnPrefillDone1 { bound: Some(bound::<P>), on_prefill_done: Some(on_prefill_done::<P>) };
    const ON_GROWN: &'static KvhOnGrown1 = &KvhOnGrown1 { bound: Some(bound::<P>), on_grown: Some(on_grown::<P>) };
    const BEFORE_ATTENTION: &'static KvhBeforeAttention1 =
        &KvhBeforeAttention1 { before_attention: Some(before_attention::<P>) };
    const ON_FREE: &'static KvhOnFree1 = &KvhOnFree1 { on_free: Some(on_free::<P>) };

    /// What the metadata says.
    pub const DESCRIPTION: Description = Description {
        id: P::ID,
        version: P::VERSION,
        required_host_minor: P::REQUIRED_HOST_MINOR,
        hooks: P::HOOKS,
        may_need: P::MAY_NEED,
        config: <P::Config as Config>::KEYS,
    };

    /// The entry.
    pub const fn entry() -> Static<KvhPluginEntry> {
        Static::new(KvhPluginEntry {
            struct_size: size_of::<KvhPluginEntry>(),
            abi_major: KVH_ABI_MAJOR,
            abi_minor: KVH_ABI_MINOR,
            required_host_minor: P::REQUIRED_HOST_MINOR,
            reserved0: 0,
            id: KvhStr::new(P::ID),
            version: KvhStr::new(P::VERSION),
            fingerprints: KvhArray {
                data: (&raw const FINGERPRINTS).cast(),
                count: ROW_COUNT as u64,
                stride: size_of::<KvhFingerprint>() as u64,
            },
            create: Some(create::<P>),
            destroy: Some(destroy::<P>),
            needs: Some(needs::<P>),
            hook: Some(hook::<P>),
        })
    }
}

/// Makes a shared library of a [`Plugin`](crate::Plugin): the entry symbol, the tables, the metadata section.
///
/// Once for each cdylib, whose `build.rs` prints `cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete`.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        #[cfg(panic = "abort")]
        compile_error!("a kvhook plugin must be built with panic = \"unwind\": its panics become statuses");

        const _: () = {
            type Tables = $crate::export::Tables<$plugin>;

            #[used]
            #[unsafe(link_section = ".kvh_meta")]
            static METADATA: [u8; Tables::DESCRIPTION.section_length()] = Tables::DESCRIPTION.section();

            static ENTRY: $crate::export::Static<$crate::raw::KvhPluginEntry> = Tables::entry();

            #[unsafe(no_mangle)]
            extern "C" fn kvh_plugin_entry_v1() -> *const $crate::raw::KvhPluginEntry {
                // A use that the linker sees keeps the section when it removes what is unused.
                ::core::hint::black_box(&METADATA);
                ENTRY.get()
            }

            $crate::export_deep_layout!();
        };
    };
}

unsafe extern "C" fn create<P: Plugin>(
    args: *const KvhCreateArgs,
    instance: *mut *mut KvhInstance,
    error: *mut KvhText,
) -> KvhStatus {
    let body = || {
        if instance.is_null() {
            return Err(PluginError::InvalidArgument("`instance` is null".into()));
        }
        // SAFETY: null or what the contract says of the arguments.
        let args = unsafe { boundary::read(args, "args")? };
        // SAFETY: the contract keeps the host as long as the instance, the model for the call.
        let (host, model) = unsafe { (Host::new(args.host)?, ModelInfo::read(args.model)?) };
        // SAFETY: null or what the contract says of the offers.
        let offers = unsafe { boundary::read(args.offers, "args.offers")? };
        // SAFETY: the contract makes the config readable during the call.
        let text = unsafe { boundary::bytes(args.config, "args.config")? };
        if text.len() > config::MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong { length: text.len() }.into());
        }
        let text = core::str::from_utf8(text).map_err(|error| ConfigError::NotUtf8 { at: error.valid_up_to() })?;
        let made = {
            let _current = log::enter(&host);
            log::connect(&host);
            let context = CreateContext {
                host: &host,
                model: &model,
                offers: Offers {
                    can: Can(offers.can),
                    max_window_queries: offers.max_window_queries,
                    block_size: offers.block_size,
                },
            };
            P::create(&context, config::parse(text)?)?
        };
        let made = Box::new(Instance::new(host, model.on_cpu(), made));
        log::add(&made.host);
        // SAFETY: not null; the contract makes it writable.
        unsafe { instance.write(Box::into_raw(made).cast()) };
        Ok(())
    };
    // SAFETY: the caller lends the error buffer.
    match unsafe { guarded(error, body) } {
        Ok(()) => KVH_OK,
        Err((status, _)) => status,
    }
}

unsafe extern "C" fn destroy<P: Plugin>(instance: *mut KvhInstance) {
    if instance.is_null() {
        return;
    }
    // SAFETY: made by `create`, and the contract says that no other call is running and none will come.
    let instance = unsafe { Box::from_raw(instance.cast::<Instance<P>>()) };
    log::remove(&instance.host);
    guard::drop_guarded(instance.end());
}

unsafe extern "C" fn needs<P: Plugin>(
    instance: *mut KvhInstance,
    out: *mut KvhNeeds,
    error: *mut KvhText,
) -> KvhStatus {
    let body = |plugin: &mut P, _: &Instance<P>| {
        // SAFETY: null or what the contract says of the answer.
        let mut raw = unsafe { boundary::read(out.cast_const(), "needs")? };
        let Needs { must, before_attention, layers, window_queries, grown_every, min_tokens } = plugin.needs();
        let undeclared = must.without(P::MAY_NEED);
        if !undeclared.is_empty() {
            return Err(PluginError::Internal(format!(
                "the instance needs {} though the plugin's MAY_NEED does not say so",
                undeclared.names()
            )));
        }
        raw.must = must.0;
        raw.before_attention_phases = before_attention.0;
        raw.window_queries = window_queries;
        raw.grown_every = grown_every;
        raw.min_tokens = min_tokens;
        if let Some(layers) = layers {
            if raw.layer_mask.is_null() || raw.layer_mask_words < layers.len().div_ceil(64) as u64 {
                return Err(PluginError::InvalidArgument(format!(
                    "`needs.layer_mask` has {} words for {} layers",
                    raw.layer_mask_words,
                    layers.len()
                )));
            }
            for (word, layers) in layers.chunks(64).enumerate() {
                let bits = layers.iter().enumerate().fold(0, |bits, (bit, on)| bits | u64::from(*on) << bit);
                // SAFETY: the words were counted above.
                unsafe { raw.layer_mask.add(word).write(bits) };
            }
        }
        // SAFETY: as above.
        unsafe { boundary::write(out, &raw, "needs") }
    };
    // SAFETY: the caller hands in an instance of this plugin and lends the error buffer.
    unsafe { on_instance(instance, error, body) }
}

unsafe extern "C" fn hook<P: Plugin>(id: KvhStr) -> *const core::ffi::c_void {
    // SAFETY: the contract makes the id readable during the call.
    let Ok(id) = (unsafe { boundary::text(id, "id") }) else { return ptr::null() };
    let has = |hook| P::HOOKS.contains(hook);
    match id {
        KVH_ON_PREFILL_DONE_1 if has(Hooks::ON_PREFILL_DONE) => ptr::from_ref(Tables::<P>::ON_PREFILL_DONE).cast(),
        KVH_ON_GROWN_1 if has(Hooks::ON_GROWN) => ptr::from_ref(Tables::<P>::ON_GROWN).cast(),
        KVH_BEFORE_ATTENTION_1 if has(Hooks::BEFORE_ATTENTION) => ptr::from_ref(Tables::<P>::BEFORE_ATTENTION).cast(),
        KVH_ON_FREE_1 if has(Hooks::ON_FREE) => ptr::from_ref(Tables::<P>::ON_FREE).cast(),
        _ => ptr::null(),
    }
}

unsafe extern "C" fn bound<P: Plugin>(
    instance: *mut KvhInstance,
    args: *const KvhBoundArgs,
    out: *mut KvhBoundOut,
    error: *mut KvhText,
) -> KvhStatus {
    let body = |plugin: &mut P, _: &Instance<P>| {
        // SAFETY: null or what the contract says of arguments and answer.
        let (args, mut answer) = unsafe { (boundary::read(args, "args")?, boundary::read(out.cast_const(), "out")?) };
        // SAFETY: the contract makes the arrays readable during the call.
        let (lengths, segments) = unsafe {
            (
                Values::<u64>::new(args.lengths, "args.lengths")?,
                Values::<KvhSegment>::new(args.segments, "args.segments")?,
            )
        };
        let counts = Slots::new::<u64>(answer.counts, size_of::<u64>(), "out.counts")?;
        if counts.len() != lengths.len() {
            return Err(PluginError::InvalidArgument(format!(
                "`out.counts` has {} elements for {} layers",
                counts.len(),
                lengths.len()
            )));
        }
        let args = BoundArgs {
            uid: args.uid,
            epoch: args.epoch,
            next_position: args.next_position,
            prompt_length: args.prompt_length,
            lengths,
            segments: Segments(segments),
        };
        match plugin.bound(&args)? {
            Bound::Keep(reason) => answer.reason = reason.raw(),
            Bound::Rows(rows) => {
                if rows.len() != lengths.len() {
                    return Err(PluginError::Internal(format!(
                        "the bound has {} layers, the sequence {}",
                        rows.len(),
                        lengths.len()
                    )));
                }
                answer.reason = KVH_REASON_NONE;
                for (index, rows) in rows.into_iter().enumerate() {
                    // SAFETY: inside the array, whose head was checked.
                    unsafe { counts.pointer::<u64>(index).write(rows) };
                }
            }
        }
        // SAFETY: as above.
        unsafe { boundary::write(out, &answer, "out") }
    };
    // SAFETY: the caller hands in an instance of this plugin and lends the error buffer.
    unsafe { on_instance(instance, error, body) }
}

/// Arguments and answer of the two hooks that ask for plans.
///
/// # Safety
/// `args` and `out` are null or what the contract says, during `'a`.
unsafe fn requests<'a, P>(
    instance: &'a Instance<P>,
    args: *const KvhPrepareArgs,
    out: *mut KvhPrepareOut,
) -> Result<(Call<'a>, Requests<'a>), PluginError> {
    // SAFETY: passed on from the caller.
    let (args, answer) = unsafe { (boundary::read(args, "args")?, boundary::read(out.cast_const(), "out")?) };
    instance.ranges.clear();
    let call = Call::new(&instance.host, args.call, args.stream, instance.on_cpu, &instance.ranges);
    // SAFETY: passed on from the caller; the plans are this call's alone.
    let requests = unsafe { Requests::new(call, args.sequences, answer.plans)? };
    Ok((call, requests))
}

unsafe extern "C" fn on_prefill_done<P: Plugin>(
    instance: *mut KvhInstance,
    args: *const KvhPrepareArgs,
    out: *mut KvhPrepareOut,
    error: *mut KvhText,
) -> KvhStatus {
    let body = |plugin: &mut P, instance: &Instance<P>| {
        // SAFETY: null or what the contract says, during the call.
        let (call, requests) = unsafe { requests(instance, args, out)? };
        plugin.on_prefill_done(&call, requests)
    };
    // SAFETY: the caller hands in an instance of this plugin and lends the error buffer.
    unsafe { on_instance(instance, error, body) }
}

unsafe extern "C" fn on_grown<P: Plugin>(
    instance: *mut KvhInstance,
    args: *const KvhPrepareArgs,
    out: *mut KvhPrepareOut,
    error: *mut KvhText,
) -> KvhStatus {
    let body = |plugin: &mut P, instance: &Instance<P>| {
        // SAFETY: null or what the contract says, during the call.
        let (call, requests) = unsafe { requests(instance, args, out)? };
        plugin.on_grown(&call, requests)
    };
    // SAFETY: the caller hands in an instance of this plugin and lends the error buffer.
    unsafe { on_instance(instance, error, body) }
}

unsafe extern "C" fn before_attention<P: Plugin>(
    instance: *mut KvhInstance,
    args: *const KvhBeforeAttentionArgs,
    error: *mut KvhText,
) -> KvhStatus {
    let body = |plugin: &mut P, instance: &Instance<P>| {
        // SAFETY: null or what the contract says, during the call.
        let args = unsafe { boundary::read(args, "args")? };
        let call = Call::new(&instance.host, args.call, args.stream, instance.on_cpu, &instance.ranges);
        // SAFETY: as above.
        let step = unsafe { StepView::new(&args, instance.on_cpu)? };
        plugin.before_attention(&call, &step)
    };
    // SAFETY: the caller hands in an instance of this plugin and lends the error buffer.
    unsafe { on_instance(instance, error, body) }
}

unsafe extern "C" fn on_free<P: Plugin>(
    instance: *mut KvhInstance,
    args: *const KvhOnFreeArgs,
    error: *mut KvhText,
) -> KvhStatus {
    let body = |plugin: &mut P, _: &Instance<P>| {
        // SAFETY: null or what the contract says, during the call.
        let args = unsafe { boundary::read(args, "args")? };
        plugin.on_free(args.uid, args.reason.into())
    };
    // SAFETY: the caller hands in an instance of this plugin and lends the error buffer.
    unsafe { on_instance(instance, error, body) }
}
