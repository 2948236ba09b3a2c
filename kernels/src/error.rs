//! The error type of all operations.

use std::ops::Range;

use crate::check::BadIndex;
use crate::dtype::Dtype;

/// Why an operation was refused. Nothing was written when one of these is returned, [`Self::ResultTooLarge`] apart.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A view's fields contradict each other.
    #[error("layout of rows: {reason}")]
    Layout {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A name that is no dtype's.
    #[error("dtype {found:?} is not known: expected f32, f16 or bf16")]
    DtypeName {
        /// The name found.
        found: String,
    },
    /// A paged view addresses more blocks than its table lists.
    #[error("block table lists {found} blocks, but {capacity} rows in blocks of {block_size} need {needed}")]
    TableTooShort {
        /// Blocks listed.
        found: usize,
        /// Blocks needed.
        needed: usize,
        /// Rows that the view claims to address.
        capacity: usize,
        /// Tokens per block.
        block_size: usize,
    },
    /// A block table names a block outside the pool.
    #[error("block table, head {head}, entry {entry}: block {found} is outside the pool of {pool_blocks} blocks")]
    BlockOutOfPool {
        /// KV head whose table was read.
        head: usize,
        /// Entry of the table.
        entry: usize,
        /// The block number found.
        found: isize,
        /// Blocks in the pool.
        pool_blocks: usize,
    },
    /// Two views of one operation have different element types.
    #[error("rows of {source_dtype} cannot be moved into rows of {destination_dtype}: both must have one dtype")]
    DtypeMismatch {
        /// Dtype read.
        source_dtype: Dtype,
        /// Dtype written.
        destination_dtype: Dtype,
    },
    /// Two operands have different head dimensions.
    #[error("{what} has head_dim {found}, expected {expected}")]
    HeadDimMismatch {
        /// The operand.
        what: &'static str,
        /// Its head dimension.
        found: usize,
        /// The head dimension of the other operand.
        expected: usize,
    },
    /// Heads outside the view.
    #[error("heads {}..{} were asked of a view with {kv_heads} KV heads", heads.start, heads.end)]
    HeadRange {
        /// Heads asked for.
        heads: Range<usize>,
        /// Heads of the view.
        kv_heads: usize,
    },
    /// Tokens outside the view.
    #[error("tokens {}..{} were asked of a view that addresses {capacity} rows", tokens.start, tokens.end)]
    TokenRange {
        /// Tokens asked for.
        tokens: Range<usize>,
        /// Rows that may be addressed.
        capacity: usize,
    },
    /// A slice has the wrong length.
    #[error("{what} has {found} elements, expected {expected}")]
    SliceLength {
        /// The slice.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that the other arguments ask for.
        expected: usize,
    },
    /// The indices of a selection are refused.
    #[error(transparent)]
    Index(#[from] BadIndex),
    /// In place, a row would be written before it was read.
    #[error(
        "head {head}, place {place}: row {source_row} cannot move up to row {destination_row} in place; \
         in place, rows move towards the front only"
    )]
    Overtakes {
        /// KV head.
        head: usize,
        /// Place in the list of indices.
        place: usize,
        /// Row read.
        source_row: usize,
        /// Row written.
        destination_row: usize,
    },
    /// More query heads than whole groups of the KV heads.
    #[error(
        "{query_heads} query heads cannot be shared by {kv_heads} KV heads: expected a multiple, at least one each"
    )]
    QueryHeads {
        /// Query heads.
        query_heads: usize,
        /// KV heads.
        kv_heads: usize,
    },
    /// A window that is empty or longer than the sequence.
    #[error("window of {window} queries over {length} keys: expected 1 to {length}")]
    Window {
        /// Queries in the window.
        window: usize,
        /// Keys.
        length: usize,
    },
    /// A pooling kernel that has no middle.
    #[error("pooling kernel of {kernel}: expected an odd number")]
    PoolingKernel {
        /// The kernel found.
        kernel: usize,
    },
    /// A selection that keeps fewer rows than are protected, or more than there are.
    #[error("keep {keep} of {length} with {protected} protected: expected {protected} to {length}")]
    Keep {
        /// Rows to keep.
        keep: usize,
        /// Rows that are always kept.
        protected: usize,
        /// Rows in all.
        length: usize,
    },
    /// A score that cannot be ordered.
    #[error("score of token {token} is NaN: scores must be ordered")]
    ScoreNotANumber {
        /// The token.
        token: usize,
    },
    /// A weight that is no probability's weight.
    #[error("weight of token {token} is {value}: expected a finite number, zero or more")]
    Weight {
        /// The token.
        token: usize,
        /// The weight found.
        value: f32,
    },
    /// Groups of no rows, or rows of no elements.
    #[error("groups of {factor} rows of {head_dim} elements: expected at least 1 of each, and a product that fits")]
    Group {
        /// Rows of a group.
        factor: usize,
        /// Elements of a row.
        head_dim: usize,
    },
    /// More pairs of channels to rotate than a row has, or none.
    #[error("{pairs} pairs of channels to rotate in rows of {head_dim} elements: expected 1 to {}", head_dim / 2)]
    Rotary {
        /// Pairs, as many as frequencies.
        pairs: usize,
        /// Elements of a row.
        head_dim: usize,
    },
    /// A computed row that cannot be stored.
    #[error(
        "head {head}, row {row}: a result is not a number or above {largest}, the most that the cache's dtype holds"
    )]
    ResultTooLarge {
        /// KV head.
        head: usize,
        /// Row of the destination.
        row: usize,
        /// Largest value of the dtype.
        largest: f32,
    },
    /// Working memory could not be had.
    #[error("no memory for {bytes} bytes of working space")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
}
