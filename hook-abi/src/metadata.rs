//! Metadata of a plugin, readable from its file without running its code.
//!
//! Section `.kvh_meta`: 8 bytes [`MAGIC`], the length of the JSON in bytes (u32, lowest byte first), the JSON.

use serde::Deserialize;

use crate::config::{Key, write_schema};
use crate::json::ConstJson;
use crate::layout::{Row, write_layouts};
use crate::offers::{Can, Hooks};
use crate::raw::{KVH_ABI_MAJOR, KVH_ABI_MINOR};

/// First bytes of the section.
pub const MAGIC: &[u8; 8] = b"KVHMETA1";
/// Bytes before the JSON.
pub const HEAD: usize = MAGIC.len() + 4;
/// Largest section that is read, in bytes.
pub const MAX_SECTION_BYTES: usize = 1 << 20;

/// What a plugin says of itself at compile time.
pub struct Description {
    /// Short name.
    pub id: &'static str,
    /// Version of the plugin.
    pub version: &'static str,
    /// Oldest minor of a host that it works with.
    pub required_host_minor: u32,
    /// Hook points that it implements.
    pub hooks: Hooks,
    /// Whatever an instance may need.
    pub may_need: Can,
    /// Keys of its config, in groups.
    pub config: &'static [&'static [Key]],
}

impl Description {
    /// Bytes of the section.
    pub const fn section_length(&self) -> usize {
        HEAD + self.write_json(&mut [])
    }

    /// The section. `N` is [`Self::section_length`].
    pub const fn section<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        let (head, json) = out.split_at_mut(HEAD);
        let length = (self.write_json(json) as u32).to_le_bytes();
        let mut i = 0;
        while i < MAGIC.len() {
            head[i] = MAGIC[i];
            i += 1;
        }
        let mut i = 0;
        while i < length.len() {
            head[MAGIC.len() + i] = length[i];
            i += 1;
        }
        out
    }

    /// Writes the JSON as far as there is room; gives its length.
    const fn write_json(&self, out: &mut [u8]) -> usize {
        let mut json = ConstJson::new(out);
        json.raw("{");
        json.key("id", true);
        json.text(self.id);
        json.key("version", false);
        json.text(self.version);
        json.key("abi_major", false);
        json.number(KVH_ABI_MAJOR as u64);
        json.key("abi_minor", false);
        json.number(KVH_ABI_MINOR as u64);
        json.key("required_host_minor", false);
        json.number(self.required_host_minor as u64);
        json.key("hooks", false);
        json.raw("[");
        let mut i = 0;
        let mut first = true;
        while i < Hooks::NAMES.len() {
            let (bit, name) = Hooks::NAMES[i];
            if self.hooks.contains(bit) {
                list_item(&mut json, name, first);
                first = false;
            }
            i += 1;
        }
        json.raw("]");
        json.key("may_need", false);
        json.raw("[");
        let mut i = 0;
        let mut first = true;
        while i < Can::NAMES.len() {
            let (bit, name) = Can::NAMES[i];
            if self.may_need.contains(bit) {
                list_item(&mut json, name, first);
                first = false;
            }
            i += 1;
        }
        json.raw("]");
        json.key("language", false);
        json.text("rust");
        json.key("compiler", false);
        json.text(env!("KVH_RUSTC"));
        json.key("config_schema", false);
        write_schema(&mut json, self.config);
        json.key("layouts", false);
        write_layouts(&mut json);
        json.raw("}");
        json.length()
    }
}

const fn list_item(json: &mut ConstJson<'_>, text: &str, first: bool) {
    if !first {
        json.raw(",");
    }
    json.text(text);
}

/// A plugin's metadata, as read from its file.
#[derive(Clone, Debug, Deserialize)]
pub struct Metadata {
    /// Short name.
    pub id: String,
    /// Version of the plugin.
    pub version: String,
    /// Major version of the ABI that it was built with.
    pub abi_major: u32,
    /// Minor version of the ABI that it was built with.
    pub abi_minor: u32,
    /// Oldest minor of a host that it works with.
    #[serde(default)]
    pub required_host_minor: u32,
    /// Ids of the hook points that it implements.
    pub hooks: Vec<String>,
    /// Names of [`Can`] bits that an instance may need.
    #[serde(default)]
    pub may_need: Vec<String>,
    /// Language that it was written in.
    #[serde(default)]
    pub language: String,
    /// Compiler that built it.
    #[serde(default)]
    pub compiler: String,
    /// JSON Schema of its config.
    #[serde(default)]
    pub config_schema: serde_json::Value,
    /// Layouts of the structs that it was built with.
    #[serde(default)]
    pub layouts: Vec<Row>,
}

