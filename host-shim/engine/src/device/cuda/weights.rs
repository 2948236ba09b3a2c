//! A model's weights on the device, in f32 and in the panels that the CPU's product reads.

use std::sync::Arc;

use super::Driver;
use super::memory::Buffer;
use crate::error::Result;
use crate::matmul::PackedMatrix;
use crate::model::{LayerWeights, Model};

/// A [`PackedMatrix`].
pub(super) struct Matrix {
    pub(super) panels: Buffer<f32>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// One layer's weights, as in [`LayerWeights`].
pub(super) struct Layer {
    pub(super) attention_norm: Buffer<f32>,
    pub(super) qkv: Matrix,
    pub(super) attention_output: Matrix,
    pub(super) feed_forward_norm: Buffer<f32>,
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
}

/// All weights, and the angles of RoPE.
pub(super) struct Weights {
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Buffer<f32>,
    pub(super) output: Option<Matrix>,
    pub(super) frequencies: Buffer<f64>,
}

impl Weights {
    /// Copies the weights and waits for it.
    pub(super) fn upload(driver: &Arc<Driver>, model: &Model) -> Result<Self> {
        let weights = &model.weights;
        let matrix = |matrix: &PackedMatrix| {
            let panels = copied(driver, matrix.panels())?;
            Ok(Matrix { panels, outputs: matrix.outputs(), inputs: matrix.inputs() })
        };
        let layer = |layer: &LayerWeights| {
            Ok(Layer {
                attention_norm: copied(driver, &layer.attention_norm)?,
                qkv: matrix(&layer.qkv)?,
                attention_output: matrix(&layer.attention_output)?,
                feed_forward_norm: copied(driver, &layer.feed_forward_norm)?,
                gate_up: matrix(&layer.gate_up)?,
                down: matrix(&layer.down)?,
            })
        };
        Ok(Self {
            embedding: matrix(&weights.embedding)?,
            layers: weights.layers.iter().map(layer).collect::<Result<_>>()?,
            output_norm: copied(driver, &weights.output_norm)?,
            output: weights.output.as_ref().map(matrix).transpose()?,
            frequencies: copied(driver, &model.config.rope_frequencies)?,
        })
    }
}

/// Not through page-locked memory, of which weights would take as much again.
fn copied<T: Copy>(driver: &Arc<Driver>, data: &[T]) -> Result<Buffer<T>> {
    let buffer = Buffer::new(driver, data.len())?;
    // SAFETY: the buffer is as long as the data.
    unsafe { driver.upload_and_wait(buffer.address(), data) }?;
    Ok(buffer)
}
