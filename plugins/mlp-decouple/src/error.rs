//! Why one sequence cannot be compressed.

use kvhook_abi::{PluginError, Reason};
use kvhook_kernels::KernelError;

/// Why a sequence is kept as it is. Other sequences of the call are not touched by it.
#[derive(Debug, thiserror::Error)]
pub enum Kept {
    /// It has fewer tokens than `min_tokens`.
    #[error("{tokens} tokens; min_tokens is {min_tokens}")]
    TooShort {
        /// Tokens so far.
        tokens: u64,
        /// The config's.
        min_tokens: u64,
    },
    /// Too few rows would become free.
    #[error("{gain} rows of a layer would become free; min_gain is {min_gain}")]
    NoGain {
        /// Rows.
        gain: u64,
        /// The config's.
        min_gain: u64,
    },
    /// Positions were moved, so that nothing says any more what a row stands for.
    #[error("positions=compacted compresses a sequence once, and this one was compressed already")]
    Compacted,
    /// Its rows are not those that this plugin would have left.
    #[error(
        "layer {layer} has {length} rows for {position} tokens, which compressing groups of {factor} does not give: \
         it was compressed by another plugin or another config"
    )]
    Foreign {
        /// The layer.
        layer: usize,
        /// Rows stored.
        length: u64,
        /// Position of the next token.
        position: u64,
        /// Rows that become one.
        factor: u64,
    },
    /// The sequence has another number of layers than the model.
    #[error("the sequence has {found} layers; the model has {expected}")]
    Layers {
        /// Layers of the sequence.
        found: usize,
        /// Layers of the model.
        expected: usize,
    },
    /// The rows that the host lends are not those of the bound.
    #[error("layer {layer}: {found} rows were lent, {expected} are needed")]
    Lent {
        /// The layer.
        layer: usize,
        /// Rows lent.
        found: usize,
        /// The bound.
        expected: usize,
    },
    /// A layer could not be computed.
    #[error("layer {layer}, {part}: {source}")]
    Compute {
        /// The layer.
        layer: usize,
        /// `K` or `V`.
        part: &'static str,
        /// What the kernel says.
        source: KernelError,
    },
    /// The layer's rows cannot be read, or the host refused memory.
    #[error(transparent)]
    Plugin(#[from] PluginError),
}

impl kvhook_abi::tasks::Kept for Kept {
    fn reason(&self) -> Reason {
        match self {
            Self::TooShort { .. } => Reason::TooShort,
            Self::NoGain { .. } => Reason::NoGain,
            Self::Plugin(PluginError::Unsupported(_)) => Reason::Unsupported,
            Self::Plugin(PluginError::OutOfMemory(_)) => Reason::NoRoom,
            _ => Reason::Other,
        }
    }
}
