//! Commands that change arms: never a panic; what was accepted holds to the rules and reads back the same when it is
//! written; and a host makes a command as a whole, or stays as it is.

#![no_main]

use kvhook_abi::raw::KvhPluginEntry;
use kvhook_fuzz::mock::{Engine, SMALL};
use kvhook_host::control::{Change, MAX_ARMS, parse};
use kvhook_host::guard::GuardSpec;
use kvhook_host::host::Host;
use kvhook_host::load::Source;
use kvhook_host::spec::{ArmPatch, ArmSpec, LayerSet, MAX_SPEC_BYTES};
// Its entry is linked for it.
use kvhook_truncate as _;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

unsafe extern "C" {
    fn kvh_plugin_entry_v1() -> *const KvhPluginEntry;
}

fn guard(guard: &GuardSpec) -> Value {
    json!({
        "failed": guard.failed,
        "sequences": guard.sequences,
        "ns_per_token": guard.ns_per_token,
        "tokens": guard.tokens,
    })
}

fn arm(arm: &ArmSpec) -> Value {
    json!({
        "name": arm.name,
        "plugin": arm.plugin,
        "config": arm.config,
        "sha256": arm.sha256.map(|hash| hash.to_string()),
        "min_tokens": arm.min_tokens,
        "layers": arm.layers.as_ref().map(LayerSet::to_string),
        "weight": arm.weight,
        "state": arm.state.map(|state| state.name()),
        "guard": arm.guard.as_ref().map(guard),
    })
}

fn patch(name: &str, patch: &ArmPatch) -> Value {
    let mut keys = Map::new();
    keys.insert("name".into(), json!(name));
    let mut key = |key: &str, value: Option<Value>| value.map(|value| keys.insert(key.into(), value));
    key("plugin", patch.plugin.as_ref().map(|(plugin, _)| json!(plugin)));
    key("config", patch.config.as_ref().map(|config| json!(config)));
    key("sha256", patch.sha256.as_ref().map(|hash| json!(hash.map(|hash| hash.to_string()))));
    key("min_tokens", patch.min_tokens.map(|tokens| json!(tokens)));
    key("layers", patch.layers.as_ref().map(|layers| json!(layers.as_ref().map(LayerSet::to_string))));
    key("weight", patch.weight.map(|weight| json!(weight)));
    key("state", patch.state.map(|state| json!(state.name())));
    key("guard", patch.guard.as_ref().map(|limits| json!(limits.as_ref().map(guard))));
    Value::Object(keys)
}

fn write(change: &Change) -> Value {
    match change {
        Change::Add(spec) => json!({"add": arm(spec)}),
        Change::Set(spec) => json!({"set": arm(spec)}),
        Change::Replace(name, changes) => json!({"replace": patch(name, changes)}),
        Change::Weight(name, weight) => json!({"weights": {name.as_str(): weight}}),
        Change::State(name, state) => json!({"state": {name.as_str(): state.name()}}),
        Change::Guard(name, limits) => json!({"guard": {name.as_str(): limits.as_ref().map(guard)}}),
        Change::Remove(name) => json!({"remove": name}),
        Change::SafeMode(on) => json!({"safe_mode": on}),
    }
}

fn text(text: &str) -> Option<Vec<Change>> {
    let changes = match parse(text, Source::Model) {
        Ok(changes) => changes,
        Err(error) => {
            assert_eq!(error.status(), kvhook_host::raw::KVHOOK_ERR_SPEC);
            return None;
        }
    };
    for change in &changes {
        if let Change::Add(spec) | Change::Set(spec) = change {
            assert!(spec.check().is_ok() && spec.source == Source::Model);
        }
    }
    let written = json!({ "changes": changes.iter().map(write).collect::<Vec<_>>() }).to_string();
    if written.len() <= MAX_SPEC_BYTES {
        let read = parse(&written, Source::Model);
        assert!(read.as_ref().is_ok_and(|read| *read == changes), "{text:?} was written as {written}: {read:?}");
    }
    Some(changes)
}

fuzz_target!(|input: &str| {
    let Some(changes) = text(input) else { return };
    let engine = Engine::new(SMALL);
    // SAFETY: the engine's host is live.
    let host = unsafe { &*engine.raw.cast::<Host>() };
    for name in ["a", "b"] {
        // SAFETY: the entry is the plugin's own.
        let made = unsafe { host.arm_set_entry(&ArmSpec::new(name, "truncate", ""), kvh_plugin_entry_v1()) };
        assert!(made.is_ok(), "{made:?}");
    }
    let before = host.arms_json();
    match host.change(&changes) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(host.arms_json(), before, "{changes:?} was refused");
        }
        Ok(()) => {
            let arms = host.arms();
            assert!(arms.len() <= MAX_ARMS);
            assert!(arms.iter().all(|arm| arm.weight().is_finite() && arm.weight() >= 0.0));
            assert!(arms.iter().all(|arm| arm.spec().check().is_ok()));
            // No sequence is live: older instances are gone.
            assert!(host.arms_json().contains("\"older\":[]"));
            // What it says is JSON.
            assert!(serde_json::from_str::<Value>(&host.arms_json()).is_ok());
        }
    }
});
