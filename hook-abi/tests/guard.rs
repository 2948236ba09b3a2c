//! The wall around a plugin's code, through the C tables: panics, poison, wrong arguments, logs.

#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test may panic; its unsafe calls are the host's side"
)]

mod mock;

use core::ptr;
use std::panic::panic_any;
use std::sync::atomic::{AtomicBool, Ordering};

use kvhook_abi::export::{Static, Tables};
use kvhook_abi::raw::*;
use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, FreeReason, Hooks, Needs, Plugin, PluginError, Reason, Requests,
};
use mock::*;

kvhook_abi::words! {
    /// What goes wrong.
    enum Fault {
        None = "none",
        Create = "create",
        Free = "free",
        Payload = "payload",
        Needs = "needs",
        Destroy = "destroy",
        Block = "block",
    }
}

kvhook_abi::config! {
    struct Config {
        /// What goes wrong.
        fault: Fault = "none";
    }
}

/// A plugin that fails as its config says.
struct Faulty(Config);

static ENTERED: AtomicBool = AtomicBool::new(false);
static LEAVE: AtomicBool = AtomicBool::new(false);

/// Panics when dropped, as a panic's payload.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("the payload's destructor panics");
    }
}

impl Plugin for Faulty {
    type Config = Config;
    const ID: &'static str = "faulty";
    const VERSION: &'static str = "0.0.1";
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_FREE);

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        tracing::info!(layers = context.model.layers.len(), "created");
        tracing::trace!("not wanted");
        assert!(config.fault != Fault::Create, "create fails");
        Ok(Self(config))
    }

    fn needs(&self) -> Needs {
        let must = if self.0.fault == Fault::Needs { Can::REWRITE } else { Can::NONE };
        Needs { must, ..Needs::default() }
    }

    fn bound(&self, _: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        if self.0.fault == Fault::Block {
            ENTERED.store(true, Ordering::SeqCst);
            while !LEAVE.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        Ok(Bound::Keep(Reason::None))
    }

    fn on_prefill_done(&mut self, _: &Call<'_>, mut requests: Requests<'_>) -> Result<(), PluginError> {
        requests.try_for_each(|request| request?.plan.keep(Reason::Other, "because"))
    }

    fn on_free(&mut self, uid: u64, _: FreeReason) -> Result<(), PluginError> {
        match self.0.fault {
            Fault::Free => panic!("no sequence {uid}"),
            Fault::Payload => panic_any(Bomb),
            _ => Ok(()),
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        assert!(self.0.fault != Fault::Destroy, "destroy fails");
    }
}

static FAULTY: Static<KvhPluginEntry> = Tables::<Faulty>::entry();

fn load<'a>(host: &'a MockHost, config: &str) -> Result<Loaded<'a>, (KvhStatus, String)> {
    Loaded::new(FAULTY.get(), host, &Model::new(0, 3, 1, 1, 4), config.as_bytes())
}

#[test]
fn a_panic_poisons_the_instance_and_no_other() {
    let host = MockHost::with_level(KVH_LOG_INFO);
    let (bad, good) = (load(&host, "fault=free").unwrap(), load(&host, "").unwrap());
    assert_eq!(bad.free(3), (KVH_ERR_PANIC, "the plugin panicked: no sequence 3".into()));
    let (status, text) = bad.free(4);
    assert_eq!(status, KVH_ERR_POISONED);
    assert!(text.contains("no sequence 3"), "{text}");
    assert!(bad.bound(&[5], NO_SEGMENTS, 5).unwrap_err().contains("poisoned"));
    assert_eq!(good.free(3), (KVH_OK, String::new()));
    assert!(host.logged("the plugin panicked: no sequence 3") && host.logged("guard.rs"));
}

#[test]
fn a_payload_that_panics_when_dropped_stays_inside() {
    let host = MockHost::default();
    let loaded = load(&host, "fault=payload").unwrap();
    assert_eq!(loaded.free(1).0, KVH_ERR_PANIC);
    assert_eq!(loaded.free(1).0, KVH_ERR_POISONED);
}

#[test]
fn panics_in_create_and_destroy_stay_inside() {
    let host = MockHost::default();
    assert_eq!(load(&host, "fault=create").err(), Some((KVH_ERR_PANIC, "the plugin panicked: create fails".into())));
    drop(load(&host, "fault=destroy").unwrap());
}

#[test]
fn two_calls_at_once_are_refused() {
    let host = MockHost::default();
    let loaded = load(&host, "fault=block").unwrap();
    let instance = loaded.instance.addr();
    std::thread::scope(|scope| {
        let host = &host;
        scope.spawn(move || {
            // The same instance, from another thread, as a host must not.
            let other = core::mem::ManuallyDrop::new(load(host, "").unwrap());
            let hook = other.hook::<KvhOnPrefillDone1>("kvh.on_prefill_done/1").unwrap().bound.unwrap();
            while !ENTERED.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let mut error = Message::new();
            let instance = ptr::with_exposed_provenance_mut(instance);
            let status = unsafe { hook(instance, ptr::null(), ptr::null_mut(), error.raw()) };
            LEAVE.store(true, Ordering::SeqCst);
            assert_eq!(status, KVH_ERR_INVALID_ARGUMENT);
            assert!(error.text().contains("serial"), "{}", error.text());
            drop(core::mem::ManuallyDrop::into_inner(other));
        });
        let _ = loaded.instance.expose_provenance();
        assert!(loaded.bound(&[5], NO_SEGMENTS, 5).is_ok(), "the first call goes on undisturbed");
    });
}

