//! The grouped MLP: the CPU's bits where it is exact, and a twin that rounds in the same places on tensor cores.

use half::{bf16, f16};
use kvhook_kernels::cuda::Outcome;
use kvhook_kernels::cuda::grouped_mlp::{Arithmetic, Compress, GroupedMlp, Shape, grouped_mlp, pack};
use kvhook_kernels::cuda::{Fault, FaultKind};
use kvhook_kernels::grouped_mlp::{self as cpu, Groups, Linear};
use kvhook_kernels::{Dtype, IndexKind};

use crate::common::{self, Cache, Random};
use crate::gpu::{DeviceCache, Judge, Memory, OwnStream, any_shape, device, epsilon, rounds};

struct Weights {
    factor: usize,
    dim: usize,
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Weights {
    fn new(random: &mut Random, factor: usize, dim: usize) -> Self {
        let mut layer = |inputs: usize| {
            let scale = (3.0 / inputs as f32).sqrt();
            let weight: Vec<f32> = (0..dim * inputs).map(|_| scale * random.real()).collect();
            (weight, (0..dim).map(|_| random.real()).collect())
        };
        Self { factor, dim, layers: vec![layer(factor * dim), layer(dim), layer(dim)] }
    }

    fn linear(&self) -> [Linear<'_>; 3] {
        [0, 1, 2].map(|layer: usize| Linear { weight: &self.layers[layer].0, bias: &self.layers[layer].1 })
    }

    /// Weights and biases in f64, where weights are rounded to `dtype`.
    fn rounded(&self, dtype: Dtype) -> Vec<(Vec<f64>, Vec<f64>)> {
        let round_all = |values: &[f32]| values.iter().map(|&value| round(f64::from(value), dtype)).collect();
        let widen = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect();
        self.layers.iter().map(|(weight, bias)| (round_all(weight), widen(bias))).collect()
    }
}

fn round(value: f64, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f64(value).to_f64(),
        Dtype::Bf16 => bf16::from_f64(value).to_f64(),
    }
}

/// The formula in f64, where hidden values are rounded to `dtype`.
fn apply(layers: &[(Vec<f64>, Vec<f64>)], x: &[f64], dtype: Dtype) -> Vec<f64> {
    let mut x = x.to_vec();
    for (number, (weight, bias)) in layers.iter().enumerate() {
        let rows = weight.chunks(x.len()).zip(bias);
        let sums = rows.map(|(row, bias)| row.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>() + bias);
        x = sums.map(|y| if number < 2 { round(y.max(0.0), dtype) } else { y }).collect();
    }
    x
}

/// One item, on both sides.
struct Pair {
    weights: Weights,
    packed: Memory,
    shape: Shape,
    source: Cache,
    destination: Cache,
    source_on_device: DeviceCache,
    destination_on_device: DeviceCache,
    groups: Groups,
}

impl Pair {
    fn new(random: &mut Random, arithmetic: Arithmetic, length: usize) -> Self {
        let exact = arithmetic == Arithmetic::Exact;
        let dims: &[usize] = if exact { &[8, 10, 33, 64, 80, 96, 128, 256] } else { &[64, 64, 96, 128, 128] };
        let capacity = 1 + random.below(length);
        let mut shape = any_shape(random, capacity, dims);
        let mut other = any_shape(random, capacity, dims);
        if !exact {
            shape.dtype = [Dtype::F16, Dtype::Bf16][random.below(2)];
            (shape.element_step, other.element_step) = (1, 1);
        }
        shape.kv_heads = 1 + random.below(4);
        (other.dtype, other.head_dim, other.kv_heads) = (shape.dtype, shape.head_dim, shape.kv_heads);
        let factor = [1, 2, 3, 4, 5, 7][random.below(6)];
        let mlp = Shape { factor, head_dim: shape.head_dim, dtype: shape.dtype, arithmetic };
        let weights = Weights::new(random, factor, shape.head_dim);
        let source_start = random.below(capacity);
        let count = (capacity - source_start) / factor;
        let destination_start = random.below(capacity - count + 1);
        let (source, destination) = (Cache::new(shape), Cache::new(other));
        Self {
            packed: Memory::new(&pack(mlp, weights.linear()).unwrap()),
            weights,
            shape: mlp,
            source_on_device: DeviceCache::new(&source, exact && random.below(4) == 0),
            destination_on_device: DeviceCache::new(&destination, exact && random.below(4) == 0),
            source,
            destination,
            groups: Groups { source_start, count, destination_start },
        }
    }

