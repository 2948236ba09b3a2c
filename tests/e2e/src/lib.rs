//! What crosses crates: conformance, faults, and the real model end to end.

pub mod measured;
pub mod model;
pub mod plugins;
pub mod reference;
pub mod tiny;
