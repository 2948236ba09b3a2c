//! What `kvhook inspect` prints: a plugin's metadata and a host's checks, as text and as JSON.

use std::fmt::Write;

use kvhook_abi::raw::{KVH_ABI_MAJOR, KVH_ABI_MINOR};
use kvhook_host::load;
use serde::Serialize;
use serde_json::Value;

/// Everything that is known about a plugin file.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Inspection {
    /// Path as given.
    pub file: String,
    /// Content hash of the file, hexadecimal.
    pub sha256: String,
    /// The plugin's id; the metadata fields are empty when the file has none that can be read.
    pub id: String,
    /// The plugin's own version.
    pub version: String,
    /// Language and compiler.
    pub built_by: String,
    /// ABI `major.minor` with which it was built.
    pub built_abi: String,
    /// Host ABI `major.minor` that it requires at least.
    pub required_abi: String,
    /// ABI `major.minor` of this host.
    pub host_abi: String,
    /// Hook points that it implements, by id.
    pub hooks: Vec<String>,
    /// What it may need of an engine, by name.
    pub may_need: Vec<String>,
    /// Config keys, from its JSON schema.
    pub config: Vec<ConfigKey>,
    /// Its struct layouts beside ours.
    pub layouts: Vec<Layout>,
    /// The checks, in the order in which a host makes them.
    pub checks: Vec<Check>,
}

/// One key of a plugin's config.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigKey {
    /// The key.
    pub key: String,
    /// Type or allowed values, in words.
    pub allowed: String,
    /// Default as JSON text; None when the key has none.
    pub default: Option<String>,
    /// What it does, from the schema.
    pub description: String,
}

/// Fingerprint of one ABI struct.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layout {
    /// Struct and generation.
    pub name: String,
    /// Fingerprint in the plugin, hexadecimal.
    pub plugin: String,
    /// Fingerprint in this host; None when this host does not know the struct.
    pub host: Option<String>,
}

impl Layout {
    /// None for a struct that the plugin does not list.
    fn new(compared: &load::LayoutComparison) -> Option<Self> {
        let hexadecimal = |fingerprint: u64| format!("{fingerprint:016x}");
        Some(Self {
            name: format!("{}/{}", compared.name, compared.generation),
            plugin: compared.plugin.map(hexadecimal)?,
            host: compared.host.map(hexadecimal),
        })
    }
}

/// One check of a host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What is checked.
    pub name: String,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl From<load::Check> for Check {
    fn from(check: load::Check) -> Self {
        let outcome = match check.outcome {
            load::Outcome::Passed => Outcome::Pass,
            load::Outcome::Failed => Outcome::Fail(check.detail),
            load::Outcome::NotReached => Outcome::NotReached(check.detail),
        };
        Self { name: check.step.describe().into(), outcome }
    }
}

/// How a check went.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "outcome", content = "reason", rename_all = "snake_case")]
pub enum Outcome {
    /// It holds.
    Pass,
    /// It does not hold; what was found, what was expected, what to do.
    Fail(String),
    /// Not made, because an earlier one failed or the library was not loaded; which of the two.
    NotReached(String),
}

impl Inspection {
    /// What `file` says of itself, as the host read it.
    pub fn new(file: String, said: load::Inspection) -> Self {
        Self {
            file,
            sha256: said.sha256,
            id: said.id,
            version: said.version,
            built_by: [said.language, said.compiler].join(", "),
            built_abi: format!("{}.{}", said.abi_major, said.abi_minor),
            required_abi: format!("{}.{}", said.abi_major, said.required_host_minor),
            host_abi: format!("{KVH_ABI_MAJOR}.{KVH_ABI_MINOR}"),
            hooks: said.hooks,
            may_need: said.may_need,
            config: config_keys(&said.config_schema),
            layouts: said.layouts.iter().filter_map(Layout::new).collect(),
            checks: Vec::new(),
        }
    }

    /// Whether no check failed.
    pub fn passed(&self) -> bool {
        !self.checks.iter().any(|check| matches!(check.outcome, Outcome::Fail(_)))
    }

