//! Re-rotation against the CPU's.

use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::rotate::{Rotate, Shift, rotate};
use kvhook_kernels::rotate::{self as cpu, Pairing, Rotary};

use crate::common::{Cache, Random};
use crate::gpu::{DeviceCache, Memory, OwnStream, device, epsilon, rounds, shape};

/// One item, on both sides.
struct Pair {
    cache: Cache,
    on_device: DeviceCache,
    tokens: std::ops::Range<usize>,
    by: Option<i64>,
    positions: Vec<u32>,
    on_device_positions: Memory,
    shared: bool,
}

impl Pair {
    fn new(random: &mut Random, pairs: usize) -> Self {
        let capacity = 1 + random.below(500);
        let mut shape = shape(random, capacity);
        while shape.head_dim < 2 * pairs {
            shape.head_dim *= 2;
        }
        let start = random.below(capacity);
        let tokens = start..start + random.below(capacity - start + 1);
        let shared = random.below(3) == 0;
        let lists = if shared { 1 } else { shape.kv_heads };
        let positions: Vec<u32> = (0..lists * tokens.len()).map(|_| random.below(1_000_000) as u32).collect();
        let cache = Cache::new(shape);
        Self {
            on_device: DeviceCache::new(&cache, random.below(4) == 0),
            on_device_positions: Memory::of(&positions),
            cache,
            tokens,
            by: (random.below(2) == 0).then(|| random.below(2_000_000) as i64 - 1_000_000),
            positions,
            shared,
        }
    }

    fn item(&self) -> Rotate {
        let count = self.tokens.len();
        let data = self.on_device_positions.slice();
        let indices = Indices { data, stride_head: if self.shared { 0 } else { count }, count };
        let shift = self.by.map_or(Shift::From(indices), Shift::All);
        Rotate { rows: self.on_device.rows(), tokens: self.tokens.clone(), shift }
    }

    fn compare(mut self, rotary: &Rotary<'_>) {
        let count = self.tokens.len();
        let indices =
            kvhook_kernels::Indices { data: &self.positions, stride_head: if self.shared { 0 } else { count }, count };
        let shift = self.by.map_or(cpu::Shift::From(indices), cpu::Shift::All);
        let heads = self.cache.shape.kv_heads;
        cpu::rotate(&self.cache.rows(), rotary, &shift, 0..heads, self.tokens.clone()).unwrap();
        let places: Vec<_> = (0..heads).flat_map(|head| self.tokens.clone().map(move |token| (token, head))).collect();
        let rows: Vec<Vec<f64>> = places.iter().map(|&(token, head)| self.cache.get(token, head)).collect();
        let on_cpu = std::mem::replace(&mut self.cache.bytes, self.on_device.memory.bytes());
        let mut around = self.cache.bytes.clone();
        let tolerance = 2e-6f64.max(1.01 * epsilon(self.cache.shape.dtype));
        for ((token, head), expected) in places.into_iter().zip(rows) {
            let found = self.cache.get(token, head);
            for (element, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!((found - expected).abs() <= tolerance, "{found} for {expected}, {:?}", self.cache.shape);
                let at = self.cache.offset(token, head, element);
                let size = self.cache.shape.dtype.size();
                around[at..at + size].copy_from_slice(&on_cpu[at..at + size]);
            }
        }
        assert!(around == on_cpu, "something beside the rows was written");
    }
}

#[test]
fn equals_the_cpu() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(0xc33);
    for _ in 0..rounds(40) {
        let pairs = [1, 3, 4, 16, 32, 32, 64, 64][random.below(8)];
        let frequencies: Vec<f64> = (0..pairs).map(|pair| 10_000f64.powf(-(pair as f64) / pairs as f64)).collect();
        let pairing = [Pairing::HalfSplit, Pairing::Interleaved][random.below(2)];
        let rotary = Rotary { frequencies: &frequencies, pairing };
        let items: Vec<Pair> = (0..1 + random.below(3)).map(|_| Pair::new(&mut random, pairs)).collect();
        let described: Vec<Rotate> = items.iter().map(Pair::item).collect();
        rotate(device, stream.stream(), &described, &rotary).unwrap();
        stream.wait();
        items.into_iter().for_each(|item| item.compare(&rotary));
    }
}
