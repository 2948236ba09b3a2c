//! Version 1: a header of 44 bytes, metadata, then matrix after matrix without names. Little endian, packed.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::stored::{Linear, Role, Stored, first_shape, matrix_shape, tensor_name};
use crate::{Dtype, Terms, WeightsError};

/// First bytes of a file: `0x4B56434D`.
pub const MAGIC: [u8; 4] = *b"MCVK";
/// Bytes of the header.
pub const HEADER_BYTES: usize = 44;
/// Most metadata that is read.
pub const MAX_METADATA_BYTES: usize = 16 << 20;
/// Key under which the converter writes its metadata, as a JSON object, in both versions.
pub const METADATA_KEY: &str = "kvhook_mlp";

/// Which of the two image MLPs comes first in a layer. Exporters differ, and nothing in the matrices tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ImageOrder {
    /// `tk, tv, ik, iv`: what FastCache's checkpoints and upstream's loader have.
    #[default]
    #[serde(rename = "tk,tv,ik,iv")]
    KeyFirst,
    /// `tk, tv, iv, ik`: what an older exporter of upstream wrote.
    #[serde(rename = "tk,tv,iv,ik")]
    ValueFirst,
}

impl ImageOrder {
    /// The order in the file, as in the metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::KeyFirst => "tk,tv,ik,iv",
            Self::ValueFirst => "tk,tv,iv,ik",
        }
    }

    fn roles(self) -> [Role; 4] {
        match self {
            Self::KeyFirst => Role::ALL,
            Self::ValueFirst => [Role::TextK, Role::TextV, Role::ImageV, Role::ImageK],
        }
    }
}

/// What of a version 1 file is not in its matrices: with it the file can be written again, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The header.
    pub header: [u8; HEADER_BYTES],
    /// The metadata.
    pub metadata: Vec<u8>,
    /// Order in which the image MLPs were read.
    pub image_order: ImageOrder,
}

/// The header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Element type.
    pub dtype: Dtype,
    /// Layers of the model.
    pub layers: u32,
    /// Heads, of no use here: the MLPs are shared by them. 0 in some files.
    pub heads: u32,
    /// Values in one row of one head.
    pub head_dim: u32,
    /// `factor * head_dim` in real files; not used.
    pub hidden_size: u32,
    /// Rows that become one.
    pub factor: u32,
    /// Fewest groups in a segment for it to be compressed; 0 means 1.
    pub min_seq_len: u32,
    /// Matrices of a layer.
    pub weight_count: u32,
    /// Bytes of metadata that follow.
    pub metadata_size: u32,
}

impl Header {
    /// Reads the fields that stand for themselves.
    ///
    /// # Errors
    /// Those named `Header...`, [`WeightsError::NotWeights`], [`WeightsError::Truncated`].
    pub fn parse(bytes: &[u8]) -> Result<Self, WeightsError> {
        let mut reader = Reader { bytes, offset: 0 };
        if !bytes.starts_with(&MAGIC) {
            return Err(crate::not_weights(bytes));
        }
        let header = reader.take(HEADER_BYTES, || "the header".into())?;
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (version, code, reserved) = (word(4), half(8), half(10));
        if version != 1 {
            return Err(WeightsError::HeaderVersion { found: version });
        }
        let Some(&dtype) = Dtype::ALL.get(usize::from(code)) else {
            return Err(WeightsError::HeaderDtype { found: code });
        };
        if reserved != 0 {
            return Err(WeightsError::HeaderReserved { found: reserved });
        }
        Ok(Self {
            dtype,
            layers: word(12),
            heads: word(16),
            head_dim: word(20),
            hidden_size: word(24),
            factor: word(28),
            min_seq_len: word(32),
            weight_count: word(36),
            metadata_size: word(40),
        })
    }

