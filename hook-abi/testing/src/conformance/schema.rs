//! The rule about a plugin's own schema: each key, with values that the schema allows and values that it does not.

use serde_json::{Map, Number, Value, json};

use super::subject::Subject;
use super::{broken, holds};
use crate::fault::Fault;
use crate::random::Random;

/// Random values of each key that the schema allows.
const RANDOM: usize = 4;

/// What a config is expected to give.
#[derive(Clone, Copy, PartialEq)]
enum Expected {
    /// An instance, or an error that names the key: keys may forbid each other.
    Taken,
    /// An error that names the key.
    Refused,
}

pub(super) fn configs_keep_the_schema(subject: &Subject) -> Result<String, Fault> {
    let Some(file) = &subject.file else { return Ok("a linked plugin has no schema to read".into()) };
    let schema = &file.metadata.config_schema;
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        return Ok("its schema has no keys".into());
    };
    let base = pairs(&subject.config);
    let mut random = Random::new(subject.seed);
    let (mut taken, mut tried) = (0, 0);
    for (key, property) in properties {
        for (value, expected) in cases(property, &mut random) {
            tried += 1;
            taken += usize::from(check(subject, &base, key, value, expected)?);
        }
    }
    Ok(format!("{} keys, {tried} configs, {taken} taken", properties.len()))
}

/// Whether a config with this value is taken.
fn check(
    subject: &Subject,
    base: &Map<String, Value>,
    key: &str,
    value: Value,
    expected: Expected,
) -> Result<bool, Fault> {
    let mut config = base.clone();
    config.insert(key.to_owned(), value);
    let config = written(&config);
    let mut instance = match subject.default_engine().create(subject.entry, &config) {
        Ok(_) if expected == Expected::Refused => {
            return broken(format!("`{config}` is taken; the schema does not allow that value of `{key}`"));
        }
        Ok(instance) => instance,
        Err(Fault::Refused { status: kvhook_abi::raw::KVH_ERR_PANIC, message }) => {
            return broken(format!("`{config}`: {message}"));
        }
        Err(Fault::Refused { message, .. }) => {
            holds(message.contains(key), || format!("`{config}` is refused without naming `{key}`: {message}"))?;
            return Ok(false);
        }
        Err(fault) => return Err(fault),
    };
    // What is taken also works.
    match subject.run_one(&mut instance, &subject.prompt(1, 1, 40), 1) {
        Err(Fault::Refused { status, .. }) if status != kvhook_abi::raw::KVH_ERR_PANIC => Ok(true),
        Err(fault) => broken(format!("`{config}` is taken, then: {fault}")),
        Ok(_) => Ok(true),
    }
}

/// Values of one key.
fn cases(property: &Value, random: &mut Random) -> Vec<(Value, Expected)> {
    use Expected::{Refused, Taken};
    let types: Vec<&str> = match property.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let mut cases: Vec<(Value, Expected)> =
        property.get("default").map(|value| (value.clone(), Taken)).into_iter().collect();
    if let Some(words) = property.get("enum").and_then(Value::as_array) {
        cases.extend(words.iter().map(|word| (word.clone(), Taken)));
        cases.push((json!("no-such-word"), Refused));
        return cases;
    }
    let limit = |name: &str| property.get(name).and_then(Value::as_f64);
    let (low, high) = (limit("minimum"), limit("maximum"));
    for name in &types {
        match *name {
            "null" => cases.push((Value::Null, Taken)),
            "boolean" => cases.extend([(json!(true), Taken), (json!(false), Taken)]),
            "integer" | "number" => {
                let whole = *name == "integer";
                let (from, to) = (low.unwrap_or(0.0), high.unwrap_or(low.unwrap_or(0.0).max(1.0) * 1000.0));
                let number = |value: f64| number(value, whole);
                cases.extend([low, high].into_iter().flatten().map(|limit| (number(limit), Taken)));
                for _ in 0..RANDOM {
                    let share = f64::from(random.float()).abs();
                    cases.push((number(from + share * (to - from)), Taken));
                }
                cases.extend(low.map(|low| (number(low - 1.0), Refused)));
                cases.extend(high.map(|high| (number(high + 1.0 + high.abs() * 1e-3), Refused)));
                if whole {
                    cases.push((json!(1.5), Refused));
                }
            }
            _ => {}
        }
    }
    let can = |name: &str| types.is_empty() || types.contains(&name);
    if !can("string") {
        cases.push((json!("word"), Refused));
    }
    if !can("boolean") && !can("string") {
        cases.push((json!(true), Refused));
    }
    cases
}

fn number(value: f64, whole: bool) -> Value {
    // Beyond 2^53 a float is no longer every integer; nobody needs an exact one there.
    if whole { json!(value as i64) } else { Number::from_f64(value).map_or(Value::Null, Value::Number) }
}

/// Keys and values of a config: a JSON object, or the short form.
fn pairs(config: &str) -> Map<String, Value> {
    if let Ok(Value::Object(map)) = serde_json::from_str(config) {
        return map;
    }
    let mut map = Map::new();
    let mut rest = config.trim();
    while let Some((key, behind)) = rest.split_once('=') {
        let behind = behind.trim_start();
        let mut stream = serde_json::Deserializer::from_str(behind).into_iter::<Value>();
        let (value, end) = match stream.next() {
            Some(Ok(value)) if behind.starts_with(['{', '[', '"']) => (value, stream.byte_offset()),
            _ => {
                let end = behind.find(',').unwrap_or(behind.len());
                let word = behind[..end].trim();
                (serde_json::from_str(word).unwrap_or_else(|_| json!(word)), end)
            }
        };
        map.insert(key.trim().to_owned(), value);
        rest = behind[end..].trim_start_matches([',', ' ']);
    }
    map
}

/// A config in the short form, which every plugin reads, or as JSON where that form cannot say it.
fn written(config: &Map<String, Value>) -> String {
    let plain = |value: &Value| match value {
        Value::String(word) => !word.contains([',', '=', '{', '[', '"']) && word.trim() == word && !word.is_empty(),
        Value::Array(_) | Value::Object(_) => false,
        _ => true,
    };
    if !config.values().all(plain) {
        return Value::Object(config.clone()).to_string();
    }
    let pair = |(key, value): (&String, &Value)| match value {
        Value::String(word) => format!("{key}={word}"),
        value => format!("{key}={value}"),
    };
    config.iter().map(pair).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_are_read_and_written() {
        for (config, expected) in [
            ("", ""),
            ("keep=0.5, history=top", "history=top,keep=0.5"),
            (r#"layers={"0-2": 0.25},budget=5"#, r#"{"budget":5,"layers":{"0-2":0.25}}"#),
            (r#"{"keep": 0.5}"#, "keep=0.5"),
        ] {
            assert_eq!(written(&pairs(config)), expected);
        }
    }

    #[test]
    fn cases_are_on_both_sides_of_the_limits() {
        let property = json!({"type": ["integer", "null"], "minimum": 1, "maximum": 9, "default": null});
        let cases = cases(&property, &mut Random::new(1));
        for (value, expected) in [
            (json!(1), Expected::Taken),
            (json!(9), Expected::Taken),
            (Value::Null, Expected::Taken),
            (json!(0), Expected::Refused),
            (json!(10), Expected::Refused),
            (json!(1.5), Expected::Refused),
            (json!("word"), Expected::Refused),
        ] {
            assert!(cases.iter().any(|case| case.0 == value && case.1 == expected), "{value}");
        }
    }
}
