//! Each rule can fail: a plugin for every one of them that breaks it. Those that take their process along are tried by
//! `kvhook validate` (`host-shim/cli/tests/validate.rs`).

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use kvhook_faulty::broken::BROKEN;
use kvhook_faulty::variant::entry_of;
use kvhook_testing::conformance::{RULES, Rule, Subject};
use kvhook_testing::entry;

#[test]
fn numbers_and_names_are_unique() {
    for (place, rule) in RULES.iter().enumerate() {
        assert_eq!(rule.number as usize, place + 1);
        assert!(RULES[..place].iter().all(|other| other.name != rule.name));
        assert!(rule.name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{}", rule.name);
        let page = include_str!("../../../docs/conformance.md");
        assert!(page.contains(&format!("| {} | `{}` |", rule.number, rule.name)), "{} is not on the page", rule.name);
    }
}

#[test]
fn a_plugin_that_keeps_the_rules_passes() {
    for config in ["", "keep=0.3,every=40,must=128,plan=select-heads"] {
        for rule in RULES {
            // What a test framework holds beside is not the plugin's: this rule is checked in a process of its own.
            if rule.name != "instances-leave-nothing" {
                let subject = Subject::new(entry!(kvhook_faulty), config);
                rule.check(&subject).unwrap_or_else(|fault| panic!("{}, `{config}`: {fault}", rule.name));
            }
        }
    }
}

#[test]
fn each_rule_can_be_broken() {
    for case in BROKEN.iter().filter(|case| !case.ends_process) {
        let rule = Rule::named(case.rule).unwrap();
        let subject = Subject::new(entry_of(case.word).unwrap(), case.config);
        let fault = rule.check(&subject).expect_err(case.rule).to_string();
        assert!(fault.contains(case.said), "{case:?}: {fault}");
    }
    // These are about files.
    let files = ["metadata-is-true", "configs-keep-the-schema", "imports-no-synchronisation"];
    for rule in RULES.iter().filter(|rule| !files.contains(&rule.name)) {
        assert!(BROKEN.iter().any(|case| case.rule == rule.name), "nothing breaks {}", rule.name);
    }
}
