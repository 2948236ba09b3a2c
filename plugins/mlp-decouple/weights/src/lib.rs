//! The weight files of mlp-decouple: version 1, which upstream's loader reads, and version 2, safetensors with named
//! tensors and metadata. `docs/mlp-weights.md` has both byte by byte.
//!
//! A plugin needs [`Weights::open`]: f32 in memory, all checked. [`Stored`] holds what a file holds, in bytes, so that
//! files are converted without loss: [`v1`] and [`v2`] read and write it, [`state_dict`] and, with the feature
//! `pytorch`, [`pytorch`] make one of a checkpoint, [`report`] describes it.
//!
//! A file is taken whole or refused with a [`WeightsError`] that says where it is wrong.

mod dtype;
mod error;
mod file;
mod mlp;
mod pairing;
#[cfg(feature = "pytorch")]
pub mod pytorch;
pub mod report;
pub mod state_dict;
mod stored;
mod terms;
pub mod v1;
pub mod v2;

use std::path::Path;

pub use dtype::Dtype;
pub use error::WeightsError;
pub use file::{Mapped, replace};
pub use mlp::{LayerWeights, Mlp};
pub use stored::{Layers, Linear, Role, Stored, tensor_name};
pub use terms::{ImageRule, ModelIdentity, Pairing, PositionRule, Terms};
pub use v1::{ImageOrder, Origin};

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    /// Order of the image MLPs in a version 1 file; None: what its metadata says, or `tk, tv, ik, iv`.
    pub image_order: Option<ImageOrder>,
    /// Refuse values that are not finite.
    pub check_finite: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { image_order: None, check_finite: true }
    }
}

/// Weights in memory, f32, all checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Rows that become one.
    pub factor: usize,
    /// Values in one row of one head.
    pub head_dim: usize,
    /// One for each layer of the model.
    pub layers: Vec<LayerWeights>,
    /// What the weights were trained for.
    pub terms: Terms,
    /// Version of the file: 1 or 2.
    pub version: u32,
    /// Element type in the file.
    pub dtype: Dtype,
    /// What is odd about the file and no reason to refuse it.
    pub warnings: Vec<String>,
}

impl Weights {
    /// Opens a file of version 1 or 2, told apart by its first bytes.
    ///
    /// # Errors
    /// Everything that is wrong with the file: it is not used in part.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, WeightsError> {
        read(Mapped::open(path)?.bytes(), options.image_order)?.decode(options.check_finite)
    }
}

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Version 1.
    V1,
    /// Safetensors: version 2, or a state dict.
    Safetensors,
    /// A zip archive: a PyTorch checkpoint.
    Zip,
    /// A pickle that is not in an archive: a PyTorch checkpoint from before version 1.6.
    Pickle,
}

impl Kind {
    /// Looks at the first bytes; None for none of them.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        // A safetensors file begins with the length of its JSON header, of which the first byte is a brace.
        match bytes {
            _ if bytes.starts_with(&v1::MAGIC) => Some(Self::V1),
            _ if bytes.starts_with(b"PK\x03\x04") => Some(Self::Zip),
            [_, _, _, _, _, _, _, _, b'{', ..] => Some(Self::Safetensors),
            [0x80, 2..=5, ..] => Some(Self::Pickle),
            _ => None,
        }
    }
}

/// Reads a file of version 1 or 2, told apart by its first bytes. `image_order` is of version 1 only.
///
/// # Errors
/// [`WeightsError::NotWeights`], and those of [`v1::read`] and [`v2::read`].
pub fn read(bytes: &[u8], image_order: Option<ImageOrder>) -> Result<Stored<'_>, WeightsError> {
    match Kind::of(bytes) {
        Some(Kind::V1) => v1::read(bytes, image_order),
        Some(Kind::Safetensors) => v2::read(bytes),
        _ => Err(not_weights(bytes)),
    }
}

fn not_weights(bytes: &[u8]) -> WeightsError {
    let found: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    WeightsError::NotWeights { found: if found.is_empty() { "nothing".into() } else { found.join(" ") } }
}
