//! Why one sequence cannot be compressed.

use kvhook_abi::{PluginError, Reason};
use kvhook_kernels::KernelError;

/// Why a sequence is kept as it is. Other sequences of the call are not touched by it.
#[derive(Debug, thiserror::Error)]
pub enum Kept {
    /// Its plan would keep every row.
    #[error("")]
    NothingToDrop(Reason),
    /// `importance=attention` has not seen the last queries.
    #[error("layer {layer}: {held} of the last {wanted} queries were seen")]
    QueriesMissing {
        /// The layer.
        layer: usize,
        /// Queries without a gap up to the newest.
        held: usize,
        /// Queries that the score needs.
        wanted: usize,
    },
    /// Rows that are always kept whole are missing, or their positions are unknown.
    #[error("layer {layer}: the rows that segments={compressed} keeps whole are not all there")]
    WholeRowsMissing {
        /// The layer.
        layer: usize,
        /// The config's word.
        compressed: &'static str,
    },
    /// The rows' positions lie on a device, and with them what kinds of tokens the rows stand for.
    #[error(
        "layer {layer} was compressed before: which rows segments={compressed} keeps whole is known on a device until the \
         first compression"
    )]
    KindsOnDevice {
        /// The layer.
        layer: usize,
        /// The config's word.
        compressed: &'static str,
    },
    /// The sequence has another number of layers than the model.
    #[error("the sequence has {found} layers; the model has {expected}")]
    Layers {
        /// Layers of the sequence.
        found: usize,
        /// Layers of the model.
        expected: usize,
    },
    /// A score could not be computed.
    #[error("layer {layer}, KV head {head}: {source}")]
    Score {
        /// The layer.
        layer: usize,
        /// The KV head of this rank.
        head: usize,
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
            Self::NothingToDrop(reason) => *reason,
            Self::QueriesMissing { .. } => Reason::QueriesMissing,
            Self::KindsOnDevice { .. } | Self::Plugin(PluginError::Unsupported(_)) => Reason::Unsupported,
            _ => Reason::Other,
        }
    }
}
