//! Config of a plugin: one declaration gives the struct, its defaults, its checks and its JSON schema.
//!
//! A config string is a JSON object, or the short form `key=value,key=value`. Unknown keys, keys given twice, wrong
//! types and values out of range are refused with the key, the value and what is allowed.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::json::ConstJson;

mod layers;
mod short;

pub use layers::layer_range;

/// Longest config string, in bytes.
pub const MAX_CONFIG_BYTES: usize = 64 * 1024;

/// Why a config string was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// It is too long.
    #[error("the config has {length} bytes; at most {MAX_CONFIG_BYTES} are allowed")]
    TooLong {
        /// Its bytes.
        length: usize,
    },
    /// It is not UTF-8.
    #[error("the config is not UTF-8 from byte {at}")]
    NotUtf8 {
        /// First bad byte.
        at: usize,
    },
    /// It is neither a JSON object nor the short form.
    #[error("the config cannot be read at byte {at}: {problem}; write a JSON object or key=value,key=value")]
    Syntax {
        /// Where.
        at: usize,
        /// What was found and what was expected.
        problem: String,
    },
    /// There is no such key.
    #[error("unknown config key `{key}` with value {value}{}; the keys are: {known}", did_you_mean(.nearest))]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
        /// All known keys.
        known: String,
    },
    /// A key was given twice.
    #[error("config key `{key}` is given twice; its second value is {value}")]
    DuplicateKey {
        /// The key.
        key: String,
        /// Its second value.
        value: String,
    },
    /// A value is not one that its key takes.
    #[error("config key `{key}` has the value {value}; allowed is {allowed}")]
    BadValue {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What the key takes.
        allowed: String,
    },
}

impl ConfigError {
    /// A value that is refused for a reason that the key's type and range do not say.
    pub fn bad_value(key: &str, value: impl core::fmt::Display, allowed: &str) -> Self {
        Self::BadValue { key: key.to_owned(), value: value.to_string(), allowed: allowed.to_owned() }
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or(String::new(), |key| format!(" (did you mean `{key}`?)"))
}

/// One key of a config.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub help: &'static str,
    /// JSON type: `number`, `integer`, `boolean`, `string`, `object`.
    pub kind: &'static str,
    /// More members of its schema, as JSON text without braces; may be empty.
    pub extra: &'static str,
    /// Whether `null` is a value.
    pub nullable: bool,
    /// What its type takes, in words.
    pub allowed: &'static str,
    /// Default, as JSON text.
    pub default: &'static str,
    /// Least value, as JSON text; empty: none.
    pub low: &'static str,
    /// Greatest value, as JSON text; empty: none.
    pub high: &'static str,
}

impl Key {
    fn refuse(&self, value: &Value) -> ConfigError {
        let range = match (self.low, self.high) {
            ("", "") => String::new(),
            (low, "") => format!(", at least {low}"),
            ("", high) => format!(", at most {high}"),
            (low, high) => format!(", from {low} to {high}"),
        };
        let null = if self.nullable { ", or null" } else { "" };
        ConfigError::bad_value(self.name, shorten(value), &format!("{}{range}{null}", self.allowed))
    }

    fn in_range(&self, value: &Value) -> bool {
        let Some(value) = value.as_f64() else { return true };
        let within = |limit: &str, holds: fn(f64, f64) -> bool| {
            limit.replace('_', "").parse::<f64>().map_or(limit.is_empty(), |limit| holds(value, limit))
        };
        within(self.low, |value, low| value >= low) && within(self.high, |value, high| value <= high)
    }
}

/// A type that a config key may have.
pub trait ConfigValue: Sized {
    /// JSON type: `number`, `integer`, `boolean`, `string`, `object`.
    const KIND: &'static str;
    /// More members of its schema, as JSON text without braces.
    const EXTRA: &'static str = "";
    /// Whether `null` is a value.
    const NULLABLE: bool = false;
    /// What it takes, in words: `a whole number`.
    const ALLOWED: &'static str;
    /// Reads a value; `None` when it is not one of this type.
    fn from_json(value: &Value) -> Option<Self>;
}

macro_rules! config_value {
    ($($type:ty: $kind:literal, $allowed:literal, $read:expr;)+) => {$(
        impl ConfigValue for $type {
            const KIND: &'static str = $kind;
            const ALLOWED: &'static str = $allowed;
            fn from_json(value: &Value) -> Option<Self> {
                let read: fn(&Value) -> Option<Self> = $read;
                read(value)
            }
        }
    )+};
}

