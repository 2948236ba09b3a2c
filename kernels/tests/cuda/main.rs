//! The CUDA bodies against the CPU's. Without a device every test prints "skipped: no CUDA device".
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod gpu;

mod check;
mod choose;
mod grouped_mlp;
mod plan;
mod rotate;
mod scores;
mod select;
mod streams;
mod whole;
mod window_attention;
