//! What was measured, as JSON and for the table.

use serde::{Deserialize, Serialize};

use super::floors::{Floors, Rates};
use super::machine::{Launches, Measured, Spread};
use super::peers::{Peer, Peers};
use super::rows::Row;
use crate::machine::now;

/// Format of the file; it changes when a reader has to.
pub const FORMAT: u32 = 1;

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// When it began, RFC 3339.
    pub date: String,
    /// Version of kvhook.
    pub version: String,
    /// What it ran on.
    pub hardware: Hardware,
    /// Bytes a second, read and written, of a large copy in this run.
    pub copy_bytes_per_second: f64,
    /// Operations a second of a large bf16 product; none: no floor has any.
    pub products_per_second: Option<f64>,
    /// Whether they were measured in the same session, by the peers' script; else they are an H100's.
    pub products_measured: bool,
    /// Exponentials a second of the device; none: no floor has any.
    pub exponentials_per_second: Option<f64>,
    /// In the order in which they were measured.
    pub rows: Vec<Measurement>,
    /// Rows that could not be measured.
    pub failed: Vec<Failure>,
    /// What other programs took.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Peer>,
}

/// A row that could not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its name.
    pub row: String,
    /// What was said.
    pub why: String,
}

/// What a run ran on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hardware {
    /// `cpu` or `cuda`.
    pub device: String,
    /// Its name.
    pub name: String,
    /// Version that the driver is of.
    pub driver: Option<String>,
}

/// One row. Times are of one call, which does all layers and sequences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The row's name.
    pub name: String,
    /// The model's.
    pub shape: String,
    /// How rows lie.
    pub form: String,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// One of so many rows is kept.
    pub keep: usize,
    /// What is done.
    pub operation: String,
    /// Layers of the call.
    pub layers: usize,
    /// Time on the device, without gaps of the host's.
    pub device_us: Microseconds,
    /// From begin to end, the host's gaps and the wait for the verdict included.
    pub whole_us: Microseconds,
    /// Time of the host to enqueue it.
    pub host_us: Microseconds,
    /// The commit's part of it.
    pub host_commit_us: Microseconds,
    /// Mean time of the plugin's hooks in a call, by the host's figures; none without a plugin.
    pub plugin_us: Option<f64>,
    /// None where nothing is launched, or it could not be counted.
    pub launches: Option<Counted>,
    /// The least time if each byte is moved once.
    pub floor_once_us: f64,
    /// The least time of the phases.
    pub floor_phases_us: f64,
}

/// A middle and a spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Microseconds {
    /// Median.
    pub median: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Calls.
    pub n: usize,
}

impl From<Spread> for Microseconds {
    fn from(spread: Spread) -> Self {
        let Spread { median, p10, p90, n } = spread;
        Self { median: median * 1e6, p10: p10 * 1e6, p90: p90 * 1e6, n }
    }
}

/// What a call puts on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Kernels.
    pub kernels: usize,
    /// Memory that is set.
    pub memsets: usize,
    /// Memory that is copied.
    pub copies: usize,
}

impl Counted {
    /// All of them.
    pub fn all(self) -> usize {
        self.kernels + self.memsets + self.copies
    }
}

impl From<Launches> for Counted {
    fn from(launches: Launches) -> Self {
        let Launches { kernels, memsets, copies } = launches;
        Self { kernels, memsets, copies }
    }
}

impl Report {
    /// A run that begins now.
    pub fn new(hardware: Hardware, rates: &Rates, peers: Option<&Peers>) -> Self {
        Self {
            format: FORMAT,
            date: now(),
            version: env!("CARGO_PKG_VERSION").into(),
            hardware,
            copy_bytes_per_second: rates.copy,
            products_per_second: rates.products,
            products_measured: rates.products.is_some() && peers.is_some_and(|peers| peers.products.is_some()),
            exponentials_per_second: rates.exponentials,
            rows: Vec::new(),
            failed: Vec::new(),
            peers: peers.map(|peers| peers.rows.clone()).unwrap_or_default(),
        }
    }

    /// As JSON text.
    pub fn to_json(&self) -> String {
        // Strings, numbers and arrays: nothing that cannot be written.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

impl Measurement {
    /// Of a row.
    pub fn new(row: &Row, measured: &Measured, in_plugin: Option<f64>, floors: Floors) -> Self {
        Self {
            name: row.name(),
            shape: row.shape.name.into(),
            form: row.form.name(),
            lengths: row.batch.lengths(),
            keep: row.keep,
            operation: row.operation.name(),
            layers: row.shape.layers,
            device_us: measured.device.into(),
            whole_us: measured.whole.into(),
            host_us: measured.host.into(),
            host_commit_us: measured.host_commit.into(),
            plugin_us: in_plugin.map(|seconds| seconds * 1e6),
            launches: measured.launches.map(Into::into),
            floor_once_us: floors.once * 1e6,
            floor_phases_us: floors.phases * 1e6,
        }
    }

    /// A time of the call, for one layer.
    pub fn of_layer(&self, microseconds: f64) -> f64 {
        microseconds / self.layers as f64
    }
}