    /// That the fields agree with the tensors.
    fn check(&self, factor: usize, head_dim: usize) -> Result<(), WeightsError> {
        if self.head_dim as usize != head_dim {
            return Err(WeightsError::HeaderHeadDim { header: self.head_dim, rows: head_dim });
        }
        if self.factor as usize != factor {
            return Err(WeightsError::HeaderFactor { header: self.factor, factor });
        }
        Ok(())
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = 1;
        bytes[8] = match self.dtype {
            Dtype::F16 => 0,
            Dtype::Bf16 => 1,
            Dtype::F32 => 2,
        };
        let words = [
            self.layers,
            self.heads,
            self.head_dim,
            self.hidden_size,
            self.factor,
            self.min_seq_len,
            self.weight_count,
            self.metadata_size,
        ];
        for (place, word) in bytes[12..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Goes through a file from front to back.
struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, needed: usize, what: impl FnOnce() -> String) -> Result<&'a [u8], WeightsError> {
        let rest = &self.bytes[self.offset..];
        let Some(taken) = rest.get(..needed) else {
            return Err(WeightsError::Truncated { what: what(), offset: self.offset, needed, found: rest.len() });
        };
        self.offset += needed;
        Ok(taken)
    }

    /// Rows, columns and has_bias of a matrix.
    fn shape(&mut self, tensor: &str) -> Result<[u32; 3], WeightsError> {
        let bytes = self.take(12, || format!("shape of {tensor}"))?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok([word(0), word(4), word(8)])
    }
}

/// Reads a file. Every byte of it has a meaning, or it is refused; that numbers are finite is not looked at.
///
/// # Errors
/// Those of [`Header::parse`], and what is wrong with metadata, shapes and length.
pub fn read(bytes: &[u8], image_order: Option<ImageOrder>) -> Result<Stored<'_>, WeightsError> {
    let header = Header::parse(bytes)?;
    if header.layers == 0 {
        return Err(WeightsError::HeaderLayers);
    }
    if ![6, 12].contains(&header.weight_count) {
        return Err(WeightsError::HeaderWeightCount { found: header.weight_count });
    }
    let mut reader = Reader { bytes, offset: HEADER_BYTES };
    let most = (bytes.len() - HEADER_BYTES).min(MAX_METADATA_BYTES);
    if header.metadata_size as usize > most {
        return Err(WeightsError::HeaderMetadataSize { found: header.metadata_size, most });
    }
    let metadata = reader.take(header.metadata_size as usize, || "the metadata".into())?;
    let (image_order, terms) = understand(metadata, image_order, &header)?;

    let (factor, head_dim) = first_matrix(&mut Reader { ..reader }, &header)?;
    let mut layers = Vec::new();
    for layer in 0..header.layers as usize {
        let mut mlps = Vec::new();
        for role in image_order.roles().into_iter().take(header.weight_count as usize / 3) {
            let mut linear = |matrix| linear(&mut reader, header.dtype, (layer, role, matrix), factor, head_dim);
            mlps.push((role, [linear(0)?, linear(1)?, linear(2)?]));
        }
        mlps.sort_by_key(|(role, _)| *role);
        layers.push(mlps.into_iter().map(|(_, mlp)| mlp).collect());
    }
    let found = bytes.len() - reader.offset;
    if found != 0 {
        return Err(WeightsError::TrailingBytes { found });
    }

    let mut warnings = Vec::new();
    if header.hidden_size as usize != factor * head_dim {
        warnings.push(format!(
            "header, hidden_size: found {}, factor * head_dim is {}; it is not used",
            header.hidden_size,
            factor * head_dim
        ));
    }
    let mut raw = [0; HEADER_BYTES];
    raw.copy_from_slice(&bytes[..HEADER_BYTES]);
    let origin = Some(Origin { header: raw, metadata: metadata.into(), image_order });
    let stored = Stored { version: 1, dtype: header.dtype, factor, head_dim, layers, terms, origin, warnings };
    stored.check_terms()?;
    Ok(stored)
}

