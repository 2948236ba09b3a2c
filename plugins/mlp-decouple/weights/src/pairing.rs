//! K's weights for another pairing of RoPE.

use crate::{Mlp, Pairing, Weights};

impl Weights {
    /// Permutes K's weights to another pairing: the columns of the first matrix within each of the `factor` rows, the
    /// rows of the last matrix and its bias. V is not turned by RoPE and stays.
    ///
    /// An interleaved row holds at `2 i + j` what a half-split one holds at `i + j r / 2`, where `r` is the number of
    /// channels that RoPE turns; the others keep their places.
    pub fn to_pairing(&mut self, pairing: Pairing) {
        if self.terms.pairing == pairing {
            return;
        }
        let rotary = self.terms.model.as_ref().and_then(|model| model.rotary_dim).unwrap_or(self.head_dim);
        let source = source(pairing, rotary.min(self.head_dim), self.head_dim);
        for layer in &mut self.layers {
            permute(&mut layer.text_k, &source);
            if let Some(image_k) = &mut layer.image_k {
                permute(image_k, &source);
            }
        }
        self.terms.pairing = pairing;
    }
}

/// For each channel of a row in the pairing `to`, its channel in the other one.
fn source(to: Pairing, rotary: usize, head_dim: usize) -> Vec<usize> {
    let half = rotary / 2;
    let channel = |c: usize| match to {
        _ if c >= 2 * half => c,
        Pairing::Interleaved => c / 2 + c % 2 * half,
        Pairing::HalfSplit => c % half * 2 + c / half,
    };
    (0..head_dim).map(channel).collect()
}

fn permute(mlp: &mut Mlp, source: &[usize]) {
    let d = mlp.head_dim;
    for row in mlp.w1.chunks_exact_mut(d) {
        let before = row.to_vec();
        row.iter_mut().zip(source).for_each(|(value, c)| *value = before[*c]);
    }
    mlp.w3 = source.iter().flat_map(|c| mlp.w3[c * d..(c + 1) * d].to_vec()).collect();
    mlp.b3 = source.iter().map(|c| mlp.b3[*c]).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_hand() {
        assert_eq!(source(Pairing::Interleaved, 6, 6), [0, 3, 1, 4, 2, 5]);
        assert_eq!(source(Pairing::HalfSplit, 6, 6), [0, 2, 4, 1, 3, 5]);
        assert_eq!(source(Pairing::Interleaved, 4, 6), [0, 2, 1, 3, 4, 5]);
    }
}
