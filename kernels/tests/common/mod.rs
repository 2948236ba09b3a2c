//! A cache in memory of the test's own, in any layout, with an address rule written apart from the library's.
#![allow(dead_code, reason = "each test file uses a part of it")]

use half::{bf16, f16};
use kvhook_kernels::{BlockTable, Dtype, IndexKind, Layout, Rows};
use proptest::prelude::*;

/// Bytes around the rows that nobody may touch.
const GUARD: usize = 256;

/// What a cache looks like.
#[derive(Debug, Clone)]
pub struct Shape {
    pub dtype: Dtype,
    pub kv_heads: usize,
    pub capacity: usize,
    pub head_dim: usize,
    /// Tokens of a block; 0: contiguous.
    pub block_size: usize,
    /// Whether a token's heads are adjacent, rather than a head's tokens.
    pub token_major: bool,
    /// Elements from one element of a row to the next.
    pub element_step: usize,
    /// Whether each head has a block table of its own.
    pub table_per_head: bool,
    pub kind: IndexKind,
    pub seed: u64,
}

/// All layouts of the row formula.
pub fn shapes(capacity: std::ops::Range<usize>) -> impl Strategy<Value = Shape> {
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let head_dim = prop_oneof![1usize..20, Just(32), Just(64), Just(80), Just(128)];
    let kind = prop_oneof![Just(IndexKind::U32), Just(IndexKind::I32), Just(IndexKind::I64)];
    let block_size = prop_oneof![Just(0usize), 1usize..9, Just(16)];
    (dtype, 1usize..4, capacity, head_dim, block_size, any::<bool>(), 1usize..3, any::<bool>(), kind, any::<u64>())
        .prop_map(
            |(
                dtype,
                kv_heads,
                capacity,
                head_dim,
                block_size,
                token_major,
                element_step,
                table_per_head,
                kind,
                seed,
            )| {
                Shape {
                    dtype,
                    kv_heads,
                    capacity,
                    head_dim,
                    block_size,
                    token_major,
                    element_step,
                    table_per_head: table_per_head && block_size > 0,
                    kind,
                    seed,
                }
            },
        )
}

/// Numbers that look random, the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 20) as usize % bound
    }

    /// In -1..1.
    pub fn real(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// `count` of `0..length`, ascending.
    pub fn subset(&mut self, length: usize, count: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..length as u32).collect();
        for place in 0..count {
            let other = place + self.below(length - place);
            all.swap(place, other);
        }
        all.truncate(count);
        all.sort_unstable();
        all
    }
}

/// A cache filled with random rows, between guards.
pub struct Cache {
    pub shape: Shape,
    pub bytes: Vec<u8>,
    start: usize,
    layout: Layout,
    table: Vec<usize>,
    table_bytes: Vec<u8>,
}

impl Cache {
    pub fn new(shape: Shape) -> Self {
        let mut random = Random(shape.seed | 1);
        let element = (shape.dtype.size() * shape.element_step) as isize;
        let row = element * shape.head_dim as isize;
        let heads_here = if shape.table_per_head { 1 } else { shape.kv_heads };
        let tokens_here = if shape.block_size == 0 { shape.capacity } else { shape.block_size };
        let (stride_token, stride_head) =
            if shape.token_major { (row * heads_here as isize, row) } else { (row, row * tokens_here as isize) };
        let blocks = if shape.block_size == 0 { 1 } else { shape.capacity.div_ceil(shape.block_size) };
        let tables = if shape.table_per_head { shape.kv_heads } else { 1 };
        // More blocks in the pool than are used, in no order.
        let pool = blocks * tables + 3;
        let mut table: Vec<usize> = (0..pool).collect();
        for place in 0..pool {
            let other = place + random.below(pool - place);
            table.swap(place, other);
        }
        table.truncate(blocks * tables);
        let table_bytes = table
            .iter()
            .flat_map(|&block| match shape.kind {
                IndexKind::U32 | IndexKind::I32 => (block as u32).to_ne_bytes().to_vec(),
                IndexKind::I64 => (block as u64).to_ne_bytes().to_vec(),
            })
            .collect();
        let layout = Layout {
            dtype: shape.dtype,
            head_dim: shape.head_dim,
            kv_heads: shape.kv_heads,
            capacity: shape.capacity,
            stride_element: element,
            stride_block: row * (heads_here * tokens_here) as isize,
            stride_token,
            stride_head: if shape.table_per_head { 0 } else { stride_head },
            block_size: shape.block_size,
        };
        let size = row as usize * heads_here * tokens_here * if shape.block_size == 0 { 1 } else { pool };
        let bytes: Vec<u8> = (0..size + 2 * GUARD + 64).map(|_| random.next() as u8).collect();
        // Some caches are aligned to cache lines, others to nothing.
        let start =
            if shape.seed.is_multiple_of(2) { GUARD + bytes[GUARD..].as_ptr().align_offset(64) } else { GUARD + 1 };
        let mut cache = Self { shape, bytes, start, layout, table, table_bytes };
        for head in 0..cache.shape.kv_heads {
            for token in 0..cache.shape.capacity {
                let values: Vec<f32> = (0..cache.shape.head_dim).map(|_| random.real()).collect();
                cache.set(token, head, &values);
            }
        }
        cache
    }

