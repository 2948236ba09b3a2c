//! The packed weights: once for each process, however many instances share them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvhook_kernels::KernelError;
use kvhook_kernels::grouped_mlp::{GroupedMlp, Linear};
use kvhook_mlp_weights::{LayerWeights, Mlp, Weights};
use sha2::{Digest, Sha256};

use crate::stretches::Kind;

/// The MLPs of a model, ready to multiply.
#[derive(Debug)]
pub struct Mlps {
    layers: Vec<LayerMlps>,
}

/// Those of one layer, for K and V of text and of images, as something multiplies with them.
#[derive(Debug)]
pub struct LayerMlps<M = GroupedMlp> {
    text: [M; 2],
    image: Option<[M; 2]>,
}

/// Which tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Keys.
    K,
    /// Values.
    V,
}

impl Part {
    /// Its letter.
    pub fn name(self) -> &'static str {
        match self {
            Self::K => "K",
            Self::V => "V",
        }
    }
}

/// SHA-256 of all weights.
pub(crate) type Hash = [u8; 32];

/// What instances use together: the ranks of a model, its arms, and models that share weights. It goes with its last user.
pub(crate) struct Shared<K, V>(Mutex<BTreeMap<K, Weak<V>>>);

impl<K: Ord, V> Shared<K, V> {
    /// Nothing yet.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// Gives what somebody uses under this key, or makes it.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn get_or_make<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        // Held while making, so that ranks that start together do not make it twice.
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|_, value| value.strong_count() > 0);
        if let Some(value) = shared.get(&key).and_then(Weak::upgrade) {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        shared.insert(key, Arc::downgrade(&value));
        Ok(value)
    }
}

impl Mlps {
    /// Packs the weights, or gives those that an instance with the same ones has packed. They go when the last instance
    /// goes.
    ///
    /// # Errors
    /// As [`GroupedMlp::pack`].
    pub fn shared(weights: &Weights) -> Result<Arc<Self>, KernelError> {
        static SHARED: Shared<Hash, Mlps> = Shared::new();
        let pack = |mlp: &Mlp| GroupedMlp::pack(mlp.factor, mlp.head_dim, linear(mlp));
        SHARED.get_or_make(hash(weights), || {
            let layers = weights.layers.iter().map(|layer| LayerMlps::pack(layer, pack)).collect::<Result<_, _>>()?;
            Ok(Self { layers })
        })
    }

    /// Those of one layer.
    pub fn layer(&self, layer: usize) -> Option<&LayerMlps> {
        self.layers.get(layer)
    }

    /// Elements of working memory that any of them wants.
    pub fn scratch_len(&self) -> usize {
        self.layers.iter().map(|layer| layer.text[0].scratch_len()).max().unwrap_or(0)
    }
}

impl<M> LayerMlps<M> {
    /// Packs each of a layer's MLPs.
    ///
    /// # Errors
    /// Those of `pack`.
    pub fn pack<E>(weights: &LayerWeights, mut pack: impl FnMut(&Mlp) -> Result<M, E>) -> Result<Self, E> {
        let image = match (&weights.image_k, &weights.image_v) {
            (Some(k), Some(v)) => Some([pack(k)?, pack(v)?]),
            _ => None,
        };
        Ok(Self { text: [pack(&weights.text_k)?, pack(&weights.text_v)?], image })
    }

    /// The one for a kind of stretch and a tensor, if there is one.
    pub fn get(&self, kind: Kind, part: Part) -> Option<&M> {
        let pair = match kind {
            Kind::Text => &self.text,
            Kind::Image => self.image.as_ref()?,
        };
        Some(match part {
            Part::K => &pair[0],
            Part::V => &pair[1],
        })
    }
}

/// The three layers of an MLP.
pub(crate) fn linear(mlp: &Mlp) -> [Linear<'_>; 3] {
    [(&mlp.w1, &mlp.b1), (&mlp.w2, &mlp.b2), (&mlp.w3, &mlp.b3)].map(|(weight, bias)| Linear { weight, bias })
}

/// Of the values as they are used: a file of another version or pairing with the same ones is the same.
pub(crate) fn hash(weights: &Weights) -> Hash {
    let mut hash = Sha256::new();
    let mut number = |number: usize| hash.update((number as u64).to_le_bytes());
    number(weights.factor);
    number(weights.head_dim);
    number(weights.layers.len());
    for layer in &weights.layers {
        for mlp in [Some(&layer.text_k), Some(&layer.text_v), layer.image_k.as_ref(), layer.image_v.as_ref()] {
            hash.update([u8::from(mlp.is_some())]);
            let Some(mlp) = mlp else { continue };
            for values in [&mlp.w1, &mlp.b1, &mlp.w2, &mlp.b2, &mlp.w3, &mlp.b3] {
                for chunk in values.chunks(1024) {
                    let bytes: Vec<u8> = chunk.iter().flat_map(|value| value.to_le_bytes()).collect();
                    hash.update(bytes);
                }
            }
        }
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvhook_mlp_weights::{Dtype, Terms};

    fn weights(value: f32) -> Weights {
        let mlp = || Mlp {
            factor: 2,
            head_dim: 4,
            w1: vec![value; 32],
            b1: vec![0.0; 4],
            w2: vec![0.0; 16],
            b2: vec![0.0; 4],
            w3: vec![0.0; 16],
            b3: vec![0.0; 4],
        };
        let layer = || LayerWeights { text_k: mlp(), text_v: mlp(), image_k: None, image_v: None };
        let layers = vec![layer(), layer()];
        let (terms, warnings) = (Terms::default(), Vec::new());
        Weights { factor: 2, head_dim: 4, layers, terms, version: 2, dtype: Dtype::F16, warnings }
    }

    #[test]
    fn the_same_weights_are_packed_once_and_go_with_their_last_user() {
        let first = Mlps::shared(&weights(0.25)).unwrap();
        let second = Mlps::shared(&weights(0.25)).unwrap();
        let other = Mlps::shared(&weights(0.5)).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!Arc::ptr_eq(&first, &other));
        assert_eq!(Arc::strong_count(&first), 2, "the map owns nothing");
        let gone = Arc::downgrade(&first);
        drop((first, second));
        assert!(gone.upgrade().is_none());
    }
}
