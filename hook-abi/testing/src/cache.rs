//! One layer's cache, with seeded data, in any layout and dtype.

use half::{bf16, f16};
use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;

use crate::engine::Shape;
use crate::fault::Fault;
use crate::guarded::Guarded;
use crate::random::Random;

/// Values `[heads][tokens][dim]`.
pub type PerHead = Vec<Vec<Vec<f32>>>;

/// How the rows of a layer lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `[heads, tokens, dim]`
    HeadMajor,
    /// `[tokens, heads, dim]`
    TokenMajor,
    /// `[blocks, heads, block, dim]`, blocks in a mixed order.
    Paged {
        /// Tokens of a block.
        block: usize,
    },
    /// `[blocks, block, heads, dim]`, blocks in a mixed order.
    PagedTokenMajor {
        /// Tokens of a block.
        block: usize,
    },
}

impl Form {
    /// Every form, with blocks of 16 tokens.
    pub const ALL: [Self; 4] =
        [Self::HeadMajor, Self::TokenMajor, Self::Paged { block: 16 }, Self::PagedTokenMajor { block: 16 }];

    /// Tokens of a block; 0: contiguous.
    pub fn block(self) -> usize {
        match self {
            Self::HeadMajor | Self::TokenMajor => 0,
            Self::Paged { block } | Self::PagedTokenMajor { block } => block,
        }
    }
}

/// A dtype as it crosses the boundary.
pub fn dtype_of(dtype: Dtype) -> KvhDtype {
    match dtype {
        Dtype::F32 => KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 },
        Dtype::F16 => KvhDtype { code: KVH_DTYPE_FLOAT, bits: 16, lanes: 1 },
        Dtype::Bf16 => KvhDtype { code: KVH_DTYPE_BFLOAT, bits: 16, lanes: 1 },
    }
}

