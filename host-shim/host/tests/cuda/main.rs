//! Compression of a cache on a CUDA device, against the plain model that the tests on the CPU use. Each test says that it
//! is skipped where there is no device.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod graphs;
mod room;
mod rows;
mod streams;

use common::{SMALL, Shape};
use kvhook_host::raw::KVHOOK_EVENT_PREFILL_DONE;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;
const GPU: Shape = Shape { gpu: true, ..SMALL };