/// The first matrix gives factor and head_dim; with them the header can be compared with the length of the file.
fn first_matrix(reader: &mut Reader<'_>, header: &Header) -> Result<(usize, usize), WeightsError> {
    let start = reader.offset;
    let tensor = tensor_name(0, Role::TextK, 0, false);
    let [rows, cols, _] = reader.shape(&tensor)?;
    let (factor, head_dim) = first_shape(&tensor, &[rows as usize, cols as usize])?;
    header.check(factor, head_dim)?;
    let (d, f, size) = (u128::from(rows), factor as u128, header.dtype.size() as u128);
    let mlps = u128::from(header.layers) * u128::from(header.weight_count / 3);
    let least = start as u128 + mlps * (3 * 12 + size * (f + 2) * d * d);
    let most = least + mlps * 3 * d * size;
    let found = reader.bytes.len();
    if !(least..=most).contains(&(found as u128)) {
        let (layers, weights, dtype) = (header.layers, header.weight_count, header.dtype.name());
        return Err(WeightsError::Length { found, least, most, layers, weights, dtype, head_dim, factor });
    }
    Ok((factor, head_dim))
}

fn linear<'a>(
    reader: &mut Reader<'a>,
    dtype: Dtype,
    (layer, role, matrix): (usize, Role, usize),
    factor: usize,
    head_dim: usize,
) -> Result<Linear<'a>, WeightsError> {
    let name = |bias| tensor_name(layer, role, matrix, bias);
    let [rows, cols, has_bias] = reader.shape(&name(false))?;
    let (found, expected) = ([rows as usize, cols as usize], matrix_shape(matrix, factor, head_dim));
    if found != expected {
        return Err(WeightsError::Shape { tensor: name(false), found: found.into(), expected: expected.into() });
    }
    if has_bias > 1 {
        return Err(WeightsError::HasBias { tensor: name(false), found: has_bias });
    }
    // Checked with the file's length: the products fit.
    let weight = reader.take(found[0] * found[1] * dtype.size(), || name(false))?.into();
    let bias = match has_bias {
        0 => None,
        _ => Some(Cow::from(reader.take(found[0] * dtype.size(), || name(true))?)),
    };
    Ok(Linear { weight, bias })
}

/// The order of the image MLPs and the terms by the metadata. Metadata that the converter has not written says nothing.
fn understand(
    metadata: &[u8],
    asked: Option<ImageOrder>,
    header: &Header,
) -> Result<(ImageOrder, Terms), WeightsError> {
    let min_groups = header.min_seq_len.max(1) as usize;
    let written = serde_json::from_slice::<Map<String, Value>>(metadata).ok();
    let Some(Value::Object(mut fields)) = written.and_then(|mut entries| entries.remove(METADATA_KEY)) else {
        return Ok((asked.unwrap_or_default(), Terms { min_groups, ..Terms::default() }));
    };
    let unreadable = |source| WeightsError::Metadata { source };
    let order = fields.remove("image_order").map(serde_json::from_value).transpose().map_err(unreadable)?;
    if let (Some(asked), Some(found)) = (asked, order)
        && asked != found
    {
        return Err(WeightsError::ImageOrder { asked, found });
    }
    let terms: Terms = serde_json::from_value(Value::Object(fields)).map_err(unreadable)?;
    if terms.min_groups != min_groups {
        return Err(WeightsError::Contradiction {
            field: "min_groups",
            found: terms.min_groups.to_string(),
            expected: format!("{min_groups}, min_seq_len of the header"),
        });
    }
    Ok((order.or(asked).unwrap_or_default(), terms))
}

