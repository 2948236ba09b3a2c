//! Rotary positions (Su et al., arXiv 2104.09864): queries turned back to none, keys against the mean of the next ones.

use std::f64::consts::TAU;

use kvhook_abi::model::RopePairing;
use kvhook_abi::{ModelInfo, PluginError};

/// How a model turns its queries and keys.
pub struct Rope {
    /// Radians a position, of each pair of channels.
    frequencies: Vec<f64>,
    pairing: RopePairing,
}

/// A turn of each pair of channels, or a mean of turns, which also shortens.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Cosine and sine of each pair.
    pairs: Vec<(f32, f32)>,
    pairing: RopePairing,
}

impl Rope {
    /// That of a model.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] for positions of several axes, and for a pairing that is not known.
    pub fn new(model: &ModelInfo) -> Result<Self, PluginError> {
        let unsupported = |what: String| {
            let text = format!(
                "{what}; expected-attention turns queries back by RoPE of one axis, paired in halves or neighbours"
            );
            Err(PluginError::Unsupported(text))
        };
        if model.position_axes != 1 {
            return unsupported(format!("the model's positions have {} axes", model.position_axes));
        }
        let pairs = match model.rope_pairing {
            RopePairing::HalfSplit | RopePairing::Interleaved => model.rotary_dim as usize / 2,
            RopePairing::None => 0,
            RopePairing::Unknown(pairing) => return unsupported(format!("the model pairs channels in way {pairing}")),
        };
        let narrowest = model.layers.iter().filter(|layer| layer.is_planned()).map(|layer| layer.k_head_dim).min();
        if narrowest.is_some_and(|channels| channels < 2 * pairs) {
            return unsupported(format!("the model turns {} channels of keys that have fewer", 2 * pairs));
        }
        let from_base = |pair| model.rope_base.powf(-2.0 * pair as f64 / f64::from(model.rotary_dim));
        let frequencies = match model.rope_frequencies.as_slice() {
            [] => (0..pairs).map(from_base).collect(),
            given => given.iter().take(pairs).map(|frequency| f64::from(*frequency)).collect(),
        };
        Ok(Self { frequencies, pairing: model.rope_pairing })
    }

    /// The turns of `count` positions from `first` on.
    pub fn turns(&self, first: u64, count: usize) -> Vec<Turn> {
        let turn = |position: u64| self.turn(|frequency| (position as f64 * frequency, 1.0));
        (first..).take(count).map(turn).collect()
    }

    /// The mean of the turns of `count` positions from `first` on.
    ///
    /// A sum of turns by equal steps is a geometric series: the turn of the middle, times a ratio of sines.
    pub fn mean_turn(&self, first: u64, count: u64) -> Turn {
        let count = count as f64;
        let middle = first as f64 + (count - 1.0) / 2.0;
        self.turn(|frequency| {
            let step = (frequency / 2.0).sin();
            let length = if step == 0.0 { 1.0 } else { (count * frequency / 2.0).sin() / (count * step) };
            (middle * frequency, length)
        })
    }

    fn turn(&self, of_pair: impl Fn(f64) -> (f64, f64)) -> Turn {
        let pair = |frequency: &f64| {
            let (angle, length) = of_pair(*frequency);
            let (sin, cos) = (angle % TAU).sin_cos();
            ((length * cos) as f32, (length * sin) as f32)
        };
        Turn { pairs: self.frequencies.iter().map(pair).collect(), pairing: self.pairing }
    }
}

impl Turn {
    /// Turns a row the other way: multiplies it by the transposed matrix. Channels behind the last pair stay.
    pub fn back(&self, row: &mut [f32]) {
        let half = self.pairs.len();
        for (pair, (cos, sin)) in self.pairs.iter().enumerate() {
            let (first, second) = match self.pairing {
                RopePairing::Interleaved => (2 * pair, 2 * pair + 1),
                _ => (pair, pair + half),
            };
            let (a, b) = (row[first], row[second]);
            row[first] = a * cos + b * sin;
            row[second] = b * cos - a * sin;
        }
    }
}
