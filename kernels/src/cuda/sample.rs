//! A weighted sample without replacement.

use super::device::{Device, Family, Image, Kernel, Stream};
use super::error::CudaError;
use super::keep_smallest::{MOST_SHARED, Task, launch};
use super::memory::DeviceSlice;
use super::verdict::Verdict;
use crate::sample::Draw;
use crate::top_k::Protected;

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/sample.fatbin")),
    kernels: &[Kernel { name: "sample_f32", shared: MOST_SHARED }],
};

/// The heads of one layer of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Weights, `[heads, length]`.
    pub weights: DeviceSlice<f32>,
    /// KV heads.
    pub heads: usize,
    /// Tokens that are always kept.
    pub protected: Protected,
    /// Names the random numbers of the first head; those of the others have the numbers behind `head`.
    pub draw: Draw,
    /// The kept tokens, `[heads, keep]`, ascending in each head.
    pub out: DeviceSlice<u32>,
}

/// [`crate::sample::sample`] for each head of all items, in a launch for each 568 of them. The draws are the CPU's, two
/// logarithms apart that differ in their last place.
///
/// A token that is not protected and whose weight is negative, infinite or NaN goes into `verdict`, which must be cleared,
/// and what is kept of that head is no such sample then.
///
/// Floor: one logarithm in f64 and a few comparisons a token.
///
/// # Errors
/// As [`top_k`](super::top_k::top_k).
pub fn sample(device: &Device, stream: Stream, items: &[Sample], verdict: &Verdict) -> Result<(), CudaError> {
    let tasks: Vec<Task> = items
        .iter()
        .map(|&Sample { weights, heads, protected, draw, out }| Task { values: weights, out, heads, protected, draw })
        .collect();
    launch(device, stream, "sample_f32", 8, &tasks, verdict)
}
