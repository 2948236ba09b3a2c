//! Operations that multiply: window_attention, grouped_mlp, and rotate. Their floors also hold the time of the products at
//! `PRODUCTS` a second, which a large bf16 matrix product reaches on an H100.

use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::grouped_mlp::{Arithmetic, Compress, GroupedMlp, Groups, Linear, Shape, grouped_mlp, pack};
use kvhook_kernels::cuda::rotate::{Rotate, Shift, rotate};
use kvhook_kernels::cuda::window_attention::{
    LogSumExp, WindowAttention, WindowQueries, scratch_bytes, window_attention,
};
use kvhook_kernels::cuda::{DeviceSlice, Rows};
use kvhook_kernels::rotate::{Pairing, Rotary};
use kvhook_kernels::{BlockTable, Dtype, IndexKind, Layout};

use super::{Bench, HEADS, LAYERS, Memory, Random};

/// Additions and multiplications a second.
const PRODUCTS: f64 = 776e12;

pub(super) fn run(bench: &Bench) {
    for length in bench.filter.lengths() {
        let keys = Keys::new(bench, length, 128, 0);
        keys.attention(bench, 64, 4, false);
        keys.attention(bench, 64, 4, true);
        keys.attention(bench, 64, 1, false);
        keys.attention(bench, 8, 4, false);
        keys.attention(bench, 1, 4, false);
        keys.rotate(bench);
        keys.compress(bench, 5, Arithmetic::TensorCores);
    }
    let wanted = |length: usize| bench.filter.tokens.is_none_or(|tokens| tokens == length);
    if wanted(32_768) {
        let paged = Keys::new(bench, 32_768, 128, 16);
        paged.attention(bench, 64, 4, false);
        paged.attention(bench, 1, 4, false);
        paged.rotate(bench);
        paged.compress(bench, 5, Arithmetic::TensorCores);
        let narrow = Keys::new(bench, 32_768, 64, 0);
        narrow.attention(bench, 64, 4, false);
        narrow.attention(bench, 1, 4, false);
        narrow.compress(bench, 5, Arithmetic::TensorCores);
    }
    if wanted(8192) {
        let short = Keys::new(bench, 8192, 128, 0);
        short.compress(bench, 2, Arithmetic::TensorCores);
        short.compress(bench, 8, Arithmetic::TensorCores);
        short.compress(bench, 5, Arithmetic::Exact);
    }
}

/// Bytes that memory moves while the products of one pass of attention are done.
pub(super) fn attention_bytes(bench: &Bench, rows: usize, length: usize, head_dim: usize) -> f64 {
    2.0 * (rows * HEADS * head_dim) as f64 * length as f64 / PRODUCTS * bench.bandwidth
}

/// Attention scores of all layers.
pub(super) struct Attention {
    items: Vec<WindowAttention>,
    scratch: Memory,
    _memory: [Memory; 3],
}

impl Attention {
    /// With `group` query heads for each KV head.
    pub(super) fn new(
        bench: &Bench,
        keys: &[Rows],
        length: usize,
        window: usize,
        group: usize,
        with_lse: bool,
    ) -> Self {
        let head_dim = keys[0].head_dim();
        let rows = window * group;
        let element_count = rows * HEADS * head_dim;
        let queries = bench.cache(LAYERS * element_count * 2);
        let lse = Memory::of(&vec![8.0f32; rows * HEADS]);
        let scores = Memory::new(LAYERS * HEADS * length * 4);
        let part = |layer: usize, len: usize| layer * len..(layer + 1) * len;
        let items: Vec<WindowAttention> = (0..LAYERS)
            .map(|layer| WindowAttention {
                keys: keys[layer],
                queries: WindowQueries {
                    data: queries.slice::<u8>().part(part(layer, element_count * 2)).unwrap(),
                    dtype: Dtype::Bf16,
                    window,
                    query_heads: group * HEADS,
                    stride_position: group * HEADS * head_dim,
                    stride_head: head_dim,
                    scale: 1.0 / (head_dim as f32).sqrt(),
                },
                log_sum_exp: with_lse.then(|| LogSumExp { data: lse.slice(), stride_position: 1, stride_head: window }),
                length,
                scores: scores.slice().part(part(layer, HEADS * length)).unwrap(),
            })
            .collect();
        let scratch = Memory::new(scratch_bytes(&items).unwrap());
        Self { items, scratch, _memory: [queries, lse, scores] }
    }

    pub(super) fn run(&self, bench: &Bench) {
        window_attention(&bench.device, bench.stream(), &self.items, 5, self.scratch.slice()).unwrap();
    }

    pub(super) fn scores(&self, layer: usize) -> DeviceSlice<f32> {
        self.items[layer].scores
    }
}

/// Keys of all layers, or values.
struct Keys {
    rows: Vec<Rows>,
    length: usize,
    head_dim: usize,
    block: usize,
    _memory: Vec<Memory>,
}

