//! Views: the row formula, conversion, refusals.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Cache, Random, Shape, shapes};
use half::{bf16, f16};
use kvhook_kernels::{BlockTable, Dtype, IndexKind, KernelError, Layout, Rows};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn loads_and_stores_the_right_elements(shape in shapes(1..60), seed in 1u64..) {
        let mut cache = Cache::new(shape.clone());
        let mut random = Random(seed);
        let rows = cache.rows();
        let mut out = vec![0.0; shape.head_dim];
        for _ in 0..20 {
            let (token, head) = (random.below(shape.capacity), random.below(shape.kv_heads));
            rows.load(token, head, &mut out).unwrap();
            prop_assert_eq!(out.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), cache.get(token, head));
        }
        let (token, head) = (random.below(shape.capacity), random.below(shape.kv_heads));
        let values: Vec<f32> = (0..shape.head_dim).map(|_| random.real()).collect();
        let mut expected = cache.bytes.clone();
        rows.store(token, head, &values).unwrap();
        std::mem::swap(&mut expected, &mut cache.bytes);
        cache.set(token, head, &values);
        prop_assert!(expected == cache.bytes);
    }
}

/// A row of `values` in memory of `dtype`.
fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0u8; values.len() * dtype.size()];
    let layout = Layout::head_major(dtype, 1, 1, values.len());
    // SAFETY: one row inside `bytes`.
    let rows = unsafe { Rows::new(bytes.as_mut_ptr(), layout, None) }.unwrap();
    rows.store(0, 0, values).unwrap();
    bytes
}

fn loaded(dtype: Dtype, bytes: &mut [u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / dtype.size()];
    let layout = Layout::head_major(dtype, 1, 1, out.len());
    // SAFETY: one row inside `bytes`.
    let rows = unsafe { Rows::new(bytes.as_mut_ptr(), layout, None) }.unwrap();
    rows.load(0, 0, &mut out).unwrap();
    out
}

#[test]
fn all_halves_are_read_exactly() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let mut bytes: Vec<u8> = all.iter().flat_map(|bits| bits.to_ne_bytes()).collect();
    for (bits, found) in all.iter().zip(loaded(Dtype::F16, &mut bytes)) {
        let expected = f16::from_bits(*bits).to_f32_const();
        assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{bits:#x}");
    }
    for (bits, found) in all.iter().zip(loaded(Dtype::Bf16, &mut bytes)) {
        assert_eq!(found.to_bits(), u32::from(*bits) << 16, "{bits:#x}");
    }
}

#[test]
fn stores_round_to_nearest_even() {
    // Around each half: itself, the middle to the next one, and just beside the middle.
    let values: Vec<f32> = (0..0x7c00u16)
        .flat_map(|bits| {
            let (low, high) = (f16::from_bits(bits).to_f32_const(), f16::from_bits(bits + 1).to_f32_const());
            let middle = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
            [low, middle, middle.next_down(), middle.next_up(), -middle]
        })
        .collect();
    for (value, bytes) in values.iter().zip(stored(Dtype::F16, &values).chunks(2)) {
        assert_eq!(bytes, f16::from_f32_const(*value).to_ne_bytes(), "{value}");
    }
    for (value, bytes) in values.iter().zip(stored(Dtype::Bf16, &values).chunks(2)) {
        assert_eq!(bytes, bf16::from_f32_const(*value).to_ne_bytes(), "{value}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut cache = Cache::new(Shape {
        dtype: Dtype::F32,
        kv_heads: 2,
        capacity: 10,
        head_dim: 4,
        block_size: 4,
        token_major: false,
        element_step: 1,
        table_per_head: false,
        kind: IndexKind::I64,
        seed: 1,
    });
    let rows = cache.rows();
    let mut out = [0.0; 4];
    assert!(matches!(rows.load(10, 0, &mut out), Err(KernelError::TokenRange { capacity: 10, .. })));
    assert!(matches!(rows.load(usize::MAX, 0, &mut out), Err(KernelError::TokenRange { .. })));
    assert!(matches!(rows.load(0, 2, &mut out), Err(KernelError::HeadRange { kv_heads: 2, .. })));
    assert!(matches!(rows.load(0, usize::MAX, &mut out), Err(KernelError::HeadRange { .. })));
    assert!(matches!(rows.load(0, 0, &mut out[..3]), Err(KernelError::SliceLength { found: 3, expected: 4, .. })));
    assert!(matches!(rows.row_ptr(10, 0), Err(KernelError::TokenRange { .. })));
    assert_eq!(rows.row_ptr(9, 1).unwrap().addr(), cache.bytes.as_ptr().addr() + cache.offset(9, 1, 0));

    let mut memory = [0u8; 64];
    let table = [0i32, 5, -1, 2];
    let layout = Layout::paged_head_major(Dtype::F32, 1, 16, 1, 4);
    let table = |blocks| BlockTable { data: table.as_ptr().cast(), kind: IndexKind::I32, stride_head: 0, blocks };
    // SAFETY: no row is touched.
    let new = |layout, table| unsafe { Rows::new(memory.as_mut_ptr(), layout, table) };
    let mut new = new;
    let paged = new(layout, Some(table(4))).unwrap();
    assert_eq!(
        paged.check_blocks(6),
        Err(KernelError::BlockOutOfPool { head: 0, entry: 2, found: -1, pool_blocks: 6 })
    );
    assert_eq!(paged.check_blocks(5), Err(KernelError::BlockOutOfPool { head: 0, entry: 1, found: 5, pool_blocks: 5 }));
    assert!(matches!(new(layout, Some(table(3))), Err(KernelError::TableTooShort { found: 3, needed: 4, .. })));
    assert!(matches!(new(Layout { block_size: 0, ..layout }, Some(table(4))), Err(KernelError::Layout { .. })));
    assert!(matches!(new(Layout { head_dim: 0, ..layout }, None), Err(KernelError::Layout { .. })));
    // SAFETY: no row is touched.
    let null = unsafe { Rows::new(std::ptr::null_mut(), layout, None) };
    assert!(matches!(null, Err(KernelError::Layout { .. })));
}

#[test]
fn names_of_dtypes() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
    }
    assert_eq!("int8".parse::<Dtype>(), Err(KernelError::DtypeName { found: "int8".to_owned() }));
}