config_value! {
    bool: "boolean", "true or false", Value::as_bool;
    u64: "integer", "a whole number, 0 or more", Value::as_u64;
    u32: "integer", "a whole number, 0 or more, below 2^32", |value| value.as_u64()?.try_into().ok();
    usize: "integer", "a whole number, 0 or more", |value| value.as_u64()?.try_into().ok();
    i64: "integer", "a whole number", Value::as_i64;
    f64: "number", "a number", Value::as_f64;
    f32: "number", "a number", |value| Some(value.as_f64()? as f32);
    String: "string", "text", |value| Some(value.as_str()?.to_owned());
}

impl<T: ConfigValue> ConfigValue for Option<T> {
    const KIND: &'static str = T::KIND;
    const EXTRA: &'static str = T::EXTRA;
    const NULLABLE: bool = true;
    const ALLOWED: &'static str = T::ALLOWED;
    fn from_json(value: &Value) -> Option<Self> {
        if value.is_null() { Some(None) } else { T::from_json(value).map(Some) }
    }
}

/// A plugin's config. Made by [`config!`](crate::config!).
pub trait Config: Sized + Send + 'static {
    /// Its keys, in groups.
    const KEYS: &'static [&'static [Key]];

    /// Takes its keys' values, or their defaults.
    ///
    /// # Errors
    /// [`ConfigError::BadValue`].
    fn from_values(values: &mut Values) -> Result<Self, ConfigError>;
}

/// The values of a config string, by key.
#[derive(Debug, Default)]
pub struct Values(BTreeMap<String, Value>);

impl Values {
    /// The value of `key`, or its default.
    ///
    /// # Errors
    /// [`ConfigError::BadValue`] when it is not of its type or out of range.
    pub fn take<T: ConfigValue>(&mut self, key: &Key) -> Result<T, ConfigError> {
        let value = match self.0.remove(key.name) {
            Some(value) => value,
            None => serde_json::from_str(key.default).map_err(|_| {
                ConfigError::bad_value(key.name, key.default, "JSON (the default that its author wrote is not)")
            })?,
        };
        match T::from_json(&value) {
            Some(read) if key.in_range(&value) => Ok(read),
            _ => Err(key.refuse(&value)),
        }
    }
}

/// Reads a config string; an empty one gives the defaults.
///
/// # Errors
/// Every way in which it can be wrong is a variant of [`ConfigError`].
pub fn parse<C: Config>(text: &str) -> Result<C, ConfigError> {
    if text.len() > MAX_CONFIG_BYTES {
        return Err(ConfigError::TooLong { length: text.len() });
    }
    let mut values = Values::default();
    for (name, value) in short::pairs(text)? {
        let keys = || C::KEYS.iter().flat_map(|group| group.iter()).map(|key| key.name);
        if !keys().any(|key| key == name) {
            return Err(ConfigError::UnknownKey {
                nearest: nearest(&name, keys()).map(str::to_owned),
                known: keys().collect::<Vec<_>>().join(", "),
                value: shorten(&value),
                key: name,
            });
        }
        if let Some(second) = values.0.get(&name).map(|_| shorten(&value)) {
            return Err(ConfigError::DuplicateKey { key: name, value: second });
        }
        values.0.insert(name, value);
    }
    C::from_values(&mut values)
}

/// A value as JSON text of at most 80 characters.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The key with the smallest edit distance to `name`, unless that is more than a third of its length (at least 2).
fn nearest<'a>(name: &str, keys: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > 100 {
        return None;
    }
    keys.map(|key| (edit_distance(name, key), key))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, key)| *distance <= (key.len() / 3).max(2))
        .map(|(_, key)| key)
}

/// Levenshtein's distance: insertions, removals and replacements that turn one text into the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Writes the JSON Schema of a config.
pub const fn write_schema(json: &mut ConstJson<'_>, groups: &[&[Key]]) {
    json.raw("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{");
    let mut first = true;
    let mut g = 0;
    while g < groups.len() {
        let mut k = 0;
        while k < groups[g].len() {
            let key = &groups[g][k];
            json.key(key.name, first);
            first = false;
            json.raw("{");
            json.key("description", true);
            json.text(trimmed(key.help));
            json.key("type", false);
            if key.nullable {
                json.raw("[");
                json.text(key.kind);
                json.raw(",\"null\"]");
            } else {
                json.text(key.kind);
            }
            if !key.extra.is_empty() {
                json.raw(",");
                json.raw(key.extra);
            }
            json.key("default", false);
            json.raw(key.default);
            if !key.low.is_empty() {
                json.key("minimum", false);
                json.raw(key.low);
            }
            if !key.high.is_empty() {
                json.key("maximum", false);
                json.raw(key.high);
            }
            json.raw("}");
            k += 1;
        }
        g += 1;
    }
    json.raw("}}");
}

