//! SnapKV's score against the CPU's.

use half::{bf16, f16};
use kvhook_kernels::cuda::DeviceSlice;
use kvhook_kernels::cuda::window_attention::{
    LogSumExp, WindowAttention, WindowQueries, scratch_bytes, window_attention,
};
use kvhook_kernels::{Dtype, window_attention as cpu};

use crate::common::{Cache, Random, Shape};
use crate::gpu::{DeviceCache, Memory, OwnStream, any_shape, device, rounds};

/// Of the head's largest score.
const TOLERANCE: f32 = 1e-4;

/// One item, on both sides.
struct Pair {
    cache: Cache,
    on_device: DeviceCache,
    /// As f32, dense `[window, query_heads, head_dim]`; exact in the keys' dtype.
    queries: Vec<f32>,
    queries_on_device: Memory,
    /// Behind each row of queries on the device.
    padding: usize,
    log_sum_exp: Option<Memory>,
    scores: Memory,
    window: usize,
    query_heads: usize,
    length: usize,
    scale: f32,
}

impl Pair {
    fn new(random: &mut Random, shape: Shape, window: usize, group: usize, with_lse: bool) -> Self {
        let (dim, dtype) = (shape.head_dim, shape.dtype);
        let length = shape.capacity - random.below(shape.capacity - window + 1).min(40);
        let query_heads = group * shape.kv_heads;
        let padding = [0, 0, 8, 3][random.below(4)];
        let round = |value: f32| match dtype {
            Dtype::F32 => value,
            Dtype::F16 => f16::from_f32(value).to_f32(),
            Dtype::Bf16 => bf16::from_f32(value).to_f32(),
        };
        let queries: Vec<f32> = (0..window * query_heads * dim).map(|_| round(4.0 * random.real())).collect();
        let mut bytes = Vec::new();
        for row in queries.chunks(dim) {
            for &value in row.iter().chain(std::iter::repeat_n(&f32::NAN, padding)) {
                match dtype {
                    Dtype::F32 => bytes.extend(value.to_ne_bytes()),
                    Dtype::F16 => bytes.extend(f16::from_f32(value).to_ne_bytes()),
                    Dtype::Bf16 => bytes.extend(bf16::from_f32(value).to_ne_bytes()),
                }
            }
        }
        let cache = Cache::new(shape);
        let scale = 1.0 / (dim as f32).sqrt();
        let log_sum_exp = with_lse.then(|| {
            let rows = (0..query_heads).flat_map(|head| (0..window).map(move |position| (head, position)));
            let lse = rows.map(|(head, position)| {
                let query = &queries[(position * query_heads + head) * dim..][..dim];
                let logits: Vec<f64> = (0..=length - window + position)
                    .map(|token| {
                        let key = cache.get(token, head / group);
                        key.iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum::<f64>() * f64::from(scale)
                    })
                    .collect();
                logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() as f32
            });
            Memory::of(&lse.collect::<Vec<f32>>())
        });
        Self {
            on_device: DeviceCache::new(&cache, random.below(6) == 0),
            queries,
            queries_on_device: Memory::new(&bytes),
            padding,
            log_sum_exp,
            scores: Memory::poisoned(cache.shape.kv_heads * length * 4),
            cache,
            window,
            query_heads,
            length,
            scale,
        }
    }

    fn random(random: &mut Random) -> Self {
        let window = [1, 1, 2, 3, 7, 8, 17, 31, 63, 64][random.below(10)];
        let group = [1, 2, 3, 4, 4, 7, 8][random.below(7)];
        let capacity = window + [0, 1, random.below(60), random.below(900), random.below(5000)][random.below(5)];
        let mut shape = any_shape(random, capacity, &[8, 40, 64, 64, 80, 96, 128, 128, 128, 256]);
        shape.kv_heads = 1 + random.below(3);
        let with_lse = capacity < 300 && random.below(3) == 0;
        Self::new(random, shape, window, group, with_lse)
    }

    fn item(&self) -> WindowAttention {
        let row = self.cache.shape.head_dim + self.padding;
        WindowAttention {
            keys: self.on_device.rows(),
            queries: WindowQueries {
                data: self.queries_on_device.slice(),
                dtype: self.cache.shape.dtype,
                window: self.window,
                query_heads: self.query_heads,
                stride_position: self.query_heads * row,
                stride_head: row,
                scale: self.scale,
            },
            log_sum_exp: self.log_sum_exp.as_ref().map(|memory| LogSumExp {
                data: memory.slice(),
                stride_position: 1,
                stride_head: self.window,
            }),
            length: self.length,
            scores: self.scores.slice(),
        }
    }

    fn expected(&mut self, kernel: usize) -> Vec<f32> {
        let heads = self.cache.shape.kv_heads;
        let mut expected = vec![0.0; heads * self.length];
        let queries =
            cpu::WindowQueries::dense(&self.queries, self.window, self.query_heads, self.cache.shape.head_dim);
        cpu::window_attention(&self.cache.rows(), &queries, 0..heads, self.length, kernel, &mut expected).unwrap();
        expected
    }

