//! What `kvhook validate` found, as text and as JSON.

use std::time::Duration;

use kvhook_testing::conformance::Rule;
use serde::{Deserialize, Serialize};

use crate::args::Validate;

/// A plugin and the rules that were checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name or path as given.
    pub plugin: String,
    /// Content hash of the file, hexadecimal.
    pub sha256: String,
    /// The plugin's id; empty where the file cannot be read that far.
    pub id: String,
    /// The plugin's own version.
    pub version: String,
    /// The config that it was given.
    pub config: String,
    /// The model's shape: layers, KV heads, query heads, channels of a head.
    pub shape: String,
    /// Base of its rotary positions.
    pub rope_base: f64,
    /// Where all random data came from.
    pub seed: u64,
    /// The rules, by number.
    pub rules: Vec<RuleReport>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleReport {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// The rule in a sentence.
    pub rule: String,
    /// Milliseconds that the check took.
    pub milliseconds: u64,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How a check went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The rule holds.
    Holds {
        /// What there is to tell, such as times; may be empty.
        note: String,
    },
    /// It does not.
    Broken {
        /// What was found.
        reason: String,
    },
    /// It was not checked.
    NotRun {
        /// Why.
        reason: String,
    },
}

impl RuleReport {
    /// The outcome of a rule, and how long that took.
    pub fn new(rule: &Rule, outcome: Outcome, took: Duration) -> Self {
        Self {
            number: rule.number,
            name: rule.name.into(),
            rule: rule.says.into(),
            milliseconds: took.as_millis() as u64,
            outcome,
        }
    }

    /// The rule as lines of text.
    pub fn to_text(&self) -> String {
        let (word, more) = match &self.outcome {
            Outcome::Holds { note } => ("holds", note),
            Outcome::Broken { reason } => ("BROKEN", reason),
            Outcome::NotRun { reason } => ("not run", reason),
        };
        let mut text = format!("  {word:<8} {:>2} {:<32} {:>6} ms", self.number, self.name, self.milliseconds);
        if let Outcome::Holds { note } = &self.outcome {
            if !note.is_empty() {
                text += &format!("  {note}");
            }
            return printable(&text);
        }
        if matches!(self.outcome, Outcome::Broken { .. }) {
            text += &format!("\n              rule: {}", self.rule);
        }
        for line in more.lines() {
            text += &format!("\n              {line}");
        }
        printable(&text)
    }
}

impl Report {
    /// A report without rules.
    pub fn new(options: &Validate, sha256: String) -> Self {
        Self {
            plugin: options.plugin.clone(),
            sha256,
            id: String::new(),
            version: String::new(),
            config: options.config.clone(),
            shape: options.shape.to_string(),
            rope_base: options.rope_base,
            seed: options.seed,
            rules: Vec::new(),
        }
    }

    /// Whether every rule that was asked for holds.
    pub fn holds(&self) -> bool {
        self.rules.iter().all(|rule| matches!(rule.outcome, Outcome::Holds { .. }))
    }

    /// The report as JSON, with `holds`.
    pub fn to_json(&self) -> String {
        let mut value = serde_json::json!(self);
        value["holds"] = self.holds().into();
        format!("{value:#}\n")
    }

    /// What stands before the rules.
    pub fn heading(&self) -> String {
        printable(&format!(
            "{}\n  config `{}`, shape {}, RoPE base {}, seed {}\n",
            self.plugin, self.config, self.shape, self.rope_base, self.seed
        ))
    }

    /// What stands behind the rules.
    pub fn summary(&self) -> String {
        let count = |wanted: fn(&Outcome) -> bool| self.rules.iter().filter(|rule| wanted(&rule.outcome)).count();
        let held = count(|outcome| matches!(outcome, Outcome::Holds { .. }));
        let mut text = format!("{held} of {} rules hold.", self.rules.len());
        let broken = self.rules.iter().find(|rule| matches!(rule.outcome, Outcome::Broken { .. }));
        if let Some(rule) = broken {
            text += &format!(
                "\nTo repeat the first broken one, in a debugger if need be: \
                 kvhook validate {} --config '{}' --shape {} --rope-base {} --seed {} --only {} --in-process",
                self.plugin, self.config, self.shape, self.rope_base, self.seed, rule.name
            );
        }
        printable(&text)
    }
}

/// Without control characters: what a plugin says must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| *c == '\n' || !c.is_control()).collect()
}
