//! How much a plugin is told to keep, where its config leaves that open.

use serde_json::{Map, Value, json};

/// What is kept where neither config nor command line says it.
const HALF: f64 = 0.5;

/// Keys that say how much is kept.
const AMOUNTS: [&str; 2] = ["keep", "budget"];

/// The config with `keep`, where the plugin has that key and neither `keep` nor `budget` is given: by `keep`, or half.
///
/// # Errors
/// What is wrong, where `keep` was asked for and the plugin has no such key, or the config says already how much is kept.
pub fn with_keep(config: &str, keep: Option<f64>, schema: &Value) -> Result<String, String> {
    let given = AMOUNTS.into_iter().find(|key| value(config, key).is_some());
    let has_key = schema.pointer("/properties/keep").is_some();
    match (keep, given) {
        (Some(_), Some(key)) => Err(format!("--config gives `{key}` already: leave --keep out")),
        (Some(_), None) if !has_key => {
            Err("the plugin has no config key `keep`: leave --keep out, and say by --config what is kept".into())
        }
        (None, Some(_)) => Ok(config.to_owned()),
        (None, None) if !has_key => Ok(config.to_owned()),
        (_, None) => Ok(with(config, "keep", &json!(keep.unwrap_or(HALF)))),
    }
}

/// The value of a key in a config of either form, as text.
pub fn value(config: &str, key: &str) -> Option<String> {
    if let Some(object) = object(config) {
        return object.get(key).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    let pairs = config.split(',').filter_map(|pair| pair.split_once('='));
    let mut values = pairs.filter(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned());
    values.next()
}

fn with(config: &str, key: &str, value: &Value) -> String {
    match object(config) {
        Some(mut object) => {
            object.insert(key.into(), value.clone());
            Value::Object(object).to_string()
        }
        None if config.trim().is_empty() => format!("{key}={value}"),
        None => format!("{config},{key}={value}"),
    }
}

fn object(config: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(config).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_comes_where_nothing_says_how_much() {
        let schema = json!({"properties": {"keep": {"type": "number"}}});
        let merged = |config, keep| with_keep(config, keep, &schema);
        assert_eq!(merged("", None), Ok("keep=0.5".into()));
        assert_eq!(merged("", Some(0.25)), Ok("keep=0.25".into()));
        assert_eq!(merged("history=top", Some(0.25)), Ok("history=top,keep=0.25".into()));
        assert_eq!(merged(r#"{"sinks": 8}"#, None), Ok(r#"{"keep":0.5,"sinks":8}"#.into()));
        assert_eq!(merged("history=top, budget = 64", None), Ok("history=top, budget = 64".into()));
        assert_eq!(merged(r#"{"keep": 0.1}"#, None), Ok(r#"{"keep": 0.1}"#.into()));
        assert!(merged("keep=0.1", Some(0.2)).unwrap_err().contains("`keep`"));
        assert_eq!(with_keep("weights=w", None, &json!({})), Ok("weights=w".into()));
        assert!(with_keep("weights=w", Some(0.5), &json!({"properties": {}})).unwrap_err().contains("no config key"));
    }

    #[test]
    fn values_are_found_in_both_forms() {
        assert_eq!(value("keep=0.5,every=8", "every").as_deref(), Some("8"));
        assert_eq!(value(r#"{"every": 8, "history": "top"}"#, "every").as_deref(), Some("8"));
        assert_eq!(value(r#"{"history": "top"}"#, "history").as_deref(), Some("top"));
        assert_eq!(value("xevery=8", "every"), None);
    }
}