/// Without the space that a doc comment begins with.
const fn trimmed(text: &str) -> &str {
    text.trim_ascii()
}

/// Declares a config: `key: type = default`, then `in low..=high` or `from low` where there is a range. The doc
/// comments become the schema's descriptions; defaults and limits are written as JSON.
///
/// ```
/// kvhook_abi::config! {
///     /// Config of a plugin.
///     pub struct Config {
///         /// Fraction of the entries to keep.
///         keep: f64 = 0.5, in 0.0..=1.0;
///         /// Entries to keep; counts before `keep`.
///         budget: Option<u64> = null, from 1;
///     }
/// }
/// let config: Config = kvhook_abi::config::parse("budget=512").unwrap();
/// assert_eq!((config.keep, config.budget), (0.5, Some(512)));
/// ```
#[macro_export]
macro_rules! config {
    ($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($(#[doc = $help:literal])* $key:ident: $type:ty = $default:expr
            $(, in $low:literal ..= $high:literal)? $(, from $from:literal)?;)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $name {
            $($(#[doc = $help])* pub $key: $type,)*
        }

        impl $name {
            /// The keys of this struct, in order.
            pub const OWN_KEYS: &'static [$crate::config::Key] = &[$($crate::config::Key {
                name: stringify!($key),
                help: concat!($($help),*),
                kind: <$type as $crate::config::ConfigValue>::KIND,
                extra: <$type as $crate::config::ConfigValue>::EXTRA,
                nullable: <$type as $crate::config::ConfigValue>::NULLABLE,
                allowed: <$type as $crate::config::ConfigValue>::ALLOWED,
                default: stringify!($default),
                low: concat!("" $(, stringify!($low))? $(, stringify!($from))?),
                high: concat!("" $(, stringify!($high))?),
            }),*];
        }

        impl $crate::config::Config for $name {
            const KEYS: &'static [&'static [$crate::config::Key]] = &[$name::OWN_KEYS];

            fn from_values(values: &mut $crate::config::Values) -> Result<Self, $crate::config::ConfigError> {
                let mut keys = $name::OWN_KEYS.iter();
                let _ = (&mut keys, &values);
                Ok(Self {
                    $($key: match keys.next() {
                        Some(key) => values.take(key)?,
                        None => return Err($crate::config::ConfigError::bad_value(stringify!($key), "", "a key")),
                    },)*
                })
            }
        }
    };
}

/// Declares an enum of words for a config key.
///
/// ```
/// kvhook_abi::words! {
///     /// What is done with the history.
///     pub enum History {
///         /// Nothing of it is kept.
///         None = "none",
///         /// The best are kept.
///         Top = "top",
///     }
/// }
/// kvhook_abi::config! {
///     struct Config {
///         /// What is done with the history.
///         history: History = "top";
///     }
/// }
/// assert_eq!(kvhook_abi::config::parse::<Config>("history=none").unwrap().history, History::None);
/// ```
#[macro_export]
macro_rules! words {
    ($(#[$meta:meta])* $vis:vis enum $name:ident {
        $(#[$first_meta:meta])* $first:ident = $first_word:literal
        $(, $(#[$rest_meta:meta])* $rest:ident = $rest_word:literal)* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $name {
            $(#[$first_meta])* $first,
            $($(#[$rest_meta])* $rest,)*
        }

        impl $crate::config::ConfigValue for $name {
            const KIND: &'static str = "string";
            const EXTRA: &'static str =
                concat!("\"enum\":[\"", $first_word, "\"" $(, ",\"", $rest_word, "\"")*, "]");
            const ALLOWED: &'static str = concat!("one of ", $first_word $(, ", ", $rest_word)*);
            fn from_json(value: &$crate::config::JsonValue) -> Option<Self> {
                match value.as_str()? {
                    $first_word => Some(Self::$first),
                    $($rest_word => Some(Self::$rest),)*
                    _ => None,
                }
            }
        }
    };
}

/// A JSON value, as [`ConfigValue::from_json`] reads it.
pub type JsonValue = Value;

config! {
    /// A config without keys.
    pub struct NoConfig {}
}

#[cfg(test)]
mod tests;
