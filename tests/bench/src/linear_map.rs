//! Linear maps of `f` rows to one as weight files of `mlp-decouple`, so that they run through the same plugin.
//!
//! `relu(z + c) - c` is `z` where `z > -c`. With the shift `c` in the first bias and taken away in the last, a network of
//! ReLUs is the linear map. f32 then resolves `2^-15` of a channel's scale (`c` = 256): a row that is copied comes out
//! unchanged where it is 0.004 or more, and is off by at most `2^-16` where it is less; bf16 itself keeps 8 bits.

use std::path::Path;

use kvhook_mlp_weights::{Dtype, Linear, Stored, Terms, v2};
use safetensors::SafeTensors;

use crate::error::{Error, Result};

/// What hidden values are shifted by, in units of a channel's scale. Values of a cache must stay below it.
pub const SHIFT: f32 = 256.0;

/// `y = scale (weight x) + bias`, of K or of V of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearMap {
    /// `[d, f d]`, row-major.
    pub weight: Vec<f32>,
    /// `[d]`; hidden values are outputs without it.
    pub bias: Vec<f32>,
    /// `[d]`: units of the hidden values.
    pub scale: Vec<f32>,
    /// `[d]`: added to the hidden values.
    pub hidden_bias: Vec<f32>,
}

impl LinearMap {
    /// The mean of the group's rows with these weights, oldest first.
    pub fn weighted(rows: &[f32], head_dim: usize) -> Self {
        let inputs = rows.len() * head_dim;
        let mut weight = vec![0.0; head_dim * inputs];
        for channel in 0..head_dim {
            for (row, value) in rows.iter().enumerate() {
                weight[channel * inputs + row * head_dim + channel] = *value;
            }
        }
        let zeros = vec![0.0; head_dim];
        Self { weight, bias: zeros.clone(), scale: vec![1.0; head_dim], hidden_bias: zeros }
    }

    /// The three matrices, each with its bias.
    fn matrices(&self) -> [(Vec<f32>, Vec<f32>); 3] {
        let d = self.bias.len();
        let diagonal = |values: &[f32]| {
            let mut matrix = vec![0.0; d * d];
            for (channel, value) in values.iter().enumerate() {
                matrix[channel * (d + 1)] = *value;
            }
            matrix
        };
        let shifted = self.hidden_bias.iter().map(|bias| bias + SHIFT).collect();
        let back = self.bias.iter().zip(&self.scale).map(|(bias, scale)| bias - SHIFT * scale).collect();
        [(self.weight.clone(), shifted), (diagonal(&vec![1.0; d]), vec![0.0; d]), (diagonal(&self.scale), back)]
    }
}

/// Writes a weight file, version 2, f32, of maps for K and V of each layer.
///
/// # Errors
/// Those of writing.
pub fn write(path: &Path, factor: usize, maps: &[[LinearMap; 2]], terms: &Terms) -> Result<()> {
    let linear = |(weight, bias): (Vec<f32>, Vec<f32>)| Linear {
        weight: Dtype::F32.encode(&weight).into(),
        bias: Some(Dtype::F32.encode(&bias).into()),
    };
    let mlp = |map: &LinearMap| map.matrices().map(linear);
    let stored = Stored {
        version: 2,
        dtype: Dtype::F32,
        factor,
        head_dim: maps.first().map_or(0, |[k, _]| k.bias.len()),
        layers: maps.iter().map(|maps| maps.iter().map(mlp).collect()).collect(),
        terms: Terms { training: String::new(), ..terms.clone() },
        origin: None,
        warnings: Vec::new(),
    };
    std::fs::write(path, v2::write(&stored)?).map_err(|source| Error::File { path: path.into(), source })
}

