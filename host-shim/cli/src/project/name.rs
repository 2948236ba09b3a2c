//! What a plugin may be called: its name is also a folder's, a crate's and a library's.

use std::str::FromStr;

/// Longest name. A library of that name still fits any file system.
const MAX_LENGTH: usize = 64;
/// `kvhook-` before these is a crate that a project carries.
const TAKEN: [&str; 2] = ["abi", "kernels"];

/// Name of a plugin: `value-norm`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginName(String);

/// Why a text is no name of a plugin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is none.
    #[error("a plugin needs a name, such as `value-norm`")]
    Empty,
    /// It is too long.
    #[error("it has {0} characters; a name has at most {MAX_LENGTH}")]
    TooLong(usize),
    /// It begins or ends with something else than a letter or digit.
    #[error("a name begins with a letter from a to z, and ends with a letter or digit; this has `{0}` there")]
    Edge(char),
    /// Something else than a letter, digit, `-` or `_` is in it.
    #[error("`{0}` cannot be in it; a name has letters from a to z, digits, `-` and `_`, such as `value-norm`")]
    Character(char),
    /// A crate of the project would have the same name.
    #[error("kvhook-{0} is a crate that the project carries; choose another name")]
    Taken(String),
}

impl FromStr for PluginName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        let (Some(first), Some(last)) = (name.chars().next(), name.chars().last()) else {
            return Err(NameError::Empty);
        };
        if let Some(wrong) = name.chars().find(|c| !allowed(*c)) {
            return Err(NameError::Character(wrong));
        }
        if !first.is_ascii_lowercase() {
            return Err(NameError::Edge(first));
        }
        if !last.is_ascii_alphanumeric() {
            return Err(NameError::Edge(last));
        }
        if name.len() > MAX_LENGTH {
            return Err(NameError::TooLong(name.len()));
        }
        if TAKEN.contains(&name) {
            return Err(NameError::Taken(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }
}

impl PluginName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as it stands in the library's file name and in Rust code.
    pub fn identifier(&self) -> String {
        self.0.replace('-', "_")
    }

    /// A template's text with the name where its placeholder was.
    pub(super) fn insert(&self, template: &str) -> String {
        template.replace("plugin-name", &self.0).replace("plugin_name", &self.identifier())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "value-norm", "h2o", "my_plugin", "self", &"x".repeat(64)] {
            assert_eq!(good.parse::<PluginName>().unwrap().as_str(), good);
        }
        let refused = |name: &str| name.parse::<PluginName>().unwrap_err();
        assert_eq!(refused(""), NameError::Empty);
        assert_eq!(refused("9lives"), NameError::Edge('9'));
        assert_eq!(refused("-x"), NameError::Edge('-'));
        assert_eq!(refused("x-"), NameError::Edge('-'));
        assert_eq!(refused("_"), NameError::Edge('_'));
        assert_eq!(refused("Value"), NameError::Character('V'));
        assert_eq!(refused("../x"), NameError::Character('.'));
        assert_eq!(refused("a/b"), NameError::Character('/'));
        assert_eq!(refused("a b"), NameError::Character(' '));
        assert_eq!(refused("naïve"), NameError::Character('ï'));
        assert_eq!(refused(&"x".repeat(65)), NameError::TooLong(65));
        assert_eq!(refused("abi"), NameError::Taken("abi".into()));
    }

    #[test]
    fn a_name_is_put_where_the_placeholders_are() {
        let name: PluginName = "value-norm".parse().unwrap();
        assert_eq!(name.insert("plugin-name: kvhook_plugin_name"), "value-norm: kvhook_value_norm");
    }
}
