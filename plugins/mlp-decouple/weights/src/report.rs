//! What a weight file holds, for people and as JSON.

use std::fmt::{self, Write};

use serde::Serialize;

use crate::stored::{Role, Stored};
use crate::v1::Header;
use crate::{Terms, v2};

/// A weight file in short.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of the file.
    pub version: u32,
    /// Element type.
    pub dtype: &'static str,
    /// Rows that become one.
    pub factor: usize,
    /// Values in one row of one head.
    pub head_dim: usize,
    /// Layers of the model.
    pub layers: usize,
    /// MLPs of a layer, by name.
    pub mlps: Vec<MlpReport>,
    /// Numbers in the file, biases included.
    pub parameters: usize,
    /// SHA-256 of the tensors, as version 2 has it.
    pub sha256: String,
    /// What the weights were trained for.
    pub terms: Terms,
    /// Of a file that is or was version 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v1: Option<V1Report>,
    /// What is odd about the file and no reason to refuse it.
    pub warnings: Vec<String>,
}

/// The numbers of one kind of MLP over all layers. A file that was read with a wrong element type shows here.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MlpReport {
    /// Its name.
    pub name: &'static str,
    /// Matrices without a bias.
    pub without_bias: usize,
    /// Root mean square of its three matrices.
    pub rms: [f64; 3],
    /// Largest magnitude among weights and biases.
    pub largest: f64,
    /// Numbers that are not finite.
    pub not_finite: usize,
}

/// What only version 1 has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct V1Report {
    /// The header's num_heads, not used.
    pub heads: u32,
    /// The header's hidden_size, not used.
    pub hidden_size: u32,
    /// The header's min_seq_len.
    pub min_seq_len: u32,
    /// Bytes of metadata.
    pub metadata_bytes: usize,
    /// Order in which the image MLPs are read.
    pub image_order: &'static str,
}

impl Report {
    /// Describes a file.
    pub fn new(stored: &Stored<'_>) -> Self {
        let roles = stored.layers.first().map_or(0, Vec::len);
        let v1 = stored.origin.as_ref().and_then(|origin| {
            let header = Header::parse(&origin.header).ok()?;
            Some(V1Report {
                heads: header.heads,
                hidden_size: header.hidden_size,
                min_seq_len: header.min_seq_len,
                metadata_bytes: origin.metadata.len(),
                image_order: origin.image_order.name(),
            })
        });
        Self {
            version: stored.version,
            dtype: stored.dtype.name(),
            factor: stored.factor,
            head_dim: stored.head_dim,
            layers: stored.layers.len(),
            mlps: Role::ALL.into_iter().take(roles).map(|role| MlpReport::new(stored, role)).collect(),
            parameters: stored.tensors().map(|(_, shape, _)| shape.iter().product::<usize>()).sum(),
            sha256: v2::digest(stored),
            terms: stored.terms.clone(),
            v1,
            warnings: stored.warnings.clone(),
        }
    }

    /// Whether every number is finite.
    pub fn finite(&self) -> bool {
        self.mlps.iter().all(|mlp| mlp.not_finite == 0)
    }

    /// For a terminal; text from the file comes without control characters.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut text);
        text.chars().filter(|c| *c == '\n' || !c.is_control()).collect()
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        let mut line = |name: &str, value: String| writeln!(out, "  {name:<12} {value}");
        let unknown = || "not said".to_owned();
        line("version", self.version.to_string())?;
        line("shape", format!("{} layers, head_dim {}, factor {}", self.layers, self.head_dim, self.factor))?;
        line("numbers", format!("{} in {}", self.parameters, self.dtype))?;
        line("sha256", self.sha256.clone())?;
        let terms = &self.terms;
        line(
            "model",
            terms.model.as_ref().map_or_else(unknown, |model| {
                let rotary = model.rotary_dim.map_or(String::new(), |dim| format!(" on {dim} channels"));
                format!("{}, {} KV heads, RoPE base {}{rotary}", one_line(&model.name), model.kv_heads, model.rope_base)
            }),
        )?;
        line("pairing", word(&terms.pairing))?;
        line("positions", terms.positions.as_ref().map_or_else(unknown, word))?;
        line("image rule", terms.image_rule.as_ref().map_or_else(unknown, word))?;
        line("min_groups", terms.min_groups.to_string())?;
        line("sinks", terms.sinks.map_or_else(unknown, |n| n.to_string()))?;
        line("recent", terms.recent.map_or_else(unknown, |n| n.to_string()))?;
        line("max_position", terms.max_position.map_or_else(unknown, |n| n.to_string()))?;
        line("training", if terms.training.is_empty() { unknown() } else { one_line(&terms.training) })?;
        if let Some(v1) = &self.v1 {
            line(
                "version 1",
                format!(
                    "num_heads {}, hidden_size {}, min_seq_len {}, {} bytes of metadata, read as {}",
                    v1.heads, v1.hidden_size, v1.min_seq_len, v1.metadata_bytes, v1.image_order
                ),
            )?;
        }
        writeln!(out, "\n  MLP      rms W1   rms W2   rms W3   largest  not finite  without bias")?;
        for mlp in &self.mlps {
            let [a, b, c] = mlp.rms;
            writeln!(
                out,
                "  {:<8} {a:<8.2e} {b:<8.2e} {c:<8.2e} {:<8.2e} {:<11} {}",
                mlp.name, mlp.largest, mlp.not_finite, mlp.without_bias
            )?;
        }
        for warning in &self.warnings {
            writeln!(out, "warning: {warning}")?;
        }
        Ok(())
    }
}

impl MlpReport {
    fn new(stored: &Stored<'_>, role: Role) -> Self {
        let mut report = Self { name: role.name(), without_bias: 0, rms: [0.0; 3], largest: 0.0, not_finite: 0 };
        let mut counts = [0usize; 3];
        for mlp in stored.layers.iter().filter_map(|mlps| mlps.get(role as usize)) {
            for (matrix, linear) in mlp.iter().enumerate() {
                let weight = stored.dtype.decode(&linear.weight);
                let bias = linear.bias.as_ref().map(|bias| stored.dtype.decode(bias));
                report.without_bias += usize::from(bias.is_none());
                counts[matrix] += weight.len();
                report.rms[matrix] += weight.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>();
                for value in weight.iter().chain(bias.iter().flatten()) {
                    report.not_finite += usize::from(!value.is_finite());
                    report.largest = report.largest.max(f64::from(value.abs()));
                }
            }
        }
        for (sum, count) in report.rms.iter_mut().zip(counts) {
            *sum = (*sum / count.max(1) as f64).sqrt();
        }
        report
    }
}

/// An enum's word in the file.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
