//! What a comparison measured: everything that the table, the page and the JSON file show.
//!
//! The measures are E1 to E5 of the evaluation plan: a prefix of T tokens is prefilled and compressed, then M
//! tokens are scored by the compressed cache and by the full one, p(·) = full, p_C(·) = compressed.

mod summary;
mod survivors;

use std::collections::BTreeMap;
use std::path::Path;

use kvhook_engine::quality::{perplexity, recovered_context};
use serde::{Deserialize, Serialize};

use crate::error::CliError;

pub use summary::{ArmSummary, Paired};
pub use survivors::{SurvivorCounter, SurvivorMap};

/// Format number of the JSON file; a change that old readers would misread raises it.
pub const FORMAT: u32 = 1;

/// A whole comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// When it began, RFC 3339 in UTC.
    pub date: String,
    /// Where it ran.
    pub machine: Machine,
    /// What ran.
    pub model: Model,
    /// How it ran.
    pub settings: Settings,
    /// The passages, in the order of each arm's measures.
    pub passages: Vec<Passage>,
    /// The arms; the uncompressed run first.
    pub arms: Vec<Arm>,
}

/// The machine of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Cores that the process may use.
    pub cores: usize,
    /// Name of the device on which the model ran and the cache lay; empty: the processor.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub accelerator: String,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Operating system and architecture, such as `linux x86_64`.
    pub system: String,
}

/// The model of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Name from the model's file, or the file's name.
    pub name: String,
    /// Content hash of the file, hexadecimal; empty when it was not taken.
    pub sha256: String,
    /// Layers that hold a KV cache.
    pub layers: usize,
    /// KV heads of a layer, over all ranks.
    pub kv_heads: usize,
    /// Elements of one head's key.
    pub head_dim: usize,
}

/// The settings of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// T: tokens of a passage that are prefilled.
    pub prefix: usize,
    /// M: tokens of a passage that are scored.
    pub continuation: usize,
    /// `contiguous` or `paged`.
    pub cache: String,
    /// Element type of the cache: `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// Ranks that share the KV heads.
    pub ranks: usize,
    /// Version of kvhook.
    pub version: String,
    /// The arm to which paired differences are taken.
    pub reference: String,
}

/// One passage and what the model makes of it without compression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// Name of the text, without its folder.
    pub text: String,
    /// First token of the prefix in that text.
    pub start: usize,
    /// Mean negative log-likelihood of the continuation with the full cache, nats per token.
    #[serde(with = "nullable")]
    pub nll_full: f64,
    /// The same with no prefix at all, the floor for [`Quality::recovered_context`].
    pub nll_no_prefix: Option<f64>,
}

/// One arm: a plugin with a config, or none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Name in tables and plots, unique in a comparison.
    pub name: String,
    /// Name or path of the plugin as it was asked for; None for the uncompressed run.
    pub plugin: Option<String>,
    /// The plugin's config string.
    pub config: String,
    /// One entry for each passage.
    pub measures: Vec<Measures>,
    /// How often the host fell back to no compression, by reason.
    pub fallbacks: BTreeMap<String, u64>,
    /// Which positions survived; None when it was not recorded.
    pub survivors: Option<SurvivorMap>,
}

/// What one arm did on one passage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Cache entries before compression: rows of one token, summed over layers and KV heads.
    pub entries_before: u64,
    /// The same after it.
    pub entries_after: u64,
    /// Bytes of K and V that the sequence held before compression.
    pub bytes_before: u64,
    /// The same after it.
    pub bytes_after: u64,
    /// Milliseconds of the prefill, hooks not included; NaN when it took over another arm's.
    #[serde(with = "nullable")]
    pub prefill_ms: f64,
    /// Milliseconds inside each function of the plugin while the passage was prefilled and scored, summed over ranks.
    pub hook_ms: BTreeMap<String, f64>,
    /// Milliseconds in which the host moved rows, summed over ranks.
    #[serde(with = "nullable")]
    pub commit_ms: f64,
    /// Decode speed after compression, tokens per second.
    #[serde(with = "nullable")]
    pub decode_tokens_per_second: f64,
    /// How the next M tokens fared.
    pub quality: Quality,
    /// Whether the passkey came out; None when none was hidden in the passage.
    pub passkey_found: Option<bool>,
    /// First words that the arm writes after the prefix, by greedy decoding.
    pub first_words: String,
}

