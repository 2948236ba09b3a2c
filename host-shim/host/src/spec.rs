//! The form in which engines and operators name plugins, and the arms that come out of it.
//!
//! ```json
//! {"kv_plugin": {
//!     "plugin": "truncate",
//!     "config": {"keep": 0.25},
//!     "sha256": "64 hexadecimal digits",
//!     "min_tokens": 512,
//!     "layers": "0-3,8,20-",
//!     "weight": 1.0
//! }}
//! ```
//!
//! | key | value |
//! | --- | --- |
//! | `plugin` | a bare name (letters, digits, `-`, `_`), or from the operator a path inside the allowed folders |
//! | `config` | the plugin's config: a string, or an object that is passed on as JSON text; default empty |
//! | `sha256` | pins the file's content; default: not pinned |
//! | `min_tokens` | sequences shorter than this are kept; default 0 |
//! | `layers` | layers to compress: `"0-3,8"` (`"20-"`: to the last), or a list of numbers; default all |
//! | `weight` | share of the sequences that name no arm, relative to the other arms; default 1 |
//! | `state` | `serving`, `shadow`, `draining` or `disabled`; default as it was, `serving` for a new arm |
//! | `guard` | an object of limits: `failed`, `sequences`, `ns_per_token`, `tokens` ([`GuardSpec`]); `null`: none |
//! | `arms` | a list of objects with a `name` and the keys above, instead of all but `min_tokens` and `layers`; `min_tokens` and `layers` beside it hold for every arm that has none of its own |
//!
//! Without `arms` there is one arm, named `default`. `null`, an empty object and an empty list mean no arm. The outer
//! `kv_plugin` may be left out. At most 64 KiB. Unknown keys are refused.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::arm::ArmState;
use crate::error::HostError;
use crate::guard::GuardSpec;
use crate::load::{ContentHash, Source};

/// The longest form, and the longest config of one plugin, in bytes.
pub const MAX_SPEC_BYTES: usize = 64 << 10;
/// Name of the arm that a form without `arms` makes.
pub const DEFAULT_ARM: &str = "default";
/// The name that means no arm.
pub const NO_ARM: &str = "none";

/// An arm as configured: which plugin, with which config, for which sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct ArmSpec {
    /// Letters, digits, `.`, `_`, `-`; at most 64; not `none`.
    pub name: String,
    /// A bare name or a path.
    pub plugin: String,
    /// The plugin's config string.
    pub config: String,
    /// The pinned content.
    pub sha256: Option<ContentHash>,
    /// Layers to compress; none: all.
    pub layers: Option<LayerSet>,
    /// Sequences shorter than this are kept.
    pub min_tokens: u64,
    /// Share of the sequences that name no arm; finite, not negative.
    pub weight: f64,
    /// What it does with sequences; none: as it was, [`ArmState::Serving`] for a new arm.
    pub state: Option<ArmState>,
    /// What switches it off by itself.
    pub guard: Option<GuardSpec>,
    /// Who named it.
    pub source: Source,
}

impl ArmSpec {
    /// An arm with no pin, all layers, no least length, weight 1, no guard.
    pub fn new(name: impl Into<String>, plugin: impl Into<String>, config: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            plugin: plugin.into(),
            config: config.into(),
            sha256: None,
            layers: None,
            min_tokens: 0,
            weight: 1.0,
            state: None,
            guard: None,
            source: Source::Operator,
        }
    }

    /// Checks name, plugin, sizes, weight and guard.
    ///
    /// # Errors
    /// [`HostError::Spec`].
    pub fn check(&self) -> Result<(), HostError> {
        let name_byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if self.name.is_empty() || self.name.len() > 64 || !self.name.bytes().all(name_byte) || self.name == NO_ARM {
            return Err(HostError::Spec(format!(
                "`name` is {:?}; an arm's name has 1 to 64 letters, digits, `.`, `_` or `-`, and is not `none`",
                shorten(&self.name)
            )));
        }
        let arm = &self.name;
        if self.plugin.is_empty() || self.plugin.contains('\0') || self.plugin.len() > 4096 {
            return Err(HostError::Spec(format!(
                "arm `{arm}`: `plugin` is {:?}; expected a name or a path of at most 4096 bytes",
                shorten(&self.plugin)
            )));
        }
        if self.config.len() > MAX_SPEC_BYTES {
            return Err(HostError::Spec(format!(
                "arm `{arm}`: `config` has {} bytes; at most {MAX_SPEC_BYTES} are taken",
                self.config.len()
            )));
        }
        let guard = self.guard.map_or(Ok(()), |guard| guard.check());
        let checked = check_weight(self.weight).and(guard);
        checked.map_err(|error| HostError::Spec(format!("arm `{arm}`: {error}")))
    }
}

