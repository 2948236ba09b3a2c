//! The reference engine: a Llama-architecture GGUF with caches that a plugin may compress.
//!
//! It exists to show, on a real model and on any machine, what compressing a KV cache does. So it keeps apart what
//! compression needs apart (cache length and position; layers of different length; ranks with a shard each), and it
//! is exact: every row of every result has one order of summation. A token's logits are the same bits whatever the
//! cache kind, the number of ranks, the chunks of the prefill and the rest of the batch, and whatever the machine's
//! vector width.
//!
//! * [`model`] reads a GGUF and its tokenizer, and fetches the default model.
//! * [`cache`] holds keys (after RoPE) and values, contiguous or paged, and who owns which block.
//! * [`runner`] runs steps over sequences: prefill, decode, teacher-forced scoring.
//! * [`hooks`] lets plugins compress the caches, through the host.
//! * [`engine`] serves requests on top of it: admission, chunked prefill, batched decode, preemption.
//! * [`device`] says where weights and caches lie and steps run: the CPU, or a CUDA device.
//! * [`quality`] measures what compression did to the answers.

pub mod attention;
pub mod cache;
pub mod device;
mod edits;
pub mod engine;
pub mod error;
pub mod forward;
pub mod hooks;
pub mod matmul;
pub mod model;
pub mod ops;
pub mod quality;
pub mod rank;
pub mod runner;
pub mod scheduler;
mod simd;

pub use cache::{CacheConfig, CacheKind, KvDtype, SequenceId};
pub use device::Device;
pub use engine::{Engine, EngineConfig, Event, FinishReason, Request, RequestId};
pub use error::{Error, Result};
pub use hooks::{ArmConfig, KvPlugins, PluginConfig, SequenceReport};
pub use model::Model;
pub use runner::{Begin, Runner, Scoring};
