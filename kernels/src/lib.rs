//! What plugins and host compute with: one function per operation, CPU bodies.
//!
//! Every operation reads and writes cache rows through [`Rows`], the view of one K or V tensor of one layer in any
//! layout of the row formula, contiguous or paged, in f32, f16 or bf16. Arithmetic is in f32.
//!
//! Rules that hold for all of them:
//! - The same bytes in give the same bytes out: one order of summation, whatever the processor and the number of threads.
//! - A head, a token or a length that does not fit is an error and nothing was written; nothing panics.
//! - Operations run on the calling thread. [`parallel::for_each`] spreads them over cores, by layer and KV head.
//! - Each operation's documentation states its floor: the bytes that it must move over the memory's bandwidth, or the
//!   arithmetic that it must do, whichever takes longer.

pub mod check;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod grouped_mlp;
pub mod key_diff;
pub mod norms;
pub mod parallel;
pub mod rotate;
pub mod rows;
pub mod sample;
pub mod select;
pub mod top_k;
pub mod window_attention;

mod copy;
mod scratch;
mod simd;

pub use check::{BadIndex, IndexFault, Indices};
pub use dtype::Dtype;
pub use error::KernelError;
pub use rows::{BlockTable, IndexKind, Layout, Rows};
pub use top_k::Protected;
