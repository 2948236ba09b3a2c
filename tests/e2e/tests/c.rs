//! A plugin in C and an engine in C++, built by the system's compilers with every warning an error.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::ptr;

use kvhook_abi::KVH_ON_PREFILL_DONE_1;
use kvhook_abi::raw::*;
use kvhook_e2e::plugins::{Place, built, bytes};
use kvhook_host::raw::KVHOOK_ERR_LAYOUT;

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Compiles a plugin of `tests/c` into a folder that plugins may come from.
fn compile_plugin(place: &Place, source: &str, library: &str) -> PathBuf {
    let target = place.plugins().join(library);
    run(Command::new("cc")
        .args(["-std=c11", "-O2", "-shared", "-fPIC", "-Wl,-z,nodelete"])
        .args(WARNINGS)
        .arg("-I")
        .arg(root().join("hook-abi/include"))
        .arg(root().join("tests/c").join(source))
        .arg("-o")
        .arg(&target));
    target
}

#[test]
fn a_plugin_in_c_loads() {
    let place = Place::new();
    let path = compile_plugin(&place, "plugin.c", "libkvhook_window-c.so");
    let library = place.load(&fs::read(path).unwrap()).unwrap();
    assert_eq!(library.id(), "window-c");
}

#[test]
fn a_plugin_that_knows_more_than_a_draft_is_refused() {
    let place = Place::new();
    let path = compile_plugin(&place, "generation2.c", "libkvhook_generation2.so");
    let error = place.load(&fs::read(path).unwrap()).err().unwrap();
    assert_eq!(error.status(), KVHOOK_ERR_LAYOUT, "{error}");
    let text = error.to_string();
    assert!(text.contains("KvhLayer") && text.contains("generation 2") && text.contains("rebuild"), "{text}");
}

/// Builds the engine and drives it over plugins.
struct Engine {
    place: Place,
    program: PathBuf,
}

impl Engine {
    fn build(compiler: &str) -> Self {
        Self::build_of(compiler, "engine.cpp")
    }

    fn build_of(compiler: &str, source: &str) -> Self {
        let place = Place::new();
        let program = place.root().join("engine");
        // `cargo build` puts the library into the profile's folder, `cargo test` into `deps`.
        let libraries = [built(), built().join("..")];
        let library = libraries.iter().find(|folder| folder.join("libkvhook_host.so").exists());
        let library = library.expect("cargo builds libkvhook_host.so with the tests");
        let mut rpath = std::ffi::OsString::from("-Wl,-rpath,");
        rpath.push(library);
        run(Command::new(compiler)
            .args(["-std=c++17", "-O2", "-pthread"])
            .args(WARNINGS)
            .args(
                ["hook-abi/include", "host-shim/host/include"]
                    .map(|folder| format!("-I{}", root().join(folder).display())),
            )
            .arg(root().join("tests/c").join(source))
            .arg("-o")
            .arg(&program)
            .arg("-L")
            .arg(library)
            .arg("-lkvhook_host")
            .arg(rpath));
        Self { place, program }
    }

    fn command(&self, plugin: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(plugin).args(arguments).arg("--copies").arg(self.place.copies());
        // cargo's puts a library of an older build before the one that the program was linked with.
        command.env_remove("LD_LIBRARY_PATH");
        command
    }

    /// Runs over one plugin and config, on both caches, and committing 0 and 3 steps late.
    fn check(&self, plugin: &Path, arguments: &[&str]) {
        for cache in ["contiguous", "paged"] {
            for late in ["0", "3"] {
                let output = run(self.command(plugin, arguments).args(["--cache", cache, "--late", late]));
                let text = String::from_utf8(output.stdout).unwrap();
                assert_eq!(text.lines().filter(|line| line.starts_with("OK ")).count(), 3, "{text}");
            }
        }
    }

    fn put(&self, name: &str) -> PathBuf {
        self.place.put(&format!("libkvhook_{name}.so"), &bytes(name))
    }
}

