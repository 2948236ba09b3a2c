//! The rules that every plugin keeps. A test program of its own, since rule 8 looks at the whole process.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use kvhook_testing::conformance::{RULES, Subject};
use kvhook_testing::entry;

#[test]
fn every_rule_holds() {
    for config in ["", "covariance=false,budget=40", "every=16,keep=0.3"] {
        let subject = Subject::new(entry!(kvhook_expected_attention), config);
        for rule in RULES {
            rule.check(&subject)
                .unwrap_or_else(|fault| panic!("`{config}` breaks rule {} ({}): {fault}", rule.number, rule.name));
        }
    }
}
