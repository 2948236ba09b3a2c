//! One line of a record.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Format number of lines; a line without one has this.
pub const FORMAT: u64 = 1;
/// The most bytes of a line.
pub const MAX_LINE: usize = 4 << 20;
/// The most characters of a name.
pub const MAX_NAME: usize = 200;

/// Counters that a host gives for each arm.
const COUNTERS: [&str; 9] = [
    "sequences",
    "live",
    "commits",
    "entries_before",
    "entries_after",
    "bytes_before",
    "bytes_after",
    "bytes_freed",
    "tokens",
];

/// An arm's numbers by their path, such as `fallbacks.no_gain` and `hooks.bound.total_ns`.
pub(super) type Counters = BTreeMap<String, u64>;

/// A line that counts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub(super) engine: String,
    pub(super) model: String,
    pub(super) at: f64,
    pub(super) content: Content,
}

/// What it tells.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Figures {
        run: Option<String>,
        arms: BTreeMap<String, Counters>,
    },
    Probe {
        prompt: String,
        arm: String,
        tokens: Vec<u32>,
        kl: Option<Vec<f64>>,
        kept: Option<(u64, u64)>,
    },
    /// A kind that a later version may know.
    Other,
}

/// Parses a line without its end. The error says what was found and expected.
pub(super) fn parse(bytes: &[u8]) -> Result<Line, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("byte {} is not UTF-8", e.valid_up_to()))?;
    let value: Value = serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(object) = &value else { return Err(wrong("the line", &value, "an object")) };
    if let Some(format) = object.get("format").filter(|format| format.as_u64() != Some(FORMAT)) {
        return Err(wrong("`format`", format, &format!("{FORMAT}; a newer kvhook may read it")));
    }
    let content = match name(object, "kind")?.as_str() {
        "figures" => figures(object)?,
        "probe" => probe(object)?,
        _ => Content::Other,
    };
    let at = get(object, "at")?;
    let at =
        at.as_f64().filter(|at| (0.0..1e11).contains(at)).ok_or_else(|| wrong("`at`", at, "seconds since 1970"))?;
    Ok(Line { engine: name(object, "engine")?, model: name(object, "model")?, at, content })
}

fn figures(object: &Map<String, Value>) -> Result<Content, String> {
    let run = object.contains_key("run").then(|| name(object, "run")).transpose()?;
    let figures = get(object, "figures")?;
    let arms = figures.get("arms").and_then(Value::as_object);
    let arms =
        arms.ok_or_else(|| wrong("`figures`", figures, "an object with `arms`, as kvhook_figures_json gives it"))?;
    let arms = arms.iter().map(|(arm, value)| {
        check_name("figures.arms", arm)?;
        let place = format!("`figures.arms.{arm}`");
        let fields = value.as_object().ok_or_else(|| wrong(&place, value, "an object"))?;
        for key in COUNTERS {
            if let Some(found) = fields.get(key).filter(|found| found.as_u64().is_none()) {
                return Err(wrong(&format!("`figures.arms.{arm}.{key}`"), found, "a whole number from 0"));
            }
        }
        let mut counters = Counters::new();
        flatten(fields, "", 3, &mut counters);
        Ok((arm.clone(), counters))
    });
    Ok(Content::Figures { run, arms: arms.collect::<Result<_, String>>()? })
}

/// All whole numbers of an object, and of the objects in it.
fn flatten(fields: &Map<String, Value>, prefix: &str, depth: usize, counters: &mut Counters) {
    for (key, value) in fields {
        if let Some(number) = value.as_u64() {
            counters.insert(format!("{prefix}{key}"), number);
        } else if let Some(object) = value.as_object().filter(|_| depth > 1) {
            flatten(object, &format!("{prefix}{key}."), depth - 1, counters);
        }
    }
}

fn probe(object: &Map<String, Value>) -> Result<Content, String> {
    let tokens = list(object, "tokens", "token ids", |value| value.as_u64().and_then(|id| u32::try_from(id).ok()))?;
    if tokens.is_empty() {
        return Err("`tokens` is empty; expected at least one token".into());
    }
    let kl = match object.get("kl") {
        None | Some(Value::Null) => None,
        Some(_) => Some(list(object, "kl", "numbers", |value| value.as_f64().filter(|kl| kl.is_finite()))?),
    };
    let whole = |key: &str| -> Result<Option<u64>, String> {
        let Some(value) = object.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        value.as_u64().map(Some).ok_or_else(|| wrong(&format!("`{key}`"), value, "a whole number from 0"))
    };
    let kept = match (whole("kept")?, whole("of")?) {
        (None, None) => None,
        (Some(kept), Some(of)) if of > 0 => Some((kept, of)),
        (kept, of) => {
            return Err(format!("`kept` is {kept:?} and `of` is {of:?}; expected both, `of` above 0, or none of them"));
        }
    };
    Ok(Content::Probe { prompt: name(object, "prompt")?, arm: name(object, "arm")?, tokens, kl, kept })
}

fn list<T>(
    object: &Map<String, Value>,
    key: &str,
    what: &str,
    element: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>, String> {
    let value = get(object, key)?;
    let values = value.as_array().ok_or_else(|| wrong(&format!("`{key}`"), value, &format!("a list of {what}")))?;
    let elements = values.iter().enumerate().map(|(index, value)| {
        element(value).ok_or_else(|| wrong(&format!("`{key}[{index}]`"), value, &format!("one of {what}")))
    });
    elements.collect()
}

fn get<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a Value, String> {
    object.get(key).ok_or_else(|| format!("`{key}` is missing"))
}

fn name(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    let value = get(object, key)?;
    let name = value.as_str().ok_or_else(|| wrong(&format!("`{key}`"), value, "text"))?;
    check_name(key, name)?;
    Ok(name.to_owned())
}

fn check_name(key: &str, name: &str) -> Result<(), String> {
    let length = name.chars().count();
    if length == 0 || length > MAX_NAME {
        return Err(format!("a name in `{key}` has {length} characters; expected 1 to {MAX_NAME}"));
    }
    // Names come to terminals and pages: none may steer one, or turn the direction of what follows.
    let steers = |c: &char| c.is_control() || matches!(*c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    match name.chars().find(steers) {
        Some(found) => Err(format!("a name in `{key}` holds the control character {found:?}")),
        None => Ok(()),
    }
}

fn wrong(place: &str, found: &Value, expected: &str) -> String {
    let found = found.to_string();
    let short: String = found.chars().filter(|c| !c.is_control()).take(60).collect();
    let dots = if found.chars().count() > 60 { "…" } else { "" };
    format!("{place} is {short}{dots}; expected {expected}")
}