    /// The inspection as JSON, with `passed`.
    pub fn to_json(&self) -> String {
        let value = serde_json::json!({ "passed": self.passed(), "inspection": self });
        format!("{value:#}\n")
    }

    /// The inspection as text. Text from the file is printed without control characters, since a plugin that is
    /// only looked at must not be able to steer the terminal.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut text);
        text.chars().filter(|c| *c == '\n' || !c.is_control()).collect()
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{}", self.file)?;
        field(out, "sha256", &self.sha256)?;
        field(out, "id", &self.id)?;
        field(out, "version", &self.version)?;
        field(out, "built by", &self.built_by)?;
        if !self.built_abi.is_empty() {
            writeln!(
                out,
                "  {:<10} built with {}, requires {}, this host has {}",
                "ABI", self.built_abi, self.required_abi, self.host_abi
            )?;
        }
        field(out, "hooks", &self.hooks.join(", "))?;
        field(out, "may need", &listed(&self.may_need))?;
        if !self.config.is_empty() {
            writeln!(out, "\nConfig")?;
            let width = self.config.iter().map(|key| key.key.chars().count()).max().unwrap_or(0);
            for key in &self.config {
                let default = key.default.as_ref().map_or(String::new(), |d| format!(" (default {d})"));
                writeln!(out, "  {:<width$}  {}{default}", key.key, key.allowed)?;
                if !key.description.is_empty() {
                    let description = key.description.split_whitespace().collect::<Vec<_>>().join(" ");
                    writeln!(out, "  {:<width$}  {description}", "")?;
                }
            }
        }
        if !self.layouts.is_empty() {
            writeln!(out, "\nStruct layouts")?;
            let (same, others): (Vec<_>, Vec<_>) =
                self.layouts.iter().partition(|layout| layout.host.as_ref() == Some(&layout.plugin));
            let width = others.iter().map(|layout| layout.name.chars().count()).max().unwrap_or(0);
            for layout in others {
                let here = layout.host.as_deref().unwrap_or("unknown");
                writeln!(out, "  {:<width$}  {}, {here} here", layout.name, layout.plugin)?;
            }
            writeln!(out, "  same here: {} of {}", same.len(), self.layouts.len())?;
        }
        if !self.checks.is_empty() {
            writeln!(out, "\nChecks")?;
            for check in &self.checks {
                match &check.outcome {
                    Outcome::Pass => writeln!(out, "  pass         {}", check.name)?,
                    Outcome::Fail(reason) => {
                        writeln!(out, "  FAIL         {}", check.name)?;
                        for line in reason.lines() {
                            writeln!(out, "               {line}")?;
                        }
                    }
                    Outcome::NotReached(reason) => {
                        writeln!(out, "  not reached  {} ({reason})", check.name)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn field(out: &mut String, name: &str, value: &str) -> std::fmt::Result {
    if value.is_empty() { Ok(()) } else { writeln!(out, "  {name:<10} {value}") }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

/// Reads the keys of a config from its JSON schema (draft 2020-12, as schemars writes it).
pub fn config_keys(schema: &Value) -> Vec<ConfigKey> {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        return Vec::new();
    };
    let text = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    properties
        .iter()
        .map(|(key, property)| ConfigKey {
            key: key.clone(),
            allowed: allowed(schema, property, 0),
            default: property.get("default").map(Value::to_string),
            description: text(property, "description").unwrap_or_default(),
        })
        .collect()
}

/// Deepest chain of `$ref` and alternatives that is followed; a schema may refer to itself.
const MAX_DEPTH: usize = 8;

/// Type, choices and range of a property in words.
fn allowed(schema: &Value, property: &Value, depth: usize) -> String {
    if depth > MAX_DEPTH {
        return "any".into();
    }
    let quoted = |values: &[Value]| values.iter().map(Value::to_string).collect::<Vec<_>>().join(" | ");
    if let Some(pointer) = property.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix('#')) {
        return schema.pointer(pointer).map_or("any".into(), |target| allowed(schema, target, depth + 1));
    }
    if let Some(value) = property.get("const") {
        return value.to_string();
    }
    if let Some(values) = property.get("enum").and_then(Value::as_array) {
        return quoted(values);
    }
    for alternatives in ["oneOf", "anyOf", "allOf"] {
        if let Some(list) = property.get(alternatives).and_then(Value::as_array) {
            let mut words: Vec<String> = list.iter().map(|one| allowed(schema, one, depth + 1)).collect();
            words.dedup();
            return words.join(" | ");
        }
    }
    let mut words = match property.get("type") {
        Some(Value::String(name)) => name.clone(),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" | "),
        _ => "any".into(),
    };
    for (limit, sign) in [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    {
        if let Some(value) = property.get(limit) {
            words += &format!(" {sign} {value}");
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn inspection() -> Inspection {
        Inspection {
            file: "./libmine.so".into(),
            id: "mine\u{1b}[31m".into(),
            version: "0.1.0".into(),
            built_abi: "1.0".into(),
            required_abi: "1.0".into(),
            host_abi: "1.0".into(),
            hooks: vec!["kvh.on_prefill_done/1".into()],
            layouts: [("kvh_layer/1", "1f", "2f"), ("kvh_text/1", "3f", "3f")]
                .map(|(name, plugin, host)| Layout {
                    name: name.into(),
                    plugin: plugin.into(),
                    host: Some(host.into()),
                })
                .into(),
            checks: vec![
                Check { name: "ELF for this machine".into(), outcome: Outcome::Pass },
                Check { name: "layouts".into(), outcome: Outcome::Fail("kvh_layer/1 differs\nrebuild".into()) },
                Check { name: "create".into(), outcome: Outcome::NotReached("layouts failed".into()) },
            ],
            ..Inspection::default()
        }
    }

    #[test]
    fn text_is_readable_and_cannot_steer_a_terminal() {
        let expected = "\
./libmine.so
  id         mine[31m
  version    0.1.0
  ABI        built with 1.0, requires 1.0, this host has 1.0
  hooks      kvh.on_prefill_done/1
  may need   nothing

Struct layouts
  kvh_layer/1  1f, 2f here
  same here: 1 of 2

Checks
  pass         ELF for this machine
  FAIL         layouts
               kvh_layer/1 differs
               rebuild
  not reached  create (layouts failed)
";
        assert_eq!(inspection().to_text(), expected);
    }

    #[test]
    fn one_failed_check_fails_the_inspection() {
        let mut inspection = inspection();
        assert!(!inspection.passed());
        inspection.checks.remove(1);
        assert!(inspection.passed());
    }

    #[test]
    fn json_names_each_outcome() {
        let value: Value = serde_json::from_str(&inspection().to_json()).unwrap();
        assert_eq!(value["passed"], json!(false));
        assert_eq!(
            value["inspection"]["checks"][1],
            json!({ "name": "layouts", "outcome": "fail", "reason": "kvh_layer/1 differs\nrebuild" })
        );
        assert_eq!(value["inspection"]["checks"][0]["outcome"], json!("pass"));
    }

    #[test]
    fn keys_of_a_schema() {
        let schema = json!({
            "properties": {
                "keep": { "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "description": "Share." },
                "history": { "$ref": "#/$defs/History", "default": "none" },
                "seed": { "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "null" }] },
            },
            "$defs": { "History": { "oneOf": [{ "const": "none" }, { "enum": ["top", "stride"] }] } },
        });
        let keys = config_keys(&schema);
        let find = |name: &str| keys.iter().find(|key| key.key == name).unwrap();
        assert_eq!(find("keep").allowed, "number | null > 0 ≤ 1");
        assert_eq!(find("keep").description, "Share.");
        assert_eq!(find("history").allowed, r#""none" | "top" | "stride""#);
        assert_eq!(find("history").default.as_deref(), Some("\"none\""));
        assert_eq!(find("seed").allowed, "integer ≥ 0 | null");
    }

    #[test]
    fn a_schema_that_refers_to_itself_ends() {
        let schema = json!({ "properties": { "a": { "$ref": "#/properties/a" } } });
        assert_eq!(config_keys(&schema)[0].allowed, "any");
        assert!(config_keys(&json!("no object")).is_empty());
    }
}
