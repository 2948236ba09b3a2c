//! Config strings of `truncate`: read, written back, and made into instances for a model.

#![no_main]

use kvhook_abi::raw::KvhPluginEntry;
use kvhook_fuzz::config::{create, round_trip, word};
use kvhook_truncate::config::Config;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

unsafe extern "C" {
    fn kvh_plugin_entry_v1() -> *const KvhPluginEntry;
}

fn write(config: &Config) -> Map<String, Value> {
    let mut keys = Map::new();
    let mut set = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    set("keep", json!(config.keep));
    set("budget", json!(config.budget));
    set("sinks", json!(config.sinks));
    set("recent", json!(config.recent));
    set("history", word(config.history));
    set("importance", config.importance.map_or(Value::Null, word));
    set("window", json!(config.window));
    set("pool", json!(config.pool));
    set("seed", json!(config.seed));
    set("every", json!(config.every));
    set("layers", json!(config.layers.as_ref().map(|layers| &layers.0)));
    set("min_tokens", json!(config.min_tokens));
    set("segments", word(config.segments));
    set("align", word(config.align));
    keys
}

fuzz_target!(|text: &str| {
    round_trip(text, write);
    // SAFETY: the entry is the plugin's own.
    unsafe { create(kvh_plugin_entry_v1(), text) };
});
