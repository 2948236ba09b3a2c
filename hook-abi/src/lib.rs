//! The contract between an LLM engine's host and its KV cache plugins, and the safe side for a plugin's author.
//!
//! [`raw`] is the contract itself, from which `include/kvhook.h` is generated. The other modules are for authors in
//! Rust: implement [`Plugin`], or [`Scorer`] where the method is "give each entry a score, keep the best", and write
//! one line, [`export_plugin!`] or [`export_scorer!`].
//!
//! An instance's life, for one model and one rank: `create`, `needs`, then for each sequence `before_attention` (if
//! needed), `bound` and `on_prefill_done`, later `on_grown`, at its end `on_free`; at last it is dropped. Calls on one
//! instance are serial. A panic becomes a status and the instance is never called again.
//!
//! On a CUDA device the same traits hold; what is read there, and what it is read with, the module `cuda` has (behind the
//! feature of that name).
//!
//! A complete plugin (`examples/value_norm.rs`):
//!
//! ```ignore
#![doc = include_str!("../examples/value_norm.rs")]
//! ```
//!
//! with `crate-type = ["cdylib"]` and a `build.rs` that prints `cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete`, since
//! a plugin is never unloaded.

pub mod boundary;
pub mod call;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod deep;
pub mod error;
pub mod export;
mod guard;
pub mod ids;
pub mod json;
pub mod layout;
pub mod log;
pub mod metadata;
pub mod model;
pub mod offers;
pub mod plan;
pub mod plugin;
pub mod raw;
pub mod scorer;
pub mod step;
pub mod tasks;
pub mod view;

pub use call::{Call, Host, Memory};
pub use config::{Config, NoConfig};
pub use error::PluginError;
pub use ids::*;
pub use kvhook_kernels as kernels;
pub use model::{LayerInfo, ModelInfo};
pub use offers::{Can, FreeReason, Hooks, LayerKind, Needs, Offers, Phases, Reason};
pub use plan::{Plan, Request, Requests};
pub use plugin::{Bound, BoundArgs, CreateContext, Plugin};
pub use scorer::Scorer;
pub use step::{StepSequence, StepView};
pub use view::{LayerView, Queries, SequenceView};