/// Checks an arm's weight; gives what is wrong.
pub(crate) fn check_weight(weight: f64) -> Result<(), String> {
    if weight.is_finite() && weight >= 0.0 {
        Ok(())
    } else {
        Err(format!("`weight` is {weight}; expected a finite number, 0 or more"))
    }
}

/// Parses the form. See the module's documentation.
///
/// # Errors
/// [`HostError::Spec`] with the key, what was found and what is allowed.
pub fn parse(text: &str, source: Source) -> Result<Vec<ArmSpec>, HostError> {
    parse_form(text, source).map_err(HostError::Spec)
}

const ARM_KEYS: [&str; 9] = ["name", "plugin", "config", "sha256", "min_tokens", "layers", "weight", "state", "guard"];
const FORM_KEYS: [&str; 9] = ["plugin", "config", "sha256", "min_tokens", "layers", "weight", "state", "guard", "arms"];
/// Keys of the form that belong to one arm.
const ONE_ARM_KEYS: [&str; 6] = ["plugin", "config", "sha256", "weight", "state", "guard"];

fn parse_form(text: &str, source: Source) -> Result<Vec<ArmSpec>, String> {
    if text.len() > MAX_SPEC_BYTES {
        return Err(format!("it has {} bytes; at most {MAX_SPEC_BYTES} are taken", text.len()));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let value = match value {
        Value::Object(mut outer) if outer.contains_key("kv_plugin") => {
            if let Some(key) = outer.keys().find(|key| *key != "kv_plugin") {
                return Err(format!("`{}` stands beside `kv_plugin`; nothing else may", shorten(key)));
            }
            outer.remove("kv_plugin").unwrap_or(Value::Null)
        }
        other => other,
    };
    let form = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Object(form) => form,
        other => return Err(wrong("kv_plugin", &other, "an object")),
    };
    check_keys(&form, &FORM_KEYS, "the form")?;
    let min_tokens = get_u64(&form, "min_tokens")?.unwrap_or(0);
    let layers = get_layers(&form)?;

    let Some(arms) = form.get("arms") else {
        if form.is_empty() {
            return Ok(Vec::new());
        }
        let arm = parse_arm(&form, DEFAULT_ARM.to_owned(), source)?;
        return Ok(vec![arm]);
    };
    if let Some(key) = ONE_ARM_KEYS.into_iter().find(|key| form.contains_key(*key)) {
        return Err(format!("`{key}` stands beside `arms`; put it into an arm"));
    }
    let Value::Array(arms) = arms else { return Err(wrong("arms", arms, "a list of objects")) };
    let mut specs: Vec<ArmSpec> = Vec::with_capacity(arms.len());
    for (index, arm) in arms.iter().enumerate() {
        let within = |error: String| format!("`arms[{index}]`: {error}");
        let Value::Object(arm) = arm else { return Err(within(wrong("arms", arm, "a list of objects"))) };
        check_keys(arm, &ARM_KEYS, "an arm").map_err(within)?;
        let name = get_text(arm, "name").map_err(within)?.ok_or_else(|| within("`name` is missing".into()))?;
        if specs.iter().any(|other| other.name == name) {
            return Err(within(format!("the name `{}` is used twice", shorten(&name))));
        }
        let mut spec = parse_arm(arm, name, source).map_err(within)?;
        if !arm.contains_key("min_tokens") {
            spec.min_tokens = min_tokens;
        }
        if !arm.contains_key("layers") {
            spec.layers = layers.clone();
        }
        specs.push(spec);
    }
    Ok(specs)
}

