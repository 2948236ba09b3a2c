//! The rules that every plugin keeps, in each of its ways to choose.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use kvhook_testing::conformance::{RULES, Subject};
use kvhook_testing::entry;

#[test]
fn every_rule_holds_for_every_way_to_choose() {
    let configs = [
        "",
        "history=stride,keep=0.3",
        "history=top,importance=key_norm",
        "history=top,importance=key_diff,budget=40",
        "history=top,importance=attention,window=16",
        "history=sample,importance=key_norm,seed=3,segments=text",
        "align=block,every=16",
    ];
    for config in configs {
        let subject = Subject::new(entry!(kvhook_truncate), config);
        for rule in RULES {
            if let Err(fault) = rule.check(&subject) {
                panic!("`{config}` breaks rule {} ({}): {fault}", rule.number, rule.name);
            }
        }
    }
}