/// A value's bytes.
pub fn encode(dtype: Dtype, value: f32, out: &mut [u8]) {
    match dtype {
        Dtype::F32 => out.copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Dtype::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

/// The value of an element's bytes.
fn decode(dtype: Dtype, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (Dtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    }
}

/// What is left of a value that is stored.
pub fn round(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

/// K or V of a layer.
#[derive(Debug, Clone)]
struct Tensor {
    memory: Guarded,
    /// The bytes as they were filled.
    filled: Vec<u8>,
    dim: usize,
}

/// One layer of one sequence. Memory that belongs to no row holds NaN.
#[derive(Debug, Clone)]
pub struct Layer {
    /// `[heads][tokens][k_head_dim]`, rounded to the dtype, with RoPE applied.
    pub keys: PerHead,
    /// `[heads][tokens][v_head_dim]`, rounded to the dtype.
    pub values: PerHead,
    /// `[heads][tokens]`: positions that the first rows stand for; empty: nothing was ever dropped.
    pub positions: Vec<Vec<u32>>,
    /// `KVH_LAYER_*`; full unless changed.
    pub kind: i32,
    /// What the plugin is told of V's elements, true unless changed.
    pub v_dtype: KvhDtype,
    dtype: Dtype,
    form: Form,
    heads: usize,
    tokens: usize,
    table: Vec<i32>,
    k: Tensor,
    v: Tensor,
    flat_positions: Vec<u32>,
}

impl Layer {
    /// A cache that holds these keys and values, rounded to the dtype.
    pub fn new(keys: PerHead, values: PerHead, dtype: Dtype, form: Form) -> Self {
        let dim = |rows: &PerHead| rows.first().and_then(|head| head.first()).map_or(1, Vec::len);
        let tokens = keys.first().map_or(0, Vec::len);
        let mut layer = Self::empty(keys.len(), tokens, [dim(&keys), dim(&values)], dtype, form);
        let rounded = |rows: PerHead| -> PerHead {
            let row = |row: Vec<f32>| row.into_iter().map(|value| round(dtype, value)).collect();
            rows.into_iter().map(|head| head.into_iter().map(row).collect()).collect()
        };
        (layer.keys, layer.values) = (rounded(keys), rounded(values));
        for head in 0..layer.heads {
            for token in 0..tokens {
                let (k, v) = (layer.place(&layer.k, head, token), layer.place(&layer.v, head, token));
                let size = dtype.size();
                let fill = |tensor: &mut Tensor, at: usize, row: &[f32]| {
                    let bytes = &mut tensor.memory.bytes_mut()[at..at + row.len() * size];
                    row.iter().zip(bytes.chunks_mut(size)).for_each(|(value, out)| encode(dtype, *value, out));
                };
                fill(&mut layer.k, k, &layer.keys[head][token]);
                fill(&mut layer.v, v, &layer.values[head][token]);
            }
        }
        layer.k.filled = layer.k.memory.bytes().to_vec();
        layer.v.filled = layer.v.memory.bytes().to_vec();
        layer
    }

    /// A cache with random keys and values ([`Random::rows`]).
    pub fn random(shape: Shape, tokens: usize, dtype: Dtype, form: Form, random: &mut Random) -> Self {
        let mut rows = || random.rows(shape.kv_heads, tokens, shape.head_dim);
        Self::new(rows(), rows(), dtype, form)
    }

    /// Rows that hold NaN, and no [`Layer::keys`] or [`Layer::values`].
    fn empty(heads: usize, tokens: usize, dims: [usize; 2], dtype: Dtype, form: Form) -> Self {
        let blocks = if form.block() == 0 { 0 } else { tokens.div_ceil(form.block()) };
        let capacity = if form.block() == 0 { tokens } else { blocks * form.block() };
        // Even blocks first, then odd ones: neighbours lie apart.
        let table =
            (0..blocks as i32).map(|block| if block % 2 == 0 { block / 2 } else { (blocks as i32 + block) / 2 });
        let tensor = |dim: usize| Tensor {
            memory: Guarded::new(capacity * heads * dim * dtype.size(), 64, 0xff),
            filled: Vec::new(),
            dim,
        };
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            positions: Vec::new(),
            kind: KVH_LAYER_FULL,
            v_dtype: dtype_of(dtype),
            dtype,
            form,
            heads,
            tokens,
            table: table.collect(),
            k: tensor(dims[0]),
            v: tensor(dims[1]),
            flat_positions: Vec::new(),
        }
    }

    /// As many rows like this layer's, to be filled by a plugin.
    pub(crate) fn fresh(&self, tokens: usize) -> Self {
        Self::empty(self.heads, tokens, [self.k.dim, self.v.dim], self.dtype, self.form)
    }

    /// The same rows, which stand for these positions `[heads][rows]` after earlier compressions.
    pub fn with_positions(mut self, positions: Vec<Vec<u32>>) -> Self {
        self.flat_positions = positions.concat();
        self.positions = positions;
        self
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Channels of a row of K.
    pub fn k_head_dim(&self) -> usize {
        self.k.dim
    }

    /// Channels of a row of V.
    pub fn v_head_dim(&self) -> usize {
        self.v.dim
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How it lies in memory.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Byte strides `[block, token, head]`.
    fn strides(&self, tensor: &Tensor) -> [usize; 3] {
        let row = tensor.dim * self.dtype.size();
        match self.form {
            Form::HeadMajor => [0, row, row * self.tokens],
            Form::TokenMajor => [0, row * self.heads, row],
            Form::Paged { block } => [row * self.heads * block, row, row * block],
            Form::PagedTokenMajor { block } => [row * self.heads * block, row * self.heads, row],
        }
    }

    fn place(&self, tensor: &Tensor, head: usize, token: usize) -> usize {
        let [block, in_block, per_head] = self.strides(tensor);
        match self.form.block() {
            0 => token * in_block + head * per_head,
            size => self.table[token / size] as usize * block + token % size * in_block + head * per_head,
        }
    }

    /// What memory holds now: K and V as `[heads][tokens][dim]`.
    pub fn read(&self) -> [PerHead; 2] {
        [&self.k, &self.v].map(|tensor| {
            let size = self.dtype.size();
            let row = |head: usize, token: usize| -> Vec<f32> {
                let at = self.place(tensor, head, token);
                let bytes = &tensor.memory.bytes()[at..at + tensor.dim * size];
                bytes.chunks(size).map(|bytes| decode(self.dtype, bytes)).collect()
            };
            (0..self.heads).map(|head| (0..self.tokens).map(|token| row(head, token)).collect()).collect()
        })
    }

    /// As a plugin sees it, as layer `index`; it may only read.
    pub fn view(&self, index: usize) -> KvhLayer {
        let bases = [&self.k, &self.v].map(|tensor| tensor.memory.address().cast_mut());
        self.describe(index, bases)
    }

    /// As a plugin sees rows that it fills.
    pub(crate) fn lend(&mut self, index: usize) -> KvhLayer {
        let bases = [self.k.memory.address_mut(), self.v.memory.address_mut()];
        self.describe(index, bases)
    }

    fn describe(&self, index: usize, bases: [*mut std::ffi::c_void; 2]) -> KvhLayer {
        let rows = |tensor: &Tensor, base, dtype| {
            let [block, token, head] = self.strides(tensor).map(|stride| stride as i64);
            KvhRows {
                base,
                stride_block: block,
                stride_token: token,
                stride_head: head,
                stride_element: self.dtype.size() as i64,
                head_dim: tensor.dim as u32,
                dtype,
            }
        };
        let covered = self.positions.first().map_or(0, Vec::len);
        KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: index as u32,
            kind: self.kind,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: self.heads as u32,
            block_size: self.form.block() as u32,
            reserved0: 0,
            length: self.tokens as u64,
            k: rows(&self.k, bases[0], dtype_of(self.dtype)),
            v: rows(&self.v, bases[1], self.v_dtype),
            table: KvhBlockTable {
                data: if self.table.is_empty() { std::ptr::null() } else { self.table.as_ptr().cast() },
                stride_head: 0,
                count: self.table.len() as u32,
                dtype: KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 },
            },
            positions: KvhPositions {
                data: if covered == 0 { std::ptr::null() } else { self.flat_positions.as_ptr() },
                stride_head: covered as i64,
                count: covered as u64,
            },
        }
    }

    /// Looks for writes outside the rows that were lent.
    pub(crate) fn check_bands(&self, layer: usize, what: &str) -> Result<(), Fault> {
        for (name, tensor) in [("K", &self.k), ("V", &self.v)] {
            if let Some(at) = tensor.memory.damage() {
                let bytes = tensor.memory.bytes().len();
                return Err(Fault::Outside { what: format!("{what}, {name} of layer {layer}"), at, bytes });
            }
        }
        Ok(())
    }

    /// Looks for any write at all.
    pub(crate) fn check_untouched(&self, layer: usize, uid: u64) -> Result<(), Fault> {
        for (tensor, what) in [(&self.k, "K"), (&self.v, "V")] {
            let now = tensor.memory.bytes();
            let written = (now != tensor.filled)
                .then(|| now.iter().zip(&tensor.filled).position(|(now, filled)| now != filled))
                .flatten();
            if let Some(at) = written.map(|at| at as i64).or_else(|| tensor.memory.damage()) {
                return Err(Fault::CacheWritten { tensor: what, layer, at, sequence: format!("sequence {uid}") });
            }
        }
        Ok(())
    }
}