fn parse_arm(object: &Map<String, Value>, name: String, source: Source) -> Result<ArmSpec, String> {
    let plugin = get_text(object, "plugin")?.ok_or("`plugin` is missing: the name of a plugin, or a path")?;
    let spec = parse_patch(object, source)?.applied_to(&ArmSpec::new(name, plugin, ""));
    spec.check().map_err(|error| inner(&error))?;
    Ok(spec)
}

/// An arm as [`parse`] takes it in `arms`.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse_named_arm(object: &Map<String, Value>, source: Source) -> Result<ArmSpec, String> {
    check_keys(object, &ARM_KEYS, "an arm")?;
    parse_arm(object, get_name(object)?, source)
}

/// Some keys of an arm, and its name.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn parse_named_patch(object: &Map<String, Value>, source: Source) -> Result<(String, ArmPatch), String> {
    check_keys(object, &ARM_KEYS, "an arm")?;
    Ok((get_name(object)?, parse_patch(object, source)?))
}

fn get_name(object: &Map<String, Value>) -> Result<String, String> {
    get_text(object, "name")?.ok_or_else(|| "`name` is missing".to_owned())
}

/// What changes of an arm; none: it stays.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ArmPatch {
    /// A bare name or a path, and who named it. With it, `config` and `sha256` begin empty.
    pub plugin: Option<(String, Source)>,
    /// The plugin's config string.
    pub config: Option<String>,
    /// The pinned content.
    pub sha256: Option<Option<ContentHash>>,
    /// Layers to compress.
    pub layers: Option<Option<LayerSet>>,
    /// Sequences shorter than this are kept.
    pub min_tokens: Option<u64>,
    /// Share of the sequences that name no arm.
    pub weight: Option<f64>,
    /// What it does with sequences.
    pub state: Option<ArmState>,
    /// What switches it off by itself.
    pub guard: Option<Option<GuardSpec>>,
}

impl ArmPatch {
    /// The spec with what changes. Its state is the patch's.
    pub fn applied_to(&self, spec: &ArmSpec) -> ArmSpec {
        let mut spec = spec.clone();
        if let Some((plugin, source)) = &self.plugin {
            (spec.plugin, spec.source) = (plugin.clone(), *source);
            (spec.config, spec.sha256) = (String::new(), None);
        }
        let patch = self.clone();
        ArmSpec {
            config: patch.config.unwrap_or(spec.config),
            sha256: patch.sha256.unwrap_or(spec.sha256),
            layers: patch.layers.unwrap_or(spec.layers),
            min_tokens: patch.min_tokens.unwrap_or(spec.min_tokens),
            weight: patch.weight.unwrap_or(spec.weight),
            state: patch.state,
            guard: patch.guard.unwrap_or(spec.guard),
            ..spec
        }
    }
}

/// A key that is there, whatever its value.
fn given<T>(object: &Map<String, Value>, key: &str, value: T) -> Option<T> {
    object.contains_key(key).then_some(value)
}

fn parse_patch(object: &Map<String, Value>, source: Source) -> Result<ArmPatch, String> {
    let config = match object.get("config") {
        None => None,
        Some(Value::Null) => Some(String::new()),
        Some(Value::String(text)) => Some(text.clone()),
        Some(config @ Value::Object(_)) => Some(config.to_string()),
        Some(other) => return Err(wrong("config", other, "a string or an object")),
    };
    let sha256 = match get_text(object, "sha256")? {
        Some(text) => Some(text.parse::<ContentHash>().map_err(|error| inner(&error))?),
        None => None,
    };
    let weight = match object.get("weight") {
        None | Some(Value::Null) => None,
        Some(value) => Some(weight_of("weight", value)?),
    };
    Ok(ArmPatch {
        plugin: get_text(object, "plugin")?.map(|plugin| (plugin, source)),
        config,
        sha256: given(object, "sha256", sha256),
        layers: given(object, "layers", get_layers(object)?),
        min_tokens: get_u64(object, "min_tokens")?,
        weight,
        state: match object.get("state") {
            None | Some(Value::Null) => None,
            Some(value) => Some(state_of(value)?),
        },
        guard: given(object, "guard", guard_of(object.get("guard"))?),
    })
}

