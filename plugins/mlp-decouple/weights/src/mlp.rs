//! The MLP that makes one row of K or V out of `f` consecutive rows.

/// `y = W3 relu(W2 relu(W1 x + b1) + b2) + b3`, of FastCache (arXiv 2503.08461).
///
/// `x` holds `factor` consecutive rows of one KV head, oldest first (`factor * head_dim` values); `y` is one row. Matrices
/// are row major in PyTorch's order `[out, in]`. A bias that the file does not have is all zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct Mlp {
    /// Rows that become one (`f`).
    pub factor: usize,
    /// Values in one row of one head (`d`).
    pub head_dim: usize,
    /// First matrix, `[d, f * d]`.
    pub w1: Vec<f32>,
    /// First bias, `[d]`.
    pub b1: Vec<f32>,
    /// Second matrix, `[d, d]`.
    pub w2: Vec<f32>,
    /// Second bias, `[d]`.
    pub b2: Vec<f32>,
    /// Third matrix, `[d, d]`.
    pub w3: Vec<f32>,
    /// Third bias, `[d]`.
    pub b3: Vec<f32>,
}

/// The MLPs of one layer, shared by its KV heads.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWeights {
    /// For K of text, after RoPE.
    pub text_k: Mlp,
    /// For V of text.
    pub text_v: Mlp,
    /// For K of an image, after RoPE; None where the file has text only.
    pub image_k: Option<Mlp>,
    /// For V of an image.
    pub image_v: Option<Mlp>,
}

impl Mlp {
    /// The formula in plain loops and f64: what tests compare with, slow.
    ///
    /// # Panics
    /// When `x` is shorter than `factor * head_dim`, or a matrix than its shape.
    pub fn apply_reference(&self, x: &[f32]) -> Vec<f64> {
        let x: Vec<f64> = x[..self.factor * self.head_dim].iter().map(|v| f64::from(*v)).collect();
        let relu = |y: Vec<f64>| y.into_iter().map(|v| v.max(0.0)).collect::<Vec<_>>();
        let h = relu(affine(&self.w1, &self.b1, &x));
        let h = relu(affine(&self.w2, &self.b2, &h));
        affine(&self.w3, &self.b3, &h)
    }
}

fn affine(w: &[f32], b: &[f32], x: &[f64]) -> Vec<f64> {
    let row = |out: usize| &w[out * x.len()..(out + 1) * x.len()];
    let dot = |out: usize| row(out).iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
    b.iter().enumerate().map(|(out, b)| f64::from(*b) + dot(out)).collect()
}
