//! The methods that a plugin is measured against, each keeping as much as the plugin does.

use serde_json::{Map, Value, json};

use crate::arm::ArmSpec;
use crate::measure::Remains;

/// A method of the plugin `truncate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// Name of its arm.
    pub name: &'static str,
    /// Name in sentences.
    pub title: &'static str,
    history: &'static str,
    importance: Option<&'static str>,
}

/// The controls, from the least that a method must beat.
pub const CONTROLS: [Control; 4] = [
    Control { name: "random", title: "random with guard", history: "sample", importance: Some("uniform") },
    Control { name: "streaming", title: "streaming", history: "none", importance: None },
    Control { name: "key_diff", title: "key_diff", history: "top", importance: Some("key_diff") },
    Control { name: "snapkv", title: "SnapKV", history: "top", importance: Some("attention") },
];

impl Control {
    /// Its arm, with as many rows of each layer as the plugin left of a prompt, and compressing again as often.
    pub fn arm(&self, remains: &Remains, every: Option<u64>) -> ArmSpec {
        let mut config = Map::new();
        config.insert("history".into(), self.history.into());
        config.extend(self.importance.map(|importance| ("importance".to_owned(), importance.into())));
        config.extend(every.map(|every| ("every".to_owned(), every.into())));
        config.extend(amounts(remains));
        ArmSpec { name: self.name.into(), plugin: "truncate".into(), config: Value::Object(config).to_string() }
    }
}

/// The keys that keep so many rows. Fractions, not numbers, since a passkey's prompt is one token longer.
fn amounts(remains: &Remains) -> Map<String, Value> {
    let lengths = remains.lengths.as_deref().unwrap_or_default();
    // Half a row more, so that rounding down gives the number whatever the last bit is.
    let fraction = |rows: usize| ((rows as f64 + 0.5) / remains.rows as f64).min(1.0);
    let mut keys = Map::new();
    if let Some(&first) = lengths.first() {
        keys.insert("keep".into(), json!(fraction(first)));
        if lengths.iter().any(|&rows| rows != first) {
            let layers = lengths.iter().enumerate().map(|(layer, &rows)| (layer.to_string(), json!(fraction(rows))));
            keys.insert("layers".into(), Value::Object(layers.collect()));
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remains(lengths: Vec<usize>) -> Remains {
        Remains { rows: 1023, lengths: Some(lengths), why: String::new() }
    }

    fn config(remains: &Remains) -> Value {
        serde_json::from_str(&CONTROLS[0].arm(remains, Some(8)).config).unwrap()
    }

    #[test]
    fn fractions_give_the_rows_of_each_layer() {
        for rows in [1, 2, 36, 511, 512, 1022, 1023] {
            let keep = config(&remains(vec![rows; 3]))["keep"].as_f64().unwrap();
            // As the plugin computes it.
            assert_eq!((1023.0 * keep).floor() as usize, rows);
        }
        let config = config(&remains(vec![1023, 100, 200]));
        let layers: Vec<f64> = ["0", "1", "2"].map(|layer| config["layers"][layer].as_f64().unwrap()).to_vec();
        assert_eq!(layers.iter().map(|keep| (1023.0 * keep).floor() as usize).collect::<Vec<_>>(), [1023, 100, 200]);
        assert_eq!(config["every"], 8);
    }
}