/// Why a section cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// It is shorter than its head or than it says.
    #[error("the metadata section has {found} bytes; its head says {expected}")]
    Truncated {
        /// Bytes that are there.
        found: usize,
        /// Bytes that the head, or its length, asks for.
        expected: usize,
    },
    /// It is larger than any plugin's.
    #[error("the metadata section says that it has {found} bytes; at most {MAX_SECTION_BYTES} are read")]
    TooLong {
        /// Bytes that it says.
        found: usize,
    },
    /// It does not begin with [`MAGIC`].
    #[error("the metadata section begins with {found:?} instead of `KVHMETA1`")]
    Magic {
        /// Its first bytes.
        found: String,
    },
    /// Its JSON is broken or lacks a member.
    #[error("the metadata is not what it should be: {0}")]
    Json(#[from] serde_json::Error),
}

impl Metadata {
    /// Reads a section.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub fn parse(section: &[u8]) -> Result<Self, MetadataError> {
        let Some((magic, rest)) = section.split_first_chunk::<8>() else {
            return Err(MetadataError::Truncated { found: section.len(), expected: HEAD });
        };
        if magic != MAGIC {
            return Err(MetadataError::Magic { found: String::from_utf8_lossy(magic).into_owned() });
        }
        let Some((length, json)) = rest.split_first_chunk::<4>() else {
            return Err(MetadataError::Truncated { found: section.len(), expected: HEAD });
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_SECTION_BYTES {
            return Err(MetadataError::TooLong { found: length });
        }
        let json =
            json.get(..length).ok_or(MetadataError::Truncated { found: section.len(), expected: HEAD + length })?;
        Ok(serde_json::from_slice(json)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::config! {
        struct Sample {
            /// Fraction to "keep".
            keep: f64 = 0.5, in 0.0..=1.0;
            /// At least 1.
            budget: Option<u64> = null, from 1;
        }
    }

    const DESCRIPTION: Description = Description {
        id: "sample",
        version: "1.2.3",
        required_host_minor: 0,
        hooks: Hooks::ON_GROWN.and(Hooks::ON_FREE),
        may_need: Can::QUERIES.and(Can::STATE),
        config: &[Sample::OWN_KEYS],
    };

    #[test]
    fn a_section_reads_back() {
        const LENGTH: usize = DESCRIPTION.section_length();
        static SECTION: [u8; LENGTH] = DESCRIPTION.section();
        let read = Metadata::parse(&SECTION).unwrap();
        assert_eq!((read.id.as_str(), read.version.as_str()), ("sample", "1.2.3"));
        assert_eq!(read.hooks, ["kvh.on_grown/1", "kvh.on_free/1"]);
        assert_eq!(read.may_need, ["queries", "state"]);
        assert_eq!(
            read.config_schema,
            serde_json::json!({
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "keep": {"description": "Fraction to \"keep\".", "type": "number", "default": 0.5,
                             "minimum": 0.0, "maximum": 1.0},
                    "budget": {"description": "At least 1.", "type": ["integer", "null"], "default": null,
                               "minimum": 1},
                }
            })
        );
        let layer = read.layouts.iter().find(|row| row.name == "KvhLayer").unwrap();
        assert_eq!(layer.size, 192);
        assert_eq!(layer.fields[0], ("struct_size".to_owned(), 0, 8));
    }

    #[test]
    fn broken_sections_are_refused() {
        let good: [u8; DESCRIPTION.section_length()] = DESCRIPTION.section();
        for length in 0..good.len() {
            assert!(Metadata::parse(&good[..length]).is_err(), "{length} bytes");
        }
        let mut magic = good;
        magic[0] = b'k';
        assert!(matches!(Metadata::parse(&magic), Err(MetadataError::Magic { .. })));
        let mut long = good;
        long[8..12].fill(0xff);
        assert!(matches!(Metadata::parse(&long), Err(MetadataError::TooLong { .. })));
        let mut json = good;
        json[HEAD] = b'[';
        assert!(matches!(Metadata::parse(&json), Err(MetadataError::Json(_))));
    }
}
