//! The grouped MLP of `mlp-decouple` against the rate of a large matrix product: `gemm`, 1,024 x 1,024 x 1,024, f32.
//!
//! Both run on one core, and on all cores: `gemm` splits its product, the MLP runs K and V of several layers side by side
//! as the plugin does. Arithmetic is in f32 whatever the cache's dtype. Rates are of the operations that the formula asks
//! for, so what is padded, widened, rounded or stored beside them counts as time only.
//!
//! Gate: at least 60 % of the product's rate for head_dim 64 and 128, in every dtype, on one core and on all.

use std::process::ExitCode;

use gemm::Parallelism;
use kvhook_bench::measure::{Gates, cores, median, print_machine, time};
use kvhook_bench::{Result, error};
use kvhook_kernels::grouped_mlp::{GroupedMlp, Groups, Linear, grouped_mlp};
use kvhook_kernels::{Dtype, KernelError, Layout, Rows, parallel};

const RUNS: usize = 15;
const GATE: f64 = 0.6;
/// Rows and columns of the large product's matrices.
const SIZE: usize = 1024;
/// Tensors (K or V of a layer) that are compressed in one run.
const TENSORS: usize = 8;

struct Shape {
    name: &'static str,
    factor: usize,
    head_dim: usize,
    kv_heads: usize,
    tokens: usize,
    gated: bool,
}

const SHAPES: [Shape; 5] = [
    Shape { name: "SmolLM2, f 2", factor: 2, head_dim: 64, kv_heads: 3, tokens: 2048, gated: true },
    Shape { name: "SmolLM2, f 4", factor: 4, head_dim: 64, kv_heads: 3, tokens: 2048, gated: true },
    Shape { name: "Llama 8B, f 2", factor: 2, head_dim: 128, kv_heads: 8, tokens: 1024, gated: true },
    Shape { name: "LLaVA, f 5", factor: 5, head_dim: 128, kv_heads: 8, tokens: 1000, gated: true },
    Shape { name: "head_dim 80, f 2", factor: 2, head_dim: 80, kv_heads: 8, tokens: 1024, gated: false },
];

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    let mut gates = Gates::default();
    print_machine();
    println!("{TENSORS} tensors, {RUNS} turns; GFLOP/s");
    println!("{:18} {:5} {:>6} {:>10} {:>10} {:>8}", "shape", "cache", "cores", "gemm", "MLP", "ratio");
    let mut threads = vec![1, cores()];
    threads.dedup();
    for shape in &SHAPES {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for &threads in &threads {
                measure(shape, dtype, threads, &mut gates)?;
            }
        }
    }
    Ok(gates)
}

fn measure(shape: &Shape, dtype: Dtype, threads: usize, gates: &mut Gates) -> Result<()> {
    let &Shape { factor, head_dim, kv_heads, tokens, .. } = shape;
    let weights = vec![0.01; factor * head_dim * head_dim];
    let bias = vec![0.5; head_dim];
    let linear = |inputs: usize| Linear { weight: &weights[..inputs * head_dim], bias: &bias };
    let layers = [linear(factor * head_dim), linear(head_dim), linear(head_dim)];
    let mlp = GroupedMlp::pack(factor, head_dim, layers)?;
    let count = tokens / factor;
    let bytes = kv_heads * head_dim * dtype.size();
    let mut source = vec![0u8; TENSORS * tokens * bytes];
    let mut destination = vec![0u8; TENSORS * count * bytes];
    let mut scratch = vec![0.0; TENSORS * mlp.scratch_len()];
    let (a, b) = (vec![0.5f32; SIZE * SIZE], vec![0.25f32; SIZE * SIZE]);
    let mut c = vec![0.0f32; SIZE * SIZE];

    let (mut products, mut mlps) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        products.push(time(|| large_product(&a, &b, &mut c, threads)).as_secs_f64());
        let tensors = source.chunks_mut(tokens * bytes).zip(destination.chunks_mut(count * bytes));
        let tasks: Vec<_> = tensors.zip(scratch.chunks_mut(mlp.scratch_len())).collect();
        let mut done = Ok::<(), KernelError>(());
        mlps.push(
            time(|| {
                done = parallel::for_each_on(threads, tasks, |((source, destination), scratch)| {
                    let from = Layout::head_major(dtype, kv_heads, tokens, head_dim);
                    let to = Layout::head_major(dtype, kv_heads, count, head_dim);
                    // SAFETY: the layouts fill the task's own chunks.
                    let rows = unsafe {
                        (Rows::new(source.as_mut_ptr(), from, None)?, Rows::new(destination.as_mut_ptr(), to, None)?)
                    };
                    let groups = Groups { source_start: 0, count, destination_start: 0 };
                    grouped_mlp(&mlp, &rows.0, &rows.1, 0..kv_heads, groups, scratch)
                });
            })
            .as_secs_f64(),
        );
        done?;
    }
    let product = 2.0 * (SIZE as f64).powi(3) / median(&products) / 1e9;
    let rate = (TENSORS * kv_heads * count * mlp.operations()) as f64 / median(&mlps) / 1e9;
    // Pairs that took turns, so that what slows down the machine slows down both.
    let scale = (TENSORS * kv_heads * count * mlp.operations()) as f64 / (2.0 * (SIZE as f64).powi(3));
    let ratios: Vec<f64> = products.iter().zip(&mlps).map(|(product, mlp)| scale * product / mlp).collect();
    let ratio = median(&ratios);
    let verdict = if shape.gated { gates.check(ratio >= GATE) } else { "" };
    println!("{:18} {dtype:5} {threads:6} {product:10.1} {rate:10.1} {:6.0} % {verdict}", shape.name, 100.0 * ratio);
    Ok(())
}

/// `c = a b`, all column-major.
fn large_product(a: &[f32], b: &[f32], c: &mut [f32], threads: usize) {
    let parallelism = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    let (a, b, c, stride) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), SIZE as isize);
    // SAFETY: three matrices of SIZE x SIZE elements, of which the one that is written overlaps none.
    unsafe {
        gemm::gemm(
            SIZE,
            SIZE,
            SIZE,
            c,
            stride,
            1,
            false,
            a,
            stride,
            1,
            b,
            stride,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
