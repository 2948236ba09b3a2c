//! Why a weight file is refused.

use std::path::PathBuf;

use crate::{Dtype, ImageOrder};

/// Why a file cannot be read, converted or written. A file is used whole or not at all.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}; choose a writable place", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither version, by its first bytes.
    #[error(
        "not a weight file: it begins with {found}; version 1 begins with 4d 43 56 4b, version 2 is a safetensors file; \
         `kvhook convert` makes one from a PyTorch checkpoint"
    )]
    NotWeights {
        /// The first bytes, hexadecimal.
        found: String,
    },

    /// A version 1 file of another version.
    #[error("header, version: found {found}, expected 1; convert the file with the tool that wrote it")]
    HeaderVersion {
        /// The field.
        found: u32,
    },
    /// A code for no element type.
    #[error("header, dtype: found code {found}, expected 0 (f16), 1 (bf16) or 2 (f32); write the file again")]
    HeaderDtype {
        /// The field.
        found: u16,
    },
    /// The reserved field is in use.
    #[error("header, reserved: found {found}, expected 0; the file is damaged or of a version that this does not know")]
    HeaderReserved {
        /// The field.
        found: u16,
    },
    /// No layers.
    #[error("header, num_layers: found 0, expected the layers of the model; write the file again")]
    HeaderLayers,
    /// Neither text only nor text and image.
    #[error(
        "header, weight_count_per_layer: found {found}, expected 6 (text) or 12 (text and image), three matrices for \
         each MLP; write the file again"
    )]
    HeaderWeightCount {
        /// The field.
        found: u32,
    },
    /// The metadata is longer than the file, or than is read.
    #[error(
        "header, metadata_size_bytes: found {found}, expected at most {most}, what is left of the file or 16 MiB; \
         the file is damaged or cut"
    )]
    HeaderMetadataSize {
        /// The field.
        found: u32,
        /// Bytes that there may be.
        most: usize,
    },
    /// The header's head_dim is not the rows of the first matrix.
    #[error(
        "header, head_dim: found {header}, expected {rows}, the rows of layers.0.text_k.0.weight; write the file again"
    )]
    HeaderHeadDim {
        /// The field.
        header: u32,
        /// Rows of the first matrix.
        rows: usize,
    },
    /// The header's factor is not the first matrix's columns over its rows.
    #[error(
        "header, compression_factor: found {header}, expected {factor}, columns over rows of layers.0.text_k.0.weight; \
         write the file again"
    )]
    HeaderFactor {
        /// The field.
        header: u32,
        /// Columns over rows.
        factor: usize,
    },
    /// The file ends too early.
    #[error("{what}: {needed} bytes expected at offset {offset}, {found} found; the file is cut, copy it again")]
    Truncated {
        /// What was being read.
        what: String,
        /// Where it begins in the file.
        offset: usize,
        /// Its size.
        needed: usize,
        /// Bytes left.
        found: usize,
    },
    /// The length cannot come from this header and these shapes.
    #[error(
        "the file has {found} bytes; its header and first shape ({layers} layers of {weights} matrices, {dtype}, \
         head_dim {head_dim}, factor {factor}) give {least} without biases to {most} with all; num_layers, dtype or \
         weight_count_per_layer is wrong, or the file is cut"
    )]
    Length {
        /// Bytes of the file.
        found: usize,
        /// Bytes without any bias.
        least: u128,
        /// Bytes with all biases.
        most: u128,
        /// Layers in the header.
        layers: u32,
        /// Matrices in a layer.
        weights: u32,
        /// Element type in the header.
        dtype: &'static str,
        /// Rows of the first matrix.
        head_dim: usize,
        /// Its columns over its rows.
        factor: usize,
    },
    /// Bytes after the last matrix.
    #[error("{found} bytes follow the last matrix, expected none; the file is damaged")]
    TrailingBytes {
        /// How many.
        found: usize,
    },
    /// A flag that is neither 0 nor 1.
    #[error("{tensor}, has_bias: found {found}, expected 0 or 1; the file is damaged")]
    HasBias {
        /// The matrix.
        tensor: String,
        /// The field.
        found: u32,
    },
    /// The order that was asked for is not the one that the converter wrote down.
    #[error(
        "image order: `{}` was asked for, the file's metadata says `{}`; leave the option out",
        asked.name(), found.name()
    )]
    ImageOrder {
        /// The option.
        asked: ImageOrder,
        /// The metadata.
        found: ImageOrder,
    },

    /// Not a well-formed safetensors file.
    #[error("not a whole safetensors file: {0}; copy or write it again")]
    Safetensors(#[from] safetensors::SafeTensorError),
    /// A safetensors file without our entry.
    #[error(
        "the safetensors file has no metadata entry `kvhook_mlp`, so nothing says what its tensors are for; \
         `kvhook convert` adds it"
    )]
    NoMetadata,
    /// Metadata that cannot be read.
    #[error("metadata `kvhook_mlp`: {source}; write the file again with `kvhook convert`")]
    Metadata {
        /// What the JSON reader said.
        source: serde_json::Error,
    },
    /// Metadata of another format.
    #[error("metadata, format_version: found {found}, expected 2; use a kvhook that knows it, or convert again")]
    FormatVersion {
        /// The field.
        found: u32,
    },
    /// An MLP of another kind.
    #[error("metadata, activation: found `{found}`, expected `relu`; these weights are for another method")]
    Activation {
        /// The field.
        found: String,
    },
    /// Two places of the file say different things.
    #[error("metadata, {field}: found {found}, expected {expected}; correct it and convert again")]
    Contradiction {
        /// The field.
        field: &'static str,
        /// What it says.
        found: String,
        /// What else the file says, and where.
        expected: String,
    },
    /// The tensors are not those that the checksum is of.
    #[error("the tensors have sha256 {found}, expected {expected} by the metadata; the file is damaged, copy it again")]
    Digest {
        /// In the metadata, hexadecimal.
        expected: String,
        /// Of the tensors.
        found: String,
    },
    /// Bytes in the metadata that are not written as hexadecimal digits.
    #[error(
        "metadata, {field}: expected pairs of hexadecimal digits{size}; write the file again with `kvhook convert`"
    )]
    Hexadecimal {
        /// The field.
        field: &'static str,
        /// How many, where that is fixed.
        size: &'static str,
    },

    /// The first matrix's shape gives no factor.
    #[error(
        "{tensor}: found shape {found:?}, expected [d, f * d] with d even and f at least 2; these are not weights of \
         this method"
    )]
    FirstShape {
        /// The matrix.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A tensor of another shape than the first matrix implies.
    #[error("{tensor}: found shape {found:?}, expected {expected:?}; all MLPs of a file have one factor and head_dim")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// That of its place.
        expected: Vec<usize>,
    },
    /// A tensor that must be there is not.
    #[error("{tensor}: missing; expected all tensors of {expected}; save the whole state dict again")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// What it belongs to.
        expected: String,
    },
    /// A tensor that has no place.
    #[error("{tensor}: found, but the method has no such tensor; use --prefix to convert the others only")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
    },
    /// Two tensors for one place.
    #[error("{tensor}: found, but `{other}` has its place already; remove one")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// The other.
        other: String,
    },
    /// Tensors of several element types, or of one that is not stored.
    #[error("{tensor}: found {found}, expected {expected}; {advice}")]
    TensorDtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: String,
        /// What it should have.
        expected: String,
        /// What to do.
        advice: &'static str,
    },
    /// Infinity or NaN.
    #[error("{tensor}: found {value} at element {index}, expected finite numbers; train or convert again")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Position of the first one, row major.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A number that the element type asked for cannot hold.
    #[error("{tensor}: {value} at element {index} does not fit {}; convert with --dtype bf16 or f32", dtype.name())]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Position of the first one, row major.
        index: usize,
        /// The number.
        value: f32,
        /// The element type.
        dtype: Dtype,
    },

    /// No tensors of the method at all.
    #[error(
        "no compressor found among {found} tensors{example}; expected names such as compress_tk.0.0.weight, in a state \
         dict (torch.save(model.state_dict(), ...), not the module itself)"
    )]
    NoCompressor {
        /// Tensors in the file, or under the prefix.
        found: usize,
        /// One of their names, in words.
        example: String,
    },
    /// Several compressors in one file.
    #[error("several compressors found, under the prefixes {found:?}; choose one with --prefix")]
    SeveralCompressors {
        /// Their prefixes.
        found: Vec<String>,
    },
    /// Layers of a Sequential that are not those of the method.
    #[error(
        "{tensor}: found Sequential indices {found:?}, expected 0, 3, 6 (with dropout), 0, 2, 4 (without) or 0, 1, 2; \
         this is another network"
    )]
    SequentialIndices {
        /// A tensor of it.
        tensor: String,
        /// The indices.
        found: Vec<usize>,
    },

    /// A PyTorch file from before version 1.6.
    #[error(
        "a PyTorch checkpoint in the format from before 1.6, expected a zip archive; load it with PyTorch and save it \
         again"
    )]
    LegacyPytorch,
    /// Not a zip archive as PyTorch writes it.
    #[error("not a whole PyTorch checkpoint: {reason}; save it again with torch.save")]
    Archive {
        /// What is wrong.
        reason: String,
    },
    /// The pickle in a PyTorch checkpoint cannot be followed.
    #[error("the checkpoint's pickle, byte {offset}: {reason}; save a plain state dict with torch.save")]
    Pickle {
        /// Where.
        offset: usize,
        /// What is wrong.
        reason: String,
    },
    /// A tensor in a checkpoint whose place in its storage is wrong.
    #[error("{tensor}: {reason}; save the checkpoint again")]
    Storage {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
}
