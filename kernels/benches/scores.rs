//! Scores and choices: time, bytes and operations of each, beside a plain memcpy that reads as many bytes.

mod common;

use std::time::Duration;

use common::{Random, Turns, cores, gigabytes_per_second, memcpy, take_turns};
use kvhook_kernels::key_diff::key_diff;
use kvhook_kernels::norms::row_norms;
use kvhook_kernels::sample::{Draw, sample};
use kvhook_kernels::top_k::top_k;
use kvhook_kernels::window_attention::{DEFAULT_POOLING_KERNEL, WindowQueries, window_attention};
use kvhook_kernels::{Dtype, KernelError, Layout, Protected, Rows, parallel};

const LENGTH: usize = 8192;
const KV_HEADS: usize = 8;
const QUERY_HEADS: usize = 32;
const DIM: usize = 128;
const WINDOW: usize = 64;
const LAYERS: usize = 16;
const PROTECTED: Protected = Protected { sinks: 4, recent: 64 };

fn main() {
    let layout = Layout::head_major(Dtype::F16, KV_HEADS, LENGTH, DIM);
    let layer_bytes = KV_HEADS * LENGTH * layout.row_bytes();
    let mut keys = vec![0u8; LAYERS * layer_bytes];
    let mut random = Random(3);
    for half in keys.chunks_exact_mut(2) {
        // Finite halves around one.
        half.copy_from_slice(&(0x3800 + random.below(0x0800) as u16).to_ne_bytes());
    }
    let views: Vec<Rows> = keys
        .chunks_exact_mut(layer_bytes)
        // SAFETY: each view lies in a chunk of its own; `keys` is not used otherwise while the views are.
        .map(|layer| unsafe { Rows::new(layer.as_mut_ptr(), layout, None) }.expect("a sound layout"))
        .collect();
    let data: Vec<f32> = (0..WINDOW * QUERY_HEADS * DIM).map(|_| random.below(1000) as f32 / 1000.0 - 0.5).collect();
    let queries = WindowQueries::dense(&data, WINDOW, QUERY_HEADS, DIM);
    let mut scores = vec![0.0f32; LAYERS * KV_HEADS * LENGTH];
    let mut other = vec![0u8; 2 * LAYERS * layer_bytes];

    println!("{} threads, f16, {LENGTH} tokens, {KV_HEADS} KV heads of {DIM}, all layers cold", cores());
    println!(
        "{:18} {:>6} {:>9} {:>9} {:>9} {:>8} {:>9}",
        "operation", "layers", "MB read", "ms", "GB/s", "memcpy", "GFLOP/s"
    );
    let mut measure = |name: &str, layers: usize, operations: usize, operation: &Operation<'_>| {
        let bytes = layers * layer_bytes;
        let run = || {
            let tasks: Vec<_> = scores
                .chunks_mut(LENGTH)
                .enumerate()
                .take(layers * KV_HEADS)
                .map(|(number, out)| (&views[number / KV_HEADS], number % KV_HEADS, out))
                .collect();
            parallel::for_each_on(cores(), tasks, |(keys, head, out)| operation(keys, head, out))
                .expect("sound arguments");
        };
        let Turns { first: plain, second: time, .. } = take_turns(|| memcpy(&mut other, bytes), run);
        line(name, layers, bytes, time, plain, layers * KV_HEADS * LENGTH * operations);
    };
    measure("row_norms", LAYERS, 2 * DIM, &|keys, head, out| row_norms(keys, head..head + 1, 0..LENGTH, out));
    measure("key_diff", LAYERS, 6 * DIM, &|keys, head, out| key_diff(keys, head..head + 1, LENGTH, out));
    measure("window_attention", 2, 2 * WINDOW * QUERY_HEADS / KV_HEADS * DIM, &|keys, head, out| {
        window_attention(keys, &queries, head..head + 1, LENGTH, DEFAULT_POOLING_KERNEL, out)
    });

    for score in &mut scores {
        *score = random.below(1 << 20) as f32;
    }
    let mut kept = vec![0u32; LENGTH / 4];
    let draw = Draw { seed: 1, round: 0, layer: 0, head: 0 };
    let lists = scores.len() / LENGTH;
    let each_list = |choose: &Choice<'_>, kept: &mut [u32]| {
        scores.chunks(LENGTH).for_each(|scores| choose(scores, kept).expect("sound arguments"));
    };
    let mut twin = vec![0u32; LENGTH / 4];
    let Turns { first: largest, second: drawn, .. } = take_turns(
        || each_list(&|scores, kept| top_k(scores, PROTECTED, kept), &mut kept),
        || each_list(&|scores, kept| sample(scores, PROTECTED, draw, kept), &mut twin),
    );
    for (name, time) in [("top_k", largest), ("sample", drawn)] {
        let nanoseconds = time.as_secs_f64() * 1e9 / (lists * LENGTH) as f64;
        println!("{name:18} a quarter of {LENGTH} tokens, one thread: {nanoseconds:.2} ns a token");
    }
}

/// Scores of one head of one layer.
type Operation<'a> = dyn Fn(&Rows, usize, &mut [f32]) -> Result<(), KernelError> + Sync + 'a;

/// Chooses tokens of one head.
type Choice<'a> = dyn Fn(&[f32], &mut [u32]) -> Result<(), KernelError> + 'a;

fn line(name: &str, layers: usize, bytes: usize, time: Duration, plain: Duration, operations: usize) {
    println!(
        "{name:18} {layers:6} {:9.0} {:9.2} {:9.2} {:8.2} {:9.1}",
        bytes as f64 / 1e6,
        time.as_secs_f64() * 1e3,
        gigabytes_per_second(bytes, time),
        gigabytes_per_second(2 * bytes, plain),
        operations as f64 / time.as_secs_f64() / 1e9,
    );
}
