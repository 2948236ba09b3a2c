//! Finding a compressor among named tensors, such as a PyTorch state dict.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use safetensors::SafeTensors;

use crate::stored::{Place, Role, Stored, Tensor, assemble, converted, tensor_name};
use crate::{Dtype, Terms, WeightsError};

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor<'a> {
    /// Its name; the keys of nested dicts are joined by dots.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type; the name of one that weights cannot have.
    pub dtype: Result<Dtype, String>,
    /// Row major, little endian; empty where the element type cannot be used.
    pub bytes: Cow<'a, [u8]>,
}

/// What to take from a checkpoint.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// What stands before the compressor's names, with or without the last dot; None: found out.
    pub prefix: Option<String>,
    /// Element type to convert to; None: that of the tensors, which must then be one.
    pub dtype: Option<Dtype>,
    /// What the weights were trained for.
    pub terms: Terms,
}

/// What became of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: String,
    /// What it is used for.
    pub fate: Fate,
}

/// Whether a tensor is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Under this name of version 2.
    Used(String),
    /// Not, and why.
    Ignored(&'static str),
}

const OUTSIDE: &str = "not under the prefix";
const DEAD: &str = "in FastCache's state dict, never used by the method";

/// Layer, MLP, index in the Sequential, whether it is a bias.
type Parsed = (usize, Role, usize, bool);

/// Takes the compressor out of a checkpoint; tells what became of every tensor, in the order of their names.
///
/// # Errors
/// [`WeightsError::NoCompressor`] also for a checkpoint without any tensor; names, shapes and element types that do not
/// make up the whole of one.
pub fn read<'a>(
    mut tensors: Vec<NamedTensor<'a>>,
    choice: &Choice,
) -> Result<(Stored<'a>, Vec<Outcome>), WeightsError> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let prefix = match &choice.prefix {
        Some(prefix) if prefix.is_empty() || prefix.ends_with('.') => prefix.clone(),
        Some(prefix) => format!("{prefix}."),
        None => find_prefix(&tensors)?,
    };
    let parsed: Vec<Option<Parsed>> =
        tensors.iter().map(|tensor| tensor.name.strip_prefix(&prefix).and_then(parse)).collect();
    if parsed.iter().all(Option::is_none) {
        return Err(no_compressor(&tensors));
    }
    let matrices = matrices(&tensors, &parsed)?;

    let mut dtype = None;
    let mut places: BTreeMap<Place, Tensor<'a>> = BTreeMap::new();
    let mut outcomes = Vec::with_capacity(tensors.len());
    for (tensor, parsed) in tensors.into_iter().zip(parsed) {
        let dtype_name = tensor.dtype.as_ref().map_or_else(String::clone, |dtype| dtype.name().into());
        let mut outcome = |fate| {
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            outcomes.push(Outcome { name, shape, dtype: dtype_name.clone(), fate });
        };
        let Some((layer, role, index, bias)) = parsed else {
            match tensor.name.strip_prefix(&prefix) {
                None => outcome(Fate::Ignored(OUTSIDE)),
                Some(name) if name.starts_with("attention.") => outcome(Fate::Ignored(DEAD)),
                Some(_) => return Err(WeightsError::UnknownTensor { tensor: tensor.name }),
            }
            continue;
        };
        // The indices are among those that were found before.
        let matrix = matrices.iter().position(|known| *known == index).unwrap_or_default();
        let place = (layer, role, matrix, bias);
        outcome(Fate::Used(tensor_name(layer, role, matrix, bias)));
        let bytes = bytes_as(&tensor, choice.dtype, &mut dtype)?.map_or(tensor.bytes, Cow::from);
        let tensor = Tensor { name: tensor.name, shape: tensor.shape, bytes };
        if let Some(other) = places.get(&place) {
            return Err(WeightsError::DuplicateTensor { tensor: tensor.name, other: other.name.clone() });
        }
        places.insert(place, tensor);
    }

    let name = |(layer, role, matrix, bias): Place| {
        let part = if bias { "bias" } else { "weight" };
        format!("{prefix}compress_{}.{layer}.{}.{part}", role.short_name(), matrices[matrix])
    };
    let (factor, head_dim, layers) = assemble(places, false, name)?;
    let (terms, warnings) = (choice.terms.clone(), Vec::new());
    let dtype = dtype.unwrap_or(Dtype::F32);
    let stored = Stored { version: 0, dtype, factor, head_dim, layers, terms, origin: None, warnings };
    stored.check_terms()?;
    Ok((stored, outcomes))
}

