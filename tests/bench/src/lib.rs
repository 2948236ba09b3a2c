//! Benchmarks that gate on ratios within one run: `cargo bench -p kvhook-bench`.
//!
//! | benchmark | measures | gate |
//! | --- | --- | --- |
//! | `hook` | an empty hook through the C boundary, with the guard | 20 ns |
//! | `commit` | a compression through the host's C API against memcpy of the same bytes | see there |
//! | `decode` | decode with `noop`, without plugins, and after a cut | 1 %, 1 %, 5 % |
//! | `grouped_mlp` | the MLP of `mlp-decouple` against a large matrix product of crate `gemm` | 60 % of its rate |
//! | `mlp_quality` | KL behind `mlp-decouple` with its trained weights against uniform stride, paired | lower, p < 0.01 |
//! | `swap` | the longest call that a swap delays, with 64 and 1,024 live sequences | 50 us |
//! | `hooks_share` | the whole `truncate` hook against prefill, by importance | none |
//!
//! The bandwidth of the moving itself is gated beside the kernels: `cargo bench -p kvhook-kernels --bench select`.
//!
//! Each prints a table and exits with an error when a gate fails. Where time is measured, candidates take turns within one run, so that what slows
//! down the machine for a while slows down all of them; figures are medians.

pub mod error;
pub mod linear_map;
pub mod measure;
pub mod model;
pub mod passages;
pub mod rig;
pub mod student;

pub use error::{Error, Result};
