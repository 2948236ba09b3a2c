//! One sequence of a mock engine.

use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;

use crate::answer::Answer;
use crate::cache::{Form, Layer, PerHead};
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

    /// What is left after a host carried out a plan, with `grown` more tokens whose rows are random.
    pub fn committed(&self, answer: &Answer, grown: usize, random: &mut Random) -> Self {
        let mut next = self.clone();
        next.epoch += u64::from(!matches!(answer, Answer::Keep { .. }));
        if let Answer::Rewrite { next_position: Some(moved), .. } = answer {
            next.next_position = *moved;
        }
        for (index, layer) in next.layers.iter_mut().enumerate() {
            let (mut keys, mut values, positions) = self.kept(&self.layers[index], index, answer);
            let mut row = |dim: usize| -> Vec<f32> { (0..dim).map(|_| random.float()).collect() };
            for (keys, values) in keys.iter_mut().zip(&mut values) {
                keys.extend((0..grown).map(|_| row(layer.k_head_dim())));
                values.extend((0..grown).map(|_| row(layer.v_head_dim())));
            }
            let (kind, v_dtype) = (layer.kind, layer.v_dtype);
            *layer = Layer::new(keys, values, layer.dtype(), layer.form()).with_positions(positions);
            (layer.kind, layer.v_dtype) = (kind, v_dtype);
        }
        next.next_position += grown as u64;
        next
    }

    /// Keys, values and positions of a layer after a plan.
    fn kept(&self, layer: &Layer, index: usize, answer: &Answer) -> (PerHead, PerHead, Vec<Vec<u32>>) {
        match answer {
            Answer::Keep { .. } => (layer.keys.clone(), layer.values.clone(), layer.positions.clone()),
            Answer::Rewrite { layers, .. } => {
                let rows = &layers[index];
                (rows.keys.clone(), rows.values.clone(), rows.positions.clone())
            }
            Answer::Select(layers) => {
                let kept = &layers[index].rows;
                let of = |rows: &PerHead| -> PerHead {
                    let head = |(rows, kept): (&Vec<Vec<f32>>, &Vec<u32>)| {
                        kept.iter().map(|row| rows[*row as usize].clone()).collect()
                    };
                    rows.iter().zip(kept).map(head).collect()
                };
                let positions = kept
                    .iter()
                    .enumerate()
                    .map(|(head, kept)| kept.iter().map(|row| self.position(layer, head, *row)).collect::<Vec<u32>>());
                (of(&layer.keys), of(&layer.values), positions.collect())
            }
        }
    }

    /// What a row stands for: rows behind those that have a position follow up to the next one.
    fn position(&self, layer: &Layer, head: usize, row: u32) -> u32 {
        let known = layer.positions.get(head).and_then(|positions| positions.get(row as usize));
        known.copied().unwrap_or_else(|| row + self.next_position as u32 - layer.tokens() as u32)
    }

    /// The same with an image in its prompt.
    pub fn image(mut self, start: u64, length: u64) -> Self {
        self.segments.push(KvhSegment { kind: KVH_SEGMENT_IMAGE, reserved0: 0, start, length });
        self
    }
}
