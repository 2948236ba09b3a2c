//! Records: what is read, what is claimed, and the page, on made-up traffic whose truth is known.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use kvhook::page;
use kvhook::record::{Finding, Findings, MAX_LINE, Record, Weight, read};
use proptest::prelude::*;
use serde_json::{Value, json};

const START: f64 = 1_764_021_600.0;
/// Name that would break a page which does not escape.
const HOSTILE: &str = "<script>alert(1)</script>&\"'";

/// Numbers in 0..1 of a linear congruential generator (Knuth's MMIX).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn around(&mut self, value: f64, spread: f64) -> f64 {
        value * (1.0 + spread * (2.0 * self.next() - 1.0))
    }
}

/// An arm of made-up traffic.
#[derive(Clone)]
struct Made {
    name: &'static str,
    freed_per_token: f64,
    ns_per_token: f64,
    /// Share of probes whose answer differs.
    differing: f64,
    kl: f64,
    totals: [f64; 5],
}

fn made(name: &'static str, freed_per_token: f64, ns_per_token: f64, differing: f64, kl: f64) -> Made {
    Made { name, freed_per_token, ns_per_token, differing, kl, totals: [0.0; 5] }
}

fn figures_line(at: f64, arms: &Value) -> String {
    let figures = json!({ "engine": "made up 0", "arms": arms });
    let line = json!({ "kind": "figures", "at": at, "engine": "infinilm", "model": HOSTILE, "figures": figures });
    format!("{line}\n")
}

fn figures_of(made: &Made) -> Value {
    let [sequences, tokens, entries, freed, ns] = made.totals.map(|total| total as u64);
    json!({
        "sequences": sequences, "live": 3, "commits": sequences, "entries_before": entries, "entries_after": entries / 2,
        "bytes_before": entries * 256, "bytes_after": entries * 128, "bytes_freed": freed, "tokens": tokens,
        "shadow": { "commits": 0, "entries_before": 0, "entries_after": 0, "bytes_before": 0, "bytes_after": 0 },
        "fallbacks": { "no_gain": sequences / 10 },
        "hooks": { "on_prefill_done": { "calls": sequences, "total_ns": ns, "max_ns": 9, "buckets": [1, 2] } },
    })
}

/// A record with so many lines of figures and so many probes.
fn record(arms: &mut [Made], lines: usize, probes: usize, seed: u64) -> String {
    let mut draws = Draws(seed);
    let mut text = String::new();
    for line in 0..lines {
        // Traffic that all arms share.
        let traffic = draws.around(1000.0, 0.8);
        for arm in &mut *arms {
            let tokens = draws.around(traffic, 0.3);
            let more = [
                tokens / 100.0,
                tokens,
                tokens * 90.0,
                tokens * draws.around(arm.freed_per_token, 0.4),
                tokens * draws.around(arm.ns_per_token, 0.4),
            ];
            arm.totals.iter_mut().zip(more).for_each(|(total, more)| *total += more);
        }
        let figures: serde_json::Map<_, _> = arms.iter().map(|arm| (arm.name.to_owned(), figures_of(arm))).collect();
        text += &figures_line(START + 60.0 * line as f64, &Value::Object(figures));
    }
    for probe in 0..probes {
        let line = |arm: &str, tokens: [u32; 4], kl: Option<f64>| {
            let mut line = json!({ "kind": "probe", "at": START, "engine": "infinilm", "model": HOSTILE, "arm": arm,
                "prompt": format!("prompts.txt:{probe}"), "tokens": tokens });
            if let Some(kl) = kl {
                line["kl"] = json!([kl / 2.0, kl * 1.5]);
            }
            format!("{line}\n")
        };
        text += &line("none", [7, 8, 9, 10], None);
        let difficulty = draws.around(1.0, 0.9);
        for arm in &*arms {
            let last = if draws.next() < arm.differing { 11 } else { 10 };
            text += &line(arm.name, [7, 8, 9, last], Some(draws.around(arm.kl * difficulty, 0.3)));
        }
    }
    text
}

fn parse(text: &str) -> Record {
    read(text.as_bytes()).unwrap()
}

