//! What a user types.

pub mod bench;
pub mod compare;
pub mod convert;
pub mod demo;
pub mod inspect;
pub mod new;
pub mod run;
pub mod validate;
