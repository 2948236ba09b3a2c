//! The plugin in a mock engine.

#![allow(dead_code, reason = "each test file uses a part")]

use kvhook_testing::{Engine, Fault, Form, Instance, Layer, PerHead, Seen};

pub const PAGED: Form = Form::Paged { block: 16 };

/// An engine that makes an instance with a config, or gives the plugin's status and words.
pub fn create(config: &str, engine: &Engine) -> Result<Instance, (i32, String)> {
    match engine.create(kvhook_testing::entry!(kvhook_truncate), config) {
        Ok(instance) => Ok(instance),
        Err(Fault::Refused { status, message }) => Err((status, message)),
        Err(fault) => panic!("{config}: {fault}"),
    }
}

pub fn made(config: &str, shape: kvhook_testing::Shape) -> Instance {
    create(config, &Engine::new(shape)).unwrap_or_else(|refused| panic!("{config}: {refused:?}"))
}

/// A layer whose V rows are its K rows.
pub fn of_keys(keys: PerHead, form: Form) -> Layer {
    Layer::new(keys.clone(), keys, kvhook_testing::Dtype::F32, form)
}

/// One sequence's queries of a step.
pub fn seen(uid: u64, prompt_length: u64, first_position: u64, queries: &[Vec<Vec<f32>>]) -> Seen {
    Seen { uid, prompt_length, first_position, queries: queries.to_vec() }
}