#[test]
fn wrong_arguments_are_named() {
    let host = MockHost::default();
    let loaded = load(&host, "").unwrap();
    let on_free = loaded.hook::<KvhOnFree1>("kvh.on_free/1").unwrap().on_free.unwrap();
    let args = KvhOnFreeArgs { struct_size: 16, uid: 1, reason: 0, reserved0: 0, stream: ptr::null_mut() };
    let call = |instance, args| {
        let mut error = Message::new();
        let status = unsafe { on_free(instance, args, error.raw()) };
        (status, error.text().to_owned())
    };
    let invalid = |text: &str| (KVH_ERR_INVALID_ARGUMENT, text.to_owned());
    assert_eq!(call(ptr::null_mut(), &raw const args), invalid("`instance` is null"));
    assert_eq!(call(loaded.instance, ptr::null()), invalid("`args` is null; expected a KvhOnFreeArgs"));
    assert_eq!(
        call(loaded.instance, &raw const args),
        invalid("`args.struct_size` is 16; a KvhOnFreeArgs has at least 32 bytes")
    );
    // An error buffer may be missing or small.
    assert_eq!(unsafe { on_free(loaded.instance, ptr::null(), ptr::null_mut()) }, KVH_ERR_INVALID_ARGUMENT);
    let mut small = [0; 3];
    let mut buffer = KvhText::over(&mut small);
    assert_eq!(unsafe { on_free(loaded.instance, ptr::null(), &raw mut buffer) }, KVH_ERR_INVALID_ARGUMENT);
    assert_eq!((buffer.length, &small), (3, b"`ar"));
    unsafe { loaded.entry.destroy.unwrap()(ptr::null_mut()) };
}

#[test]
fn create_refuses_null_arguments_and_bad_configs() {
    let host = MockHost::default();
    let mut error = Message::new();
    let mut instance = ptr::null_mut();
    let create = FAULTY.get().create.unwrap();
    assert_eq!(unsafe { create(ptr::null(), &raw mut instance, error.raw()) }, KVH_ERR_INVALID_ARGUMENT);
    let (status, text) = load(&host, "falt=free").err().unwrap();
    assert_eq!(status, KVH_ERR_CONFIG);
    assert!(text.contains("`falt`") && text.contains("did you mean `fault`?"), "{text}");
    let model = Model::new(0, 1, 1, 1, 4);
    let (status, text) = Loaded::new(FAULTY.get(), &host, &model, b"fault=\xff").err().unwrap();
    assert_eq!((status, text.as_str()), (KVH_ERR_CONFIG, "the config is not UTF-8 from byte 6"));
    let (status, _) = Loaded::new(FAULTY.get(), &host, &model, &vec![b' '; 1 << 20]).err().unwrap();
    assert_eq!(status, KVH_ERR_CONFIG);
}

#[test]
fn only_declared_hooks_and_needs_are_there() {
    let host = MockHost::default();
    let loaded = load(&host, "fault=needs").unwrap();
    assert!(loaded.hook::<KvhOnPrefillDone1>("kvh.on_prefill_done/1").is_some());
    assert!(loaded.hook::<KvhOnGrown1>("kvh.on_grown/1").is_none());
    assert!(loaded.hook::<KvhOnGrown1>("kvh.on_prefill_done/2").is_none());
    let mut needs = KvhNeeds { struct_size: size_of::<KvhNeeds>(), ..unsafe { core::mem::zeroed() } };
    let mut error = Message::new();
    let status = unsafe { loaded.entry.needs.unwrap()(loaded.instance, &raw mut needs, error.raw()) };
    assert_eq!(status, KVH_ERR_INTERNAL);
    assert!(error.text().contains("rewrite"), "{}", error.text());
}

#[test]
fn a_keep_carries_its_reason() {
    let host = MockHost::default();
    let loaded = load(&host, "").unwrap();
    let cache = Cache::new(1, 5, 4, 0, |_, _, _| (0.0, 0.0));
    let layers = (0..3).map(|index| cache.layer(index)).collect();
    let made = prepare(&loaded, 16, 1, layers, NO_SEGMENTS, 5).unwrap();
    assert_eq!((made.kind, made.reason, made.message.as_str()), (KVH_PLAN_KEEP, KVH_REASON_OTHER, "because"));
}

#[test]
fn events_reach_the_host_of_their_instance() {
    let (loud, quiet) = (MockHost::with_level(KVH_LOG_INFO), MockHost::with_level(KVH_LOG_ERROR));
    let _loud = load(&loud, "").unwrap();
    let _quiet = load(&quiet, "").unwrap();
    assert!(loud.logged("created layers=3"), "{:?}", loud.logs.lock().unwrap());
    assert!(!loud.logged("not wanted"));
    assert!(quiet.logs.lock().unwrap().is_empty());
}
