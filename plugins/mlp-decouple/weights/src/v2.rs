//! Version 2: a safetensors file with named tensors and one JSON text, `kvhook_mlp`, in its metadata.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use safetensors::tensor::{Dtype as Element, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::state_dict::{canonical_place, element};
use crate::stored::{Stored, Tensor, assemble, tensor_name};
use crate::v1::{HEADER_BYTES, ImageOrder, METADATA_KEY, Origin, check_origin};
use crate::{Dtype, Terms, WeightsError};

/// What the metadata says besides the terms, which stand beside it in the same object.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format_version: u32,
    factor: usize,
    head_dim: usize,
    activation: String,
    sha256: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    v1: Option<RawOrigin>,
}

const HEAD_FIELDS: [&str; 6] = ["format_version", "factor", "head_dim", "activation", "sha256", "v1"];

/// [`Origin`] as text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOrigin {
    header: String,
    metadata: String,
    image_order: ImageOrder,
}

/// Whether a safetensors file has our metadata. Its tensors are not looked at.
///
/// # Errors
/// [`WeightsError::Safetensors`].
pub fn is_ours(bytes: &[u8]) -> Result<bool, WeightsError> {
    let (_, metadata) = header(bytes)?;
    Ok(metadata.metadata().as_ref().is_some_and(|entries| entries.contains_key(METADATA_KEY)))
}

/// Reads a file and compares the tensors with the metadata's sha256.
///
/// # Errors
/// What is wrong with the safetensors file, its metadata, its tensors, or that they do not fit each other.
pub fn read(bytes: &[u8]) -> Result<Stored<'_>, WeightsError> {
    let (_, metadata) = header(bytes)?;
    let text = metadata.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY));
    let (head, terms) = parse(text.ok_or(WeightsError::NoMetadata)?)?;

    let file = SafeTensors::deserialize(bytes)?;
    let mut tensors = BTreeMap::new();
    let mut dtype = None;
    // By name, so that the same file gets the same message.
    for (name, view) in file.iter().collect::<BTreeMap<_, _>>() {
        let place = canonical_place(name).ok_or_else(|| WeightsError::UnknownTensor { tensor: name.into() })?;
        let found = element(view.dtype());
        let expected = *dtype.get_or_insert(found.unwrap_or(Dtype::F16));
        if found != Some(expected) {
            return Err(WeightsError::TensorDtype {
                tensor: name.into(),
                found: view.dtype().to_string(),
                expected: format!("{}, as other tensors have it", expected.name()),
                advice: "write the file again with `kvhook convert --dtype`",
            });
        }
        tensors.insert(place, Tensor { name: name.into(), shape: view.shape().into(), bytes: view.data().into() });
    }
    let (factor, head_dim, layers) =
        assemble(tensors, true, |(layer, role, matrix, bias)| tensor_name(layer, role, matrix, bias))?;
    for (field, found, expected) in [("factor", head.factor, factor), ("head_dim", head.head_dim, head_dim)] {
        if found != expected {
            let expected = format!("{expected}, by the shape of layers.0.text_k.0.weight");
            return Err(WeightsError::Contradiction { field, found: found.to_string(), expected });
        }
    }
    let origin = head.v1.map(Origin::try_from).transpose()?;
    let dtype = dtype.unwrap_or(Dtype::F16);
    let stored = Stored { version: 2, dtype, factor, head_dim, layers, terms, origin, warnings: Vec::new() };
    stored.check_terms()?;
    if let Some(origin) = &stored.origin {
        check_origin(&stored, origin)?;
    }
    let found = digest(&stored);
    if found != head.sha256.to_ascii_lowercase() {
        return Err(WeightsError::Digest { expected: head.sha256, found });
    }
    Ok(stored)
}

