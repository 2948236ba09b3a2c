//! Times of the CUDA operations against their floors, which come from the bandwidth that a copy reaches in the same run.
//!
//! The shape is Llama-3.1-8B's: 32 layers, 8 KV heads, d 128, bf16, all layers' own tensors in one call, so that nothing is
//! left in the second-level cache from one call to the next (268 MB of K and V at 2,048 tokens). Median of `RUNS` calls
//! between events; the spread is from the 10th to the 90th percentile. Prints a table and exits at once without a device.
//!
//! `cargo bench -p kvhook-kernels --features cuda --bench cuda`; with `-- products`, only the operations that multiply,
//! with a number behind `--` only sequences of so many tokens, and with any other text only operations whose name holds it.
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::ffi::c_void;
use std::time::Instant;

use cudarc::driver::{result, sys};
use half::bf16;
use kvhook_kernels::cuda::check::{Check, Indices, check_indices};
use kvhook_kernels::cuda::key_diff::{self, KeyDiff, key_diff};
use kvhook_kernels::cuda::norms::{RowNorms, Sign, row_norms};
use kvhook_kernels::cuda::sample::{Sample, sample};
use kvhook_kernels::cuda::select::{self, Gather, gather};
use kvhook_kernels::cuda::top_k::{TopK, top_k};
use kvhook_kernels::cuda::{CudaError, Device, DeviceSlice, Rows, Stream, Verdict};
use kvhook_kernels::sample::Draw;
use kvhook_kernels::{BlockTable, Dtype, IndexKind, Layout, Protected};

#[path = "cuda/products.rs"]
mod products;

const LAYERS: usize = 32;
const HEADS: usize = 8;
const RUNS: usize = 50;

fn main() {
    let device = match Device::adopt(0, std::ptr::null_mut()) {
        Ok(device) => device,
        Err(CudaError::NoDriver | CudaError::NoDevice { .. }) => return println!("skipped: no CUDA device"),
        Err(error) => panic!("{error}"),
    };
    // SAFETY: the device exists; its context is kept for the process.
    unsafe {
        let context = result::primary_ctx::retain(result::device::get(0).unwrap()).unwrap();
        result::ctx::set_current(context).unwrap();
    }
    let bench = Bench::new(device, Filter::from_arguments());
    println!("copy: {:.3} TB/s read and written", bench.bandwidth / 1e12);
    println!(
        "{:42} {:>7} {:>9} {:>13} {:>10} {:>8} {:>8} {:>8} {:>8}",
        "operation, all layers in one call",
        "tokens",
        "us/layer",
        "spread",
        "all, ms",
        "once",
        "phases",
        "ratio",
        "host us"
    );
    for head_dim in [128, 64] {
        for length in bench.filter.lengths() {
            if !bench.filter.products && (head_dim == 128 || length == 32_768) {
                bench.length(length, head_dim);
            }
        }
    }
    products::run(&bench);
}

/// What the arguments leave to be measured.
#[derive(Default)]
struct Filter {
    products: bool,
    tokens: Option<usize>,
    name: String,
}

impl Filter {
    fn from_arguments() -> Self {
        let mut filter = Self::default();
        // `cargo bench` adds options of its own.
        for argument in std::env::args().skip(1).filter(|argument| !argument.starts_with("--")) {
            match argument.parse() {
                Ok(tokens) => filter.tokens = Some(tokens),
                Err(_) if argument == "products" => filter.products = true,
                Err(_) => filter.name = argument,
            }
        }
        filter
    }

    fn lengths(&self) -> impl Iterator<Item = usize> + use<> {
        let tokens = self.tokens;
        [2048, 8192, 32_768, 131_072].into_iter().filter(move |&length| tokens.is_none_or(|tokens| tokens == length))
    }
}

struct Bench {
    device: Device,
    filter: Filter,
    stream: sys::CUstream,
    bandwidth: f64,
    /// Random numbers of bf16, copied into every cache.
    pattern: Memory,
}

/// Device memory.
struct Memory {
    address: u64,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Self {
        // SAFETY: a fresh allocation.
        let address = unsafe { result::malloc_sync(len.max(1)) }.unwrap();
        Self { address, len }
    }

