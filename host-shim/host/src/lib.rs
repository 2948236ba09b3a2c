//! The host between an engine and its plugins: loads, checks, commits, falls back, measures.
//!
//! An engine uses the functions of [`c_api`] (`include/kvhook_host.h`, and `include/kvhook.hpp` on top of it) with the
//! types of [`raw`]. They are thin: [`host::Host`] and the modules beside it hold what they do.
//!
//! | module | holds |
//! | --- | --- |
//! | [`load`], [`instance`], [`spec`] | from a name in a form to a plugin instance |
//! | [`host`], [`arm`], [`assign`] | a model's host; which instances serve which sequences |
//! | [`control`], [`guard`] | how arms change while the engine runs, and what switches one off |
//! | [`sequence`], [`lifecycle`], [`attention`] | what happens to a sequence while it is not compressed |
//! | [`ask`], [`prepare`], [`plan`], [`ticket`], [`commit`] | a compression, in its order |
//! | [`device`] | where ordinary memory and a CUDA device differ |
//! | [`model`], [`view`], [`positions`], [`memory`], [`lent`] | rows, and memory beside them |
//! | [`services`], [`callbacks`] | what a plugin may ask of the host, and the host of the engine |
//! | [`figures`] | what each arm did |

pub mod arm;
pub mod ask;
pub mod assign;
pub mod attention;
pub mod c_api;
pub mod callbacks;
pub mod commit;
pub mod control;
pub mod device;
pub mod error;
pub mod figures;
pub mod guard;
pub mod host;
pub mod instance;
pub mod lent;
pub mod lifecycle;
pub mod load;
pub mod memory;
pub mod model;
pub mod plan;
pub mod positions;
pub mod prepare;
pub mod raw;
pub mod sequence;
pub mod services;
pub mod spec;
mod sync;
pub mod ticket;
pub mod view;

pub use error::HostError;

/// Name and version of the host.
pub const NAME: &str = concat!("kvhook-host ", env!("CARGO_PKG_VERSION"));
