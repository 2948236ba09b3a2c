//! One step of the model over a batch.

use crate::device::{Backend, cpu};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::rank::{Batch, Ranks};

/// Runs the tokens of a batch, writes their K and V, and returns the logits of the rows in `wanted`, `[vocab]` each.
///
/// # Errors
/// [`Error::UnknownToken`] before anything is written; [`Error::RankStopped`] where a rank panicked; [`Error::Device`]
/// where a device other than the CPU fails or has no memory left.
pub fn forward(model: &Model, ranks: &Ranks, batch: Batch, tokens: &[u32], wanted: &[usize]) -> Result<Vec<Vec<f32>>> {
    if let Some(&token) = tokens.iter().find(|token| **token as usize >= model.config.vocab) {
        return Err(Error::UnknownToken { token, vocab: model.config.vocab });
    }
    match ranks.backend() {
        Backend::Cpu => cpu::forward(model, ranks, batch, tokens, wanted),
        #[cfg(feature = "cuda")]
        Backend::Cuda(cuda) => crate::device::cuda::forward(cuda, model, ranks, batch, tokens, wanted),
    }
}
