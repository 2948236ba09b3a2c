//! Comparing a plugin's fingerprints with the host's table.

use serde::Deserialize;

use super::{LAYOUTS, RELEASED};
use crate::raw::{KVH_ABI_MAJOR, KVH_ABI_MINOR};

/// Whether a generation may still change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It may; both sides must have been built from the same text.
    Draft,
    /// It never changes.
    Released,
}

/// One generation of one struct.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Row {
    /// The struct.
    #[serde(rename = "struct")]
    pub name: String,
    /// Its generation, from 1.
    pub generation: u32,
    /// Bytes.
    pub size: usize,
    /// The fingerprint, as `0x` and 16 digits.
    #[serde(deserialize_with = "hex")]
    pub fingerprint: u64,
    /// Name, offset and size of each field.
    pub fields: Vec<(String, usize, usize)>,
}

fn hex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.strip_prefix("0x")
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| serde::de::Error::custom(format!("fingerprint {text:?} is not 0x and 16 digits")))
}

/// A fingerprint of a plugin's entry, copied out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginFingerprint {
    /// The struct.
    pub name: String,
    /// Its generation.
    pub generation: u32,
    /// The fingerprint.
    pub value: u64,
}

/// The generations that one side knows.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// All rows, generations of a struct in order.
    pub rows: Vec<(Row, Status)>,
    /// Major and minor version of the ABI.
    pub abi: (u32, u32),
}

impl Table {
    /// The table of this build.
    pub fn current() -> Self {
        let rows = LAYOUTS
            .iter()
            .flat_map(|layout| {
                let released = RELEASED.iter().find(|(name, _)| *name == layout.name).map_or(0, |(_, newest)| *newest);
                (1..=layout.generations).map(move |generation| {
                    let fields = &layout.fields[..layout.field_count(generation)];
                    let row = Row {
                        name: layout.name.to_owned(),
                        generation,
                        size: layout.size_of_generation(generation),
                        fingerprint: layout.fingerprint(generation),
                        fields: fields.iter().map(|field| (field.name.to_owned(), field.offset, field.size)).collect(),
                    };
                    (row, if generation <= released { Status::Released } else { Status::Draft })
                })
            })
            .collect();
        Self { rows, abi: (KVH_ABI_MAJOR, KVH_ABI_MINOR) }
    }
}

/// The first struct in which plugin and host differ.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LayoutMismatch {
    /// The plugin lists no generation of a struct.
    #[error("the plugin does not list {name}, which the host uses; {advice}")]
    Missing {
        /// The struct.
        name: String,
        /// What to do.
        advice: String,
    },
    /// The plugin lists none of the generations that the host can work with.
    #[error("the plugin lists generations {listed} of {name}, the host needs one of {needed}; {advice}")]
    NoCommon {
        /// The struct.
        name: String,
        /// Generations of the plugin.
        listed: String,
        /// Generations of which the host needs one: all that it knows, or only the newest where that is a draft.
        needed: String,
        /// What to do.
        advice: String,
    },
    /// A generation that both know has two layouts.
    #[error("{name} (generation {generation}) differs: {difference}; {advice}")]
    Differs {
        /// The struct.
        name: String,
        /// Its generation.
        generation: u32,
        /// The field and both places, or both fingerprints.
        difference: String,
        /// What to do.
        advice: String,
    },
    /// A struct is a draft on the host's side, and the plugin knows a generation that the host does not.
    #[error("{name} is a draft in the host (generation {newest}) and the plugin knows generation {found}; {advice}")]
    NewerThanDraft {
        /// The struct.
        name: String,
        /// Newest generation of the host.
        newest: u32,
        /// Generation of the plugin.
        found: u32,
        /// What to do.
        advice: String,
    },
}

/// Checks that a plugin and a host with `table` understand each other's structs.
///
/// For each struct of the table: every generation that both know must be the same, and there must be one. A newer
/// one is fine behind released rows. Where the host's newest is a draft, the plugin must list that one and nothing
/// newer. `layouts` are those of the plugin's metadata, to name the field that differs; they may be empty.
///
/// # Errors
/// The first mismatch.
pub fn check(
    table: &Table,
    plugin_abi: (u32, u32),
    fingerprints: &[PluginFingerprint],
    layouts: &[Row],
) -> Result<(), LayoutMismatch> {
    let advice = || {
        let ((major, minor), (host_major, host_minor)) = (plugin_abi, table.abi);
        format!(
            "the plugin was built with ABI {major}.{minor}, the host with {host_major}.{host_minor}: rebuild the plugin \
             against kvhook-abi {host_major}.{host_minor}, or use a host built from the same source"
        )
    };
    let mut rows = table.rows.as_slice();
    while let Some((first, _)) = rows.first() {
        let name = &first.name;
        let end = rows.iter().position(|(row, _)| row.name != *name).unwrap_or(rows.len());
        let (known, rest) = rows.split_at(end);
        rows = rest;
        let listed: Vec<_> = fingerprints.iter().filter(|listed| listed.name == *name).collect();
        if listed.is_empty() {
            return Err(LayoutMismatch::Missing { name: name.clone(), advice: advice() });
        }
        let mut common = 0;
        for (row, _) in known {
            for found in listed.iter().filter(|listed| listed.generation == row.generation) {
                common = common.max(row.generation);
                if found.value != row.fingerprint {
                    return Err(LayoutMismatch::Differs {
                        name: name.clone(),
                        generation: row.generation,
                        difference: difference(row, found.value, layouts),
                        advice: advice(),
                    });
                }
            }
        }
        let newest = known.iter().map(|(row, _)| row.generation).max().unwrap_or(0);
        let draft = known.iter().any(|(row, status)| row.generation == newest && *status == Status::Draft);
        if common == 0 || (draft && common != newest) {
            let generations = |list: Vec<u32>| list.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            let oldest = if draft { newest } else { 1 };
            return Err(LayoutMismatch::NoCommon {
                name: name.clone(),
                listed: generations(listed.iter().map(|listed| listed.generation).collect()),
                needed: generations((oldest..=newest).collect()),
                advice: advice(),
            });
        }
        if let Some(newer) = listed.iter().find(|listed| draft && listed.generation > newest) {
            return Err(LayoutMismatch::NewerThanDraft {
                name: name.clone(),
                newest,
                found: newer.generation,
                advice: advice(),
            });
        }
    }
    Ok(())
}

/// Names the first field that differs, when the plugin's layouts say.
fn difference(row: &Row, found: u64, layouts: &[Row]) -> String {
    let fingerprints = format!("fingerprint {found:#018x} in the plugin, {:#018x} in the host", row.fingerprint);
    let Some(theirs) = layouts.iter().find(|other| other.name == row.name && other.generation == row.generation) else {
        return fingerprints;
    };
    let place = |field: Option<&(String, usize, usize)>| match field {
        Some((name, offset, size)) => format!("`{name}` at byte {offset} with {size} bytes"),
        None => "nothing".to_owned(),
    };
    (0..row.fields.len().max(theirs.fields.len()))
        .map(|index| (theirs.fields.get(index), row.fields.get(index)))
        .find(|(plugin, host)| plugin != host)
        .map_or(fingerprints, |(plugin, host)| {
            format!(
                "the plugin has {} where the host has {} (sizes {} and {})",
                place(plugin),
                place(host),
                theirs.size,
                row.size
            )
        })
}

#[cfg(test)]
mod tests;