/// A weight from JSON.
pub(crate) fn weight_of(key: &str, value: &Value) -> Result<f64, String> {
    value.as_f64().ok_or_else(|| wrong(key, value, "a number, 0 or more"))
}

/// A state from its name.
pub(crate) fn state_of(value: &Value) -> Result<ArmState, String> {
    let named = value.as_str().and_then(|name| ArmState::ALL.into_iter().find(|state| state.name() == name));
    named.ok_or_else(|| {
        let names: Vec<_> = ArmState::ALL.iter().map(|state| state.name()).collect();
        wrong("state", value, &names.join(", "))
    })
}

/// A guard from an object of limits; nothing and `null` give none.
pub(crate) fn guard_of(value: Option<&Value>) -> Result<Option<GuardSpec>, String> {
    let object = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(object)) => object,
        Some(other) => return Err(wrong("guard", other, "an object, or null")),
    };
    check_keys(object, &["failed", "sequences", "ns_per_token", "tokens"], "a guard")?;
    let usual = GuardSpec::default();
    let failed = match object.get("failed") {
        None | Some(Value::Null) => usual.failed,
        Some(value) => value.as_f64().ok_or_else(|| wrong("failed", value, "a share, 0 to 1"))?,
    };
    let guard = GuardSpec {
        failed,
        sequences: match get_u64(object, "sequences")? {
            None => usual.sequences,
            Some(sequences) => u32::try_from(sequences).unwrap_or(u32::MAX),
        },
        ns_per_token: get_u64(object, "ns_per_token")?.unwrap_or(usual.ns_per_token),
        tokens: get_u64(object, "tokens")?.unwrap_or(usual.tokens),
    };
    guard.check()?;
    Ok(Some(guard))
}

/// The text inside a spec error, so that it is not wrapped twice.
fn inner(error: &HostError) -> String {
    match error {
        HostError::Spec(text) => text.clone(),
        other => other.to_string(),
    }
}

pub(crate) fn check_keys(object: &Map<String, Value>, known: &[&str], place: &str) -> Result<(), String> {
    let Some(unknown) = object.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
    let hint = nearest(unknown, known).map(|key| format!("did you mean `{key}`? ")).unwrap_or_default();
    Err(format!("{place} has the unknown key `{}`; {hint}Keys: {}", shorten(unknown), known.join(", ")))
}

fn get_text(object: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(wrong(key, other, "a string")),
    }
}

fn get_u64(object: &Map<String, Value>, key: &str) -> Result<Option<u64>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| wrong(key, value, "a whole number, 0 or more")),
    }
}

fn get_layers(object: &Map<String, Value>) -> Result<Option<LayerSet>, String> {
    const EXPECTED: &str = "text as in \"0-3,8\", or a list of layers";
    match object.get("layers") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => LayerSet::parse(text),
        Some(value @ Value::Array(items)) => {
            let layers = items
                .iter()
                .map(|item| item.as_u64().and_then(|layer| u32::try_from(layer).ok()).map(|layer| layer..=layer));
            let ranges: Option<Vec<_>> = layers.collect();
            let ranges = ranges.filter(|ranges| !ranges.is_empty()).ok_or_else(|| wrong("layers", value, EXPECTED))?;
            Ok(Some(LayerSet { ranges }))
        }
        Some(other) => Err(wrong("layers", other, EXPECTED)),
    }
}

pub(crate) fn wrong(key: &str, value: &Value, expected: &str) -> String {
    format!("`{key}` is {}; expected {expected}", shorten(&value.to_string()))
}

/// Text for a message: a stranger's, so at most 60 characters of it.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The known key with the fewest edits, if these are at most a third of its length and one more.
fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    if unknown.len() > 32 {
        return None;
    }
    known
        .iter()
        .map(|key| (edits(unknown, key), *key))
        .min()
        .filter(|(edits, key)| *edits <= key.len() / 3 + 1)
        .map(|(_, key)| key)
}

