//! One sequence of a mock engine.

use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;

use crate::cache::{Form, Layer};
use crate::engine::Shape;
use crate::random::Random;

/// A sequence: its layers, and what an engine knows of it.
#[derive(Clone)]
pub struct Sequence {
    /// Its name.
    pub uid: u64,
    /// Commits so far.
    pub epoch: u64,
    /// Position of the next token.
    pub next_position: u64,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// How many of the prompt's last queries `before_attention` saw; the engine's own count.
    pub queries_seen: u64,
    /// Stretches of the prompt.
    pub segments: Vec<KvhSegment>,
    /// Its caches.
    pub layers: Vec<Layer>,
}

impl Sequence {
    /// A prompt that was just run: as many tokens as the longest layer has rows.
    pub fn new(uid: u64, layers: Vec<Layer>) -> Self {
        let tokens = layers.iter().map(Layer::tokens).max().unwrap_or(0) as u64;
        Self {
            uid,
            epoch: 0,
            next_position: tokens,
            prompt_length: tokens,
            queries_seen: 0,
            segments: Vec::new(),
            layers,
        }
    }

    /// A prompt of `tokens` tokens with random rows.
    pub fn random(uid: u64, tokens: usize, shape: Shape, dtype: Dtype, form: Form, random: &mut Random) -> Self {
        Self::new(uid, (0..shape.layers).map(|_| Layer::random(shape, tokens, dtype, form, random)).collect())
    }

    /// The same with an image in its prompt.
    pub fn image(mut self, start: u64, length: u64) -> Self {
        self.segments.push(KvhSegment { kind: KVH_SEGMENT_IMAGE, reserved0: 0, start, length });
        self
    }
}
