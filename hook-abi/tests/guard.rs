//! The wall around a plugin's code, through the C tables: panics, poison, wrong arguments, logs.

#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test may panic; its unsafe calls are the host's side"
)]

use core::ptr;
use std::panic::panic_any;
use std::sync::atomic::{AtomicBool, Ordering};

use kvhook_abi::export::{Static, Tables};
use kvhook_abi::raw::*;
use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, FreeReason, Hooks, Needs, Plugin, PluginError, Reason, Requests,
};
use kvhook_testing::{Answer, Bounded, Engine, Fault as Broken, Instance, Message, Random, Sequence, Shape};

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

const SHAPE: Shape = Shape::new(3, 1, 1, 4);

fn load(config: impl AsRef<[u8]>) -> Result<Instance, Broken> {
    Engine::new(SHAPE).create(FAULTY.get(), config)
}

fn prompt() -> Sequence {
    Sequence::random(1, 5, SHAPE, kvhook_testing::Dtype::F32, kvhook_testing::Form::HeadMajor, &mut Random::new(1))
}

fn refused(status: KvhStatus, message: &str) -> Broken {
    Broken::Refused { status, message: message.into() }
}

/// The status and words of what was refused.
fn words<T>(outcome: Result<T, Broken>) -> (KvhStatus, String) {
    match outcome {
        Err(Broken::Refused { status, message }) => (status, message),
        Err(fault) => panic!("{fault}"),
        Ok(_) => (KVH_OK, String::new()),
    }
}

#[test]
fn a_panic_poisons_the_instance_and_no_other() {
    let (mut bad, mut good) = (load("fault=free").unwrap(), load("").unwrap());
    assert_eq!(bad.free(3), Err(refused(KVH_ERR_PANIC, "the plugin panicked: no sequence 3")));
    let (status, text) = words(bad.free(4));
    assert_eq!(status, KVH_ERR_POISONED);
    assert!(text.contains("no sequence 3"), "{text}");
    assert!(words(bad.bound(&prompt())).1.contains("poisoned"));
    assert_eq!(good.free(3), Ok(()));
    assert!(bad.host().logged("the plugin panicked: no sequence 3") && bad.host().logged("guard.rs"));
}

#[test]
fn a_payload_that_panics_when_dropped_stays_inside() {
    let mut loaded = load("fault=payload").unwrap();
    assert_eq!(words(loaded.free(1)).0, KVH_ERR_PANIC);
    assert_eq!(words(loaded.free(1)).0, KVH_ERR_POISONED);
}

#[test]
fn panics_in_create_and_destroy_stay_inside() {
    assert_eq!(load("fault=create").err(), Some(refused(KVH_ERR_PANIC, "the plugin panicked: create fails")));
    drop(load("fault=destroy").unwrap());
}

#[test]
fn two_calls_at_once_are_refused() {
    let mut loaded = load("fault=block").unwrap();
    let instance = loaded.raw().expose_provenance();
    let hook = on_prefill_done(&loaded).bound.unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The same instance, from another thread, as a host must not.
            while !ENTERED.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let mut error = Message::new();
            let instance = ptr::with_exposed_provenance_mut(instance);
            let status = unsafe { hook(instance, ptr::null(), ptr::null_mut(), error.raw()) };
            LEAVE.store(true, Ordering::SeqCst);
            assert_eq!(status, KVH_ERR_INVALID_ARGUMENT);
            assert!(error.read().unwrap().contains("serial"), "{:?}", error.read());
        });
        assert!(loaded.bound(&prompt()).is_ok(), "the first call goes on undisturbed");
    });
}

fn on_prefill_done(instance: &Instance) -> &'static KvhOnPrefillDone1 {
    unsafe { instance.hook("kvh.on_prefill_done/1") }.unwrap()
}

