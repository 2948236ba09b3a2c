//! The config: its keys, and what they mean for one model and one weight file.

use std::path::Path;

use kvhook_abi::config::{ConfigError, ConfigValue, JsonValue, layer_range};
use kvhook_abi::model::RopePairing;
use kvhook_abi::raw::KVH_DEVICE_CUDA;
use kvhook_abi::view::Segments;
use kvhook_abi::{Can, CreateContext, ModelInfo, PluginError};
use kvhook_mlp_weights::{ImageOrder, OpenOptions, Pairing, Terms, Weights};

use crate::error::Kept;
use crate::stretches::{self, ImageRule, PositionRule, Run};

kvhook_abi::words! {
    /// Which tokens the MLPs for images take.
    pub enum ImageRuleWord {
        /// All tokens up to the last one of an image.
        Prefix = "prefix",
        /// The tokens of image segments.
        Segments = "segments",
    }
}

kvhook_abi::words! {
    /// The position of the next token after a compression.
    pub enum PositionsWord {
        /// As if nothing had been compressed.
        Logical = "logical",
        /// The compressed length.
        Compacted = "compacted",
    }
}

kvhook_abi::words! {
    /// Order of a layer's image MLPs in a version 1 file.
    pub enum ImageOrderWord {
        /// K, then V.
        Kv = "kv",
        /// V, then K.
        Vk = "vk",
    }
}

kvhook_abi::config! {
    /// Config of `mlp-decouple`.
    pub struct Config {
        /// Path of the weight file, version 1 or 2. Required.
        weights: Option<String> = null;
        /// Rows that become one: a check, for it must be the file's factor.
        factor: Option<u32> = null, in 2..=65536;
        /// Sequences with fewer tokens are kept.
        min_tokens: u64 = 0;
        /// Groups that a segment must have to be compressed; from the weight file if not given.
        min_groups: Option<u64> = null, from 1;
        /// Rows of each layer that a compression must free; with fewer the sequence is kept.
        min_gain: u64 = 1, from 1;
        /// Tokens at the front that are kept as they are; from the weight file if not given, else 4.
        sinks: Option<u32> = null;
        /// Tokens at the end that are kept as they are; from the weight file if not given, else 32.
        recent: Option<u32> = null;
        /// First position from which on rows are kept as they are; from the weight file if not given, else none. Weights
        /// are only good for positions that they were trained on: above the file's it is refused.
        max_position: Option<u32> = null, from 1;
        /// Layers that are compressed: ranges like "3", "0-3", "4-", in JSON also several, "0-3,28-"; all if not given.
        layers: Option<LayerRanges> = null;
        /// Which tokens the MLPs for images take; from the weight file if not given, else prefix.
        image_rule: Option<ImageRuleWord> = null;
        /// Positions that the weights were trained for; required unless the weight file says it.
        positions: Option<PositionsWord> = null;
        /// Order of the image MLPs in a version 1 file; from its metadata if not given, else kv.
        image_order: Option<ImageOrderWord> = null;
        /// Compress again each time a sequence has grown by so many tokens; 0: only when its prompt is done.
        every: u64 = 0;
    }
}

/// Ranges of layers as they are written.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerRanges(pub String);

impl ConfigValue for LayerRanges {
    const KIND: &'static str = "string";
    const ALLOWED: &'static str = "ranges of layers like \"3\", \"0-3\", \"4-\" or, in JSON, \"0-3,28-\"";
    fn from_json(value: &JsonValue) -> Option<Self> {
        // The short form reads `layers=3` as a number.
        value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|layer| layer.to_string())).map(Self)
    }
}

impl LayerRanges {
    /// Whether each of `count` layers is in a range.
    fn by_layer(&self, count: usize) -> Result<Vec<bool>, ConfigError> {
        let refuse = |allowed: &str| ConfigError::bad_value("layers", format!("{:?}", self.0), allowed);
        let mut named = vec![false; count];
        for range in self.0.split(',') {
            let layers = layer_range(range, count)
                .ok_or_else(|| refuse(&format!("ranges like \"3\", \"0-3\", \"4-\" of this model's {count} layers")))?;
            for layer in &mut named[layers] {
                if std::mem::replace(layer, true) {
                    return Err(refuse("ranges that do not overlap"));
                }
            }
        }
        Ok(named)
    }
}

