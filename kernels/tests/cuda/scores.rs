//! Norms and KeyDiff: scores within rounding of the CPU's, the same bytes alone and in a batch.

use kvhook_kernels::cuda::key_diff::{self, KeyDiff, key_diff};
use kvhook_kernels::cuda::norms::{RowNorms, Sign, row_norms};
use kvhook_kernels::cuda::{Device, DeviceSlice};
use kvhook_kernels::{Dtype, IndexKind, norms};

use crate::common::{Cache, Random, Shape};
use crate::gpu::{DeviceCache, Memory, OwnStream, device, shape};

/// The largest difference, and the largest value of the second.
fn difference(found: &[f32], expected: &[f32]) -> (f32, f32) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let mut difference = 0.0f32;
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.is_finite(), "a score was not written, or is {found}");
        difference = difference.max((found - expected).abs());
    }
    (difference, largest)
}

fn random_shapes(random: &mut Random, count: usize, longest: usize) -> Vec<Shape> {
    (0..count)
        .map(|_| {
            let capacity = 1 + random.below(longest);
            shape(random, capacity)
        })
        .collect()
}

/// Long enough for several tiles a chain, in every layout.
fn long_shapes(random: &mut Random) -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (dtype, head_dim) in [
        (Dtype::Bf16, 128),
        (Dtype::F16, 64),
        (Dtype::F32, 96),
        (Dtype::F32, 256),
        (Dtype::Bf16, 256),
        (Dtype::F16, 512),
    ] {
        for (token_major, block_size) in [(false, 0), (true, 0), (true, 64), (false, 256)] {
            shapes.push(Shape {
                dtype,
                kv_heads: 5,
                capacity: 3000 + random.below(500),
                head_dim,
                block_size,
                token_major,
                element_step: 1,
                table_per_head: false,
                kind: IndexKind::I32,
                seed: random.next() & !1,
            });
        }
    }
    shapes
}

/// Caches on both sides, and memory for their scores.
struct Scored {
    cache: Cache,
    on_device: DeviceCache,
    out: Memory,
    len: usize,
}

impl Scored {
    fn new(shape: Shape, odd: bool) -> Self {
        let cache = Cache::new(shape);
        let len = cache.shape.capacity * cache.shape.kv_heads;
        let on_device = DeviceCache::new(&cache, odd);
        // NaN until it is written.
        Self { cache, on_device, out: Memory::of(&vec![f32::NAN; len]), len }
    }

    fn out(&self) -> DeviceSlice<f32> {
        self.out.slice()
    }
}

fn all(random: &mut Random) -> Vec<Scored> {
    let mut shapes = random_shapes(random, 60, 900);
    shapes.extend(long_shapes(random));
    shapes.into_iter().map(|shape| Scored::new(shape, random.below(5) == 0)).collect()
}

fn run_norms(device: &Device, stream: &OwnStream, items: &[&Scored], sign: Sign) -> Vec<Vec<f32>> {
    let list: Vec<RowNorms> = items
        .iter()
        .map(|item| RowNorms { rows: item.on_device.rows(), tokens: 0..item.cache.shape.capacity, out: item.out() })
        .collect();
    row_norms(device, stream.stream(), &list, sign).unwrap();
    stream.wait();
    items.iter().map(|item| item.out.values()).collect()
}

fn run_key_diff(device: &Device, stream: &OwnStream, items: &[&Scored]) -> Vec<Vec<f32>> {
    let list: Vec<KeyDiff> = items
        .iter()
        .map(|item| KeyDiff { keys: item.on_device.rows(), length: item.cache.shape.capacity, out: item.out() })
        .collect();
    let scratch = Memory::poisoned(key_diff::scratch_bytes(&list).unwrap());
    key_diff(device, stream.stream(), &list, scratch.slice()).unwrap();
    stream.wait();
    items.iter().map(|item| item.out.values()).collect()
}

#[test]
fn norms_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(31));
    let mut items = all(&mut random);
    let together = run_norms(device, &stream, &items.iter().collect::<Vec<_>>(), Sign::Negative);
    for (item, together) in items.iter_mut().zip(together) {
        let shape = item.cache.shape.clone();
        let alone = run_norms(device, &stream, &[item], Sign::Positive).remove(0);
        assert!(alone.iter().zip(&together).all(|(alone, other)| *alone == -*other), "{shape:?}");
        let mut expected = vec![0.0; item.len];
        let rows = item.cache.rows();
        norms::row_norms(&rows, 0..shape.kv_heads, 0..shape.capacity, &mut expected).unwrap();
        let (difference, largest) = difference(&alone, &expected);
        assert!(difference <= 1e-6 * largest, "{difference} of {largest}: {shape:?}");
    }
}

#[test]
fn norms_of_a_part_of_the_tokens() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(32));
    for shape in random_shapes(&mut random, 20, 600) {
        let mut cache = Cache::new(shape.clone());
        let on_device = DeviceCache::new(&cache, false);
        let start = random.below(shape.capacity);
        let tokens = start..shape.capacity;
        let out = Memory::of(&vec![f32::NAN; tokens.len() * shape.kv_heads]);
        let item = RowNorms { rows: on_device.rows(), tokens: tokens.clone(), out: out.slice() };
        row_norms(device, stream.stream(), &[item], Sign::Positive).unwrap();
        stream.wait();
        let mut expected = vec![0.0; tokens.len() * shape.kv_heads];
        norms::row_norms(&cache.rows(), 0..shape.kv_heads, tokens, &mut expected).unwrap();
        let (difference, largest) = difference(&out.values::<f32>(), &expected);
        assert!(difference <= 1e-6 * largest, "{difference} of {largest}: {shape:?}");
    }
}

#[test]
fn key_diff_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (OwnStream::new(), Random(33));
    let mut items = all(&mut random);
    // Keys of norm 0 score 0.
    for head in 0..items[0].cache.shape.kv_heads {
        let zeros = vec![0.0; items[0].cache.shape.head_dim];
        items[0].cache.set(0, head, &zeros);
    }
    items[0].on_device = DeviceCache::new(&items[0].cache, false);
    let together = run_key_diff(device, &stream, &items.iter().collect::<Vec<_>>());
    for (item, together) in items.iter_mut().zip(together) {
        let shape = item.cache.shape.clone();
        let alone = run_key_diff(device, &stream, &[item]).remove(0);
        assert!(alone.iter().zip(&together).all(|(alone, other)| alone.to_bits() == other.to_bits()), "{shape:?}");
        let mut expected = vec![0.0; item.len];
        kvhook_kernels::key_diff::key_diff(&item.cache.rows(), 0..shape.kv_heads, shape.capacity, &mut expected)
            .unwrap();
        // A score is a cosine; the mean direction of random keys is a small sum of large parts.
        let (difference, _) = difference(&alone, &expected);
        assert!(difference <= 2e-5, "{difference}: {shape:?}");
    }
}
