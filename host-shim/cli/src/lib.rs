//! The `kvhook` command line: compress the KV cache of a real model with plugins, and measure what that does.
//!
//! The library holds what the commands share: the options ([`args`]), the measures of a comparison ([`results`]) and
//! their faces in the terminal ([`table`]) and in the browser ([`page`]), handed out by [`report`], the face of an inspection ([`inspect`]),
//! and the model that `demo` fetches ([`fetch`]).

pub mod args;
pub mod arm;
pub mod error;
pub mod fetch;
pub mod files;
pub mod format;
pub mod inspect;
pub mod machine;
pub mod page;
pub mod passages;
pub mod passkey;
pub mod progress;
pub mod report;
pub mod results;
pub mod stats;
pub mod table;