/// The config, checked, for one model and one weight file.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Rows that become one, at least 2.
    pub factor: u64,
    /// Whether each layer is compressed.
    pub layers: Vec<bool>,
    /// Tokens at the front that are kept.
    pub sinks: u64,
    /// Tokens at the end that are kept.
    pub recent: u64,
    /// First position from which on rows are kept; `u64::MAX`: none.
    pub max_position: u64,
    /// Sequences with fewer tokens are kept.
    pub min_tokens: u64,
    /// Groups that a stretch must have.
    pub min_groups: u64,
    /// Rows of a layer that must become free.
    pub min_gain: u64,
    /// Tokens after which a sequence is compressed again; 0: never.
    pub every: u64,
    /// Which tokens the MLPs for images take.
    pub image_rule: ImageRule,
    /// Whether there are MLPs for images; without them image stretches are kept.
    pub images: bool,
    /// The position of the next token afterwards.
    pub positions: PositionRule,
    /// Whether layers come to have different lengths.
    pub layers_differ: bool,
}

/// Opens the weight file and checks it and the config against each other and the model. The weights come back in the
/// model's pairing.
///
/// # Errors
/// [`PluginError::Config`] with the key; [`PluginError::Unsupported`] with what file, model or engine have and what was
/// expected. What is wrong with the file is said in the words of its reader.
pub fn open(config: &Config, context: &CreateContext<'_>) -> Result<(Settings, Weights), PluginError> {
    let model = context.model;
    check_device(model)?;
    let Some(path) = config.weights.as_deref().filter(|path| !path.is_empty()) else {
        return Err(ConfigError::bad_value("weights", "none", "the path of a weight file; there is no default").into());
    };
    let refuse = |why: String| PluginError::Unsupported(format!("weights {path}: {why}"));
    let image_order = config.image_order.map(|order| match order {
        ImageOrderWord::Kv => ImageOrder::KeyFirst,
        ImageOrderWord::Vk => ImageOrder::ValueFirst,
    });
    let options = OpenOptions { image_order, check_finite: true };
    let mut weights = Weights::open(Path::new(path), &options).map_err(|error| refuse(error.to_string()))?;
    for warning in &weights.warnings {
        context.host.log(kvhook_abi::raw::KVH_LOG_WARN, module_path!(), &format!("weights {path}: {warning}"), "", 0);
    }
    if config.image_order.is_some() && weights.version != 1 {
        let allowed = "unset: this file names its image MLPs; only version 1 does not";
        return Err(ConfigError::bad_value("image_order", "kv or vk", allowed).into());
    }
    check_model(&weights, model).map_err(refuse)?;
    match model.rope_pairing {
        RopePairing::HalfSplit => weights.to_pairing(Pairing::HalfSplit),
        RopePairing::Interleaved => weights.to_pairing(Pairing::Interleaved),
        RopePairing::None => {}
        RopePairing::Unknown(pairing) => {
            return Err(refuse(format!("the model pairs channels in a way (number {pairing}) that is not known")));
        }
    }
    let settings = Settings::new(config, &weights, context)?;
    Ok((settings, weights))
}

fn check_device(model: &ModelInfo) -> Result<(), PluginError> {
    let on_cuda = cfg!(feature = "cuda") && model.device_type == KVH_DEVICE_CUDA;
    if !model.on_cpu() && !on_cuda {
        let device = model.device_type;
        let cuda = if cfg!(feature = "cuda") { " and on CUDA devices (2)" } else { ", built without CUDA" };
        return Err(PluginError::Unsupported(format!(
            "the cache lies on a device of type {device}; mlp-decouple works on caches in ordinary memory (1){cuda}"
        )));
    }
    model.dtype().map(|_| ())
}