/// Levenshtein distance in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, byte_a) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, byte_b) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(byte_a != byte_b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Some layers of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSet {
    ranges: Vec<RangeInclusive<u32>>,
}

impl LayerSet {
    /// From text: layers and ranges, separated by commas, as in `0-3,8,20-`; a range without an end reaches to the last
    /// layer. Empty text means all layers, and gives none.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let bad = || format!("`layers` is {:?}; expected layers and ranges as in \"0-3,8,20-\"", shorten(text));
        let number = |digits: &str| -> Result<u32, String> {
            let all_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| all_digits).ok_or_else(bad)
        };
        let range = |part: &str| {
            let range = match part.trim().split_once('-') {
                None => number(part.trim()).map(|layer| layer..=layer)?,
                Some((start, "")) => number(start)?..=u32::MAX,
                Some((start, end)) => number(start)?..=number(end)?,
            };
            if range.is_empty() { Err(bad()) } else { Ok(range) }
        };
        let ranges: Result<Vec<_>, String> = text.split(',').map(range).collect();
        Ok(Some(Self { ranges: ranges? }))
    }

    /// Whether a layer is in it.
    pub fn contains(&self, layer: u32) -> bool {
        self.ranges.iter().any(|range| range.contains(&layer))
    }

    /// Checks that every layer that it names is one of the model's.
    ///
    /// # Errors
    /// [`HostError::Spec`] naming the layer.
    pub fn check(&self, layers: u32) -> Result<(), HostError> {
        let outside = |range: &&RangeInclusive<u32>| {
            *range.start() >= layers || (*range.end() >= layers && *range.end() != u32::MAX)
        };
        match self.ranges.iter().find(outside) {
            None => Ok(()),
            Some(range) => Err(HostError::Spec(format!(
                "`layers` names {}-{}, but the model has the layers 0-{}",
                range.start(),
                range.end(),
                layers.saturating_sub(1)
            ))),
        }
    }
}

/// As [`LayerSet::parse`] reads it.
impl fmt::Display for LayerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match (*range.start(), *range.end()) {
                (start, end) if start == end => write!(f, "{comma}{start}")?,
                (start, u32::MAX) => write!(f, "{comma}{start}-")?,
                (start, end) => write!(f, "{comma}{start}-{end}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> ArmSpec {
        let mut arms = parse(text, Source::Operator).unwrap();
        assert_eq!(arms.len(), 1);
        arms.remove(0)
    }

    fn refused(text: &str) -> String {
        let error = parse(text, Source::Operator).unwrap_err();
        assert_eq!(error.status(), crate::raw::KVHOOK_ERR_SPEC);
        error.to_string()
    }

