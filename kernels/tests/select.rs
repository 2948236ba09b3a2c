//! Moves, compared byte for byte with a model of the whole memory, guards included.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Cache, Random, Shape, shapes};
use kvhook_kernels::select::{gather, move_rows};
use kvhook_kernels::{Dtype, IndexFault, IndexKind, Indices, KernelError, parallel};
use proptest::prelude::*;

/// What a gather does, done row by row from a copy.
fn expect_gather(
    source: &Cache,
    destination: &mut Cache,
    heads: std::ops::Range<usize>,
    indices: &Indices<'_>,
    start: usize,
) {
    for head in heads {
        let rows: Vec<Vec<u8>> = (0..indices.count)
            .map(|place| source.row(indices.data[head * indices.stride_head + place] as usize, head))
            .collect();
        for (place, row) in rows.iter().enumerate() {
            destination.set_row(start + place, head, row);
        }
    }
}

fn copy(cache: &Cache) -> Cache {
    let mut twin = Cache::new(cache.shape.clone());
    // Alignment may place the rows elsewhere in the twin's allocation, so rows are copied one by one.
    for head in 0..cache.shape.kv_heads {
        for token in 0..cache.shape.capacity {
            twin.set_row(token, head, &cache.row(token, head));
        }
    }
    twin
}

/// Rows and everything else: the parts of memory that are no row's must be what they were.
fn assert_same(found: &Cache, expected: &Cache, before: &[u8]) {
    let mut untouched = found.bytes.clone();
    for head in 0..found.shape.kv_heads {
        for token in 0..found.shape.capacity {
            assert_eq!(found.row(token, head), expected.row(token, head), "token {token}, head {head}");
            for element in 0..found.shape.head_dim {
                let offset = found.offset(token, head, element);
                let size = found.shape.dtype.size();
                untouched[offset..offset + size].copy_from_slice(&before[offset..offset + size]);
            }
        }
    }
    assert!(untouched == before, "bytes outside the rows changed");
}

/// Lists of `count` for each head, or one, and whether it is one.
fn lists(random: &mut Random, shape: &Shape, count: usize, shared: bool) -> Vec<u32> {
    (0..if shared { 1 } else { shape.kv_heads })
        .flat_map(|_| {
            if random.below(3) == 0 && count < shape.capacity {
                // One run.
                let first = random.below(shape.capacity - count + 1) as u32;
                (first..first + count as u32).collect()
            } else {
                random.subset(shape.capacity, count)
            }
        })
        .collect()
}

fn indices(data: &[u32], count: usize, shared: bool) -> Indices<'_> {
    Indices { data, stride_head: if shared { 0 } else { count }, count }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn in_place(shape in shapes(1..90), seed in 1u64.., shared: bool) {
        let mut random = Random(seed);
        let mut cache = Cache::new(shape.clone());
        let before = cache.bytes.clone();
        let count = random.below(shape.capacity + 1);
        let data = lists(&mut random, &shape, count, shared);
        let indices = indices(&data, count, shared);
        let mut expected = copy(&cache);
        expect_gather(&cache, &mut expected, 0..shape.kv_heads, &indices, 0);
        let rows = cache.rows();
        gather(&rows, &rows, 0..shape.kv_heads, &indices, 0).unwrap();
        assert_same(&cache, &expected, &before);
    }

    #[test]
    fn into_fresh_rows(source in shapes(1..90), target in shapes(1..90), seed in 1u64.., shared: bool) {
        let mut random = Random(seed);
        let target = Shape {
            dtype: source.dtype,
            kv_heads: source.kv_heads,
            head_dim: source.head_dim,
            ..target
        };
        let count = random.below(source.capacity.min(target.capacity) + 1);
        let start = random.below(target.capacity - count + 1);
        let mut data = lists(&mut random, &source, count, shared);
        if random.below(2) == 0 {
            // Fresh rows take any order.
            data.chunks_mut(count.max(1)).for_each(<[u32]>::reverse);
        }
        let indices = indices(&data, count, shared);
        let heads = random.below(source.kv_heads)..source.kv_heads;
        let (mut from, mut to) = (Cache::new(source), Cache::new(target));
        let before = to.bytes.clone();
        let source_before = from.bytes.clone();
        let mut expected = copy(&to);
        expect_gather(&from, &mut expected, heads.clone(), &indices, start);
        gather(&from.rows(), &to.rows(), heads, &indices, start).unwrap();
        assert_same(&to, &expected, &before);
        prop_assert!(from.bytes == source_before);
    }

    #[test]
    fn overlapping_moves(shape in shapes(1..90), seed in 1u64..) {
        let mut random = Random(seed);
        let mut cache = Cache::new(shape.clone());
        let before = cache.bytes.clone();
        let count = random.below(shape.capacity + 1);
        let from = random.below(shape.capacity - count + 1);
        let to = random.below(shape.capacity - count + 1);
        let data: Vec<u32> = (from as u32..(from + count) as u32).collect();
        let mut expected = copy(&cache);
        expect_gather(&cache, &mut expected, 0..shape.kv_heads, &Indices::shared(&data), to);
        let rows = cache.rows();
        move_rows(&rows, from, &rows, to, count, 0..shape.kv_heads).unwrap();
        assert_same(&cache, &expected, &before);
    }
}