fn findings(text: &str, against: &str) -> Vec<Finding> {
    let record = parse(text);
    assert_eq!((record.passed_over, record.settings.len()), (0, 1));
    Findings::of(&record.settings[0], Some(against)).sentences
}

fn texts(findings: &[Finding]) -> Vec<&str> {
    findings.iter().map(|finding| finding.text.as_str()).collect()
}

#[test]
fn what_is_true_is_claimed() {
    let mut arms = [made("a", 500.0, 2000.0, 0.05, 0.02), made("b", 1050.0, 8000.0, 0.3, 0.05)];
    let found = findings(&record(&mut arms, 30, 200, 3), "a");
    let claims: Vec<&str> = found.iter().filter(|f| f.weight == Weight::Difference).map(|f| f.text.as_str()).collect();
    assert_eq!(claims.len(), 5, "{:#?}", texts(&found));
    // The truth is 2.1, 4, 2.5.
    let holds = |text: &str, truth: f64| {
        let (_, interval) = text.split_once("95 % interval ").unwrap();
        let (low, high) = interval.split_once(')').unwrap().0.split_once(" to ").unwrap();
        assert!((low.parse::<f64>().unwrap()..=high.parse().unwrap()).contains(&truth), "{truth}: {text}");
    };
    assert!(claims[0].starts_with("b frees "), "{}", claims[0]);
    holds(claims[0], 2.1);
    assert!(claims[1].contains("times as much hook time"), "{}", claims[1]);
    holds(claims[1], 4.0);
    assert!(claims[2].starts_with("b changes the uncompressed answer more often than a"), "{}", claims[2]);
    // Only the last of four tokens ever differs: a quarter of 5 % minus 30 %.
    assert!(claims[3].starts_with("b follows the uncompressed answer less far than a"), "{}", claims[3]);
    holds(claims[3], -6.25);
    assert!(claims[4].starts_with("b is further from the uncompressed model than a"), "{}", claims[4]);
    holds(claims[4], 2.5);
    // The same the other way round.
    let other = findings(&record(&mut arms.map(|arm| Made { totals: [0.0; 5], ..arm }), 30, 200, 3), "b");
    assert!(texts(&other).iter().any(|text| text.starts_with("a changes the uncompressed answer less often than b")));
    assert!(texts(&other).iter().any(|text| text.starts_with("a is closer to the uncompressed model than b")));
}

/// Of five differences between equal arms, about 5 % are claimed each; 200 records, so about 50 claims.
#[test]
fn what_is_not_true_is_hardly_ever_claimed() {
    let claims: usize = (0..200)
        .map(|seed| {
            let mut arms = [made("a", 500.0, 2000.0, 0.1, 0.02), made("b", 500.0, 2000.0, 0.1, 0.02)];
            let found = findings(&record(&mut arms, 20, 40, 1000 + seed), "a");
            assert!(found.iter().any(|finding| finding.weight == Weight::Undecided));
            found.iter().filter(|finding| finding.weight == Weight::Difference).count()
        })
        .sum();
    assert!(claims < 80, "{claims} of 1000");
}

#[test]
fn equal_answers_are_counted_and_not_judged() {
    let mut arms = [made("a", 500.0, 2000.0, 0.0, 0.02), made("b", 500.0, 2000.0, 0.0, 0.02)];
    let found = findings(&record(&mut arms, 2, 20, 5), "a");
    let texts = texts(&found);
    // Wilson for 0 of 20: Newcombe 1998, table I.
    assert!(
        texts.contains(
            &"a's answers differ from the uncompressed ones in 0 of 20 probes (95 % interval 0.0 to 16.1 %)."
        )
    );
    assert!(texts.contains(&"b's answers differ from a's in 0 of 20 probes that both had."));
    // Two lines are one period, too few for rates.
    assert!(!texts.iter().any(|text| text.contains("for each token")), "{texts:#?}");
}

fn counters(sequences: u64, freed: u64) -> Value {
    json!({ "sequences": sequences, "tokens": sequences * 10, "bytes_freed": freed, "fallbacks": { "panic": sequences } })
}