    /// Where row 0 of head 0 of block 0 is in `bytes`.
    pub fn start(&self) -> usize {
        self.start
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn table_bytes(&self) -> &[u8] {
        &self.table_bytes
    }

    pub fn table(&self) -> Option<BlockTable> {
        (self.shape.block_size > 0).then(|| {
            let blocks = self.shape.capacity.div_ceil(self.shape.block_size);
            BlockTable {
                data: self.table_bytes.as_ptr(),
                kind: self.shape.kind,
                stride_head: if self.shape.table_per_head { blocks as isize } else { 0 },
                blocks,
            }
        })
    }

    pub fn rows(&mut self) -> Rows {
        let table = self.table();
        // SAFETY: the rows lie inside `bytes`; the tests use views and bytes in turns.
        unsafe { Rows::new(self.bytes.as_mut_ptr().wrapping_add(self.start), self.layout, table) }.unwrap()
    }

    /// Where an element is in `bytes`: walks block by block.
    pub fn offset(&self, token: usize, head: usize, element: usize) -> usize {
        let shape = &self.shape;
        let size = shape.dtype.size() * shape.element_step;
        let (mut block, mut slot) = (0, token);
        while shape.block_size > 0 && slot >= shape.block_size {
            slot -= shape.block_size;
            block += 1;
        }
        let tokens = if shape.block_size == 0 { shape.capacity } else { shape.block_size };
        let (heads, head_in_block) = if shape.table_per_head { (1, 0) } else { (shape.kv_heads, head) };
        if shape.table_per_head {
            block += head * shape.capacity.div_ceil(shape.block_size);
        }
        let block = if shape.block_size == 0 { 0 } else { self.table[block] };
        let row = if shape.token_major {
            (block * tokens + slot) * heads + head_in_block
        } else {
            (block * heads + head_in_block) * tokens + slot
        };
        self.start + (row * shape.head_dim + element) * size
    }

    /// The bytes of a row's elements.
    pub fn row(&self, token: usize, head: usize) -> Vec<u8> {
        let mut row = Vec::with_capacity(self.shape.head_dim * 4);
        for element in 0..self.shape.head_dim {
            let offset = self.offset(token, head, element);
            row.extend_from_slice(&self.bytes[offset..offset + self.shape.dtype.size()]);
        }
        row
    }

    pub fn set_row(&mut self, token: usize, head: usize, row: &[u8]) {
        let size = self.shape.dtype.size();
        for (element, bytes) in row.chunks(size).enumerate() {
            let offset = self.offset(token, head, element);
            self.bytes[offset..offset + size].copy_from_slice(bytes);
        }
    }

    pub fn set(&mut self, token: usize, head: usize, values: &[f32]) {
        let mut row = Vec::with_capacity(values.len() * 4);
        for &value in values {
            match self.shape.dtype {
                Dtype::F32 => row.extend_from_slice(&value.to_ne_bytes()),
                Dtype::F16 => row.extend_from_slice(&f16::from_f32(value).to_ne_bytes()),
                Dtype::Bf16 => row.extend_from_slice(&bf16::from_f32(value).to_ne_bytes()),
            }
        }
        self.set_row(token, head, &row);
    }

    pub fn get(&self, token: usize, head: usize) -> Vec<f64> {
        self.row(token, head)
            .chunks(self.shape.dtype.size())
            .map(|bytes| match self.shape.dtype {
                Dtype::F32 => f64::from(f32::from_ne_bytes(bytes.try_into().unwrap())),
                Dtype::F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
                Dtype::Bf16 => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
            })
            .collect()
    }
}
