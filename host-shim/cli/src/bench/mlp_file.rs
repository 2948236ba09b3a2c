//! Weights for `mlp-decouple` of any shape: random, since only their size decides how long they take.

use std::borrow::Cow;

use kvhook_mlp_weights::{Dtype, Linear, Stored, Terms, v2};
use tempfile::NamedTempFile;

use super::error::BenchError;
use super::shapes::{Random, Shape};

/// A file of version 2 with MLPs for the text of each layer, gone when it is dropped.
///
/// # Errors
/// [`BenchError::Weights`].
pub fn write(shape: &Shape, factor: usize) -> Result<NamedTempFile, BenchError> {
    let d = shape.head_dim;
    let mut random = Random::new(11);
    let mut matrix = |inputs: usize| {
        // Of a size that keeps the variance from layer to layer.
        let bound = (3.0 / inputs as f64).sqrt();
        let mut values = |count: usize, bound: f64| {
            let values: Vec<f32> = (0..count).map(|_| (bound * (2.0 * random.unit() - 1.0)) as f32).collect();
            Cow::Owned(Dtype::Bf16.encode(&values))
        };
        Linear { weight: values(d * inputs, bound), bias: Some(values(d, 0.1)) }
    };
    let mut mlp = || [matrix(factor * d), matrix(d), matrix(d)];
    let stored = Stored {
        version: 2,
        dtype: Dtype::Bf16,
        factor,
        head_dim: d,
        layers: (0..shape.layers).map(|_| vec![mlp(), mlp()]).collect(),
        terms: Terms { min_groups: 1, ..Terms::default() },
        origin: None,
        warnings: Vec::new(),
    };
    let bytes = v2::write(&stored).map_err(|error| BenchError::Weights(error.to_string()))?;
    let written = tempfile::Builder::new().prefix("kvhook-bench-").suffix(".safetensors").tempfile();
    written
        .and_then(|file| std::fs::write(file.path(), bytes).map(|()| file))
        .map_err(|error| BenchError::Weights(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::shapes::SMOLLM;
    use super::*;

    #[test]
    fn a_plugin_can_read_them() {
        let file = write(&SMOLLM, 3).unwrap();
        let weights = kvhook_mlp_weights::Weights::open(file.path(), &Default::default()).unwrap();
        assert_eq!((weights.factor, weights.head_dim, weights.layers.len()), (3, 64, 30));
    }
}