    fn of<T>(values: &[T]) -> Self {
        let memory = Self::new(size_of_val(values));
        // SAFETY: the memory is as long as the values; null is the default stream.
        unsafe {
            result::memcpy_htod_sync(memory.address, values).unwrap();
            // That call may return before pageable memory has arrived.
            result::stream::synchronize(std::ptr::null_mut()).unwrap();
        }
        memory
    }

    fn slice<T>(&self) -> DeviceSlice<T> {
        // SAFETY: the bench waits for its work before the memory goes.
        unsafe { DeviceSlice::new(self.address, self.len / size_of::<T>()) }.unwrap()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, and nothing uses it any more.
        unsafe { result::free_sync(self.address) }.unwrap();
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A random `keep`-th of the tokens, ascending, for each head.
fn lists(length: usize, keep: usize, random: &mut Random) -> Vec<u32> {
    let mut all = Vec::new();
    for _ in 0..HEADS {
        let (mut left, mut wanted) = (length, length / keep);
        for token in 0..length {
            if (random.next() >> 20) as usize % left < wanted {
                all.push(token as u32);
                wanted -= 1;
            }
            left -= 1;
        }
    }
    all
}

/// How rows lie.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    HeadMajor,
    Paged(usize),
}

impl Bench {
    fn new(device: Device, filter: Filter) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let values: Vec<bf16> =
            (0..32 << 20).map(|_| bf16::from_f32((random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0)).collect();
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let mut bench = Self { device, filter, stream, bandwidth: 0.0, pattern: Memory::of(&values) };
        let (from, to) = (bench.cache(2 << 30), Memory::new(2 << 30));
        let times = bench.time(|| {
            // SAFETY: both are that long.
            unsafe { result::memcpy_dtod_async(to.address, from.address, from.len, bench.stream) }.unwrap();
        });
        bench.bandwidth = 2.0 * (2u64 << 30) as f64 / times.median;
        bench
    }

    fn stream(&self) -> Stream {
        // SAFETY: the stream lives as long as the process.
        unsafe { Stream::borrow(self.stream.cast::<c_void>()) }
    }

    /// Memory of random numbers.
    fn cache(&self, len: usize) -> Memory {
        let memory = Memory::new(len);
        for start in (0..len).step_by(self.pattern.len) {
            let part = self.pattern.len.min(len - start);
            // SAFETY: the part lies inside both.
            unsafe { result::memcpy_dtod_sync(memory.address + start as u64, self.pattern.address, part) }.unwrap();
        }
        memory
    }

    fn time(&self, mut work: impl FnMut()) -> Times {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let events: Vec<_> = (0..2 * RUNS).map(|_| result::event::create(flags).unwrap()).collect();
        for _ in 0..3 {
            work();
        }
        let mut host = Vec::new();
        for pair in events.chunks(2) {
            // SAFETY: events and stream are ours.
            unsafe {
                result::event::record(pair[0], self.stream).unwrap();
                let start = Instant::now();
                work();
                host.push(start.elapsed().as_secs_f64());
                result::event::record(pair[1], self.stream).unwrap();
                // So that the next call's host time holds no waiting.
                result::stream::synchronize(self.stream).unwrap();
            }
        }
        let mut times: Vec<f64> = events
            .chunks(2)
            // SAFETY: both events have happened.
            .map(|pair| f64::from(unsafe { result::event::elapsed(pair[0], pair[1]) }.unwrap()) / 1e3)
            .collect();
        for event in events {
            // SAFETY: ours.
            unsafe { result::event::destroy(event) }.unwrap();
        }
        times.sort_by(f64::total_cmp);
        host.sort_by(f64::total_cmp);
        Times { median: times[RUNS / 2], low: times[RUNS / 10], high: times[RUNS * 9 / 10], host: host[RUNS / 2] }
    }

    /// Prints a row; floors are bytes of one layer.
    fn row(&self, name: &str, length: usize, once: f64, phases: f64, work: impl FnMut()) {
        if !name.contains(&self.filter.name) {
            return;
        }
        let times = self.time(work);
        let layer = |seconds: f64| seconds * 1e6 / LAYERS as f64;
        let (once, phases) = (once / self.bandwidth * 1e6, phases / self.bandwidth * 1e6);
        println!(
            "{name:42} {length:>7} {:>9.2} {:>13} {:>10.3} {once:>8.2} {phases:>8.2} {:>8.2} {:>8.1}",
            layer(times.median),
            format!("{:.2}-{:.2}", layer(times.low), layer(times.high)),
            times.median * 1e3,
            layer(times.median) / once,
            times.host * 1e6,
        );
    }

