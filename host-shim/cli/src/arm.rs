//! The form of an arm on the command line: `NAME=PLUGIN:CONFIG`.

use std::collections::BTreeSet;
use std::str::FromStr;

use crate::error::CliError;

/// Longest name of an arm, in characters; longer names would not fit the tables.
pub const MAX_NAME: usize = 32;

/// Name of the uncompressed run, which `compare` always adds.
pub const FULL: &str = "full";

/// The host's name for serving a sequence without a plugin.
pub const NO_PLUGIN: &str = "none";

/// A plugin with a config and the name under which reports list it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArmSpec {
    /// Name in tables and plots: ASCII letters, digits and `-_.`.
    pub name: String,
    /// Bare name (looked up in the plugin folder) or path of a shared library.
    pub plugin: String,
    /// Config string for the plugin; empty for its defaults.
    pub config: String,
}

/// What is wrong with an arm.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArmError {
    /// There is no `=` that ends a name.
    #[error("`{0}` has no name: write NAME=PLUGIN:CONFIG, for example half=truncate:keep=0.5,history=none")]
    NoName(String),
    /// The name is empty or too long.
    #[error(
        "the name `{0}` has {len} characters, expected 1 to {MAX_NAME}: write NAME=PLUGIN:CONFIG",
        len = .0.chars().count()
    )]
    NameLength(String),
    /// The name holds a character that is not allowed.
    #[error(
        "the name `{name}` holds {found:?}, allowed are the letters a-z and A-Z, digits and - _ . : choose another name"
    )]
    NameCharacter {
        /// The name as given.
        name: String,
        /// The first character that is not allowed.
        found: char,
    },
    /// The name belongs to the uncompressed run, or to the host.
    #[error("the names `{FULL}` and `{NO_PLUGIN}` belong to runs without a plugin: choose another name")]
    NameTaken,
    /// Nothing stands between `=` and `:`.
    #[error("arm `{0}` names no plugin: write {0}=PLUGIN:CONFIG, where PLUGIN is a name or a path")]
    NoPlugin(String),
}

impl FromStr for ArmSpec {
    type Err = ArmError;

    /// Splits at the first `=` and then at the first `:`, so a config may hold both signs.
    /// A plugin's path therefore cannot hold a colon.
    fn from_str(text: &str) -> Result<Self, ArmError> {
        let (name, rest) = match text.split_once('=') {
            // In `truncate:keep=0.5` the first `=` belongs to the config.
            Some((name, _)) if name.contains(':') => return Err(ArmError::NoName(text.into())),
            Some(parts) => parts,
            None => return Err(ArmError::NoName(text.into())),
        };
        let length = name.chars().count();
        if length == 0 || length > MAX_NAME {
            return Err(ArmError::NameLength(name.into()));
        }
        let allowed = |c: &char| c.is_ascii_alphanumeric() || "-_.".contains(*c);
        if let Some(found) = name.chars().find(|c| !allowed(c)) {
            return Err(ArmError::NameCharacter { name: name.into(), found });
        }
        if [FULL, NO_PLUGIN].contains(&name) {
            return Err(ArmError::NameTaken);
        }
        let (plugin, config) = rest.split_once(':').unwrap_or((rest, ""));
        if plugin.is_empty() {
            return Err(ArmError::NoPlugin(name.into()));
        }
        Ok(Self { name: name.into(), plugin: plugin.into(), config: config.into() })
    }
}

/// Checks that no two arms share a name, since tables and plots tell arms apart by it.
///
/// # Errors
/// [`CliError::DuplicateArm`] with the first name that comes again.
pub fn check_distinct(arms: &[ArmSpec]) -> Result<(), CliError> {
    let mut seen = BTreeSet::new();
    match arms.iter().find(|arm| !seen.insert(&arm.name)) {
        Some(arm) => Err(CliError::DuplicateArm(arm.name.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ArmSpec, ArmError> {
        text.parse()
    }

    fn arm(name: &str, plugin: &str, config: &str) -> ArmSpec {
        ArmSpec { name: name.into(), plugin: plugin.into(), config: config.into() }
    }

    #[test]
    fn splits_name_plugin_and_config() {
        assert_eq!(parse("half=truncate:keep=0.5,history=none"), Ok(arm("half", "truncate", "keep=0.5,history=none")));
        assert_eq!(
            parse(r#"j=./libx.so:{"layers": {"0-3": 1.0}}"#),
            Ok(arm("j", "./libx.so", r#"{"layers": {"0-3": 1.0}}"#))
        );
        assert_eq!(parse("off=noop"), Ok(arm("off", "noop", "")));
        assert_eq!(parse("off=noop:"), Ok(arm("off", "noop", "")));
    }

    #[test]
    fn names_come_once() {
        let arms = [arm("a", "noop", ""), arm("b", "noop", "")];
        assert!(check_distinct(&arms).is_ok());
        let twice = [arms[0].clone(), arms[1].clone(), arms[0].clone()];
        assert!(matches!(check_distinct(&twice), Err(CliError::DuplicateArm(name)) if name == "a"));
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(parse("truncate"), Err(ArmError::NoName("truncate".into())));
        assert_eq!(parse("truncate:keep=0.5"), Err(ArmError::NoName("truncate:keep=0.5".into())));
        assert_eq!(parse("=noop"), Err(ArmError::NameLength(String::new())));
        assert_eq!(parse("full=noop"), Err(ArmError::NameTaken));
        assert_eq!(parse("none=noop"), Err(ArmError::NameTaken));
        assert_eq!(parse("a=:keep=1"), Err(ArmError::NoPlugin("a".into())));
        assert_eq!(parse("a b=noop"), Err(ArmError::NameCharacter { name: "a b".into(), found: ' ' }));
        let long = "x".repeat(MAX_NAME + 1);
        assert_eq!(parse(&format!("{long}=noop")), Err(ArmError::NameLength(long)));
    }
}
