//! Lines of a record, as the reference engine writes them.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

/// Name of the engine in its records.
const ENGINE: &str = "reference";

/// A line with the figures of all arms, as the host's JSON gives them.
pub fn figures_line(model: &str, run: &str, figures: &Value) -> String {
    line(model, json!({ "kind": "figures", "run": run, "figures": figures }))
}

/// A line of one prompt on one arm. What is None is left out.
pub fn probe_line(
    model: &str,
    prompt: &str,
    arm: &str,
    tokens: &[u32],
    kl: Option<&[f64]>,
    kept: Option<(usize, usize)>,
) -> String {
    let mut fields = json!({ "kind": "probe", "prompt": prompt, "arm": arm, "tokens": tokens });
    if let Some(kl) = kl {
        fields["kl"] = json!(kl);
    }
    if let Some((kept, of)) = kept {
        fields["kept"] = json!(kept);
        fields["of"] = json!(of);
    }
    line(model, fields)
}

fn line(model: &str, fields: Value) -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // To the millisecond.
    let at = since.as_millis() as f64 / 1e3;
    let mut object = Map::from_iter([("at".to_owned(), json!(at)), ("engine".to_owned(), json!(ENGINE))]);
    object.insert("model".into(), json!(model));
    if let Value::Object(fields) = fields {
        object.extend(fields);
    }
    format!("{}\n", Value::Object(object))
}
