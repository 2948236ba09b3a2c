//! A compression through the host's C API (`kvhook_compress`), half of the rows kept, against a memcpy of the same bytes.
//!
//! The memcpy copies as many bytes as are kept, from one half of the same memory to the other, as one contiguous part for
//! each core, with as many threads as the commit. Both read cold memory where the cache is larger than the last level.
//!
//! Gates: the host's commit (its checks and the moving) reaches 70 % of the memcpy's bandwidth for a random half, 90 % where
//! the kept rows form runs; the host's own share beside plugin and commit (ask, prepare, checking the plan, copying its
//! indices, new positions, begin and free) stays below a quarter of the memcpy's time. It goes with the number of indices,
//! not of bytes: for each index of 4 bytes, K and V move 256 bytes at head_dim 64, 512 at 128.

use std::process::ExitCode;

use kvhook_bench::measure::{Gates, cores, median, print_machine, time};
use kvhook_bench::rig::{Rig, Shape};
use kvhook_bench::{Result, error};
use kvhook_kernels::{KernelError, parallel};

const RUNS: usize = 11;
/// Most of the host's own time beside plugin and commit, as a share of the memcpy's.
const HOST_SHARE: f64 = 0.25;

const SMOL: Shape =
    Shape { name: "SmolLM2, contiguous", layers: 30, kv_heads: 3, head_dim: 64, length: 8192, block_size: 0 };
const LLAMA: Shape =
    Shape { name: "Llama 8B, contiguous", layers: 8, kv_heads: 8, head_dim: 128, length: 8192, block_size: 0 };

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    let shapes = [
        SMOL,
        Shape { name: "SmolLM2, paged", block_size: 16, ..SMOL },
        LLAMA,
        Shape { name: "Llama 8B, paged", block_size: 16, ..LLAMA },
    ];
    let selections = [
        ("random half", "keep=0.5,history=sample,importance=uniform", 0.7),
        ("one range", "keep=0.5,history=none", 0.9),
    ];
    let mut gates = Gates::default();
    print_machine();
    println!("f16, 8192 tokens, half kept, {RUNS} turns; ms");
    println!(
        "{:22} {:12} {:>6} {:>8} {:>8} {:>8} {:>8} {:>14} {:>12}",
        "cache", "kept", "MB", "whole", "plugin", "commit", "host", "memcpy", "commit"
    );
    for shape in shapes {
        for (name, config, gate) in selections {
            measure(shape, name, config, gate, &mut gates)?;
        }
    }
    Ok(gates)
}

fn measure(shape: Shape, name: &str, config: &str, gate: f64, gates: &mut Gates) -> Result<()> {
    let mut rig = Rig::new(shape, config)?;
    let kept: u64 = rig.compress()?.iter().sum();
    let moved = kept as usize * shape.bytes() / (shape.layers * shape.length);
    let (mut whole, mut plugin, mut commit, mut host, mut plain, mut ratio) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    memcpy(rig.memory(), moved)?;
    for _ in 0..RUNS {
        let mut failed = Ok(());
        plain.push(1e3 * time(|| failed = memcpy(rig.memory(), moved)).as_secs_f64());
        failed?;
        let before = rig.spent()?;
        let mut compressed = Ok(Vec::new());
        whole.push(1e3 * time(|| compressed = rig.compress()).as_secs_f64());
        compressed?;
        let after = rig.spent()?;
        plugin.push((after.plugin - before.plugin) as f64 / 1e6);
        commit.push((after.commit - before.commit) as f64 / 1e6);
        let last = whole.len() - 1;
        host.push(whole[last] - plugin[last] - commit[last]);
        ratio.push(plain[last] / commit[last]);
    }
    let (ratio, host, plain) = (median(&ratio), median(&host), median(&plain));
    let verdict = gates.check(ratio >= gate && host <= HOST_SHARE * plain);
    println!(
        "{:22} {name:12} {:6.0} {:8.2} {:8.2} {:8.2} {host:8.2} {plain:14.2} {:10.0} % {verdict}",
        shape.name,
        2.0 * moved as f64 / 1e6,
        median(&whole),
        median(&plugin),
        median(&commit),
        100.0 * ratio,
    );
    Ok(())
}

/// Copies `bytes` from one half of `memory` to the other.
fn memcpy(memory: &mut [u8], bytes: usize) -> Result<()> {
    let (source, destination) = memory.split_at_mut(memory.len() / 2);
    let bytes = bytes.min(source.len());
    let part = bytes.div_ceil(cores());
    let tasks = source[..bytes].chunks(part).zip(destination[..bytes].chunks_mut(part)).collect();
    parallel::for_each_on(cores(), tasks, |(source, destination): (&[u8], &mut [u8])| {
        destination.copy_from_slice(source);
        Ok::<_, KernelError>(())
    })?;
    Ok(())
}
