//! What other programs take for the same, from the file that `tests/peers/peers.py` writes.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::BenchError;
use super::report::{FORMAT, Measurement, Microseconds};
use crate::error::CliError;
use crate::files::read_text;

/// The file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Peers {
    /// Its format.
    pub format: u32,
    /// Operations a second of a large bf16 product.
    #[serde(rename = "products_per_second")]
    pub products: Option<f64>,
    /// What was measured.
    pub rows: Vec<Peer>,
}

/// One peer on one cache. Times are of one call for `layers` layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Name and version.
    pub peer: String,
    /// The operation that it stands beside.
    pub operation: String,
    /// The model's.
    pub shape: String,
    /// How rows lie.
    pub form: String,
    /// Tokens of the sequence.
    pub tokens: usize,
    /// One of so many rows is kept.
    pub keep: usize,
    /// Layers of the call, each with tensors of its own.
    pub layers: usize,
    /// Launched from Python.
    pub eager_us: Option<Microseconds>,
    /// Replayed as a CUDA graph; none where it cannot be captured.
    pub graph_us: Option<Microseconds>,
    /// What is to be known about it.
    #[serde(default)]
    pub note: String,
}

impl Peers {
    /// Reads the file.
    ///
    /// # Errors
    /// [`CliError::Read`], [`BenchError::NotPeers`], [`BenchError::PeersFormat`].
    pub fn read(path: &Path) -> Result<Self, CliError> {
        let text = read_text(path)?;
        let peers: Self =
            serde_json::from_str(&text).map_err(|source| BenchError::NotPeers { path: path.into(), source })?;
        match peers.format {
            FORMAT => Ok(peers),
            found => Err(BenchError::PeersFormat { path: path.into(), found, expected: FORMAT }.into()),
        }
    }
}

impl Peer {
    /// Whether it does what a row does.
    pub fn stands_beside(&self, row: &Measurement) -> bool {
        self.operation == row.operation
            && self.shape == row.shape
            && self.form == row.form
            && [self.tokens] == row.lengths[..]
            && self.keep == row.keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("peers.json");
        for (text, words) in [
            ("{}", "no peers' times"),
            ("[", "no peers' times"),
            (r#"{"format": 2, "products_per_second": null, "rows": []}"#, "format 2"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Peers::read(&path).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("peers.json"), "{error}");
        }
        assert!(matches!(Peers::read(&folder.path().join("none")), Err(CliError::Read { .. })));
    }
}