    fn length(&self, length: usize, head_dim: usize) {
        let forms: &[Form] = if length == 32_768 && head_dim == 128 {
            &[Form::HeadMajor, Form::Paged(16), Form::Paged(256)]
        } else {
            &[Form::HeadMajor]
        };
        for &form in forms {
            self.form(length, head_dim, form);
        }
    }

    fn form(&self, length: usize, head_dim: usize, form: Form) {
        let mut random = Random(7);
        let bytes = length * HEADS * head_dim * 2;
        let table: Vec<i32> = match form {
            Form::HeadMajor => Vec::new(),
            Form::Paged(block) => {
                let mut table: Vec<i32> = (0..(length / block) as i32).collect();
                for place in (1..table.len()).rev() {
                    table.swap(place, (random.next() >> 20) as usize % (place + 1));
                }
                table
            }
        };
        let table = Memory::of(&table);
        let (layout, entries) = match form {
            Form::HeadMajor => (Layout::head_major(Dtype::Bf16, HEADS, length, head_dim), None),
            Form::Paged(block) => {
                let data = table.address as *const u8;
                let entries = BlockTable { data, kind: IndexKind::I32, stride_head: 0, blocks: length / block };
                (Layout::paged_token_major(Dtype::Bf16, HEADS, length, head_dim, block), Some(entries))
            }
        };
        let caches: Vec<Memory> = (0..2 * LAYERS).map(|_| self.cache(bytes)).collect();
        let rows: Vec<Rows> = caches
            .iter()
            // SAFETY: the cache is that long, and the table names blocks of it.
            .map(|cache| unsafe { Rows::new(cache.address, layout, entries) }.unwrap())
            .collect();
        let suffix = match form {
            Form::HeadMajor => format!("d {head_dim}"),
            Form::Paged(block) => format!("d {head_dim} paged {block}"),
        };
        let of_keys = bytes as f64;
        let scores_bytes = (length * HEADS * 4) as f64;
        let name = |operation: &str| format!("{operation}, {suffix}");

        for keep in [2, 4, 8] {
            if keep > 2 && form != Form::HeadMajor {
                continue;
            }
            let lists: Vec<Memory> = (0..4).map(|_| Memory::of(&lists(length, keep, &mut random))).collect();
            let moves: Vec<Gather> = (0..2 * LAYERS)
                .map(|tensor| Gather {
                    source: rows[tensor],
                    destination: rows[tensor],
                    indices: Indices::per_head(lists[tensor / 2 % 4].slice(), length / keep),
                    tail: 0..0,
                    destination_start: 0,
                })
                .collect();
            let scratch = Memory::new(select::scratch_bytes(&moves).unwrap());
            let floor = 4.0 * of_keys / keep as f64;
            self.row(&name(&format!("commit in place 1/{keep}")), length, floor, floor, || {
                gather(&self.device, self.stream(), &moves, None, scratch.slice()).unwrap();
            });
            if keep == 2 && length <= 32_768 {
                // Into the tensors of the next layer: the traffic of fresh rows. What they hold does not matter.
                let fresh: Vec<Gather> = (0..2 * LAYERS)
                    .map(|tensor| Gather {
                        destination: rows[(tensor + LAYERS) % (2 * LAYERS)],
                        ..moves[tensor].clone()
                    })
                    .collect();
                self.row(&name("gather into fresh rows 1/2"), length, floor, floor, || {
                    gather(&self.device, self.stream(), &fresh, None, DeviceSlice::empty()).unwrap();
                });
            }
        }

        let scores = Memory::new(length * HEADS * 4 * LAYERS);
        let score =
            |layer: usize| scores.slice::<f32>().part(layer * HEADS * length..(layer + 1) * HEADS * length).unwrap();
        let norms: Vec<RowNorms> =
            (0..LAYERS).map(|layer| RowNorms { rows: rows[2 * layer], tokens: 0..length, out: score(layer) }).collect();
        let run_norms = || row_norms(&self.device, self.stream(), &norms, Sign::Negative).unwrap();
        self.row(&name("row norms"), length, of_keys + scores_bytes, of_keys + scores_bytes, run_norms);

        let keys: Vec<KeyDiff> =
            (0..LAYERS).map(|layer| KeyDiff { keys: rows[2 * layer], length, out: score(layer) }).collect();
        let working = Memory::new(key_diff::scratch_bytes(&keys).unwrap());
        let run_diff = || key_diff(&self.device, self.stream(), &keys, working.slice()).unwrap();
        self.row(&name("key_diff"), length, of_keys + scores_bytes, 2.0 * of_keys + scores_bytes, run_diff);

        let kept = Memory::new(length / 2 * HEADS * 4 * LAYERS);
        let keep = |layer: usize| {
            kept.slice::<u32>().part(layer * HEADS * length / 2..(layer + 1) * HEADS * length / 2).unwrap()
        };
        let word = Memory::new(8);
        let verdict = Verdict::new(word.slice()).unwrap();
        verdict.clear(&self.device, self.stream()).unwrap();
        let protected = Protected { sinks: 4, recent: 64 };
        let best: Vec<TopK> =
            (0..LAYERS).map(|layer| TopK { scores: score(layer), heads: HEADS, protected, out: keep(layer) }).collect();
        let run_best = || top_k(&self.device, self.stream(), &best, &verdict).unwrap();
        run_norms();
        self.row(&name("top-k 1/2"), length, 1.5 * scores_bytes, 1.5 * scores_bytes, run_best);
        let checks: Vec<Check> = (0..LAYERS)
            .map(|layer| Check { indices: Indices::per_head(keep(layer), length / 2), heads: HEADS, length, least: 0 })
            .collect();
        let run_check = || check_indices(&self.device, self.stream(), &checks, &verdict).unwrap();
        self.row(&name("check of indices 1/2"), length, scores_bytes / 2.0, scores_bytes / 2.0, run_check);

        let moves: Vec<Gather> = (0..2 * LAYERS)
            .map(|tensor| Gather {
                source: rows[tensor],
                destination: rows[tensor],
                indices: Indices::per_head(keep(tensor / 2), length / 2),
                tail: 0..0,
                destination_start: 0,
            })
            .collect();
        let scratch = Memory::new(select::scratch_bytes(&moves).unwrap());
        let commit = || gather(&self.device, self.stream(), &moves, Some(&verdict), scratch.slice()).unwrap();
        self.row(&name("top-k + commit 1/2"), length, 2.0 * of_keys, 2.0 * of_keys, || {
            run_best();
            commit();
        });
        self.row(&name("key_norm, whole, 1/2"), length, 2.5 * of_keys, 3.0 * of_keys, || {
            run_norms();
            run_best();
            run_check();
            commit();
        });
        self.row(&name("key_diff, whole, 1/2"), length, 2.5 * of_keys, 4.0 * of_keys, || {
            run_diff();
            run_best();
            run_check();
            commit();
        });
        let layer_keys: Vec<Rows> = rows.iter().step_by(2).copied().collect();
        for window in [64, 1] {
            let attention = products::Attention::new(self, &layer_keys, length, window, 4, false);
            let best: Vec<TopK> =
                (0..LAYERS).map(|layer| TopK { scores: attention.scores(layer), ..best[layer] }).collect();
            let pass = of_keys.max(products::attention_bytes(self, window * 4, length, head_dim));
            let passes = if window == 1 { 1.0 } else { 2.0 };
            let name = name(&format!("attention W {window} G 4, whole, 1/2"));
            self.row(&name, length, 2.5 * of_keys, 2.0 * of_keys + passes * pass, || {
                attention.run(self);
                top_k(&self.device, self.stream(), &best, &verdict).unwrap();
                run_check();
                commit();
            });
        }
        if form == Form::HeadMajor && head_dim == 128 {
            // Weights: the norms' absolute values.
            row_norms(&self.device, self.stream(), &norms, Sign::Positive).unwrap();
            let draws: Vec<Sample> = (0..LAYERS)
                .map(|layer| Sample {
                    weights: score(layer),
                    heads: HEADS,
                    protected,
                    draw: Draw { seed: 1, round: 0, layer: layer as u32, head: 0 },
                    out: keep(layer),
                })
                .collect();
            self.row(&name("sample 1/2"), length, 1.5 * scores_bytes, 1.5 * scores_bytes, || {
                sample(&self.device, self.stream(), &draws, &verdict).unwrap();
            });
        }
    }
}

/// Seconds of one call.
struct Times {
    median: f64,
    low: f64,
    high: f64,
    host: f64,
}
