//! Weights as a file has them: bytes of one element type, with everything that is needed to write the file again.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::v1::Origin;
use crate::{Dtype, LayerWeights, Mlp, Terms, Weights, WeightsError};

/// Which MLP of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// K of text.
    TextK,
    /// V of text.
    TextV,
    /// K of an image.
    ImageK,
    /// V of an image.
    ImageV,
}

impl Role {
    /// All of them, in the order of [`Stored::layers`].
    pub const ALL: [Self; 4] = [Self::TextK, Self::TextV, Self::ImageK, Self::ImageV];

    /// As in the names of version 2.
    pub fn name(self) -> &'static str {
        match self {
            Self::TextK => "text_k",
            Self::TextV => "text_v",
            Self::ImageK => "image_k",
            Self::ImageV => "image_v",
        }
    }

    /// As in FastCache's state dict, after `compress_`.
    pub fn short_name(self) -> &'static str {
        match self {
            Self::TextK => "tk",
            Self::TextV => "tv",
            Self::ImageK => "ik",
            Self::ImageV => "iv",
        }
    }

    /// Whether RoPE has turned its rows.
    pub fn is_key(self) -> bool {
        matches!(self, Self::TextK | Self::ImageK)
    }
}

/// One matrix and its bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linear<'a> {
    /// `[out, in]`, row major.
    pub weight: Cow<'a, [u8]>,
    /// `[out]`; None: the file has none.
    pub bias: Option<Cow<'a, [u8]>>,
}

/// For each layer its MLPs, for each of them its three matrices.
pub type Layers<'a> = Vec<Vec<[Linear<'a>; 3]>>;

/// A whole weight file, checked but for its numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<'a> {
    /// Version of the file that it was read from, or 0 for a state dict.
    pub version: u32,
    /// Element type of every tensor.
    pub dtype: Dtype,
    /// Rows that become one.
    pub factor: usize,
    /// Values in one row of one head.
    pub head_dim: usize,
    /// For each layer the MLPs in the order of [`Role::ALL`]: two of them, or four with images.
    pub layers: Layers<'a>,
    /// What the weights were trained for.
    pub terms: Terms,
    /// The version 1 file that this comes from.
    pub origin: Option<Origin>,
    /// What is odd about the file and no reason to refuse it.
    pub warnings: Vec<String>,
}

/// Place of a tensor: layer, MLP, matrix (0 to 2), whether it is the bias.
pub(crate) type Place = (usize, Role, usize, bool);

/// A tensor for a place.
pub(crate) struct Tensor<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

/// Name of a tensor in version 2, and in messages.
pub fn tensor_name(layer: usize, role: Role, matrix: usize, bias: bool) -> String {
    format!("layers.{layer}.{}.{matrix}.{}", role.name(), if bias { "bias" } else { "weight" })
}

/// Rows and columns of a matrix.
pub(crate) fn matrix_shape(matrix: usize, factor: usize, head_dim: usize) -> [usize; 2] {
    [head_dim, if matrix == 0 { factor * head_dim } else { head_dim }]
}

/// Factor and head_dim by the first matrix of a file.
pub(crate) fn first_shape(tensor: &str, shape: &[usize]) -> Result<(usize, usize), WeightsError> {
    match *shape {
        [d, cols] if d >= 2 && d % 2 == 0 && cols % d == 0 && cols / d >= 2 => Ok((cols / d, d)),
        _ => Err(WeightsError::FirstShape { tensor: tensor.into(), found: shape.into() }),
    }
}

