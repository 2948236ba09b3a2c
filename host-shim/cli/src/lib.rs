//! The `kvhook` command line: compress the KV cache of a real model with plugins, and measure what that does.
//!
//! * [`commands`] are what a user types, with the options of [`args`].
//! * [`measure`] runs arms over passages with the reference engine.
//! * [`results`] holds what was measured; [`table`] and [`page`] show it in the terminal and in the browser, and
//!   [`report`] hands it out.
//! * [`eval`] judges a plugin by such a comparison with controls.
//! * [`record`] reads and judges what an engine wrote down while it served.
//! * [`mod@bench`] times compressions of caches without a model.
//! * [`inspect`] shows what a plugin's file says of itself, [`account`] what plugins did to one sequence.
//! * [`project`] writes the project of a new plugin.
//! * [`validate`] checks the conformance rules on a plugin's file, each in a process of its own.
//! * [`weights`] reads and converts the weight files of `mlp-decouple`.

pub mod account;
pub mod args;
pub mod arm;
pub mod bench;
pub mod commands;
pub mod error;
pub mod eval;
pub mod files;
pub mod format;
pub mod inspect;
pub mod logs;
pub mod machine;
pub mod measure;
pub mod model;
pub mod page;
pub mod passages;
pub mod plugins;
pub mod progress;
pub mod project;
pub mod record;
pub mod report;
pub mod results;
pub mod stats;
pub mod table;
pub mod validate;
pub mod weights;