fn shape(token_major: bool, block_size: usize, capacity: usize) -> Shape {
    Shape {
        dtype: Dtype::F16,
        kv_heads: 2,
        capacity,
        head_dim: 64,
        block_size,
        token_major,
        element_step: 1,
        table_per_head: false,
        kind: IndexKind::I32,
        seed: 4,
    }
}

/// Moves of more than a mebibyte: stores around the caches (an even seed aligns the cache to them), long runs, rows that lie
/// close together and far apart.
#[test]
fn large_moves() {
    for (token_major, block_size) in [(false, 0), (true, 0), (false, 16), (true, 16), (false, 128), (true, 24)] {
        for (shared, spread) in [(true, 1), (false, 1), (false, 4)] {
            let (scattered, capacity) = (1500 * spread, 1500 * spread + 1250);
            let shape = Shape { seed: 2, dtype: Dtype::F32, ..shape(token_major, block_size, capacity) };
            let mut random = Random(11);
            let mut cache = Cache::new(shape.clone());
            let before = cache.bytes.clone();
            let mut data = random.subset(scattered, 1100);
            data.extend(capacity as u32 - 1000..capacity as u32);
            if !shared {
                data.extend(random.subset(capacity, 2100));
            }
            let indices = indices(&data, 2100, shared);
            let mut expected = copy(&cache);
            expect_gather(&cache, &mut expected, 0..2, &indices, 0);
            let rows = cache.rows();
            gather(&rows, &rows, 0..2, &indices, 0).unwrap();
            move_rows(&rows, 500, &rows, 550, 2100, 0..2).unwrap();
            let tail: Vec<u32> = (500..2600).collect();
            let moved = copy(&expected);
            expect_gather(&moved, &mut expected, 0..2, &Indices::shared(&tail), 550);
            assert_same(&cache, &expected, &before);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let results: Vec<Vec<u8>> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            let mut cache = Cache::new(Shape { seed: 5, ..shape(false, 16, 500) });
            let data = Random(3).subset(500, 200);
            let rows = cache.rows();
            parallel::for_each_on(threads, vec![0, 1], |head| {
                gather(&rows, &rows, head..head + 1, &Indices::shared(&data), 0)
            })
            .unwrap();
            cache.bytes
        })
        .collect();
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn refusals_leave_memory_alone() {
    let mut cache = Cache::new(shape(false, 0, 10));
    let mut narrow = Cache::new(Shape { head_dim: 32, ..shape(false, 0, 10) });
    let mut other = Cache::new(Shape { dtype: Dtype::Bf16, ..shape(false, 0, 10) });
    let before = cache.bytes.clone();
    let rows = cache.rows();
    let refused = |data: &[u32], start| gather(&rows, &rows, 0..2, &Indices::shared(data), start).unwrap_err();

    let KernelError::Index(bad) = refused(&[0, 4, 10], 0) else { panic!("not an index error") };
    assert_eq!((bad.head, bad.place, bad.value), (0, 2, 10));
    assert_eq!(bad.fault, IndexFault::OutOfRange { length: 10 });
    assert_eq!(refused(&[0, 4, 5], 3), KernelError::Overtakes { head: 0, place: 0, source_row: 0, destination_row: 3 });
    assert!(matches!(refused(&[7, 8, 9], 8), KernelError::TokenRange { .. }));
    let short = Indices { data: &[0, 1, 2], stride_head: 2, count: 2 };
    let KernelError::Index(bad) = gather(&rows, &rows, 0..2, &short, 0).unwrap_err() else {
        panic!("not an index error")
    };
    assert_eq!((bad.head, bad.place, bad.fault), (1, 1, IndexFault::BufferTooShort { needed: 4, found: 3 }));

    assert!(matches!(gather(&rows, &rows, 0..3, &Indices::shared(&[1]), 0), Err(KernelError::HeadRange { .. })));
    assert!(matches!(
        gather(&narrow.rows(), &rows, 0..2, &Indices::shared(&[1]), 0),
        Err(KernelError::HeadDimMismatch { found: 64, expected: 32, .. })
    ));
    assert!(matches!(
        gather(&other.rows(), &rows, 0..2, &Indices::shared(&[1]), 0),
        Err(KernelError::DtypeMismatch { .. })
    ));
    assert!(matches!(move_rows(&rows, 5, &rows, 0, 6, 0..2), Err(KernelError::TokenRange { .. })));
    assert!(matches!(move_rows(&rows, 0, &rows, 5, 6, 0..2), Err(KernelError::TokenRange { .. })));
    assert!(matches!(move_rows(&rows, usize::MAX, &rows, 0, 2, 0..2), Err(KernelError::TokenRange { .. })));
    assert!(cache.bytes == before);
}