/// Puts tensors in their places: all of them must be there and have their shapes. Without `optional_bias`, biases are
/// everywhere or nowhere. `name` names a place in the words of the file.
pub(crate) fn assemble<'a>(
    mut tensors: BTreeMap<Place, Tensor<'a>>,
    optional_bias: bool,
    name: impl Fn(Place) -> String,
) -> Result<(usize, usize, Layers<'a>), WeightsError> {
    let missing =
        |place, expected: &str| WeightsError::MissingTensor { tensor: name(place), expected: expected.into() };
    let mut numbers: Vec<usize> = tensors.keys().map(|(layer, ..)| *layer).collect();
    numbers.dedup();
    let roles = if tensors.keys().any(|(_, role, ..)| *role > Role::TextV) { 4 } else { 2 };
    let biases = tensors.keys().any(|(.., bias)| *bias);
    let first = (0, Role::TextK, 0, false);
    let (factor, head_dim) = match tensors.get(&first) {
        Some(tensor) => first_shape(&tensor.name, &tensor.shape)?,
        None => return Err(missing(first, &format!("{} layers", numbers.len()))),
    };
    let expected = format!("{} layers with {roles} MLPs each", numbers.len());
    let mut layers = Vec::with_capacity(numbers.len());
    for layer in 0..numbers.len() {
        let mut mlps = Vec::with_capacity(roles);
        for role in Role::ALL.into_iter().take(roles) {
            let mut linear = |matrix: usize| {
                let [rows, cols] = matrix_shape(matrix, factor, head_dim);
                let mut take = |bias: bool, shape: &[usize]| match tensors.remove(&(layer, role, matrix, bias)) {
                    Some(tensor) if tensor.shape != shape => {
                        Err(WeightsError::Shape { tensor: tensor.name, found: tensor.shape, expected: shape.into() })
                    }
                    found => Ok(found.map(|tensor| tensor.bytes)),
                };
                let weight =
                    take(false, &[rows, cols])?.ok_or_else(|| missing((layer, role, matrix, false), &expected))?;
                let bias = take(true, &[rows])?;
                if bias.is_none() && biases && !optional_bias {
                    return Err(missing((layer, role, matrix, true), &expected));
                }
                Ok(Linear { weight, bias })
            };
            mlps.push([linear(0)?, linear(1)?, linear(2)?]);
        }
        layers.push(mlps);
    }
    match tensors.into_values().next() {
        Some(tensor) => Err(WeightsError::UnknownTensor { tensor: tensor.name }),
        None => Ok((factor, head_dim, layers)),
    }
}

impl<'a> Stored<'a> {
    /// Whether there are MLPs for images.
    pub fn has_images(&self) -> bool {
        self.layers.first().is_some_and(|mlps| mlps.len() == 4)
    }

