//! The k best tokens of each head.

use super::device::{Device, Family, Image, Kernel, Stream};
use super::error::CudaError;
use super::keep_smallest::{MOST_SHARED, Task, launch};
use super::memory::DeviceSlice;
use super::verdict::Verdict;
use crate::sample::Draw;
use crate::top_k::Protected;

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/top_k.fatbin")),
    kernels: &[Kernel { name: "top_k_f32", shared: MOST_SHARED }],
};

/// The heads of one layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct TopK {
    /// Scores, `[heads, length]`.
    pub scores: DeviceSlice<f32>,
    /// KV heads.
    pub heads: usize,
    /// Tokens that are kept whatever their score.
    pub protected: Protected,
    /// The kept tokens, `[heads, keep]`, ascending in each head.
    pub out: DeviceSlice<u32>,
}

/// [`crate::top_k::top_k_heads`] of all items, in a launch for each 568 of them.
///
/// A token that is not protected and whose score is NaN goes into `verdict`, which must be cleared, and what is kept of
/// that head is no selection by score then.
///
/// Floor: reads 4 bytes a token and writes 4 a kept one. Up to 262,144 tokens a head are read once, on devices whose blocks
/// form clusters (compute capability 9.0 and later), else 32,768.
///
/// # Errors
/// `scores` or `out` that do not divide into `heads` rows; fewer kept than are protected, or more than there are; more
/// heads or items than a verdict can name; [`CudaError::Driver`].
pub fn top_k(device: &Device, stream: Stream, items: &[TopK], verdict: &Verdict) -> Result<(), CudaError> {
    let draw = Draw { seed: 0, round: 0, layer: 0, head: 0 };
    let tasks: Vec<Task> = items
        .iter()
        .map(|&TopK { scores, heads, protected, out }| Task { values: scores, out, heads, protected, draw })
        .collect();
    launch(device, stream, "top_k_f32", 4, &tasks, verdict)
}
