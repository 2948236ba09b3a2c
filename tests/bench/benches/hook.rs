//! An empty hook through the C boundary, with the guard (serial calls, panics, poison, whose log it is): at most 20 ns.
//!
//! The hook is `before_attention` of `libkvhook_noop.so`, opened with dlopen and called through its table as a host does,
//! with a sequence in its arguments. Beside it, for information: `on_free`, and what the host adds when it calls
//! (`Instance`: poison and the buffer for messages).

use std::ffi::c_void;
use std::hint::black_box;
use std::mem::ManuallyDrop;
use std::process::ExitCode;
use std::ptr::{null, null_mut};

use kvhook_abi::KVH_ENTRY_SYMBOL;
use kvhook_abi::ids::{KVH_BEFORE_ATTENTION_1, KVH_ON_FREE_1};
use kvhook_abi::raw::*;
use kvhook_bench::measure::{Gates, Interval, print_machine, time};
use kvhook_bench::model::plugin_folder;
use kvhook_bench::rig::{Shape, array, call};
use kvhook_bench::{Error, Result, error};

/// Most nanoseconds of a call.
const GATE: f64 = 20.0;
/// Calls of a round.
const CALLS: usize = 100_000;
/// Rounds; the best of each run of ten counts, for a call takes what it takes when nobody interrupts it.
const ROUNDS: usize = 300;

const SHAPE: Shape = Shape { name: "SmolLM2-135M", layers: 30, kv_heads: 3, head_dim: 64, length: 1024, block_size: 0 };

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    let path = plugin_folder().join("libkvhook_noop.so");
    // SAFETY: our own plugin, built with this benchmark; its initialisers do nothing. It is never unloaded.
    let library = ManuallyDrop::new(unsafe { libloading::Library::new(&path)? });
    // SAFETY: the symbol has this type by the contract.
    let entry = unsafe { library.get::<KvhPluginEntryFn>(KVH_ENTRY_SYMBOL)?() };
    // SAFETY: the contract makes the entry a static that is never null.
    let entry = unsafe { &*entry };
    let instance = create(entry)?;
    let hook = entry.hook.ok_or(Error::Missing("hook"))?;
    // SAFETY: an id's table is null or the frozen one that the id names, and static.
    let (before, free) = unsafe {
        (
            hook(KvhStr::new(KVH_BEFORE_ATTENTION_1)).cast::<KvhBeforeAttention1>().as_ref(),
            hook(KvhStr::new(KVH_ON_FREE_1)).cast::<KvhOnFree1>().as_ref(),
        )
    };
    let before = before.and_then(|table| table.before_attention).ok_or(Error::Missing("before_attention"))?;
    let free = free.and_then(|table| table.on_free).ok_or(Error::Missing("on_free"))?;

    let sequences = [KvhStepSequence {
        struct_size: size_of::<KvhStepSequence>(),
        uid: 1,
        first_token: 0,
        tokens: 1,
        first_position: 1024,
        prompt_length: 1024,
        flags: 0,
        phase: KVH_PHASE_DECODE,
        cache: null(),
    }];
    let step = KvhBeforeAttentionArgs {
        struct_size: size_of::<KvhBeforeAttentionArgs>(),
        call: null_mut(),
        layer: 0,
        reserved0: 0,
        q: null(),
        k: null(),
        v: null(),
        sequences: array(&sequences),
        stream: null_mut(),
    };
    let freed = KvhOnFreeArgs {
        struct_size: size_of::<KvhOnFreeArgs>(),
        uid: 1,
        reason: KVH_FREE_FINISHED,
        reserved0: 0,
        stream: null_mut(),
    };
    let mut buffer = [0u8; 256];
    let mut text = KvhText::over(&mut buffer);
    let text: *mut KvhText = &mut text;

    print_machine();
    println!("{ROUNDS} rounds of {CALLS} calls; nanoseconds a call, median with its 95 % interval");
    // SAFETY: the instance lives, no other call runs, the arguments are as the contract says.
    let empty = measure(|| unsafe { before(black_box(instance), black_box(&step), text) });
    // SAFETY: as above.
    let on_free = measure(|| unsafe { free(black_box(instance), black_box(&freed), text) });
    let mut gates = Gates::default();
    line("before_attention", &empty, gates.check(empty.median <= GATE));
    line("on_free", &on_free, gates.check(on_free.median <= GATE));
    if let Some(destroy) = entry.destroy {
        // SAFETY: made by `create`, and never used again.
        unsafe { destroy(instance) };
    }
    Ok(gates)
}

fn create(entry: &KvhPluginEntry) -> Result<*mut KvhInstance> {
    let infos = SHAPE.layer_infos();
    let (model, offers) = (SHAPE.model(&infos), SHAPE.offers());
    let create = entry.create.ok_or(Error::Missing("create"))?;
    let mut instance = null_mut();
    let args = KvhCreateArgs {
        struct_size: size_of::<KvhCreateArgs>(),
        host: &HOST.0,
        model: &model,
        offers: &offers,
        config: KvhStr::new(""),
    };
    // SAFETY: the host is a static, everything else lives until the call returns.
    call("create", |error| unsafe { create(&args, &mut instance, error) })?;
    Ok(instance)
}

/// Nanoseconds of a call.
fn measure(mut hook: impl FnMut() -> KvhStatus) -> Interval {
    let mut nanoseconds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let took = time(|| {
            for _ in 0..CALLS {
                assert_eq!(hook(), KVH_OK);
            }
        });
        nanoseconds.push(took.as_secs_f64() * 1e9 / CALLS as f64);
    }
    let best = |rounds: &[f64]| rounds.iter().copied().fold(f64::INFINITY, f64::min);
    Interval::of(&nanoseconds.chunks(10).map(best).collect::<Vec<_>>())
}

fn line(name: &str, interval: &Interval, verdict: &str) {
    let Interval { low, median, high } = interval;
    println!("{name:20} {median:6.1}  [{low:.1}, {high:.1}]  gate {GATE} {verdict}");
}

/// A host without services: the hook asks for none.
struct Host(KvhHost);

// SAFETY: it holds constants only.
unsafe impl Sync for Host {}

static HOST: Host = Host(KvhHost {
    struct_size: size_of::<KvhHost>(),
    state: null_mut(),
    abi_major: KVH_ABI_MAJOR,
    abi_minor: KVH_ABI_MINOR,
    name: KvhStr::new("kvhook-bench"),
    service: Some(no_service),
});

unsafe extern "C" fn no_service(_: *mut KvhHostState, _: KvhStr) -> *const c_void {
    null()
}
