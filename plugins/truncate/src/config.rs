//! The config: its keys, and what they mean for one model.

use std::collections::BTreeMap;

use kvhook_abi::config::{ConfigError, ConfigValue, JsonValue, layer_range};
use kvhook_abi::{CreateContext, PluginError};

use crate::budget::Amount;
use crate::importance::Importance;
use crate::kinds::Compressed;

kvhook_abi::words! {
    /// What is kept of the history: the rows between the sinks and the recent ones.
    pub enum HistoryWord {
        /// Nothing.
        None = "none",
        /// Evenly spaced rows.
        Stride = "stride",
        /// The most important rows.
        Top = "top",
        /// A draw by importance.
        Sample = "sample",
    }
}

kvhook_abi::words! {
    /// Measures of importance.
    pub enum ImportanceWord {
        /// Low norms of keys.
        KeyNorm = "key_norm",
        /// Distance from the mean direction of the keys.
        KeyDiff = "key_diff",
        /// Attention of the last queries.
        Attention = "attention",
        /// All the same.
        Uniform = "uniform",
    }
}

kvhook_abi::words! {
    /// Kinds of tokens that are compressed.
    pub enum SegmentsWord {
        /// Text only.
        Text = "text",
        /// Images only.
        Image = "image",
        /// Text and images.
        Both = "both",
    }
}

kvhook_abi::words! {
    /// Boundaries of what is kept.
    pub enum AlignWord {
        /// Rows.
        None = "none",
        /// Blocks of the cache.
        Block = "block",
    }
}

kvhook_abi::config! {
    /// Config of `truncate`.
    pub struct Config {
        /// Fraction of the tokens seen so far that each layer and KV head keeps, above 0, at most 1; 0.5 without
        /// `budget`. Excludes `budget`.
        keep: Option<f64> = null, in 0.0..=1.0;
        /// Entries that each layer and KV head keeps. Excludes `keep`.
        budget: Option<u64> = null, from 1;
        /// Rows at the front that are always kept.
        sinks: u32 = 4;
        /// Rows at the end that are always kept, as far as the budget allows.
        recent: u32 = 32;
        /// What is kept of the rows between sinks and recent ones.
        history: HistoryWord = "none";
        /// How rows are ranked, for history=top and sample; key_diff if not given. uniform goes with sample only.
        importance: Option<ImportanceWord> = null;
        /// Last queries that importance=attention uses; 64 if not given.
        window: Option<u32> = null, in 1..=4096;
        /// Neighbouring rows over which importance=attention averages, an odd number; 5 if not given.
        pool: Option<u32> = null, in 1..=255;
        /// Names the draw of history=sample; 0 if not given.
        seed: Option<u64> = null;
        /// Compress again each time a sequence has grown by so many tokens; 0: only when its prompt is done.
        every: u64 = 0;
        /// Fractions of other layers than the rest: {"0-3": 1.0, "28-": 0.25}.
        layers: Option<LayerFractions> = null;
        /// Sequences with fewer tokens are kept.
        min_tokens: u64 = 0;
        /// Kinds of tokens that are compressed; rows of the others are kept whole and count on top.
        segments: SegmentsWord = "both";
        /// Rounds what is kept outward to whole blocks of a paged cache, for history=none.
        align: AlignWord = "none";
    }
}

/// Fractions by ranges of layers, as they are written.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerFractions(pub BTreeMap<String, f64>);

impl ConfigValue for LayerFractions {
    const KIND: &'static str = "object";
    const EXTRA: &'static str = "\"additionalProperties\":{\"type\":\"number\",\"exclusiveMinimum\":0,\"maximum\":1}";
    const ALLOWED: &'static str =
        "an object from ranges of layers (\"3\", \"0-3\", \"4-\") to fractions above 0, at most 1";
    fn from_json(value: &JsonValue) -> Option<Self> {
        let members = value.as_object()?.iter();
        members.map(|(range, fraction)| Some((range.clone(), fraction.as_f64()?))).collect::<Option<_>>().map(Self)
    }
}

impl LayerFractions {
    /// The fraction of each of `count` layers that is named.
    fn by_layer(&self, count: usize) -> Result<Vec<Option<f64>>, ConfigError> {
        let mut fractions = vec![None; count];
        for (range, &fraction) in &self.0 {
            let refuse = |allowed: &str| ConfigError::bad_value("layers", format!("{range:?}: {fraction}"), allowed);
            if !(fraction > 0.0 && fraction <= 1.0) {
                return Err(refuse("fractions above 0, at most 1"));
            }
            let layers = layer_range(range, count)
                .ok_or_else(|| refuse(&format!("ranges like \"3\", \"0-3\", \"4-\" of this model's {count} layers")))?;
            for layer in &mut fractions[layers] {
                if layer.replace(fraction).is_some() {
                    return Err(refuse("ranges that do not overlap"));
                }
            }
        }
        Ok(fractions)
    }
}

/// What is kept of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// Nothing.
    None {
        /// Round outward to blocks of so many tokens.
        block: Option<u64>,
    },
    /// Evenly spaced rows.
    Stride,
    /// The most important rows.
    Top(Importance),
    /// A draw by importance.
    Sample {
        /// What weighs.
        importance: Importance,
        /// Names the draw.
        seed: u64,
    },
}

impl History {
    /// How rows are ranked.
    pub fn importance(self) -> Option<Importance> {
        match self {
            Self::None { .. } | Self::Stride => None,
            Self::Top(importance) | Self::Sample { importance, .. } => Some(importance),
        }
    }

    /// Queries that the ranking uses.
    pub fn window(self) -> Option<u32> {
        match self.importance() {
            Some(Importance::Attention { window, .. }) => Some(window),
            _ => None,
        }
    }
}