    fn describe(&self) -> String {
        let (window, length, heads) = (self.window, self.length, self.query_heads);
        let lse = self.log_sum_exp.is_some();
        format!("window {window}, {heads} query heads, length {length}, lse {lse}, {:?}", self.cache.shape)
    }
}

#[test]
fn equals_the_cpu_alone_and_in_a_batch() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(0x51_7a9e);
    let mut worst = 0.0f32;
    for _ in 0..rounds(40) {
        let mut pairs: Vec<Pair> = (0..1 + random.below(6)).map(|_| Pair::random(&mut random)).collect();
        let kernel = [1, 3, 5, 5, 7, 33][random.below(6)];
        let items: Vec<WindowAttention> = pairs.iter().map(Pair::item).collect();
        let scratch = Memory::poisoned(scratch_bytes(&items).unwrap());
        window_attention(device, stream.stream(), &items, kernel, scratch.slice()).unwrap();
        stream.wait();
        let together: Vec<Vec<f32>> = pairs.iter().map(|pair| pair.scores.values()).collect();
        for (pair, found) in pairs.iter_mut().zip(&together) {
            let expected = pair.expected(kernel);
            for (head, (found, expected)) in found.chunks(pair.length).zip(expected.chunks(pair.length)).enumerate() {
                let largest = expected.iter().fold(0.0f32, |most, &score| most.max(score));
                for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
                    let off = (found - expected).abs();
                    let what = pair.describe();
                    assert!(off <= TOLERANCE * largest, "{what}, head {head}, token {token}: {found} for {expected}");
                    if largest > 0.0 {
                        worst = worst.max(off / largest);
                    }
                }
            }
        }
        for (pair, item) in pairs.iter().zip(&items) {
            let scratch = Memory::poisoned(scratch_bytes(std::slice::from_ref(item)).unwrap());
            window_attention(device, stream.stream(), std::slice::from_ref(item), kernel, scratch.slice()).unwrap();
            stream.wait();
            let alone: Vec<f32> = pair.scores.values();
            let place = items.iter().position(|other| std::ptr::eq(other, item)).unwrap();
            assert!(alone.iter().zip(&together[place]).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", pair.describe());
        }
    }
    println!("window_attention: at most {worst:.2e} of a head's largest score beside the CPU's");
}

/// Logits far apart: references are raised within a split, and sums stay in range.
#[test]
fn sharp_softmaxes_are_right() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(77);
    for (dtype, group) in [(Dtype::Bf16, 4), (Dtype::Bf16, 8), (Dtype::F16, 1), (Dtype::F16, 7), (Dtype::F32, 2)] {
        let mut shape = any_shape(&mut random, 3000, &[128]);
        (shape.dtype, shape.kv_heads, shape.element_step) = (dtype, 2, 1);
        let mut pair = Pair::new(&mut random, shape, 32, group, false);
        // Products of up to some thousand: each row's softmax is nearly one key's.
        pair.scale = 40.0;
        let scratch = Memory::poisoned(scratch_bytes(&[pair.item()]).unwrap());
        window_attention(device, stream.stream(), &[pair.item()], 1, scratch.slice()).unwrap();
        stream.wait();
        let heads = pair.cache.shape.kv_heads;
        let mut expected = vec![0.0; heads * pair.length];
        let mut queries = cpu::WindowQueries::dense(&pair.queries, pair.window, pair.query_heads, 128);
        queries.scale = pair.scale;
        let rows = pair.cache.rows();
        cpu::window_attention(&rows, &queries, 0..heads, pair.length, 1, &mut expected).unwrap();
        let found: Vec<f32> = pair.scores.values();
        for (found, expected) in found.iter().zip(&expected) {
            // Logits of thousands have steps of 2^-12.
            assert!((found - expected).abs() <= 4e-3 * expected + 1e-4, "{dtype}: {found} for {expected}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(5);
    let mut shape = any_shape(&mut random, 100, &[64]);
    shape.kv_heads = 2;
    let pair = Pair::new(&mut random, shape, 8, 2, false);
    let scratch = Memory::poisoned(scratch_bytes(&[pair.item()]).unwrap());
    let refused = |item: WindowAttention, kernel: usize, scratch: DeviceSlice<u8>| {
        window_attention(device, stream.stream(), &[item], kernel, scratch).unwrap_err().to_string()
    };
    let item = pair.item();
    assert!(refused(item, 4, scratch.slice()).contains("odd"));
    assert!(refused(item, 5, scratch.slice::<u8>().part(0..256).unwrap()).contains("working memory"));
    let mut long = item;
    long.queries.window = 9;
    assert!(refused(long, 5, scratch.slice()).contains("queries"));
    let mut uneven = item;
    uneven.queries.query_heads = 3;
    assert!(refused(uneven, 5, scratch.slice()).contains("query heads"));
    let mut other = item;
    other.queries.dtype = if item.keys.dtype() == Dtype::F16 { Dtype::Bf16 } else { Dtype::F16 };
    assert!(refused(other, 5, scratch.slice()).contains("one dtype"));
    assert!(refused(WindowAttention { length: 101, ..item }, 5, scratch.slice()).contains("rows"));
}
