//! The contract between an LLM engine's host and its KV cache plugins, and the safe side for a plugin's author.
//!
//! [`raw`] is the contract itself, from which `include/kvhook.h` is generated. An author implements
//! [`Plugin`] and writes one line, [`export_plugin!`].

pub mod boundary;
pub mod call;
pub mod config;
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