impl Measures {
    /// Share of the entries that is left, 0 to 1; 1 when there were none.
    pub fn kept_fraction(&self) -> f64 {
        if self.entries_before == 0 {
            return 1.0;
        }
        self.entries_after as f64 / self.entries_before as f64
    }

    /// Milliseconds in all hooks together.
    pub fn total_hook_ms(&self) -> f64 {
        self.hook_ms.values().sum()
    }
}

/// E1 to E4 on one passage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Mean negative log-likelihood of the continuation, nats per token.
    #[serde(with = "nullable")]
    pub nll: f64,
    /// exp(NLL).
    #[serde(with = "nullable")]
    pub perplexity: f64,
    /// exp(NLL - NLL of the full cache); 1 means no loss.
    #[serde(with = "nullable")]
    pub perplexity_ratio: f64,
    /// Mean KL(p ‖ p_C), nats per token.
    #[serde(with = "nullable")]
    pub kl: f64,
    /// Share of tokens on which both caches have the same likeliest token, 0 to 1.
    #[serde(with = "nullable")]
    pub top1_agreement: f64,
    /// 1 - (NLL - NLL_full) / (NLL_no_prefix - NLL_full): 1 is as good as the full cache, 0 as bad as no prefix.
    /// None when the prefix does not help on this passage.
    pub recovered_context: Option<f64>,
}

impl Quality {
    /// Derives the ratios from the mean NLL, KL and agreement of an arm and the passage's baselines.
    pub fn new(nll: f64, kl: f64, top1_agreement: f64, passage: &Passage) -> Self {
        let full = passage.nll_full;
        let recovered_context = passage
            .nll_no_prefix
            .filter(|&floor| floor > full)
            .map(|floor| recovered_context(nll, full, floor))
            .filter(|share| share.is_finite());
        let (perplexity, perplexity_ratio) = (perplexity(nll), (nll - full).exp());
        Self { nll, perplexity, perplexity_ratio, kl, top1_agreement, recovered_context }
    }
}

impl Comparison {
    /// The comparison as JSON, with a `summary` beside it for readers that want no arithmetic.
    pub fn to_json(&self) -> String {
        let value = serde_json::json!({ "comparison": self, "summary": self.summary() });
        format!("{value:#}\n")
    }

    /// The same with what was judged of it under `evaluation`.
    pub fn to_json_with(&self, evaluation: &impl Serialize) -> String {
        let value = serde_json::json!({ "evaluation": evaluation, "comparison": self, "summary": self.summary() });
        format!("{value:#}\n")
    }

    /// Reads what [`Comparison::to_json`] wrote; the summary is left aside, since it follows from the rest.
    /// `path` only names the source in an error.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, CliError> {
        #[derive(Deserialize)]
        struct Header {
            format: u32,
        }
        #[derive(Deserialize)]
        struct File<T> {
            comparison: T,
        }
        let wrong = |source| CliError::NotResults { path: path.into(), source };
        // The format comes first: a newer file may lack fields that this version expects.
        let header: File<Header> = serde_json::from_str(text).map_err(wrong)?;
        if header.comparison.format != FORMAT {
            return Err(CliError::ResultsFormat { found: header.comparison.format, expected: FORMAT });
        }
        serde_json::from_str::<File<Self>>(text).map(|file| file.comparison).map_err(wrong)
    }
}

/// JSON has no NaN and no infinity: a measure of a broken run is written as null and read as NaN.
pub(crate) mod nullable {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}