/// The total of (sequences, bytes freed, panics) of arm `a` over lines of these counters; None where it is not there.
fn total(lines: &[Option<(u64, u64)>]) -> (u64, u64, u64, usize) {
    let text: String = lines
        .iter()
        .enumerate()
        .map(|(index, line)| {
            let arms = line.map_or_else(|| json!({}), |(sequences, freed)| json!({ "a": counters(sequences, freed) }));
            figures_line(START + index as f64, &arms)
        })
        .collect();
    let record = parse(&text);
    let history = &record.settings[0].history;
    let arm = &history.arms[0];
    (arm.total.sequences, arm.total.bytes_freed, arm.fallbacks["panic"], history.restarts)
}

#[test]
fn counters_that_begin_anew_are_added() {
    assert_eq!(total(&[Some((10, 100)), Some((15, 160))]), (15, 160, 15, 0));
    // A restart, seen by a counter that went back, though another did not.
    assert_eq!(total(&[Some((10, 100)), Some((4, 200))]), (14, 300, 14, 1));
    // An arm that was removed and added again, seen by its absence.
    assert_eq!(total(&[Some((10, 100)), None, Some((12, 120))]), (22, 220, 22, 0));
    assert_eq!(total(&[None, Some((1, 1)), None, None]), (1, 1, 1, 0));
    // Another run whose counters are ahead already.
    let line = |run: &str, sequences| {
        let figures = json!({ "arms": { "a": counters(sequences, 1) } });
        format!(
            "{}\n",
            json!({ "kind": "figures", "at": START, "engine": "e", "model": "m", "run": run, "figures": figures })
        )
    };
    let record = parse(&(line("1", 10) + &line("1", 12) + &line("2", 13)));
    let history = &record.settings[0].history;
    assert_eq!((history.arms[0].total.sequences, history.restarts), (25, 1));
}

#[test]
fn many_lines_are_put_together_without_losing_any() {
    let lines: String = (0..1000u64)
        .map(|line| figures_line(START + line as f64, &json!({ "a": counters(line * 3, line * line) })))
        .collect();
    let record = parse(&lines);
    let periods = record.settings[0].history.periods().remove(0);
    assert!(periods.len() <= 48 && periods.iter().all(Option::is_some));
    let sums = periods
        .iter()
        .flatten()
        .fold((0, 0), |sums, period| (sums.0 + period.counts.sequences, sums.1 + period.counts.bytes_freed));
    assert_eq!(sums, (999 * 3, 999 * 999));
    assert_eq!(periods.iter().flatten().last().map(|period| period.to), Some(START + 999.0));
}

#[test]
fn probes_belong_to_the_uncompressed_answer_above_them() {
    let probe = |arm: &str, tokens: &[u32]| {
        format!(
            "{}\n",
            json!({ "kind": "probe", "at": START, "engine": "e", "model": "m", "prompt": "p", "arm": arm, "tokens": tokens })
        )
    };
    let text = [
        probe("a", &[1]),
        probe("none", &[1, 2]),
        probe("a", &[1, 3]),
        probe("none", &[1, 2, 5, 6]),
        probe("b", &[1, 2, 5, 6]),
        probe("a", &[1, 2, 5, 7]),
    ]
    .concat();
    let record = parse(&text);
    let probes = &record.settings[0].probes;
    assert_eq!(probes.unpaired, 1);
    let of = |name: &str| probes.arm(name).unwrap();
    // The same prompt counts once, with its last replay.
    assert_eq!(of("a").differing().map(|p| (p.yes, p.asked)), Some((1, 1)));
    assert_eq!(of("a").same_tokens().map(|estimate| estimate.mean), Some(0.75));
    assert_eq!(of("b").differing().map(|p| p.yes), Some(0));
    assert!(record.warnings().iter().any(|warning| warning.contains("1 probes have no line of the arm `none`")));
}