#[test]
fn an_engine_in_cpp_equals_masked_attention() {
    let engine = Engine::build("c++");
    engine.check(&engine.put("noop"), &[]);
    let window = compile_plugin(&engine.place, "plugin.c", "libkvhook_window-c.so");
    engine.check(&window, &["--config", "recent=16", "--expect", "20"]);
    let truncate = engine.put("truncate");
    for (config, expect) in [
        ("keep=0.25,recent=8", "24"),
        ("history=stride,budget=40,recent=8", "40"),
        ("history=top,importance=attention,window=8,budget=32,recent=8,every=16", "32"),
        ("history=sample,importance=key_diff,budget=40,recent=8,every=20", "40"),
    ] {
        engine.check(&truncate, &["--config", config, "--expect", expect]);
    }
    // Whole blocks: one for the sinks, two for the 16 last of 96 rows; an edit of the block table.
    let blocks = ["--config", "align=block,budget=20,every=16", "--expect", "24", "--cache", "paged"];
    run(&mut engine.command(&truncate, &blocks));
    run(&mut engine.command(&truncate, &["--config", r#"layers={"0": 1.0},keep=0.5"#, "--threads", "2"]));
    // The check can fail: another number of rows is expected, and the program says so.
    let output = engine.command(&window, &["--config", "recent=16", "--expect", "21"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("keeps 20 rows"), "{text}");
}

/// Every way of `truncate` to choose rows.
#[cfg(feature = "cuda")]
const TRUNCATE_ON_CUDA: [&str; 10] = [
    "keep=0.25,recent=8",
    "history=stride,keep=0.3",
    "history=top,importance=key_norm,keep=0.5,every=100",
    "history=top,importance=key_diff,keep=0.25,every=100",
    "history=top,importance=attention,keep=0.5,every=100",
    "history=top,importance=attention,window=7,pool=3,budget=300",
    "history=sample,importance=key_norm,budget=200,seed=5,every=100",
    "history=sample,importance=key_diff,budget=200,every=100",
    "history=sample,importance=uniform,budget=200",
    "history=sample,importance=attention,keep=0.5",
];

#[cfg(feature = "cuda")]
#[path = "mlp_decouple/weights.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod weights;

/// Says "skipped" where there is no CUDA device.
#[cfg(feature = "cuda")]
#[test]
fn an_engine_on_a_gpu_keeps_what_it_keeps_in_memory() {
    let engine = Engine::build_of("c++", "cuda_engine.cpp");
    for (plugin, configs) in [("noop", &[""][..]), ("truncate", &TRUNCATE_ON_CUDA)] {
        let plugin = engine.put(plugin);
        for config in configs {
            for cache in ["contiguous", "paged"] {
                let output =
                    run(engine.command(&plugin, &["--config", config, "--cache", cache]).args(["--late", "3"]));
                let text = String::from_utf8(output.stdout).unwrap();
                assert!(text.starts_with("OK ") || text.starts_with("skipped"), "{text}");
            }
        }
    }
    // An edit of the block table.
    let truncate = engine.put("truncate");
    let blocks = ["--config", "align=block,budget=400,every=100", "--cache", "paged"];
    run(&mut engine.command(&truncate, &blocks));
    // Nothing waits for a stream that waits.
    for config in TRUNCATE_ON_CUDA {
        run(&mut engine.command(&truncate, &["--config", config, "--cache", "paged", "--blocked", "1"]));
    }
    // Two stretches of the prompt are images, which alone are compressed, or not at all.
    for (segments, cache) in [("image", "paged"), ("text", "contiguous")] {
        for config in TRUNCATE_ON_CUDA.iter().filter(|config| !config.contains("every")) {
            let config = format!("segments={segments},{config}");
            let arguments = ["--config", &config, "--images", "1", "--cache", cache];
            run(engine.command(&truncate, &arguments).args(["--late", "3"]));
        }
    }
    // Elements of one byte: where no score needs the values.
    for config in ["keep=0.25,recent=8", "history=stride,keep=0.3", "history=sample,importance=uniform,budget=200"] {
        run(&mut engine.command(&truncate, &["--config", config, "--cache", "paged", "--dtype", "fp8"]));
    }
    let scores = ["--config", "history=top,importance=key_norm", "--dtype", "fp8"];
    let output = engine.command(&truncate, &scores).output().unwrap();
    let [out, error] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(out.starts_with("skipped") || error.contains("values are read of f32, f16 and bf16"), "{error}");
}

/// Each rank's cache on a device of its own, or two ranks on each. Says "skipped" where there are not two CUDA devices.
#[cfg(feature = "cuda")]
#[test]
fn an_engine_on_several_gpus_keeps_what_it_keeps_in_memory() {
    let engine = Engine::build_of("c++", "cuda_engine.cpp");
    let truncate = engine.put("truncate");
    for config in TRUNCATE_ON_CUDA {
        for (cache, ranks, blocked) in [("contiguous", "2", "0"), ("paged", "4", "0"), ("paged", "2", "1")] {
            let arguments = ["--config", config, "--cache", cache, "--ranks", ranks, "--devices", "2"];
            let output = run(engine.command(&truncate, &arguments).args(["--blocked", blocked]));
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.starts_with("OK ") || text.starts_with("skipped"), "{text}");
        }
    }
}

/// No block is free, and what the host and the plugin hold beside the cache is bounded: the plugin's last queries, 4 bytes for
/// each kept row and head, 64 MiB. Of so many rows a few scores are as good as equal.
#[cfg(feature = "cuda")]
#[test]
fn an_engine_on_a_gpu_with_a_full_pool_compresses_in_little_memory() {
    let engine = Engine::build_of("c++", "cuda_engine.cpp");
    let truncate = engine.put("truncate");
    for (config, queries) in [
        ("history=top,importance=key_norm,keep=0.5", "0"),
        ("history=top,importance=key_diff,keep=0.25", "0"),
        ("history=top,importance=attention,keep=0.5", "64"),
    ] {
        let pool = ["--cache", "paged", "--prompt", "32768", "--rounds", "1", "--late", "0"];
        let arguments = ["--config", config, "--room", queries, "--ties", "0.001"];
        run(engine.command(&truncate, &arguments).args(pool));
    }
}

/// The rows that `mlp-decouple` makes on a GPU beside those that it makes in memory: every byte in f32; on tensor cores
/// within four half steps of the dtype at a row's largest, the bound of `Arithmetic::TensorCores`.
#[cfg(feature = "cuda")]
#[test]
fn an_engine_on_a_gpu_makes_the_rows_that_it_makes_in_memory() {
    let engine = Engine::build_of("c++", "cuda_engine.cpp");
    let plugin = engine.put("mlp_decouple");
    for factor in [2, 5] {
        let file = weights::Weights::random(factor, 64, 3, false).write(engine.place.root(), "weights.kvcm");
        let config = format!("weights={},positions=logical,every=100", file.display());
        for (dtype, bound) in [("f32", "0"), ("f16", "0.001953125"), ("bf16", "0.015625")] {
            for (cache, ranks) in [("contiguous", "1"), ("paged", "1"), ("paged", "2")] {
                let arguments = ["--config", &config, "--cache", cache, "--dtype", dtype, "--bound", bound];
                let output = run(engine.command(&plugin, &arguments).args(["--late", "3", "--ranks", ranks]));
                let text = String::from_utf8(output.stdout).unwrap();
                assert!(text.contains(": 2 commits, ") || text.starts_with("skipped"), "{text}");
            }
        }
        let arguments = ["--config", &config, "--dtype", "bf16", "--bound", "0.015625", "--blocked", "1"];
        run(&mut engine.command(&plugin, &arguments));
        // Results above 65,504, the most that f16 holds: the device finds them, and the plan is dropped for what it is.
        let mut large = weights::Weights::random(factor, 64, 3, false);
        large.layers[1][0].0[2].0.iter_mut().for_each(|weight| *weight *= 1e7);
        let config = format!("weights={},positions=logical", large.write(engine.place.root(), "large.kvcm").display());
        let output = engine.command(&plugin, &["--config", &config, "--dtype", "f16"]).output().unwrap();
        let [out, error] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(out.starts_with("skipped") || error.contains("layer 1: new row 4 of a head: a result is"), "{error}");
    }
}

/// The second generations of `generation2.c`.
#[repr(C)]
struct Layer2 {
    first: KvhLayer,
    pinned_rows: u64,
}

#[repr(C)]
struct LayerPlan2 {
    first: KvhLayerPlan,
    pinned_rows: u64,
}

/// Memory that is leaked: a test's.
unsafe extern "C" fn allocate(
    _host: *mut KvhHostState,
    _call: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    _error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: the plugin's request and place.
    unsafe {
        let words = (*request).bytes.div_ceil(8) as usize;
        out.write(Box::leak(vec![0u64; words].into_boxed_slice()).as_mut_ptr().cast());
    }
    KVH_OK
}

static MEMORY: KvhMemory1 = KvhMemory1 { allocate: Some(allocate) };

unsafe extern "C" fn service(_state: *mut KvhHostState, _id: KvhStr) -> *const c_void {
    (&raw const MEMORY).cast()
}

fn layer(struct_size: usize, length: u64) -> KvhLayer {
    // SAFETY: integers and pointers.
    let zeroed: KvhLayer = unsafe { std::mem::zeroed() };
    KvhLayer { struct_size, length, shared_with: -1, kv_heads: 1, ..zeroed }
}

fn layer_plan(struct_size: usize) -> KvhLayerPlan {
    // SAFETY: integers and pointers.
    let zeroed: KvhLayerPlan = unsafe { std::mem::zeroed() };
    KvhLayerPlan { struct_size, ..zeroed }
}

/// A plan for two layers of 100 rows, whose views and plans are as large as a host of some generation makes them.
/// Gives the ranges of each layer.
fn ask<L, P>(entry: &KvhPluginEntry, layers: &[L; 2], plans: &mut [P; 2]) -> Vec<Vec<(u64, u64)>> {
    let host = KvhHost {
        struct_size: size_of::<KvhHost>(),
        state: ptr::null_mut(),
        abi_major: KVH_ABI_MAJOR,
        abi_minor: KVH_ABI_MINOR,
        name: KvhStr::new("test"),
        service: Some(service),
    };
    let args = KvhCreateArgs {
        struct_size: size_of::<KvhCreateArgs>(),
        host: &host,
        model: ptr::null(),
        offers: ptr::null(),
        config: KvhStr::new(""),
    };
    let mut instance = ptr::null_mut();
    // SAFETY: this plugin reads the host alone.
    let status = unsafe { entry.create.unwrap()(&args, &mut instance, ptr::null_mut()) };
    assert_eq!(status, KVH_OK);

    // SAFETY: integers and pointers.
    let sequence = KvhSequence {
        struct_size: size_of::<KvhSequence>(),
        layers: KvhArray { data: layers.as_ptr().cast(), count: 2, stride: size_of::<L>() as u64 },
        ..unsafe { std::mem::zeroed() }
    };
    let mut plan = KvhPlan {
        struct_size: size_of::<KvhPlan>(),
        kind: KVH_PLAN_KEEP,
        reason: 0,
        flags: 0,
        reserved0: 0,
        next_position: 0,
        layers: KvhArrayMut { data: plans.as_mut_ptr().cast(), count: 2, stride: size_of::<P>() as u64 },
        message: ptr::null_mut(),
    };
    let args = KvhPrepareArgs {
        struct_size: size_of::<KvhPrepareArgs>(),
        call: ptr::null_mut(),
        sequences: KvhArray { data: (&raw const sequence).cast(), count: 1, stride: size_of::<KvhSequence>() as u64 },
        stream: ptr::null_mut(),
    };
    let mut out = KvhPrepareOut {
        struct_size: size_of::<KvhPrepareOut>(),
        plans: KvhArrayMut { data: (&raw mut plan).cast(), count: 1, stride: size_of::<KvhPlan>() as u64 },
    };
    // SAFETY: the table that the id names; arguments that live here.
    unsafe {
        let table = entry.hook.unwrap()(KvhStr::new(KVH_ON_PREFILL_DONE_1)).cast::<KvhOnPrefillDone1>();
        let status = (*table).on_prefill_done.unwrap()(instance, &args, &mut out, ptr::null_mut());
        assert_eq!(status, KVH_OK);
        entry.destroy.unwrap()(instance);
    }
    assert_eq!(plan.kind, KVH_PLAN_SELECT);
    plans
        .iter()
        .map(|plan| {
            // SAFETY: both generations begin with the first; the ranges are leaked memory.
            unsafe {
                let plan = &*ptr::from_ref(plan).cast::<KvhLayerPlan>();
                let ranges = std::slice::from_raw_parts(plan.ranges, plan.range_count as usize);
                assert_eq!(ranges.iter().map(|range| range.length).sum::<u64>(), u64::from(plan.count));
                ranges.iter().map(|range| (range.start, range.length)).collect()
            }
        })
        .collect()
}

#[test]
fn a_new_plugin_works_on_an_old_host_and_on_a_new_one() {
    let place = Place::new();
    let path = compile_plugin(&place, "generation2.c", "libkvhook_generation2.so");
    // SAFETY: the library was compiled above and has no initialisers.
    let library = unsafe { libloading::Library::new(path) }.unwrap();
    // SAFETY: the symbol's type by contract; the entry is static and the library stays open.
    let entry = unsafe { &*library.get::<KvhPluginEntryFn>(b"kvh_plugin_entry_v1").unwrap()() };

    // An old host: first generations, packed closely. The field behind each is the next element's.
    let layers = [layer(size_of::<KvhLayer>(), 100), layer(size_of::<KvhLayer>(), 60)];
    let mut plans = [layer_plan(size_of::<KvhLayerPlan>()), layer_plan(size_of::<KvhLayerPlan>())];
    let ranges = ask(entry, &layers, &mut plans);
    assert_eq!(ranges, [[(0, 4), (92, 8)], [(0, 4), (52, 8)]]);
    assert_eq!(plans[1].struct_size, size_of::<KvhLayerPlan>(), "nothing is written behind a plan that is smaller");

    // An old host whose elements are far apart: what stands between them is not the plugin's either.
    let layers = [100, 60].map(|length| Layer2 { first: layer(size_of::<KvhLayer>(), length), pinned_rows: 33 });
    let plan = || LayerPlan2 { first: layer_plan(size_of::<KvhLayerPlan>()), pinned_rows: 77 };
    let mut plans = [plan(), plan()];
    assert_eq!(ask(entry, &layers, &mut plans), [[(0, 4), (92, 8)], [(0, 4), (52, 8)]]);
    assert!(plans.iter().all(|plan| plan.pinned_rows == 77));

    // A host of the plugin's own generation.
    let layers = [100, 60].map(|length| Layer2 { first: layer(size_of::<Layer2>(), length), pinned_rows: 33 });
    let plan = || LayerPlan2 { first: layer_plan(size_of::<LayerPlan2>()), pinned_rows: 0 };
    let mut plans = [plan(), plan()];
    assert_eq!(ask(entry, &layers, &mut plans), [[(0, 33), (92, 8)], [(0, 33), (52, 8)]]);
    assert!(plans.iter().all(|plan| plan.pinned_rows == 33));

    // A host that is newer still: its elements are larger than the plugin knows.
    #[repr(C)]
    struct Newer<T>(T, [u64; 3]);
    let size = size_of::<Newer<Layer2>>();
    let layers = [100, 60].map(|length| Newer(Layer2 { first: layer(size, length), pinned_rows: 12 }, [9; 3]));
    let size = size_of::<Newer<LayerPlan2>>();
    let plan = || Newer(LayerPlan2 { first: layer_plan(size), pinned_rows: 0 }, [9; 3]);
    let mut plans = [plan(), plan()];
    assert_eq!(ask(entry, &layers, &mut plans), [[(0, 12), (92, 8)], [(0, 12), (52, 8)]]);
    assert!(plans.iter().all(|plan| plan.0.pinned_rows == 12 && plan.1 == [9; 3]));
}