    /// Every tensor with its name in version 2, shape and bytes, in the order of the layers.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>, &[u8])> {
        self.layers.iter().enumerate().flat_map(move |(layer, mlps)| {
            mlps.iter().zip(Role::ALL).flat_map(move |(mlp, role)| {
                mlp.iter().enumerate().flat_map(move |(matrix, linear)| {
                    let shape = matrix_shape(matrix, self.factor, self.head_dim);
                    let weight = (tensor_name(layer, role, matrix, false), shape.to_vec(), &*linear.weight);
                    let bias = linear.bias.as_deref();
                    let bias = bias.map(|bias| (tensor_name(layer, role, matrix, true), vec![shape[0]], bias));
                    std::iter::once(weight).chain(bias)
                })
            })
        })
    }

    /// That every number is finite.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`].
    pub fn check_finite(&self) -> Result<(), WeightsError> {
        for (tensor, _, bytes) in self.tensors() {
            let values = self.dtype.decode(bytes);
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(WeightsError::NotFinite { tensor, index, value: values[index] });
            }
        }
        Ok(())
    }

    /// That the terms fit the tensors and each other.
    ///
    /// # Errors
    /// [`WeightsError::Contradiction`].
    pub(crate) fn check_terms(&self) -> Result<(), WeightsError> {
        let equal = |field, found: usize, expected: usize, of: &str| {
            if found == expected {
                return Ok(());
            }
            let expected = format!("{expected}, {of}");
            Err(WeightsError::Contradiction { field, found: found.to_string(), expected })
        };
        equal("min_groups", self.terms.min_groups, self.terms.min_groups.max(1), "the least")?;
        if self.terms.max_position == Some(0) {
            equal("max_position", 0, 1, "the least")?;
        }
        let Some(model) = &self.terms.model else { return Ok(()) };
        equal("model.layers", model.layers, self.layers.len(), "the layers of the tensors")?;
        equal("model.head_dim", model.head_dim, self.head_dim, "the rows of the first matrix")?;
        match model.rotary_dim {
            Some(rotary) if rotary > self.head_dim || rotary % 2 == 1 => Err(WeightsError::Contradiction {
                field: "model.rotary_dim",
                found: rotary.to_string(),
                expected: format!("an even number up to head_dim, {}", self.head_dim),
            }),
            _ => Ok(()),
        }
    }

    /// The same numbers in another element type, rounded to nearest. The version 1 file behind it is forgotten when
    /// the type changes.
    ///
    /// # Errors
    /// [`WeightsError::Overflow`].
    pub fn with_dtype(mut self, dtype: Dtype) -> Result<Self, WeightsError> {
        if dtype == self.dtype {
            return Ok(self);
        }
        for (layer, mlps) in self.layers.iter_mut().enumerate() {
            for (mlp, role) in mlps.iter_mut().zip(Role::ALL) {
                for (matrix, linear) in mlp.iter_mut().enumerate() {
                    let name = |bias| tensor_name(layer, role, matrix, bias);
                    linear.weight = converted(&linear.weight, self.dtype, dtype, || name(false))?.into();
                    if let Some(bias) = &mut linear.bias {
                        *bias = converted(bias, self.dtype, dtype, || name(true))?.into();
                    }
                }
            }
        }
        Ok(Self { dtype, origin: None, ..self })
    }

    /// The weights in f32.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] with `check_finite`.
    pub fn decode(&self, check_finite: bool) -> Result<Weights, WeightsError> {
        if check_finite {
            self.check_finite()?;
        }
        let layers = self.layers.iter().map(|mlps| {
            let mut mlps = mlps.iter().map(|mlp| self.mlp(mlp));
            // The readers give two or four MLPs, never another number.
            let text = mlps.next().zip(mlps.next());
            text.map(|(text_k, text_v)| LayerWeights { text_k, text_v, image_k: mlps.next(), image_v: mlps.next() })
        });
        Ok(Weights {
            factor: self.factor,
            head_dim: self.head_dim,
            layers: layers.flatten().collect(),
            terms: self.terms.clone(),
            version: self.version,
            dtype: self.dtype,
            warnings: self.warnings.clone(),
        })
    }

    fn mlp(&self, linears: &[Linear<'_>; 3]) -> Mlp {
        let weight = |matrix: usize| self.dtype.decode(&linears[matrix].weight);
        let bias = |matrix: usize| match &linears[matrix].bias {
            Some(bias) => self.dtype.decode(bias),
            None => vec![0.0; self.head_dim],
        };
        let (w1, w2, w3) = (weight(0), weight(1), weight(2));
        Mlp { factor: self.factor, head_dim: self.head_dim, w1, b1: bias(0), w2, b2: bias(1), w3, b3: bias(2) }
    }
}

/// Bytes of one element type as another.
pub(crate) fn converted(
    bytes: &[u8],
    from: Dtype,
    to: Dtype,
    tensor: impl FnOnce() -> String,
) -> Result<Vec<u8>, WeightsError> {
    let values = from.decode(bytes);
    let rounded = to.encode(&values);
    let lost =
        to.decode(&rounded).iter().zip(&values).position(|(after, before)| before.is_finite() && !after.is_finite());
    match lost {
        Some(index) => Err(WeightsError::Overflow { tensor: tensor(), index, value: values[index], dtype: to }),
        None => Ok(rounded),
    }
}