#[test]
fn wrong_lines_are_told_with_number_reason_and_what_was_expected() {
    let base =
        json!({ "kind": "probe", "at": 1.0, "engine": "e", "model": "m", "prompt": "p", "arm": "none", "tokens": [1] });
    let with = |key: &str, value: Value| {
        let mut line = base.clone();
        line[key] = value;
        line.to_string()
    };
    let arms = |arms: Value| {
        json!({ "kind": "figures", "at": 1, "engine": "e", "model": "m", "figures": { "arms": arms } }).to_string()
    };
    for (line, words) in [
        ("{".to_owned(), &["not JSON"][..]),
        ("[]".to_owned(), &["the line is []", "expected an object"]),
        ("{}".to_owned(), &["`kind` is missing"]),
        (with("format", json!(2)), &["`format` is 2", "expected 1"]),
        (with("at", json!("now")), &["`at` is \"now\"", "seconds since 1970"]),
        (with("at", json!(-1)), &["`at` is -1"]),
        (with("engine", json!(5)), &["`engine` is 5", "expected text"]),
        (with("model", json!("")), &["0 characters", "1 to 200"]),
        (with("arm", json!("x".repeat(201))), &["201 characters"]),
        (with("prompt", json!("a\u{1b}[2J")), &["control character"]),
        (with("prompt", json!("a\u{202e}b")), &["control character"]),
        (with("tokens", json!([])), &["`tokens` is empty"]),
        (with("tokens", json!([1, -2])), &["`tokens[1]` is -2", "token ids"]),
        (with("tokens", json!([4_294_967_296u64])), &["`tokens[0]`"]),
        (with("kl", json!([0.1, "x"])), &["`kl[1]` is \"x\"", "numbers"]),
        (with("kept", json!(4)), &["`kept`", "expected both"]),
        (with("of", json!(0)), &["expected both"]),
        (arms(json!({ "a": 3 })), &["`figures.arms.a` is 3", "an object"]),
        (arms(json!({ "a": { "sequences": -1 } })), &["`figures.arms.a.sequences` is -1", "whole number"]),
        (arms(json!([])), &["`figures`", "`arms`"]),
    ] {
        let text = format!("{base}\n\n{line}\n{base}\n");
        let record = parse(&text);
        assert_eq!((record.lines, record.passed_over), (3, 1), "{line}");
        let problem = &record.problems[0];
        assert_eq!(problem.line, 3, "{line}");
        for word in words {
            assert!(problem.what.contains(word), "no {word} in {}", problem.what);
        }
    }
    let mut text = format!("{base}\n").into_bytes();
    text.extend(b"{\"kind\": \"\xff\"}\n");
    assert!(read(&text[..]).unwrap().problems[0].what.contains("byte 10 is not UTF-8"));
}

#[test]
fn what_a_writer_or_a_version_leaves_open_is_no_error() {
    let line = figures_line(START, &json!({ "a": counters(1, 1) }));
    // Being written.
    let record = parse(&(line.clone() + &line[..line.len() / 2]));
    assert!(record.cut_off && record.passed_over == 0 && record.settings.len() == 1);
    // Whole, though its end is missing.
    assert!(!parse(line.trim_end()).cut_off);
    // Windows' line ends, a byte order mark, kinds of a later version.
    let later = json!({ "kind": "weather", "at": 1, "engine": "e", "model": "m" });
    let record = parse(&format!("\u{feff}{}\r\n{later}\n", line.trim_end()));
    assert_eq!((record.passed_over, record.other_kinds, record.settings.len()), (0, 1, 1));
    // A host that counts less, and one that counts more.
    let old = parse(&figures_line(START, &json!({ "a": { "sequences": 3 } })));
    let total = old.settings[0].history.arms[0].total;
    assert_eq!((total.sequences, total.tokens, total.freed_per_token()), (3, None, None));
    let new = json!({ "a": { "sequences": 3, "moods": ["x"], "shadow": { "entries_before": 4, "entries_after": 1, "x": null } } });
    let new = parse(&figures_line(START, &new));
    assert_eq!(new.settings[0].history.arms[0].total.shadow_kept(), Some(0.25));
    assert!(Findings::of(&new.settings[0], None).sentences[0].text.contains("a shadow, would have kept 25.0 %"));
}

#[test]
fn a_line_without_end_does_not_fill_the_memory() {
    let line = figures_line(START, &json!({ "a": counters(1, 1) }));
    let text = format!("{line}{}\n{line}", "x".repeat(MAX_LINE + 5));
    let record = parse(&text);
    assert_eq!((record.lines, record.passed_over, record.problems[0].line), (3, 1, 2));
    let record = parse(&format!("{}{line}", "\u{1}\n".repeat(500)));
    assert_eq!((record.passed_over, record.problems.len()), (500, Record::MOST_PROBLEMS));
    assert!(record.warnings().iter().any(|warning| warning == "480 more lines were passed over"));
}

