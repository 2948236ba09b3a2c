//! The rules that every plugin keeps; `kvhook validate` checks them on the built library, each in a process of its own.

use kvhook_testing::conformance::{RULES, Subject};

#[test]
fn every_rule_holds() {
    let subject = Subject::new(kvhook_testing::entry!(kvhook_plugin_name), "");
    for rule in RULES {
        rule.check(&subject).unwrap_or_else(|fault| panic!("rule {} ({}): {fault}", rule.number, rule.name));
    }
}