/// Writes a file.
///
/// # Errors
/// [`WeightsError::Metadata`], [`WeightsError::Safetensors`].
pub fn write(stored: &Stored<'_>) -> Result<Vec<u8>, WeightsError> {
    let unwritable = |source| WeightsError::Metadata { source };
    let head = Head {
        format_version: 2,
        factor: stored.factor,
        head_dim: stored.head_dim,
        activation: "relu".into(),
        sha256: digest(stored),
        v1: stored.origin.as_ref().map(RawOrigin::from),
    };
    let mut entry = serde_json::to_value(head).map_err(unwritable)?;
    if let (Value::Object(entry), Value::Object(terms)) =
        (&mut entry, serde_json::to_value(&stored.terms).map_err(unwritable)?)
    {
        entry.extend(terms);
    }
    let dtype = match stored.dtype {
        Dtype::F16 => Element::F16,
        Dtype::Bf16 => Element::BF16,
        Dtype::F32 => Element::F32,
    };
    let views = stored.tensors().map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape, bytes)?)));
    let views = views.collect::<Result<Vec<_>, SafeTensorError>>()?;
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), entry.to_string())]);
    Ok(safetensors::serialize(views, Some(metadata))?)
}

/// SHA-256 over all tensors in the order of their names (by bytes): the name, a zero byte, the data.
pub fn digest(stored: &Stored<'_>) -> String {
    let mut tensors: Vec<_> = stored.tensors().collect();
    tensors.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    let mut sha = Sha256::new();
    for (name, _, bytes) in tensors {
        sha.update(name);
        sha.update([0]);
        sha.update(bytes);
    }
    hexadecimal(&sha.finalize())
}

/// Length of the header and what it says.
pub(crate) fn header(bytes: &[u8]) -> Result<(usize, safetensors::tensor::Metadata), WeightsError> {
    // The crate adds the largest offset to the header's length unchecked: offsets beyond the file are refused before.
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    let end = usize::try_from(length).ok().and_then(|length| length.checked_add(8));
    if let Some(text) = end.and_then(|end| bytes.get(8..end))
        && let Ok(entries) = serde_json::from_slice::<Map<String, Value>>(text)
    {
        for (name, entry) in entries {
            let end = entry["data_offsets"][1].as_u64();
            if end.is_some_and(|end| end > bytes.len() as u64) {
                return Err(SafeTensorError::InvalidOffset(name).into());
            }
        }
    }
    Ok(SafeTensors::read_metadata(bytes)?)
}

fn parse(text: &str) -> Result<(Head, Terms), WeightsError> {
    let unreadable = |source| WeightsError::Metadata { source };
    let mut terms: Map<String, Value> = serde_json::from_str(text).map_err(unreadable)?;
    let head: Map<String, Value> = HEAD_FIELDS.iter().filter_map(|field| terms.remove_entry(*field)).collect();
    // A newer format may have other fields: its version is looked at first.
    match head.get("format_version").and_then(Value::as_u64) {
        Some(2) | None => {}
        Some(found) => return Err(WeightsError::FormatVersion { found: u32::try_from(found).unwrap_or(u32::MAX) }),
    }
    let head: Head = serde_json::from_value(Value::Object(head)).map_err(unreadable)?;
    if head.activation != "relu" {
        return Err(WeightsError::Activation { found: head.activation });
    }
    Ok((head, serde_json::from_value(Value::Object(terms)).map_err(unreadable)?))
}

impl From<&Origin> for RawOrigin {
    fn from(origin: &Origin) -> Self {
        Self {
            header: hexadecimal(&origin.header),
            metadata: hexadecimal(&origin.metadata),
            image_order: origin.image_order,
        }
    }
}

impl TryFrom<RawOrigin> for Origin {
    type Error = WeightsError;

    fn try_from(raw: RawOrigin) -> Result<Self, WeightsError> {
        let wrong = |field, size| WeightsError::Hexadecimal { field, size };
        let header = bytes(&raw.header).and_then(|header| <[u8; HEADER_BYTES]>::try_from(header).ok());
        Ok(Self {
            header: header.ok_or(wrong("v1.header", ", 44 of them"))?,
            metadata: bytes(&raw.metadata).ok_or(wrong("v1.metadata", ""))?,
            image_order: raw.image_order,
        })
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing into a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}
