use proptest::prelude::*;
use serde_json::json;

use super::*;

crate::words! {
    /// Words.
    enum History {
        /// One.
        None = "none",
        /// Two.
        Top = "top",
    }
}

crate::config! {
    /// Every type and range.
    struct Sample {
        /// Fraction.
        keep: f64 = 0.5, in 0.0..=1.0;
        /// Count.
        budget: Option<u64> = null, from 1;
        /// Signed.
        shift: i64 = -3, in -10..=10;
        /// Switch.
        exact: bool = false;
        /// Word.
        history: History = "top";
        /// Text.
        label: String = "a,b";
    }
}

fn refused(text: &str) -> ConfigError {
    parse::<Sample>(text).expect_err(text)
}

#[test]
fn an_empty_config_gives_the_defaults() {
    let expected =
        Sample { keep: 0.5, budget: None, shift: -3, exact: false, history: History::Top, label: "a,b".to_owned() };
    for text in ["", "  \n", "{}", " { } "] {
        assert_eq!(parse::<Sample>(text), Ok(expected.clone()), "{text:?}");
    }
}

#[test]
fn both_forms_mean_the_same() {
    let short = r#" keep = 0.25 , budget=7,shift=-10,exact=true,history=none,label="x=1, y" "#;
    let long = json!({"keep": 0.25, "budget": 7, "shift": -10, "exact": true, "history": "none", "label": "x=1, y"});
    let read = parse::<Sample>(short).unwrap();
    assert_eq!(read, parse(&long.to_string()).unwrap());
    assert_eq!((read.keep, read.budget, read.label.as_str()), (0.25, Some(7), "x=1, y"));
}

#[test]
fn refusals_name_key_value_and_what_is_allowed() {
    let bad = |key: &str, value: &str, allowed: &str| ConfigError::bad_value(key, value, allowed);
    assert_eq!(refused("keep=1.5"), bad("keep", "1.5", "a number, from 0.0 to 1.0"));
    assert_eq!(refused("keep=half"), bad("keep", "\"half\"", "a number, from 0.0 to 1.0"));
    assert_eq!(refused("budget=0"), bad("budget", "0", "a whole number, 0 or more, at least 1, or null"));
    assert_eq!(refused("budget=1.5"), bad("budget", "1.5", "a whole number, 0 or more, at least 1, or null"));
    assert_eq!(refused("budget=-1"), bad("budget", "-1", "a whole number, 0 or more, at least 1, or null"));
    assert_eq!(refused("shift=-11"), bad("shift", "-11", "a whole number, from -10 to 10"));
    assert_eq!(refused("exact=1"), bad("exact", "1", "true or false"));
    assert_eq!(refused("history=best"), bad("history", "\"best\"", "one of none, top"));
    assert_eq!(refused(r#"{"label":{"a":[1]}}"#), bad("label", r#"{"a":[1]}"#, "text"));
}

#[test]
fn an_unknown_key_is_answered_with_the_nearest() {
    let ConfigError::UnknownKey { key, value, nearest, known } = refused("budgt=3") else { panic!() };
    assert_eq!((key.as_str(), value.as_str(), nearest.as_deref()), ("budgt", "3", Some("budget")));
    assert_eq!(known, "keep, budget, shift, exact, history, label");
    let ConfigError::UnknownKey { nearest: None, .. } = refused("completely_else=3") else { panic!() };
    assert!(refused("budgt=3").to_string().contains("did you mean `budget`?"));
}

#[test]
fn a_key_given_twice_is_refused() {
    let twice = |value: &str| ConfigError::DuplicateKey { key: "keep".into(), value: value.into() };
    assert_eq!(refused("keep=0.1,keep=0.2"), twice("0.2"));
    assert_eq!(refused(r#"{"keep":0.1,"keep":0.1}"#), twice("0.1"));
}

#[test]
fn broken_text_is_refused_with_its_place() {
    for (text, place) in [
        ("keep", 0),
        ("=1", 0),
        ("keep=", 5),
        ("keep=0.5,", 9),
        ("keep=0.5,,exact=true", 9),
        ("label=\"x\" y", 10),
        ("label=\"x", 6),
        ("{\"keep\":0.5,}", 12),
        ("{\"keep\":0.5} x", 13),
        ("{\"keep\":NaN}", 8),
    ] {
        match refused(text) {
            ConfigError::Syntax { at, .. } => assert!(at.abs_diff(place) <= 1, "{text:?}: byte {at}"),
            other => panic!("{text:?}: {other}"),
        }
    }
}

#[test]
fn too_long_a_config_is_refused() {
    let length = MAX_CONFIG_BYTES + 1;
    assert_eq!(refused(&" ".repeat(length)), ConfigError::TooLong { length });
    assert!(parse::<Sample>(&" ".repeat(MAX_CONFIG_BYTES)).is_ok());
}

#[test]
fn edit_distance_matches_known_pairs() {
    for (a, b, distance) in [("", "", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3)] {
        assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        assert_eq!(edit_distance(b, a), distance, "{b} {a}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,60}") {
        let _ = parse::<Sample>(&text);
    }

    #[test]
    fn any_value_of_the_short_form_arrives(keep in 0.0..=1.0f64, budget in 1..u64::MAX, label in "\\PC{0,20}") {
        let quoted = serde_json::Value::from(label.as_str());
        let read = parse::<Sample>(&format!("label={quoted},keep={keep:?}, budget={budget}")).unwrap();
        prop_assert_eq!((read.keep, read.budget, read.label), (keep, Some(budget), label));
    }

    #[test]
    fn a_value_out_of_range_is_refused(keep in prop_oneof![-1e300..-1e-9f64, 1.000_001..1e300f64]) {
        let text = format!("{{\"keep\":{keep:?}}}");
        prop_assert!(matches!(parse::<Sample>(&text), Err(ConfigError::BadValue { .. })), "{}", text);
    }
}