/// The tensors of any safetensors file.
///
/// # Errors
/// [`WeightsError::Safetensors`].
pub fn from_safetensors(bytes: &[u8]) -> Result<Vec<NamedTensor<'_>>, WeightsError> {
    crate::v2::header(bytes)?;
    let file = SafeTensors::deserialize(bytes)?;
    let tensors = file.iter().map(|(name, view)| {
        let dtype = element(view.dtype()).ok_or_else(|| view.dtype().to_string());
        NamedTensor { name: name.into(), shape: view.shape().into(), dtype, bytes: view.data().into() }
    });
    Ok(tensors.collect())
}

/// The element type of a safetensors file as ours.
pub(crate) fn element(dtype: safetensors::Dtype) -> Option<Dtype> {
    match dtype {
        safetensors::Dtype::F16 => Some(Dtype::F16),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        safetensors::Dtype::F32 => Some(Dtype::F32),
        _ => None,
    }
}

/// Place of a tensor by its name in version 2.
pub(crate) fn canonical_place(name: &str) -> Option<Place> {
    parse(name).filter(|(layer, role, matrix, bias)| *matrix < 3 && tensor_name(*layer, *role, *matrix, *bias) == name)
}

/// Understands `compress_{tk|tv|ik|iv}.{layer}.{index}.{weight|bias}` and `layers.{layer}.{role}.{index}.{weight|bias}`.
fn parse(name: &str) -> Option<Parsed> {
    let mut parts = name.split('.');
    let (first, second, third) = (parts.next()?, parts.next()?, parts.next()?);
    let (layer, role, index) = match first.strip_prefix("compress_") {
        Some(short) => (second, Role::ALL.into_iter().find(|role| role.short_name() == short)?, third),
        None if first == "layers" => (second, Role::ALL.into_iter().find(|role| role.name() == third)?, parts.next()?),
        None => return None,
    };
    let bias = match (parts.next()?, parts.next()) {
        ("weight", None) => false,
        ("bias", None) => true,
        _ => return None,
    };
    Some((layer.parse().ok()?, role, index.parse().ok()?, bias))
}

/// The one prefix under which there are names of the method.
fn find_prefix(tensors: &[NamedTensor<'_>]) -> Result<String, WeightsError> {
    let starts = |name: &str| {
        let starts = std::iter::once(0).chain(name.match_indices('.').map(|(dot, _)| dot + 1));
        starts.into_iter().find(|start| parse(&name[*start..]).is_some())
    };
    let found = tensors.iter().filter_map(|tensor| starts(&tensor.name).map(|start| &tensor.name[..start]));
    let found: BTreeSet<&str> = found.collect();
    let mut prefixes = found.iter();
    match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => Ok((*prefix).into()),
        (None, _) => Err(no_compressor(tensors)),
        _ => Err(WeightsError::SeveralCompressors { found: found.into_iter().map(str::to_owned).collect() }),
    }
}

fn no_compressor(tensors: &[NamedTensor<'_>]) -> WeightsError {
    let example = tensors.first().map_or(String::new(), |tensor| format!(", such as {}", tensor.name));
    WeightsError::NoCompressor { found: tensors.len(), example }
}

/// The three indices of the matrices in their Sequential, which are the same in all MLPs.
fn matrices(tensors: &[NamedTensor<'_>], parsed: &[Option<Parsed>]) -> Result<[usize; 3], WeightsError> {
    let indices: BTreeSet<usize> = parsed.iter().flatten().map(|(_, _, index, _)| *index).collect();
    let known = [[0, 3, 6], [0, 2, 4], [0, 1, 2]];
    // A matrix may be missing, which is said later, by name.
    let fits = known.into_iter().find(|known| indices.iter().all(|index| known.contains(index)));
    fits.ok_or_else(|| {
        let named = tensors.iter().zip(parsed).find(|(_, parsed)| parsed.is_some());
        let tensor = named.map_or(String::new(), |(tensor, _)| tensor.name.clone());
        WeightsError::SequentialIndices { tensor, found: indices.into_iter().collect() }
    })
}

/// The tensor's bytes in the element type that was asked for, where that is another. If none was, the first tensor sets
/// it for all.
fn bytes_as(
    tensor: &NamedTensor<'_>,
    asked: Option<Dtype>,
    first: &mut Option<Dtype>,
) -> Result<Option<Vec<u8>>, WeightsError> {
    let wrong = |found: &str, expected: String, advice| {
        let (tensor, found) = (tensor.name.clone(), found.into());
        WeightsError::TensorDtype { tensor, found, expected, advice }
    };
    let found = *tensor.dtype.as_ref().map_err(|name| wrong(name, "f16, bf16 or f32".into(), "save it as float32"))?;
    let expected = *first.get_or_insert(asked.unwrap_or(found));
    match asked {
        _ if found == expected => Ok(None),
        Some(_) => converted(&tensor.bytes, found, expected, || tensor.name.clone()).map(Some),
        None => {
            let expected = format!("{}, as other tensors have it", expected.name());
            Err(wrong(found.name(), expected, "choose one element type for all with --dtype"))
        }
    }
}
