//! CUDA bodies of the operations, behind the feature `cuda`.
//!
//! Names and results are those of the CPU bodies; what differs:
//! - An operation enqueues work on the caller's [`Stream`] and returns. It never synchronises, allocates, or copies
//!   pageable memory, so it may be captured into a graph. It writes when the stream gets there.
//! - It takes a batch: views of several layers and sequences, whose descriptions travel in the launch's parameters. What
//!   does not fit one launch takes several; each operation says how many items fit.
//! - Memory is the caller's. An operation that needs working memory says how much (`scratch_bytes`). What must lie there
//!   as long as the kernels do, [`Device::keep`] allocates.
//! - What only the device can find (a bad index, a score that is NaN) is written into a [`Verdict`] there. Operations
//!   that move rows take the verdict and do nothing where it holds a fault.
//! - A sequence gets the same bytes alone and in any batch, on any part of the device's processors.
//!
//! The engine's context is made current for each call, and the thread's former one restored.

pub mod check;
pub mod device;
pub mod error;
pub mod grouped_mlp;
pub mod key_diff;
pub mod memory;
pub mod norms;
pub mod plan;
pub mod rotate;
pub mod rows;
pub mod sample;
pub mod scores;
pub mod select;
pub mod top_k;
pub mod verdict;
pub mod whole;
pub mod window_attention;

mod batch;
mod keep_smallest;
mod tile;

pub use device::{Device, Stream};
pub use error::CudaError;
pub use memory::DeviceSlice;
pub use rows::Rows;
pub use verdict::{Fault, FaultKind, Outcome, Verdict};
