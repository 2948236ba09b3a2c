//! Commit of a select: `gather` in place over K and V of many layers, on all cores, against a plain memcpy of as many bytes.
//!
//! The memcpy copies the kept bytes from one half of the same memory to the other, a contiguous part for each core, with as
//! many threads. Both find their memory cold: it is many times a last-level cache. Bandwidth counts kept bytes, read once
//! and written once; the ratio is the median over turns.
//!
//! Exits with an error below 70 % of the memcpy's bandwidth for a random half of the rows, or 90 % where the kept rows form
//! runs. Rows that one head keeps for itself form no runs in memory where the heads of a token lie side by side; there, 70 %
//! is the gate for both.

mod common;

use std::process::ExitCode;

use common::{Random, Turns, cores, gigabytes_per_second, memcpy, take_turns};
use kvhook_kernels::{Dtype, Indices, KernelError, Layout, Rows, parallel, select};

const LENGTH: usize = 8192;
const KEPT: usize = LENGTH / 2;
const BLOCK: usize = 16;
/// Share of memcpy's bandwidth that is demanded for scattered rows.
const SCATTERED_GATE: f64 = 0.7;
/// Share of memcpy's bandwidth that is demanded for runs of rows.
const RUNS_GATE: f64 = 0.9;
/// Of K and V of all layers: many times a last-level cache.
const BYTES: usize = 768 << 20;

/// What a layer's cache looks like.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    kv_heads: usize,
    head_dim: usize,
    /// Whether the gates hold where each head keeps rows of its own, and where all keep the same.
    adjacent: bool,
    layout: fn(Dtype, usize, usize, usize) -> Layout,
}

/// Which rows are kept.
struct Selection {
    name: &'static str,
    /// For each head one list of `KEPT`.
    indices: fn(&mut Random, usize) -> Vec<u32>,
    shared: bool,
    /// Share of memcpy's bandwidth that is demanded.
    gate: f64,
}

fn main() -> ExitCode {
    let shapes = [
        Shape { name: "[heads, tokens, 128]", kv_heads: 8, head_dim: 128, adjacent: true, layout: Layout::head_major },
        Shape { name: "[heads, tokens, 64]", kv_heads: 3, head_dim: 64, adjacent: true, layout: Layout::head_major },
        Shape {
            name: "[tokens, heads, 128]",
            kv_heads: 8,
            head_dim: 128,
            adjacent: false,
            layout: Layout::token_major,
        },
        Shape {
            name: "[blocks, heads, 16, 128]",
            kv_heads: 8,
            head_dim: 128,
            adjacent: true,
            layout: |dtype, heads, capacity, dim| Layout::paged_head_major(dtype, heads, capacity, dim, BLOCK),
        },
        Shape {
            name: "[blocks, 16, heads, 128]",
            kv_heads: 8,
            head_dim: 128,
            adjacent: false,
            layout: |dtype, heads, capacity, dim| Layout::paged_token_major(dtype, heads, capacity, dim, BLOCK),
        },
    ];
    let selections = [
        Selection { name: "random half, per head", indices: random_half, shared: false, gate: SCATTERED_GATE },
        Selection { name: "random half, shared", indices: random_half, shared: true, gate: SCATTERED_GATE },
        Selection { name: "runs of 64, per head", indices: runs_of_64, shared: false, gate: RUNS_GATE },
        Selection { name: "one range, shared", indices: one_range, shared: true, gate: RUNS_GATE },
    ];
    let mut memory = vec![1u8; BYTES + 64];
    // Caches are aligned to cache lines, as allocators of engines do it.
    let misaligned = memory.as_ptr().align_offset(64);
    let memory = &mut memory[misaligned..misaligned + BYTES];
    let mut good = true;
    println!("{} threads, f16, {LENGTH} tokens, {KEPT} kept, in place", cores());
    println!("{:26} {:24} {:>8} {:>8} {:>8} {:>8} {:>7}", "layout", "kept", "MB", "ms", "GB/s", "memcpy", "ratio");
    for shape in &shapes {
        for selection in &selections {
            good &= measure(memory, shape, selection);
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints one line; whether the gate holds.
fn measure(memory: &mut [u8], shape: &Shape, selection: &Selection) -> bool {
    let layout = (shape.layout)(Dtype::F16, shape.kv_heads, LENGTH, shape.head_dim);
    let tensor = shape.kv_heads * LENGTH * layout.row_bytes();
    let tensors = memory.len() / tensor;
    let mut random = Random(7);
    let lists: Vec<u32> = (0..if selection.shared { 1 } else { shape.kv_heads })
        .flat_map(|_| (selection.indices)(&mut random, LENGTH))
        .collect();
    let indices = if selection.shared { Indices::shared(&lists) } else { Indices::per_head(&lists, KEPT) };
    let moved = tensors * tensor / 2;

    let base = memory.as_mut_ptr();
    let views: Vec<Rows> = (0..tensors)
        .map(|tensor_number| {
            // SAFETY: the tensors lie one after the other in `memory`, which outlives the views; nobody touches
            // memory while a gather runs.
            unsafe { Rows::new(base.wrapping_add(tensor_number * tensor), layout, None) }.expect("a sound layout")
        })
        .collect();
    let gather = || {
        let tasks: Vec<&Rows> = views.iter().collect();
        let done: Result<(), KernelError> =
            parallel::for_each_on(cores(), tasks, |rows| select::gather(rows, rows, 0..shape.kv_heads, &indices, 0));
        done.expect("a sound selection");
    };
    // SAFETY: made from `memory`, used only while no gather runs.
    let whole = || unsafe { std::slice::from_raw_parts_mut(base, tensors * tensor) };
    let Turns { first: plain, second: gathered, ratio } = take_turns(|| memcpy(whole(), moved), gather);
    let runs_in_memory = selection.shared || shape.adjacent;
    let gate = if runs_in_memory { selection.gate } else { SCATTERED_GATE };
    let good = ratio >= gate;
    println!(
        "{:26} {:24} {:8.0} {:8.2} {:8.2} {:8.2} {:6.0} % {}",
        shape.name,
        selection.name,
        2.0 * moved as f64 / 1e6,
        gathered.as_secs_f64() * 1e3,
        gigabytes_per_second(2 * moved, gathered),
        gigabytes_per_second(2 * moved, plain),
        100.0 * ratio,
        if good { "" } else { "BELOW THE GATE" }
    );
    good
}

fn random_half(random: &mut Random, length: usize) -> Vec<u32> {
    random.subset(length, KEPT)
}

fn runs_of_64(random: &mut Random, length: usize) -> Vec<u32> {
    random.subset(length / 64, KEPT / 64).into_iter().flat_map(|run| run * 64..run * 64 + 64).collect()
}

/// The most recent ones behind four sinks.
fn one_range(_: &mut Random, length: usize) -> Vec<u32> {
    (0..4).chain((length - KEPT + 4) as u32..length as u32).collect()
}