    #[test]
    fn one_plugin() {
        let arm = one(r#"{"kv_plugin": {"plugin": "truncate", "config": "keep=0.25", "min_tokens": 12}}"#);
        let expected = ArmSpec { min_tokens: 12, ..ArmSpec::new("default", "truncate", "keep=0.25") };
        assert_eq!(arm, expected);
        assert_eq!(one(r#"{"plugin": "noop"}"#), ArmSpec::new("default", "noop", ""));
    }

    #[test]
    fn config_object_becomes_json_text() {
        let arm = one(r#"{"plugin": "truncate", "config": {"keep": 0.25, "layers": {"0-3": 1.0}}}"#);
        let config: Value = serde_json::from_str(&arm.config).unwrap();
        assert_eq!(config, serde_json::json!({"keep": 0.25, "layers": {"0-3": 1.0}}));
    }

    #[test]
    fn arms_inherit_min_tokens_and_layers() {
        let text = r#"{"min_tokens": 7, "layers": "0-3,8", "arms": [
            {"name": "a", "plugin": "noop", "weight": 3},
            {"name": "b", "plugin": "truncate", "min_tokens": 0, "layers": [1, 2]}]}"#;
        let arms = parse(text, Source::Model).unwrap();
        assert_eq!((arms[0].min_tokens, arms[0].weight), (7, 3.0));
        assert_eq!(arms[0].layers.as_ref().unwrap().to_string(), "0-3,8");
        assert_eq!(arms[1].min_tokens, 0);
        assert_eq!(arms[1].layers.as_ref().unwrap().to_string(), "1,2");
        assert_eq!(arms[1].source, Source::Model);
    }

    #[test]
    fn nothing_means_no_arm() {
        for text in ["null", "{}", r#"{"kv_plugin": null}"#, r#"{"kv_plugin": {}}"#, r#"{"arms": []}"#] {
            assert_eq!(parse(text, Source::Operator).unwrap(), [], "{text}");
        }
    }

    #[test]
    fn refusals_name_key_value_and_what_is_allowed() {
        for (text, words) in [
            ("{", "not JSON"),
            ("[]", "`kv_plugin` is []; expected an object"),
            (r#"{"kv_plugin": {}, "x": 1}"#, "`x` stands beside"),
            (r#"{"plugn": "noop"}"#, "unknown key `plugn`; did you mean `plugin`?"),
            (r#"{"plugin": "noop", "name": "a"}"#, "unknown key `name`"),
            (r#"{"config": "x"}"#, "`plugin` is missing"),
            (r#"{"plugin": 3}"#, "`plugin` is 3; expected a string"),
            (r#"{"plugin": ""}"#, "`plugin` is \"\""),
            (r#"{"plugin": "noop", "config": 3}"#, "`config` is 3; expected a string or an object"),
            (r#"{"plugin": "noop", "sha256": "12"}"#, "expected 64 hexadecimal digits"),
            (r#"{"plugin": "noop", "min_tokens": -1}"#, "`min_tokens` is -1"),
            (r#"{"plugin": "noop", "weight": -1}"#, "`weight` is -1"),
            (r#"{"plugin": "noop", "weight": "2"}"#, "`weight` is \"2\""),
            (r#"{"plugin": "noop", "layers": []}"#, "`layers` is []"),
            (r#"{"plugin": "noop", "layers": "3-1"}"#, "`layers` is \"3-1\""),
            (r#"{"plugin": "noop", "layers": "+3"}"#, "`layers` is \"+3\""),
            (r#"{"plugin": "noop", "arms": []}"#, "`plugin` stands beside `arms`"),
            (r#"{"plugin": "noop", "state": "on"}"#, "`state` is \"on\"; expected serving, shadow, draining, disabled"),
            (r#"{"plugin": "noop", "guard": 1}"#, "`guard` is 1; expected an object"),
            (r#"{"plugin": "noop", "guard": {"faild": 1}}"#, "did you mean `failed`?"),
            (r#"{"plugin": "noop", "guard": {"failed": 2}}"#, "`failed` is 2; expected a share"),
            (r#"{"plugin": "noop", "guard": {"sequences": 1e99}}"#, "`sequences` is 1e+99"),
            (r#"{"guard": {}, "arms": []}"#, "`guard` stands beside `arms`"),
            (r#"{"arms": [{"plugin": "noop"}]}"#, "`arms[0]`: `name` is missing"),
            (r#"{"arms": [{"name": "none", "plugin": "noop"}]}"#, "is not `none`"),
            (r#"{"arms": [{"name": "a", "plugin": "x"}, {"name": "a", "plugin": "x"}]}"#, "used twice"),
            (r#"{"arms": [3]}"#, "`arms[0]`: `arms` is 3"),
        ] {
            let message = refused(text);
            assert!(message.contains(words), "{text}: {message}");
        }
        let long = format!(r#"{{"plugin": "noop", "config": "{}"}}"#, "x".repeat(1 << 20));
        assert!(refused(&long).contains("at most 65536"));
    }

    #[test]
    fn layer_sets() {
        let set = LayerSet::parse(" 0-3, 8,20- ").unwrap().unwrap();
        let inside: Vec<u32> = (0..24).filter(|layer| set.contains(*layer)).collect();
        assert_eq!(inside, [0, 1, 2, 3, 8, 20, 21, 22, 23]);
        assert!(set.check(24).is_ok());
        assert!(set.check(20).unwrap_err().to_string().contains("layers 0-19"));
        assert_eq!(LayerSet::parse("").unwrap(), None);
    }
}