/// Compares the file with the model: its shapes, and what it says that it was trained for.
fn check_model(weights: &Weights, model: &ModelInfo) -> Result<(), String> {
    let equal = |what: &str, file: usize, model: usize| match file == model {
        true => Ok(()),
        false => Err(format!("the file is for {what} {file}; the model has {model}: train or choose weights for it")),
    };
    if weights.factor < 2 {
        return Err(format!("the file's factor is {}; compressing needs at least 2", weights.factor));
    }
    equal("a number of layers of", weights.layers.len(), model.layers.len())?;
    let planned = model.layers.iter().enumerate().filter(|(_, layer)| layer.is_planned());
    for (index, layer) in planned {
        if layer.v_inside_k {
            return Err(format!("layer {index} of the model holds V inside K, which no MLP of the file fits"));
        }
        equal("a head_dim of", weights.head_dim, layer.k_head_dim)?;
        equal("a head_dim of V of", weights.head_dim, layer.v_head_dim)?;
    }
    let Some(identity) = &weights.terms.model else { return Ok(()) };
    equal("a number of layers of", identity.layers, model.layers.len())?;
    equal("a number of KV heads of", identity.kv_heads, model.total_kv_heads as usize)?;
    let rotary_dim = identity.rotary_dim.unwrap_or(identity.head_dim);
    if model.rope_pairing != RopePairing::None {
        equal("a number of rotated channels of", rotary_dim, model.rotary_dim as usize)?;
    }
    // A base of 0 means that frequencies are given one by one.
    let base = model.rope_base;
    if base != 0.0 && (identity.rope_base - base).abs() > 1e-6 * base.abs() {
        return Err(format!("the file is for a RoPE base of {}; the model's is {base}", identity.rope_base));
    }
    Ok(())
}

impl Settings {
    /// Checks the config against the file and the engine.
    fn new(config: &Config, weights: &Weights, context: &CreateContext<'_>) -> Result<Self, PluginError> {
        let terms = &weights.terms;
        if let Some(factor) = config.factor.filter(|factor| *factor as usize != weights.factor) {
            let allowed = format!("{}, which the weight file was made for, or unset", weights.factor);
            return Err(ConfigError::bad_value("factor", factor, &allowed).into());
        }
        let positions = positions(config, terms)?;
        if positions == PositionRule::Compacted && config.every > 0 {
            let allowed = "0 with positions=compacted: moved positions do not say which rows were compressed before";
            return Err(ConfigError::bad_value("every", config.every, allowed).into());
        }
        let named = match &config.layers {
            Some(ranges) => ranges.by_layer(context.model.layers.len())?,
            None => vec![true; context.model.layers.len()],
        };
        let planned = || context.model.layers.iter().zip(&named).filter(|(layer, _)| layer.is_planned());
        let layers_differ = planned().any(|(_, named)| !named) && planned().any(|(_, named)| *named);
        let offers = |can: Can, why: &str| match context.offers.can.contains(can) {
            true => Ok(()),
            false => {
                Err(PluginError::Unsupported(format!("{why}, which this engine does not offer ({})", can.names())))
            }
        };
        offers(Can::REWRITE, "mlp-decouple writes new rows")?;
        if positions == PositionRule::Compacted {
            offers(Can::MOVE_POSITIONS, "positions=compacted moves the next token's position")?;
        }
        if layers_differ {
            offers(Can::LAYER_COUNTS, "`layers` gives layers different lengths")?;
        }
        Ok(Self {
            factor: weights.factor as u64,
            layers: context
                .model
                .layers
                .iter()
                .zip(&named)
                .map(|(layer, named)| layer.is_planned() && *named)
                .collect(),
            sinks: config.sinks.or(terms.sinks).unwrap_or(4).into(),
            recent: config.recent.or(terms.recent).unwrap_or(32).into(),
            max_position: max_position(config, terms)?,
            min_tokens: config.min_tokens,
            min_groups: config.min_groups.unwrap_or(terms.min_groups as u64).max(1),
            min_gain: config.min_gain,
            every: config.every,
            image_rule: image_rule(config, terms)?,
            images: weights.layers.iter().all(|layer| layer.image_k.is_some() && layer.image_v.is_some()),
            positions,
            layers_differ,
        })
    }