impl Keys {
    fn new(bench: &Bench, length: usize, head_dim: usize, block: usize) -> Self {
        let mut random = Random(7);
        let mut table: Vec<i32> = (0..length.checked_div(block).unwrap_or(0) as i32).collect();
        for place in (1..table.len()).rev() {
            table.swap(place, (random.next() >> 20) as usize % (place + 1));
        }
        let table = Memory::of(&table);
        let mut memory: Vec<Memory> = (0..LAYERS).map(|_| bench.cache(length * HEADS * head_dim * 2)).collect();
        let rows = memory.iter().map(|layer| {
            let (layout, entries) = if block == 0 {
                (Layout::head_major(Dtype::Bf16, HEADS, length, head_dim), None)
            } else {
                let data = table.address as *const u8;
                let entries = BlockTable { data, kind: IndexKind::I32, stride_head: 0, blocks: length.div_ceil(block) };
                (Layout::paged_token_major(Dtype::Bf16, HEADS, length, head_dim, block), Some(entries))
            };
            // SAFETY: the memory is that long, and the table names blocks of it.
            unsafe { Rows::new(layer.address, layout, entries) }.unwrap()
        });
        let rows = rows.collect();
        memory.push(table);
        Self { rows, length, head_dim, block, _memory: memory }
    }

    fn bytes(&self) -> f64 {
        (self.length * HEADS * self.head_dim * 2) as f64
    }

    fn name(&self, operation: &str) -> String {
        let paged = if self.block > 0 { format!(" paged {}", self.block) } else { String::new() };
        format!("{operation}, d {}{paged}", self.head_dim)
    }

    fn attention(&self, bench: &Bench, window: usize, group: usize, with_lse: bool) {
        let rows = window * group;
        let attention = Attention::new(bench, &self.rows, self.length, window, group, with_lse);
        let scores_bytes = (HEADS * self.length * 4) as f64;
        let pass = self.bytes().max(attention_bytes(bench, rows, self.length, self.head_dim));
        let passes = if with_lse || rows <= 8 { 1.0 } else { 2.0 };
        let lse = if with_lse { " lse" } else { "" };
        let name = self.name(&format!("attention W {window} G {group}{lse}"));
        bench.row(&name, self.length, self.bytes() + scores_bytes, passes * pass + scores_bytes, || {
            attention.run(bench)
        });
    }

    fn rotate(&self, bench: &Bench) {
        let pairs = self.head_dim / 2;
        let frequencies: Vec<f64> = (0..pairs).map(|pair| 5e5f64.powf(-(pair as f64) / pairs as f64)).collect();
        let rotary = Rotary { frequencies: &frequencies, pairing: Pairing::HalfSplit };
        let positions: Vec<u32> = (0..self.length as u32).map(|token| token * 2 + 1).collect();
        let positions = Memory::of(&positions);
        let items: Vec<Rotate> = (0..LAYERS)
            .map(|layer| Rotate {
                rows: self.rows[layer],
                tokens: 0..self.length,
                shift: Shift::From(Indices::shared(positions.slice())),
            })
            .collect();
        let floor = 2.0 * self.bytes();
        bench.row(&self.name("rotate"), self.length, floor, floor, || {
            rotate(&bench.device, bench.stream(), &items, &rotary).unwrap();
        });
    }

    /// K and V of all layers, both read from the keys' memory.
    fn compress(&self, bench: &Bench, factor: usize, arithmetic: Arithmetic) {
        let dim = self.head_dim;
        let shape = Shape { factor, head_dim: dim, dtype: Dtype::Bf16, arithmetic };
        let mut random = Random(11);
        let mut layer = |inputs: usize| -> (Vec<f32>, Vec<f32>) {
            let scale = (3.0 / inputs as f32).sqrt();
            let mut value = || scale * ((random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0);
            ((0..inputs * dim).map(|_| value()).collect(), (0..dim).map(|_| value()).collect())
        };
        let layers = [layer(factor * dim), layer(dim), layer(dim)];
        let packed =
            pack(shape, [0, 1, 2].map(|at: usize| Linear { weight: &layers[at].0, bias: &layers[at].1 })).unwrap();
        let count = self.length / factor;
        let results = Memory::new(2 * LAYERS * HEADS * count * dim * 2);
        let weights: Vec<Memory> = (0..2 * LAYERS).map(|_| Memory::of(&packed)).collect();
        let items: Vec<Compress> = (0..2 * LAYERS)
            .map(|tensor| {
                let layout = Layout::head_major(Dtype::Bf16, HEADS, count, dim);
                let address = results.address + (tensor * HEADS * count * dim * 2) as u64;
                Compress {
                    mlp: GroupedMlp::new(shape, weights[tensor].slice()).unwrap(),
                    source: self.rows[tensor / 2],
                    // SAFETY: a part of `results` that no other item writes.
                    destination: unsafe { Rows::new(address, layout, None) }.unwrap(),
                    groups: Groups { source_start: 0, count, destination_start: 0 },
                    positions: None,
                }
            })
            .collect();
        // All of K, then all of V: nothing of the memory that both are read from is left in the cache in between.
        let items: Vec<Compress> = items.iter().step_by(2).chain(items.iter().skip(1).step_by(2)).copied().collect();
        let bytes = 2.0 * self.bytes() * (factor + 1) as f64 / factor as f64;
        let products = 2.0 * (2 * count * HEADS * (factor + 2) * dim * dim) as f64;
        let phases = bytes.max(products / PRODUCTS * bench.bandwidth);
        let name = self.name(&format!("MLP f {factor} {arithmetic:?}"));
        bench.row(&name, self.length, bytes, phases, || {
            grouped_mlp(&bench.device, bench.stream(), &items, None).unwrap();
        });
    }
}
