//! Moves of rows: all bytes are those of the CPU's, also around the rows.

use kvhook_kernels::cuda::check::{Check, Indices, check_indices};
use kvhook_kernels::cuda::select::{Gather, gather, scratch_bytes};
use kvhook_kernels::cuda::{Device, Outcome};
use kvhook_kernels::{Dtype, IndexKind, check, select};

use crate::common::{Cache, Random, Shape};
use crate::gpu::{DeviceCache, Judge, Memory, OwnStream, device, rounds, shape};

/// One item, on both sides.
struct Pair {
    source: Cache,
    destination: Option<Cache>,
    on_device: DeviceCache,
    destination_on_device: Option<DeviceCache>,
    lists: Vec<u32>,
    lists_on_device: Memory,
    shared: bool,
    count: usize,
    tail: std::ops::Range<usize>,
    start: usize,
}

impl Pair {
    fn new(random: &mut Random, shape: Shape, in_place: bool) -> Self {
        let length = shape.capacity;
        let start = if length > 2 { random.below(length / 2) } else { 0 };
        // In place a list of tokens at or behind `start`.
        let floor = if in_place { start } else { 0 };
        let tail_len = random.below(length - start + 1).min(random.below(100));
        let planned = length - tail_len;
        let count = random.below(planned.saturating_sub(floor.max(start)) + 1);
        let shared = random.below(4) == 0;
        let lists: Vec<u32> = (0..if shared { 1 } else { shape.kv_heads })
            .flat_map(|_| {
                random.subset(planned - floor.min(planned), count).into_iter().map(move |index| index + floor as u32)
            })
            .collect();
        let odd = random.below(4) == 0;
        let destination = (!in_place).then(|| {
            let mut other = crate::gpu::shape(random, length);
            (other.dtype, other.head_dim, other.kv_heads) = (shape.dtype, shape.head_dim, shape.kv_heads);
            Cache::new(other)
        });
        let source = Cache::new(shape);
        Self {
            on_device: DeviceCache::new(&source, odd),
            destination_on_device: destination.as_ref().map(|cache| DeviceCache::new(cache, odd)),
            lists_on_device: Memory::of(&lists),
            source,
            destination,
            lists,
            shared,
            count,
            tail: planned..planned + tail_len,
            start,
        }
    }

    fn stride(&self) -> usize {
        if self.shared { 0 } else { self.count }
    }

    fn indices(&self) -> Indices {
        Indices { data: self.lists_on_device.slice(), stride_head: self.stride(), count: self.count }
    }

    fn gather(&self) -> Gather {
        Gather {
            source: self.on_device.rows(),
            destination: self.destination_on_device.as_ref().unwrap_or(&self.on_device).rows(),
            indices: self.indices(),
            tail: self.tail.clone(),
            destination_start: self.start,
        }
    }

    /// Does the same on the CPU and compares every byte.
    fn compare(mut self, what: &str) {
        let heads = 0..self.source.shape.kv_heads;
        let indices = check::Indices { data: &self.lists, stride_head: self.stride(), count: self.count };
        let rows = self.source.rows();
        let target = self.destination.as_mut().map_or(rows, Cache::rows);
        select::gather(&rows, &target, heads.clone(), &indices, self.start).unwrap();
        let behind = self.start + self.count;
        select::move_rows(&rows, self.tail.start, &target, behind, self.tail.len(), heads).unwrap();
        assert!(self.on_device.memory.bytes() == self.source.bytes, "{what}: source {:?}", self.source.shape);
        if let (Some(host), Some(device)) = (&self.destination, &self.destination_on_device) {
            assert!(device.memory.bytes() == host.bytes, "{what}: destination {:?}", host.shape);
        }
    }
}

fn run(device: &Device, stream: &OwnStream, pairs: Vec<Pair>, what: &str) {
    let gathers: Vec<Gather> = pairs.iter().map(Pair::gather).collect();
    let scratch = Memory::poisoned(scratch_bytes(&gathers).unwrap());
    gather(device, stream.stream(), &gathers, None, scratch.slice()).unwrap();
    stream.wait();
    drop(scratch);
    pairs.into_iter().for_each(|pair| pair.compare(what));
}

#[test]
fn rows_move_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(21);
    for round in 0..rounds(120) {
        let capacity = 1 + random.below(700);
        let shape = shape(&mut random, capacity);
        let in_place = random.below(2) == 0;
        let pair = Pair::new(&mut random, shape, in_place);
        run(device, &stream, vec![pair], &format!("round {round}, in place {in_place}"));
    }
}

/// Layers and sequences of all lengths and layouts: more layouts than a launch takes.
#[test]
fn a_batch_moves_as_its_items_alone() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(22);
    for round in 0..rounds(6) {
        let pairs = (0..60)
            .map(|_| {
                let capacity = 1 + random.below(300);
                let shape = shape(&mut random, capacity);
                let in_place = random.below(2) == 0;
                Pair::new(&mut random, shape, in_place)
            })
            .collect();
        run(device, &stream, pairs, &format!("batch {round}"));
    }
}

/// Long chains in place, where tiles overtake each other if nothing holds them.
#[test]
fn long_sequences_are_compacted_in_place() {
    let Some(device) = device() else { return };
    let stream = OwnStream::new();
    let mut random = Random(23);
    for (round, (token_major, block_size)) in
        [(false, 0), (true, 0), (true, 128), (false, 256), (false, 0), (true, 256)]
            .into_iter()
            .take(rounds(6))
            .enumerate()
    {
        let pairs = (0..3)
            .map(|_| {
                let shape = Shape {
                    dtype: Dtype::Bf16,
                    kv_heads: 4,
                    capacity: 30_000,
                    head_dim: if round < 4 { 128 } else { 64 },
                    block_size,
                    token_major,
                    element_step: 1,
                    table_per_head: false,
                    kind: IndexKind::I32,
                    seed: random.next() & !1,
                };
                Pair::new(&mut random, shape, true)
            })
            .collect();
        run(device, &stream, pairs, &format!("long {round}"));
    }
}

#[test]
fn a_bad_index_moves_nothing() {
    let Some(device) = device() else { return };
    let (stream, judge) = (OwnStream::new(), Judge::new());
    let mut random = Random(24);
    for in_place in [true, false] {
        let mut shape = shape(&mut random, 500);
        shape.kv_heads = 3;
        let mut pair = Pair::new(&mut random, shape, in_place);
        (pair.shared, pair.count, pair.tail, pair.start) = (false, 100, 490..500, 0);
        pair.lists = (0..3).flat_map(|_| random.subset(490, 100)).collect();
        pair.lists[250] = 0x7fff_0000;
        pair.lists_on_device = Memory::of(&pair.lists);
        let gathers = [pair.gather()];
        let scratch = Memory::poisoned(scratch_bytes(&gathers).unwrap());
        let check = Check { indices: pair.indices(), heads: 3, length: 490, least: 0 };
        judge.verdict().clear(device, stream.stream()).unwrap();
        check_indices(device, stream.stream(), &[check], &judge.verdict()).unwrap();
        gather(device, stream.stream(), &gathers, Some(&judge.verdict()), scratch.slice()).unwrap();
        let Outcome::Bad(fault) = judge.outcome(device, &stream) else { panic!("the index is bad") };
        assert_eq!((fault.item, fault.head, fault.place), (0, 2, 50));
        assert!(pair.on_device.memory.bytes() == pair.source.bytes);
        if let (Some(host), Some(device)) = (&pair.destination, &pair.destination_on_device) {
            assert!(device.memory.bytes() == host.bytes);
        }
    }
}
