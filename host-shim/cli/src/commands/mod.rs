//! What a user types.

pub mod bench;
pub mod compare;
pub mod convert;
pub mod demo;
pub mod eval;
pub mod inspect;
pub mod new;
pub mod probe;
pub mod report;
pub mod run;
pub mod validate;
