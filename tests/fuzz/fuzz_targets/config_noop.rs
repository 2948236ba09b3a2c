//! Config strings of `noop`, as in `config`.

#![no_main]

use kvhook_abi::raw::KvhPluginEntry;
use kvhook_fuzz::config::{create, round_trip, word};
use kvhook_noop::Config;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

unsafe extern "C" {
    fn kvh_plugin_entry_v1() -> *const KvhPluginEntry;
}

fn write(config: &Config) -> Map<String, Value> {
    let keys = [("observe", word(config.observe)), ("every", json!(config.every))];
    keys.map(|(key, value)| (key.to_owned(), value)).into_iter().collect()
}

fuzz_target!(|text: &str| {
    round_trip(text, write);
    // SAFETY: the entry is the plugin's own.
    unsafe { create(kvh_plugin_entry_v1(), text) };
});