/// The maps that `train.py` wrote with `--linear-out`: tensors `mean` and `deviation` `[2 layers, d]`, `weight`
/// `[2 layers, d, f d]` and `bias` `[2 layers, 1, d]`, K of all layers first, in standardised channels:
/// `y = deviation (weight ((x - mean) / deviation) + bias) + mean`. And the factor `f`.
///
/// # Errors
/// [`Error::File`], [`Error::LinearMap`].
pub fn trained(path: &Path) -> Result<(usize, Vec<[LinearMap; 2]>)> {
    let problem = |problem: String| Error::LinearMap { path: path.into(), problem };
    let bytes = std::fs::read(path).map_err(|source| Error::File { path: path.into(), source })?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| problem(error.to_string()))?;
    let tensor = |name: &str| {
        let view = file.tensor(name).map_err(|error| problem(error.to_string()))?;
        match view.dtype() {
            safetensors::Dtype::F32 => Ok((view.shape().to_vec(), Dtype::F32.decode(view.data()))),
            other => Err(problem(format!("{name} is {other}, not F32"))),
        }
    };
    let [(_, mean), (_, deviation), (shape, weight), (_, bias)] =
        [tensor("mean")?, tensor("deviation")?, tensor("weight")?, tensor("bias")?];
    let &[maps, d, inputs] = shape.as_slice() else { return Err(problem(format!("weight has the shape {shape:?}"))) };
    let vectors = [&mean, &deviation, &bias].iter().all(|vector| vector.len() == maps * d);
    if !vectors || d == 0 || inputs % d != 0 || maps % 2 != 0 {
        return Err(problem(format!("weight has the shape {shape:?}, which the others do not fit")));
    }
    let map = |index: usize| {
        let of = |vector: &[f32]| vector[index * d..(index + 1) * d].to_vec();
        let (mean, scale) = (of(&mean), of(&deviation));
        let mut weight = weight[index * d * inputs..(index + 1) * d * inputs].to_vec();
        for (place, value) in weight.iter_mut().enumerate() {
            *value /= scale[place % d];
        }
        // In f64: where a channel varies little, its mean in units of that is large.
        let moved = |row: &[f32]| -> f64 {
            row.iter().zip(mean.iter().cycle()).map(|(w, m)| f64::from(*w) * f64::from(*m)).sum()
        };
        let rows = of(&bias).into_iter().zip(weight.chunks_exact(inputs));
        let hidden_bias = rows.map(|(bias, row)| (f64::from(bias) - moved(row)) as f32).collect();
        LinearMap { hidden_bias, weight, bias: mean, scale }
    };
    Ok((inputs / d, (0..maps / 2).map(|layer| [map(layer), map(maps / 2 + layer)]).collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use kvhook_mlp_weights::{OpenOptions, Weights};
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn a_mean_comes_out_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mean.safetensors");
        let maps = [[LinearMap::weighted(&[0.25, 0.75], 4), LinearMap::weighted(&[0.0, 1.0], 4)]];
        write(&path, 2, &maps, &Terms::default()).unwrap();
        let weights = Weights::open(&path, &OpenOptions::default()).unwrap();
        let x = [1.0, -2.0, 3.0, 40.0, 5.0, 6.0, -7.0, -80.0];
        assert_eq!(weights.layers[0].text_k.apply_reference(&x), [4.0, 4.0, -4.5, -50.0]);
        assert_eq!(weights.layers[0].text_v.apply_reference(&x), [5.0, 6.0, -7.0, -80.0]);
    }

    #[test]
    fn a_trained_map_is_folded() {
        // One layer, d = 2, f = 2: four maps' worth of numbers with no symmetry.
        let numbers = |count: usize, first: f32| (0..count).map(|i| first + 0.37 * i as f32).collect::<Vec<_>>();
        let (mean, deviation) = (numbers(4, -0.5), numbers(4, 0.25));
        let (weight, bias) = (numbers(2 * 2 * 4, -1.0), numbers(4, 0.1));
        let bytes = [&mean, &deviation, &weight, &bias].map(|values| Dtype::F32.encode(values));
        let shapes = [vec![2, 2], vec![2, 2], vec![2, 2, 4], vec![2, 1, 2]];
        let names = ["mean", "deviation", "weight", "bias"];
        let view = |(shape, bytes)| TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
        let views = names.into_iter().zip(shapes.into_iter().zip(&bytes).map(|(s, b)| view((s, b.as_slice()))));
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("linear.safetensors"), folder.path().join("weights.safetensors"));
        std::fs::write(&from, safetensors::serialize(views, None).unwrap()).unwrap();

        let (factor, maps) = trained(&from).unwrap();
        write(&to, factor, &maps, &Terms::default()).unwrap();
        let weights = Weights::open(&to, &OpenOptions::default()).unwrap();
        let x = [0.3f32, -1.2, 2.5, 0.7];
        for (index, mlp) in [&weights.layers[0].text_k, &weights.layers[0].text_v].into_iter().enumerate() {
            let of = |values: &[f32], c: usize| f64::from(values[2 * index + c]);
            let standard = |i: usize| (f64::from(x[i]) - of(&mean, i % 2)) / of(&deviation, i % 2);
            for (channel, found) in mlp.apply_reference(&x).into_iter().enumerate() {
                let row = |i: usize| f64::from(weight[8 * index + 4 * channel + i]) * standard(i);
                let net = (0..4).map(row).sum::<f64>() + of(&bias, channel);
                let expected = net * of(&deviation, channel) + of(&mean, channel);
                assert!((found - expected).abs() < 1e-4, "{found}, expected {expected}");
            }
        }
        assert!(matches!(trained(&to), Err(Error::LinearMap { .. })));
    }
}