    fn item(&self) -> Compress {
        Compress {
            mlp: GroupedMlp::new(self.shape, self.packed.slice()).unwrap(),
            source: self.source_on_device.rows(),
            destination: self.destination_on_device.rows(),
            groups: self.groups,
            positions: None,
        }
    }

    /// The CPU's rows.
    fn run_on_cpu(&mut self) {
        let mlp = cpu::GroupedMlp::pack(self.weights.factor, self.weights.dim, self.weights.linear()).unwrap();
        let heads = 0..self.source.shape.kv_heads;
        let mut scratch = vec![0.0; mlp.scratch_len()];
        let (source, destination) = (self.source.rows(), self.destination.rows());
        cpu::grouped_mlp(&mlp, &source, &destination, heads, self.groups, &mut scratch).unwrap();
    }

    /// Compares the device's rows with the twin's and the CPU's, and everything around them with what was there.
    fn compare_rounded(mut self, worst: &mut [f64; 2]) {
        let before = self.destination.bytes.clone();
        self.run_on_cpu();
        let Groups { source_start, count, destination_start } = self.groups;
        let heads = self.source.shape.kv_heads;
        let places: Vec<_> = (0..heads).flat_map(|head| (0..count).map(move |group| (head, group))).collect();
        let on_cpu: Vec<Vec<f64>> =
            places.iter().map(|&(head, group)| self.destination.get(destination_start + group, head)).collect();
        self.destination.bytes = self.destination_on_device.memory.bytes();
        let mut around = self.destination.bytes.clone();
        let (dim, dtype, factor) = (self.shape.head_dim, self.shape.dtype, self.shape.factor);
        let layers = self.weights.rounded(dtype);
        for ((head, group), cpu_row) in places.into_iter().zip(&on_cpu) {
            let row = destination_start + group;
            let found = self.destination.get(row, head);
            let first = source_start + group * factor;
            let x: Vec<f64> = (first..first + factor).flat_map(|row| self.source.get(row, head)).collect();
            let twin = apply(&layers, &x, dtype);
            let largest = twin.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
            for ((found, twin), cpu) in found.iter().zip(&twin).zip(cpu_row) {
                let off = [(found - twin).abs(), (found - cpu).abs()].map(|off| off / largest / epsilon(dtype));
                // Half a step, and hidden values that round the other way; against the CPU four half steps.
                assert!(off[0] <= 1.0 && off[1] <= 2.0, "{found} for {twin}, CPU {cpu}, {:?}", self.shape);
                *worst = [worst[0].max(off[0]), worst[1].max(off[1])];
            }
            for element in 0..dim {
                let at = self.destination.offset(row, head, element);
                around[at..at + 2].copy_from_slice(&before[at..at + 2]);
            }
        }
        assert!(around == before, "something beside the results was written");
        assert!(self.source_on_device.memory.bytes() == self.source.bytes, "the source is as it was");
    }
}

#[test]
fn exact_arithmetic_gives_the_bits_of_the_cpu() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(0xa11);
    for _ in 0..rounds(24) {
        let mut pairs: Vec<Pair> =
            (0..1 + random.below(4)).map(|_| Pair::new(&mut random, Arithmetic::Exact, 400)).collect();
        let items: Vec<Compress> = pairs.iter().map(Pair::item).collect();
        let judge = Judge::new();
        judge.verdict().clear(device, stream.stream()).unwrap();
        grouped_mlp(device, stream.stream(), &items, Some(&judge.verdict())).unwrap();
        assert_eq!(judge.outcome(device, &stream), Outcome::Good);
        for pair in &mut pairs {
            pair.run_on_cpu();
            assert!(pair.destination_on_device.memory.bytes() == pair.destination.bytes, "{:?}", pair.shape);
        }
    }
}

