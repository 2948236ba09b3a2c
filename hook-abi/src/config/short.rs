//! Reading a config string into keys and values.

use core::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Number, Value};

use super::ConfigError;

/// Keys and values in the order in which they stand, also when a key stands twice.
pub(super) fn pairs(text: &str) -> Result<Vec<(String, Value)>, ConfigError> {
    if text.trim_start().starts_with('{') {
        let Pairs(pairs) = serde_json::from_str(text).map_err(|error| ConfigError::Syntax {
            at: byte_of(text, error.line(), error.column()),
            problem: error.to_string(),
        })?;
        return Ok(pairs);
    }
    let mut pairs = Vec::new();
    let mut rest = text.trim();
    // Where `rest`, a part of `text`, begins.
    let at = |rest: &str| rest.as_ptr().addr() - text.as_ptr().addr();
    while !rest.is_empty() {
        let syntax = |rest: &str, problem: &str| ConfigError::Syntax { at: at(rest), problem: problem.to_owned() };
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let key = rest[..end].trim();
        if key.is_empty() || !rest[end..].starts_with('=') {
            return Err(syntax(rest, "expected key=value"));
        }
        let after = rest[end + 1..].trim_start();
        let (value, behind) = value(after).map_err(|problem| syntax(after, &problem))?;
        pairs.push((key.to_owned(), value));
        rest = match behind.trim_start().strip_prefix(',') {
            Some(next) if !next.trim().is_empty() => next.trim_start(),
            Some(next) => return Err(syntax(next, "expected key=value behind the last comma")),
            None if behind.trim().is_empty() => "",
            None => return Err(syntax(behind, "expected a comma behind the value")),
        };
    }
    Ok(pairs)
}

/// One value of the short form and what stands behind it: JSON when it begins like an object, array or quoted text,
/// else up to the next comma a number, `true`, `false`, `null` or a word.
fn value(text: &str) -> Result<(Value, &str), String> {
    if text.starts_with(['{', '[', '"']) {
        let mut stream = serde_json::Deserializer::from_str(text).into_iter();
        return match stream.next() {
            Some(Ok(value)) => {
                let end = stream.byte_offset();
                Ok((value, &text[end..]))
            }
            Some(Err(error)) => Err(error.to_string()),
            None => Err("expected a value".to_owned()),
        };
    }
    let end = text.find(',').unwrap_or(text.len());
    let word = text[..end].trim();
    let value = match word {
        "" => return Err("expected a value behind `=`".to_owned()),
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        word => word.parse::<Number>().map_or_else(|_| Value::String(word.to_owned()), Value::Number),
    };
    Ok((value, &text[end..]))
}

/// Byte of a line and column, both from 1, as the JSON reader counts them.
fn byte_of(text: &str, line: usize, column: usize) -> usize {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (start + column.saturating_sub(1)).min(text.len())
}

/// The members of a JSON object in order, repeated keys included.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Pairs;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(Members)
    }
}