#[test]
fn page_is_well_formed_and_escaped_and_fetches_nothing() {
    let mut arms = [
        made("recent", 500.0, 2000.0, 0.05, 0.02),
        made("attention", 1050.0, 8000.0, 0.3, 0.05),
        made("a-name-as-long-as-they-may-be-for-arms-of-a-host-and-then-some-more", 480.0, 2100.0, 0.06, 0.021),
    ];
    let mut text = record(&mut arms, 20, 60, 11);
    text += "no line\n";
    // An arm that came late and is gone.
    let figures = |sequences| json!({ HOSTILE: counters(sequences, 5000 * sequences) });
    let later = |minute: f64, sequences| figures_line(START + 60.0 * minute, &figures(sequences));
    text += &(later(21.0, 4) + &later(22.0, 9) + &figures_line(START + 60.0 * 24.0, &json!({})));
    let page = page::record::render(&parse(&text), "made-up.jsonl", None);
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("record.html"), &page).unwrap();
    for outside in ["http:", "https:", "src=", "href=", "url(", "@import", "<script", "NaN", "inf<"] {
        assert!(!page.contains(outside), "{outside}");
    }
    let xml = page.replace("<!DOCTYPE html>", "").replace("<br>", "<br/>").replace("\"><meta", "\"/><meta");
    let xml = xml.replacen("content=\"light dark\">", "content=\"light dark\"/>", 1);
    let document = roxmltree::Document::parse(&xml).unwrap();
    let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).collect();
    assert!(texts.iter().any(|text| text.contains(HOSTILE)), "names are shown as written");
    assert!(
        texts.iter().any(|text| text.starts_with("line 201: it is not JSON"))
            || texts.iter().any(|t| t.contains("not JSON"))
    );
    let plots: Vec<_> = document.descendants().filter(|node| node.attribute("class") == Some("plot")).collect();
    assert_eq!(plots.len(), 5);
    assert!(plots.iter().all(|plot| plot.attribute("aria-label").is_some_and(|label| label.contains("recent "))));
    // Probes alone, and nothing at all, are pages, too.
    let probes_only = page::record::render(&parse(&record(&mut arms, 0, 3, 1)), "p", None);
    assert!(probes_only.contains("No figures, probes only") && !probes_only.contains("NaN"));
    assert!(page::record::render(&Record::default(), "x", None).contains("no figures and no probes"));
}

proptest! {
    /// Any bytes are read to their end, and shown.
    #[test]
    fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let record = read(&bytes[..]).unwrap();
        prop_assert!(record.passed_over + record.other_kinds <= record.lines);
        page::record::render(&record, "any", None);
    }

    /// A good record of which some bytes are others is read: what is shown has no number that is none.
    #[test]
    fn damaged_records_are_read(seed in 0u64..50, places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let mut arms = [made("a", 500.0, 2000.0, 0.2, 0.02), made("b", 1050.0, 8000.0, 0.3, 0.05)];
        let mut bytes = record(&mut arms, 6, 6, seed).into_bytes();
        for (place, byte) in places {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        let record = read(&bytes[..]).unwrap();
        let page = page::record::render(&record, "damaged", None);
        prop_assert!(!page.contains("NaN") && !page.contains("inf "));
    }

    /// Numbers as large as they may be are added without a fault.
    #[test]
    fn any_counters_are_added(lines in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..8)) {
        let line = |(at, &(sequences, tokens, freed)): (usize, &(u64, u64, u64))| {
            let arm = json!({ "sequences": sequences, "tokens": tokens, "bytes_freed": freed, "entries_before": freed,
                "entries_after": tokens, "hooks": { "bound": { "total_ns": tokens }, "commit": { "total_ns": tokens } } });
            figures_line(at as f64, &json!({ "a": arm, "b": arm }))
        };
        let text: String = lines.iter().enumerate().map(line).collect();
        let record = parse(&text);
        prop_assert_eq!(record.passed_over, 0);
        page::record::render(&record, "counters", None);
        prop_assert!(record.settings[0].history.arms[0].total.sequences >= lines[0].0);
    }
}
