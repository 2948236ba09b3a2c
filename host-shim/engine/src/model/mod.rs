//! A Llama-architecture model: shape, weights in f32, tokenizer.

mod config;
pub mod fetch;
mod gguf;
mod tokenizer;
mod weights;

use std::path::Path;

pub use config::{Config, Pairing};
pub use tokenizer::Tokenizer;
pub use weights::{LayerWeights, Weights};

use crate::error::Result;
use gguf::Gguf;

/// A model, ready to run.
#[derive(Debug)]
pub struct Model {
    /// Its shape.
    pub config: Config,
    /// Its weights, dequantised to f32.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its weights on other devices.
    pub(crate) copies: crate::device::Copies,
}

impl Model {
    /// Reads a GGUF of the `llama` architecture with a byte-pair tokenizer. Takes about 4 bytes of memory a parameter.
    ///
    /// # Errors
    /// A variant that names the key or tensor, what was found, and what was expected.
    pub fn load(path: &Path) -> Result<Self> {
        let mut gguf = Gguf::open(path)?;
        let config = Config::read(&mut gguf)?;
        let tokenizer = Tokenizer::read(&gguf)?;
        let weights = Weights::read(&mut gguf, &config)?;
        Ok(Self { config, weights, tokenizer, copies: crate::device::Copies::default() })
    }
}
