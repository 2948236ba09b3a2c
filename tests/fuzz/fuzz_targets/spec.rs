//! The `kv_plugin` form and its lists of layers: never a panic; what was accepted holds to the rules, and reads back the same
//! when it is written as a list of arms, alone and inside `kv_plugin`, and from a model.

#![no_main]

use kvhook_host::load::Source;
use kvhook_host::spec::{ArmSpec, LayerSet, MAX_SPEC_BYTES, parse};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fn write(arm: &ArmSpec) -> Value {
    json!({
        "name": arm.name,
        "plugin": arm.plugin,
        "config": arm.config,
        "sha256": arm.sha256.map(|hash| hash.to_string()),
        "min_tokens": arm.min_tokens,
        "layers": arm.layers.as_ref().map(LayerSet::to_string),
        "weight": arm.weight,
    })
}

fn form(text: &str) {
    let arms = match parse(text, Source::Operator) {
        Ok(arms) => arms,
        Err(error) => return assert_eq!(error.status(), kvhook_host::raw::KVHOOK_ERR_SPEC),
    };
    for (place, arm) in arms.iter().enumerate() {
        assert!(arm.check().is_ok() && arm.weight.is_finite() && arm.weight >= 0.0);
        assert!(arms[..place].iter().all(|other| other.name != arm.name), "{} stands twice", arm.name);
    }
    let from_model: Vec<_> = arms.iter().map(|arm| ArmSpec { source: Source::Model, ..arm.clone() }).collect();
    assert_eq!(parse(text, Source::Model).ok(), Some(from_model));
    let written = json!({ "arms": arms.iter().map(write).collect::<Vec<_>>() });
    for written in [written.to_string(), json!({ "kv_plugin": written }).to_string()] {
        if written.len() <= MAX_SPEC_BYTES {
            let read = parse(&written, Source::Operator);
            assert!(read.as_ref().is_ok_and(|read| *read == arms), "{text:?} was read as {arms:?}, then as {read:?}");
        }
    }
}

/// First and last layer of each part of a list that was accepted, read by hand. No last one: all that follow.
fn by_hand(text: &str) -> Vec<(u64, Option<u64>)> {
    let number = |digits: &str| digits.bytes().fold(0u64, |value, digit| value * 10 + u64::from(digit - b'0'));
    let part = |part: &str| match part.find('-') {
        None => (number(part), Some(number(part))),
        Some(dash) => (number(&part[..dash]), Some(&part[dash + 1..]).filter(|end| !end.is_empty()).map(number)),
    };
    text.split(',').map(|text| part(text.trim())).collect()
}

fn layers(text: &str) {
    let Ok(Some(set)) = LayerSet::parse(text) else { return };
    let parts = by_hand(text);
    for layer in (0..70).chain([u32::MAX - 1, u32::MAX]) {
        let named = parts.iter().any(|&(start, end)| (start..=end.unwrap_or(u64::MAX)).contains(&layer.into()));
        assert_eq!(set.contains(layer), named, "{text:?}, layer {layer}");
    }
    assert_eq!(LayerSet::parse(&set.to_string()), Ok(Some(set.clone())), "{text:?} was written as {set}");
    for count in [1, 2, 30, 64] {
        // The last layer that there can be stands for the model's last one, as no end does.
        let end = |end: Option<u64>| end.filter(|&end| end != u64::from(u32::MAX));
        let inside = |&(start, last): &(u64, Option<u64>)| start < count && end(last).is_none_or(|last| last < count);
        assert_eq!(set.check(count as u32).is_ok(), parts.iter().all(inside), "{text:?} of {count} layers");
    }
}

fuzz_target!(|text: &str| {
    form(text);
    layers(text);
});
