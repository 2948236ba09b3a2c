//! Weights of the tests' own: a version 1 file, written from its table, and the formula in f64.

use std::path::{Path, PathBuf};

/// One MLP: three matrices `[out][in]`, each with its bias.
#[derive(Clone)]
pub struct Mlp(pub [(Vec<f32>, Vec<f32>); 3]);

/// All MLPs of a model: for each layer text K, text V and, perhaps, image K, image V.
#[derive(Clone)]
pub struct Weights {
    pub factor: usize,
    pub dim: usize,
    pub min_groups: usize,
    pub layers: Vec<Vec<Mlp>>,
}

/// Numbers that look random, in -1..1.
pub struct Random(pub u64);

impl Random {
    pub fn real(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

impl Weights {
    pub fn random(factor: usize, dim: usize, layers: usize, images: bool) -> Self {
        let mut random = Random(factor as u64 * 1_000 + dim as u64);
        let mut layer = |inputs: usize| {
            let scale = (3.0 / inputs as f32).sqrt();
            let weight = (0..dim * inputs).map(|_| scale * random.real()).collect();
            (weight, (0..dim).map(|_| 0.5 * random.real()).collect())
        };
        let mut mlp = || Mlp([layer(factor * dim), layer(dim), layer(dim)]);
        let count = if images { 4 } else { 2 };
        let layers = (0..layers).map(|_| (0..count).map(|_| mlp()).collect()).collect();
        Self { factor, dim, min_groups: 1, layers }
    }

    /// The file: header, no metadata, then rows, cols, has_bias, values, bias of each matrix.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut word = |value: usize| out.extend((value as u32).to_le_bytes());
        word(0x4B56_434D);
        word(1);
        word(2); // dtype f32, and two reserved bytes
        word(self.layers.len());
        word(0);
        word(self.dim);
        word(self.factor * self.dim);
        word(self.factor);
        word(self.min_groups);
        word(3 * self.layers[0].len());
        word(0);
        assert_eq!(out.len(), 44);
        for (weight, bias) in self.layers.iter().flatten().flat_map(|mlp| &mlp.0) {
            for value in [self.dim, weight.len() / self.dim, 1] {
                out.extend((value as u32).to_le_bytes());
            }
            weight.iter().chain(bias).for_each(|value| out.extend(value.to_le_bytes()));
        }
        out
    }

    pub fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

impl Mlp {
    /// One output at a time.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut x = x.to_vec();
        for (number, (weight, bias)) in self.0.iter().enumerate() {
            let output = |(row, bias): (&[f32], &f32)| {
                let y = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum::<f64>() + f64::from(*bias);
                if number < 2 { y.max(0.0) } else { y }
            };
            x = weight.chunks(x.len()).zip(bias).map(output).collect();
        }
        x
    }
}