#[test]
fn tensor_cores_round_where_they_say_alone_and_in_a_batch() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(0xb22);
    let mut worst = [0.0; 2];
    for round in 0..rounds(16) {
        let length = if round < 4 { 3000 } else { 300 };
        let pairs: Vec<Pair> =
            (0..1 + random.below(4)).map(|_| Pair::new(&mut random, Arithmetic::TensorCores, length)).collect();
        let items: Vec<Compress> = pairs.iter().map(Pair::item).collect();
        grouped_mlp(device, stream.stream(), &items, None).unwrap();
        stream.wait();
        let together: Vec<Vec<u8>> = pairs.iter().map(|pair| pair.destination_on_device.memory.bytes()).collect();
        for ((pair, item), together) in pairs.into_iter().zip(&items).zip(together) {
            grouped_mlp(device, stream.stream(), std::slice::from_ref(item), None).unwrap();
            stream.wait();
            assert!(pair.destination_on_device.memory.bytes() == together, "alone as in a batch");
            pair.compare_rounded(&mut worst);
        }
    }
    println!(
        "grouped_mlp on tensor cores: at most {:.2} steps of the row's largest beside the twin, {:.2} beside the CPU",
        worst[0], worst[1]
    );
}

#[test]
fn a_result_that_does_not_fit_is_a_fault() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    for (arithmetic, dtype) in [(Arithmetic::Exact, Dtype::F16), (Arithmetic::TensorCores, Dtype::F16)] {
        let (factor, dim, kind) = (2, 64, IndexKind::I32);
        let shape = |capacity| common::Shape {
            dtype,
            kv_heads: 3,
            capacity,
            head_dim: dim,
            block_size: 0,
            token_major: false,
            element_step: 1,
            table_per_head: false,
            kind,
            seed: 2,
        };
        let (mut source, destination) = (Cache::new(shape(200)), Cache::new(shape(100)));
        for token in 0..200 {
            for head in 0..3 {
                let large = head == 1 && token == 54;
                source.set(token, head, &vec![if large { 1000.0 } else { 0.5 }; dim]);
            }
        }
        // y = 100 x of the first row.
        let identity = |scale: f32, inputs: usize| -> Vec<f32> {
            (0..dim * inputs).map(|at| if at / inputs == at % inputs { scale } else { 0.0 }).collect()
        };
        let zeros = vec![0.0; dim];
        let [first, second, third] = [identity(1.0, factor * dim), identity(1.0, dim), identity(100.0, dim)];
        let layers = [&first, &second, &third].map(|weight| Linear { weight, bias: &zeros });
        let mlp = Shape { factor, head_dim: dim, dtype, arithmetic };
        let packed = Memory::new(&pack(mlp, layers).unwrap());
        let (from, to) = (DeviceCache::new(&source, false), DeviceCache::new(&destination, false));
        let item = Compress {
            mlp: GroupedMlp::new(mlp, packed.slice()).unwrap(),
            source: from.rows(),
            destination: to.rows(),
            groups: Groups { source_start: 0, count: 90, destination_start: 5 },
            positions: None,
        };
        let positions: Vec<u32> = (0..100).collect();
        let (of_good, of_item) = (Memory::of(&positions), Memory::of(&positions));
        let good = Compress { groups: Groups { count: 27, ..item.groups }, positions: Some(of_good.slice()), ..item };
        let item = Compress { positions: Some(of_item.slice()), ..item };
        let judge = Judge::new();
        for (items, expected) in [
            (vec![good], Outcome::Good),
            (vec![good, item], Outcome::Bad(Fault { item: 1, head: 1, place: 32, kind: FaultKind::TooLarge })),
        ] {
            judge.verdict().clear(device, stream.stream()).unwrap();
            grouped_mlp(device, stream.stream(), &items, Some(&judge.verdict())).unwrap();
            assert_eq!(judge.outcome(device, &stream), expected);
        }
        // The position of that row alone is spoilt, and of that item alone.
        let spoilt: Vec<u32> = positions.iter().map(|&place| if place == 32 { u32::MAX } else { place }).collect();
        assert_eq!(of_good.values::<u32>(), positions);
        assert_eq!(of_item.values::<u32>(), spoilt);
    }
}
