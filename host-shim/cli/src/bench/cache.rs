//! The cache of one row, as an engine holds it: rows of all layers, block tables, and what each sequence has of them.

use core::ptr;

use kvhook_abi::raw::*;
use kvhook_kernels::{BlockTable, Dtype, IndexKind, Layout};

use super::error::BenchError;
use super::machine::{Machine, Memory};
use super::rows::Row;
use super::shapes::{ELEMENT, Form, Random, Shape};

/// The dtype of every cache here.
pub const BF16: KvhDtype = KvhDtype { code: KVH_DTYPE_BFLOAT, bits: 16, lanes: 1 };
const I32: KvhDtype = KvhDtype { code: KVH_DTYPE_INT, bits: 32, lanes: 1 };

/// One sequence of a cache.
#[derive(Debug, Clone, Copy)]
pub struct Sequence {
    /// Its rows in each layer.
    pub tokens: usize,
    /// Rows, or blocks, of the sequences before it.
    start: usize,
}

/// K and V of all layers, each a tensor of its own, for all sequences of a row.
pub struct Cache<'a> {
    /// The model's.
    pub shape: &'static Shape,
    form: Form,
    /// The sequences.
    pub sequences: Vec<Sequence>,
    /// Tensor after tensor: K of layer 0, V of layer 0, K of layer 1, ...
    pub memory: Memory<'a>,
    /// Bytes of a tensor.
    tensor_bytes: usize,
    /// The sequences' blocks, one sequence behind the other; all layers share them.
    table: Memory<'a>,
}

impl<'a> Cache<'a> {
    /// Makes the cache of a row and fills it.
    ///
    /// # Errors
    /// [`BenchError::Memory`]; those of the driver.
    pub fn new(machine: &'a dyn Machine, row: &Row) -> Result<Self, BenchError> {
        let (shape, form) = (row.shape, row.form);
        let block = form.block_size().max(1);
        let mut sequences = Vec::new();
        let mut rows = 0;
        for tokens in row.batch.lengths() {
            sequences.push(Sequence { tokens, start: rows / block });
            rows += form.room(tokens);
        }
        let tensor_bytes = shape.tensor_bytes(rows);
        let memory = Memory::new(machine, 2 * shape.layers * tensor_bytes)?;
        machine.refill(&memory)?;
        let blocks = if form == Form::Contiguous { 0 } else { rows / block };
        let table = Memory::of(machine, &Random::new(7).permutation(blocks))?;
        Ok(Self { shape, form, sequences, memory, tensor_bytes, table })
    }

    /// Where the rows of a tensor begin for a sequence: tensor `2 * layer` is K, the next one V.
    fn base(&self, tensor: usize, sequence: &Sequence) -> u64 {
        let start = match self.form {
            Form::Contiguous => self.shape.tensor_bytes(sequence.start),
            // Block tables lead into the tensor's pool, which all sequences share.
            Form::Paged(_) => 0,
        };
        self.memory.address + (tensor * self.tensor_bytes + start) as u64
    }

    fn table_of(&self, sequence: &Sequence) -> (u64, usize) {
        match self.form {
            Form::Contiguous => (0, 0),
            Form::Paged(block) => {
                (self.table.address + (sequence.start * size_of::<i32>()) as u64, sequence.tokens.div_ceil(block))
            }
        }
    }

    /// A tensor of a sequence, as the kernels take it: address, layout and table.
    pub fn rows(&self, tensor: usize, sequence: &Sequence) -> (u64, Layout, Option<BlockTable>) {
        let Shape { kv_heads, head_dim, .. } = *self.shape;
        let layout = match self.form {
            Form::Contiguous => Layout::head_major(Dtype::Bf16, kv_heads, sequence.tokens, head_dim),
            Form::Paged(block) => Layout::paged_token_major(Dtype::Bf16, kv_heads, sequence.tokens, head_dim, block),
        };
        let (data, blocks) = self.table_of(sequence);
        let table = BlockTable { data: data as *const u8, kind: IndexKind::I32, stride_head: 0, blocks };
        (self.base(tensor, sequence), layout, (self.form != Form::Contiguous).then_some(table))
    }

    /// The layers of a sequence, as an engine describes them, with `length` rows in each.
    pub fn layers(&self, sequence: &Sequence, length: usize) -> Vec<KvhLayer> {
        let Shape { layers, kv_heads, head_dim, .. } = *self.shape;
        let row = self.shape.row_bytes();
        let block = self.form.block_size();
        let rows = |tensor: usize| KvhRows {
            base: self.base(tensor, sequence) as *mut _,
            stride_block: (row * kv_heads * block) as i64,
            stride_token: if block == 0 { row } else { row * kv_heads } as i64,
            stride_head: if block == 0 { row * sequence.tokens } else { row } as i64,
            stride_element: ELEMENT as i64,
            head_dim: head_dim as u32,
            dtype: BF16,
        };
        let (table, count) = self.table_of(sequence);
        let layer = |layer: usize| KvhLayer {
            struct_size: size_of::<KvhLayer>(),
            layer: layer as u32,
            kind: KVH_LAYER_FULL,
            flags: 0,
            window: 0,
            shared_with: -1,
            kv_heads: kv_heads as u32,
            block_size: block as u32,
            reserved0: 0,
            length: length as u64,
            k: rows(2 * layer),
            v: rows(2 * layer + 1),
            table: KvhBlockTable { data: table as *const _, stride_head: 0, count: count as u32, dtype: I32 },
            positions: KvhPositions { data: ptr::null(), stride_head: 0, count: 0 },
        };
        (0..layers).map(layer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::Cpu;
    use super::super::rows::{Operation, Row};
    use super::super::shapes::{Batch, SMOLLM};
    use super::*;

    #[test]
    fn sequences_share_no_row() {
        let machine = Cpu::new();
        for form in [Form::Contiguous, Form::Paged(16)] {
            let row = Row { shape: &SMOLLM, form, batch: Batch::One(100), keep: 2, operation: Operation::KeyNorm };
            let mut cache = Cache::new(&machine, &row).unwrap();
            // Two sequences in the room of one.
            cache.sequences = match form {
                Form::Contiguous => vec![Sequence { tokens: 40, start: 0 }, Sequence { tokens: 60, start: 40 }],
                Form::Paged(_) => vec![Sequence { tokens: 48, start: 0 }, Sequence { tokens: 52, start: 3 }],
            };
            let mut seen = std::collections::HashSet::new();
            for sequence in &cache.sequences {
                for tensor in 0..2 * SMOLLM.layers {
                    let (address, layout, table) = cache.rows(tensor, sequence);
                    // SAFETY: the cache is that long, and its table names blocks of it.
                    let rows = unsafe { kvhook_kernels::Rows::new(address as *mut u8, layout, table) }.unwrap();
                    for token in 0..sequence.tokens {
                        for head in 0..SMOLLM.kv_heads {
                            let at = rows.row_ptr(token, head).unwrap() as u64;
                            assert!(seen.insert(at), "{form:?}: row twice");
                            assert!(
                                at >= cache.memory.address
                                    && at + 128 <= cache.memory.address + cache.memory.bytes as u64
                            );
                        }
                    }
                }
            }
            assert_eq!(seen.len(), 100 * 3 * 60);
        }
    }
}