/// The config, checked, for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How much each layer keeps; `None`: everything, because no plans are made for it.
    pub layers: Vec<Option<Amount>>,
    /// Rows at the front that are always kept.
    pub sinks: usize,
    /// Rows at the end that are always kept, as far as the budget allows.
    pub recent: usize,
    /// What is kept of the rows between.
    pub history: History,
    /// Tokens after which a sequence is compressed again; 0: never.
    pub every: u64,
    /// Sequences with fewer tokens are kept.
    pub min_tokens: u64,
    /// Kinds of tokens that are compressed.
    pub compressed: Compressed,
    /// Whether layers come to have different lengths.
    pub layers_differ: bool,
}

impl Settings {
    /// Checks the config for a model and an engine.
    ///
    /// # Errors
    /// [`PluginError::Config`] with the key, the value and what is allowed.
    pub fn new(config: &Config, context: &CreateContext<'_>) -> Result<Self, PluginError> {
        let amount = match (config.keep, config.budget) {
            (Some(keep), Some(_)) => return Err(refuse("budget", format!("set beside keep={keep}"), "one of the two")),
            (None, Some(budget)) => Amount::Entries(budget),
            (Some(keep), None) if keep <= 0.0 => return Err(refuse("keep", keep, "a number above 0, at most 1")),
            (keep, None) => Amount::Fraction(keep.unwrap_or(0.5)),
        };
        let model = &context.model.layers;
        let named = match &config.layers {
            Some(fractions) => fractions.by_layer(model.len())?,
            None => vec![None; model.len()],
        };
        let layers: Vec<Option<Amount>> = model
            .iter()
            .zip(named)
            .map(|(layer, named)| layer.is_planned().then(|| named.map_or(amount, Amount::Fraction)))
            .collect();
        let mut planned = layers.iter().flatten();
        let first = planned.next();
        Ok(Self {
            layers_differ: planned.any(|amount| Some(amount) != first),
            layers,
            sinks: config.sinks as usize,
            recent: config.recent as usize,
            history: history(config, context.offers.block_size)?,
            every: config.every,
            min_tokens: config.min_tokens,
            compressed: match config.segments {
                SegmentsWord::Text => Compressed::Text,
                SegmentsWord::Image => Compressed::Image,
                SegmentsWord::Both => Compressed::All,
            },
        })
    }
}

fn history(config: &Config, block_size: u32) -> Result<History, ConfigError> {
    let importance = importance(config)?;
    let block = match config.align {
        AlignWord::None => None,
        AlignWord::Block if config.history != HistoryWord::None => {
            let allowed = "none with this history: only history=none keeps ranges, of which whole blocks can be made";
            return Err(ConfigError::bad_value("align", "block", allowed));
        }
        AlignWord::Block if config.segments != SegmentsWord::Both => {
            let allowed = "none unless segments=both: what is kept whole need not end with a block";
            return Err(ConfigError::bad_value("align", "block", allowed));
        }
        AlignWord::Block if block_size == 0 => {
            let allowed = "none here: the engine's cache is contiguous and has no blocks";
            return Err(ConfigError::bad_value("align", "block", allowed));
        }
        AlignWord::Block => Some(u64::from(block_size)),
    };
    if config.seed.is_some() && config.history != HistoryWord::Sample {
        return Err(ConfigError::bad_value("seed", given(config.seed), "unset unless history=sample"));
    }
    Ok(match config.history {
        HistoryWord::None => History::None { block },
        HistoryWord::Stride => History::Stride,
        HistoryWord::Top if importance == Importance::Uniform => {
            let allowed = "key_norm, key_diff or attention with history=top; uniform goes with history=sample";
            return Err(ConfigError::bad_value("importance", "uniform", allowed));
        }
        HistoryWord::Top => History::Top(importance),
        HistoryWord::Sample => History::Sample { importance, seed: config.seed.unwrap_or(0) },
    })
}

/// The measure; a key that would have no effect is refused.
fn importance(config: &Config) -> Result<Importance, ConfigError> {
    let ranks = matches!(config.history, HistoryWord::Top | HistoryWord::Sample);
    if let Some(word) = config.importance.filter(|_| !ranks) {
        let value = match word {
            ImportanceWord::KeyNorm => "key_norm",
            ImportanceWord::KeyDiff => "key_diff",
            ImportanceWord::Attention => "attention",
            ImportanceWord::Uniform => "uniform",
        };
        return Err(ConfigError::bad_value("importance", value, "unset unless history=top or history=sample"));
    }
    let word = config.importance.unwrap_or(ImportanceWord::KeyDiff);
    if word != ImportanceWord::Attention {
        let with_attention = "unset unless importance=attention";
        if config.window.is_some() {
            return Err(ConfigError::bad_value("window", given(config.window), with_attention));
        }
        if config.pool.is_some() {
            return Err(ConfigError::bad_value("pool", given(config.pool), with_attention));
        }
    }
    Ok(match word {
        ImportanceWord::KeyNorm => Importance::KeyNorm,
        ImportanceWord::KeyDiff => Importance::KeyDiff,
        ImportanceWord::Uniform => Importance::Uniform,
        ImportanceWord::Attention => {
            let pool = config.pool.unwrap_or(5);
            if pool.is_multiple_of(2) {
                return Err(ConfigError::bad_value("pool", pool, "an odd number from 1 to 255"));
            }
            Importance::Attention { window: config.window.unwrap_or(64), pool }
        }
    })
}

fn given(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn refuse(key: &str, value: impl std::fmt::Display, allowed: &str) -> PluginError {
    ConfigError::bad_value(key, value, allowed).into()
}