    /// What becomes of each layer's rows.
    ///
    /// # Errors
    /// [`Kept`] when nothing is to be compressed, or the rows are not what this config leaves.
    pub fn layout(
        &self,
        epoch: u64,
        position: u64,
        segments: Segments<'_>,
        lengths: &[u64],
    ) -> Result<Vec<Vec<Run>>, Kept> {
        if lengths.len() != self.layers.len() {
            return Err(Kept::Layers { found: lengths.len(), expected: self.layers.len() });
        }
        if position < self.min_tokens {
            return Err(Kept::TooShort { tokens: position, min_tokens: self.min_tokens });
        }
        if self.positions == PositionRule::Compacted && epoch > 0 {
            return Err(Kept::Compacted);
        }
        let open = stretches::open(position, self.sinks, self.recent, self.max_position);
        let mut stretches = stretches::stretches(self.image_rule, segments.iter(), open);
        if !self.images {
            stretches.retain(|stretch| stretch.kind == stretches::Kind::Text);
        }
        let layer = |(layer, &length): (usize, &u64)| {
            if !self.layers[layer] {
                let position = position.saturating_sub(length);
                return Ok(vec![Run::Rows { row: 0, count: length, position, step: 1 }]);
            }
            stretches::runs(&stretches, self.factor, self.min_groups, length, position).ok_or(Kept::Foreign {
                layer,
                length,
                position,
                factor: self.factor,
            })
        };
        let layers = lengths.iter().enumerate().map(layer).collect::<Result<Vec<_>, _>>()?;
        let gain = layers.iter().zip(lengths).map(|(runs, length)| length - stretches::rows(runs)).max().unwrap_or(0);
        if gain < self.min_gain {
            return Err(Kept::NoGain { gain, min_gain: self.min_gain });
        }
        Ok(layers)
    }
}

/// The rule that the weights were trained for: the file's word, or the config's where the file says nothing.
fn positions(config: &Config, terms: &Terms) -> Result<PositionRule, ConfigError> {
    let word = |rule| match rule {
        PositionRule::Logical => "logical",
        PositionRule::Compacted => "compacted",
    };
    let given = config.positions.map(|positions| match positions {
        PositionsWord::Logical => PositionRule::Logical,
        PositionsWord::Compacted => PositionRule::Compacted,
    });
    match (given, terms.positions) {
        (Some(given), Some(file)) if given != file => {
            let allowed = format!("{}, which the weights were trained for, or unset", word(file));
            Err(ConfigError::bad_value("positions", word(given), &allowed))
        }
        (None, None) => {
            let allowed = "logical or compacted, whichever the weights were trained for: this weight file does not say";
            Err(ConfigError::bad_value("positions", "none", allowed))
        }
        (Some(rule), _) | (None, Some(rule)) => Ok(rule),
    }
}

/// The bound of the config, which may be below the file's, or that of the file.
fn max_position(config: &Config, terms: &Terms) -> Result<u64, ConfigError> {
    match (config.max_position, terms.max_position) {
        (Some(given), Some(file)) if given > file => {
            let allowed = format!("at most {file}, beyond which the weights were not trained, or unset");
            Err(ConfigError::bad_value("max_position", given, &allowed))
        }
        (given, file) => Ok(given.or(file).map_or(u64::MAX, u64::from)),
    }
}

fn image_rule(config: &Config, terms: &Terms) -> Result<ImageRule, ConfigError> {
    let word = |rule| match rule {
        ImageRule::Prefix => "prefix",
        ImageRule::Segments => "segments",
    };
    let given = config.image_rule.map(|rule| match rule {
        ImageRuleWord::Prefix => ImageRule::Prefix,
        ImageRuleWord::Segments => ImageRule::Segments,
    });
    match (given, terms.image_rule) {
        (Some(given), Some(file)) if given != file => {
            let allowed = format!("{}, which the weights were trained for, or unset", word(file));
            Err(ConfigError::bad_value("image_rule", word(given), &allowed))
        }
        (given, file) => Ok(given.or(file).unwrap_or(ImageRule::Prefix)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_layers() {
        let named = |text: &str| {
            let layers = LayerRanges(text.into()).by_layer(6);
            layers.map(|layers| (0..6).filter(|layer| layers[*layer]).collect::<Vec<_>>())
        };
        for (text, layers) in [("3", &[3][..]), ("0-2", &[0, 1, 2]), ("4-", &[4, 5]), ("5-,0-1,3", &[0, 1, 3, 5])] {
            assert_eq!(named(text).unwrap(), layers);
        }
        for (text, words) in [("6", "of this model's 6 layers"), ("2-1", "of this"), ("", "of this"), ("1,", "of this")]
        {
            assert!(named(text).unwrap_err().to_string().contains(words), "{text}");
        }
        assert!(named("0-3,3").unwrap_err().to_string().contains("do not overlap"));
    }
}
