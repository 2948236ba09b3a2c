//! What every plugin's config must hold, whatever the text.

use kvhook_abi::config::{Config, MAX_CONFIG_BYTES, parse};
use kvhook_abi::raw::KvhPluginEntry;
use kvhook_host::host::Host;
use kvhook_host::spec::ArmSpec;
use serde_json::{Map, Value};

use crate::mock::{Engine, SMALL, Shape};

/// Reads a text; what was accepted must read back the same from JSON and from the short form, as `write` gives its keys.
pub fn round_trip<C: Config + PartialEq + core::fmt::Debug>(text: &str, write: impl Fn(&C) -> Map<String, Value>) {
    let read = match parse::<C>(text) {
        Ok(read) => read,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let keys = write(&read);
    let json = Value::Object(keys.clone()).to_string();
    let short = keys.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" , ");
    for written in [json, short] {
        if written.len() <= MAX_CONFIG_BYTES {
            assert_eq!(parse::<C>(&written).as_ref(), Ok(&read), "{text:?} was read, and written as {written}");
        }
    }
}

/// Makes an instance with the text as its config, for a contiguous and for a paged cache. Whether that succeeds does not
/// matter.
///
/// # Safety
/// `entry` is a plugin's static entry.
pub unsafe fn create(entry: *const KvhPluginEntry, text: &str) {
    for block_size in [0, 4] {
        let engine = Engine::new(Shape { block_size, layers: 5, ..SMALL });
        // SAFETY: the engine's host is live; the entry is passed on from the caller.
        let made = unsafe { (*engine.raw.cast::<Host>()).arm_set_entry(&ArmSpec::new("arm", "plugin", text), entry) };
        if let Err(error) = made {
            assert!(!error.to_string().is_empty());
        }
    }
}

/// A word of a config's enum as it is written: `KeyNorm` is `key_norm`.
pub fn word(value: impl core::fmt::Debug) -> Value {
    let mut word = String::new();
    for letter in format!("{value:?}").chars() {
        if letter.is_ascii_uppercase() && !word.is_empty() {
            word.push('_');
        }
        word.push(letter.to_ascii_lowercase());
    }
    Value::String(word)
}