#[test]
fn wrong_arguments_are_named() {
    let loaded = load("").unwrap();
    let on_free = unsafe { loaded.hook::<KvhOnFree1>("kvh.on_free/1") }.unwrap().on_free.unwrap();
    let args = KvhOnFreeArgs { struct_size: 16, uid: 1, reason: 0, reserved0: 0, stream: ptr::null_mut() };
    let call = |instance, args| {
        let mut error = Message::new();
        let status = unsafe { on_free(instance, args, error.raw()) };
        (status, error.read().unwrap())
    };
    let invalid = |text: &str| (KVH_ERR_INVALID_ARGUMENT, text.to_owned());
    assert_eq!(call(ptr::null_mut(), &raw const args), invalid("`instance` is null"));
    assert_eq!(call(loaded.raw(), ptr::null()), invalid("`args` is null; expected a KvhOnFreeArgs"));
    assert_eq!(
        call(loaded.raw(), &raw const args),
        invalid("`args.struct_size` is 16; a KvhOnFreeArgs has at least 32 bytes")
    );
    // An error buffer may be missing or small.
    assert_eq!(unsafe { on_free(loaded.raw(), ptr::null(), ptr::null_mut()) }, KVH_ERR_INVALID_ARGUMENT);
    let mut small = [0; 3];
    let mut buffer = KvhText::over(&mut small);
    assert_eq!(unsafe { on_free(loaded.raw(), ptr::null(), &raw mut buffer) }, KVH_ERR_INVALID_ARGUMENT);
    assert_eq!((buffer.length, &small), (3, b"`ar"));
    unsafe { loaded.entry().destroy.unwrap()(ptr::null_mut()) };
}

#[test]
fn create_refuses_null_arguments_and_bad_configs() {
    let mut error = Message::new();
    let mut instance = ptr::null_mut();
    let create = FAULTY.get().create.unwrap();
    assert_eq!(unsafe { create(ptr::null(), &raw mut instance, error.raw()) }, KVH_ERR_INVALID_ARGUMENT);
    let (status, text) = words(load("falt=free"));
    assert_eq!(status, KVH_ERR_CONFIG);
    assert!(text.contains("`falt`") && text.contains("did you mean `fault`?"), "{text}");
    assert_eq!(load(b"fault=\xff").err(), Some(refused(KVH_ERR_CONFIG, "the config is not UTF-8 from byte 6")));
    assert_eq!(words(load(vec![b' '; 1 << 20])).0, KVH_ERR_CONFIG);
}

#[test]
fn only_declared_hooks_and_needs_are_there() {
    let mut loaded = load("fault=needs").unwrap();
    let hook = |id: &str| unsafe { loaded.hook::<KvhOnPrefillDone1>(id) };
    assert!(hook("kvh.on_prefill_done/1").is_some());
    assert!(hook("kvh.on_grown/1").is_none());
    assert!(hook("kvh.on_prefill_done/2").is_none());
    let (status, text) = words(loaded.needs());
    assert_eq!(status, KVH_ERR_INTERNAL);
    assert!(text.contains("rewrite"), "{text}");
}

#[test]
fn a_keep_carries_its_reason() {
    let engine = Engine { extra: 16, ..Engine::new(SHAPE) };
    let mut loaded = engine.create(FAULTY.get(), "").unwrap();
    assert_eq!(loaded.bound(&prompt()), Ok(Bounded::Keep(KVH_REASON_NONE)));
    let kept = Answer::Keep { reason: KVH_REASON_OTHER, message: "because".into() };
    assert_eq!(loaded.plan_one(&prompt()), Ok(kept));
}

#[test]
fn events_reach_the_host_of_their_instance() {
    let quiet = Engine { log_level: KVH_LOG_ERROR, ..Engine::new(SHAPE) };
    let (loud, quiet) = (load("").unwrap(), quiet.create(FAULTY.get(), "").unwrap());
    assert!(loud.host().logged("created layers=3"), "{:?}", loud.host().logs());
    assert!(!loud.host().logged("not wanted"));
    assert!(quiet.host().logs().is_empty());
}