/// That the header which a version 2 file keeps is one of its own tensors.
///
/// # Errors
/// As [`read`].
pub(crate) fn check_origin(stored: &Stored<'_>, origin: &Origin) -> Result<(), WeightsError> {
    let header = Header::parse(&origin.header)?;
    header.check(stored.factor, stored.head_dim)?;
    let matrices = stored.layers.first().map_or(0, Vec::len) * 3;
    let fields = [
        ("v1.header, num_layers", header.layers as usize, stored.layers.len()),
        ("v1.header, weight_count_per_layer", header.weight_count as usize, matrices),
        ("v1.header, metadata_size_bytes", header.metadata_size as usize, origin.metadata.len()),
    ];
    for (field, found, expected) in fields {
        if found != expected {
            let expected = format!("{expected}, as the rest of the file has it");
            return Err(WeightsError::Contradiction { field, found: found.to_string(), expected });
        }
    }
    if header.dtype != stored.dtype {
        let (field, found) = ("v1.header, dtype", header.dtype.name().into());
        return Err(WeightsError::Contradiction { field, found, expected: stored.dtype.name().into() });
    }
    understand(&origin.metadata, Some(origin.image_order), &header).map(|_| ())
}

/// Writes a file. One that was version 1 before comes out as it was, byte for byte, unless another order of its image
/// MLPs is asked for. Any other gets a header of its own, and the order and the terms as metadata.
///
/// # Errors
/// [`WeightsError::Metadata`]; [`WeightsError::Contradiction`] for a number that the header cannot hold.
pub fn write(stored: &Stored<'_>, image_order: Option<ImageOrder>) -> Result<Vec<u8>, WeightsError> {
    let kept = stored.origin.as_ref().filter(|origin| image_order.is_none_or(|order| order == origin.image_order));
    let (header, metadata, order) = match kept {
        Some(origin) => (origin.header, origin.metadata.clone(), origin.image_order),
        None => {
            let order = image_order.unwrap_or_default();
            let (header, metadata) = describe(stored, order)?;
            (header, metadata, order)
        }
    };
    let mut file = [header.as_slice(), &metadata].concat();
    for mlps in &stored.layers {
        for role in order.roles().into_iter().take(mlps.len()) {
            for (matrix, linear) in mlps[role as usize].iter().enumerate() {
                let [rows, cols] = matrix_shape(matrix, stored.factor, stored.head_dim);
                for word in [rows, cols, usize::from(linear.bias.is_some())] {
                    file.extend((word as u32).to_le_bytes());
                }
                file.extend_from_slice(&linear.weight);
                file.extend_from_slice(linear.bias.as_deref().unwrap_or_default());
            }
        }
    }
    Ok(file)
}

/// Header and metadata of a file that was no version 1 before.
fn describe(stored: &Stored<'_>, order: ImageOrder) -> Result<([u8; HEADER_BYTES], Vec<u8>), WeightsError> {
    let unwritable = |source| WeightsError::Metadata { source };
    let mut entry = serde_json::to_value(&stored.terms).map_err(unwritable)?;
    entry["image_order"] = serde_json::to_value(order).map_err(unwritable)?;
    let metadata = serde_json::json!({ METADATA_KEY: entry }).to_string().into_bytes();
    let word = |field, number: usize| {
        u32::try_from(number).map_err(|_| WeightsError::Contradiction {
            field,
            found: number.to_string(),
            expected: "a number of 32 bits, as version 1 has it".into(),
        })
    };
    let header = Header {
        dtype: stored.dtype,
        layers: word("layers", stored.layers.len())?,
        heads: word("model.kv_heads", stored.terms.model.as_ref().map_or(0, |model| model.kv_heads))?,
        head_dim: word("head_dim", stored.head_dim)?,
        hidden_size: word("factor * head_dim", stored.factor * stored.head_dim)?,
        factor: word("factor", stored.factor)?,
        min_seq_len: word("min_groups", stored.terms.min_groups)?,
        weight_count: if stored.has_images() { 12 } else { 6 },
        metadata_size: word("metadata", metadata.len())?,
    };
    Ok((header.to_bytes(), metadata))
}
