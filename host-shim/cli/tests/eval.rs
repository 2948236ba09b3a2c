//! Verdicts on made-up comparisons whose truth is known, and the built program on the real model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod fixture;

use std::path::PathBuf;

use common::{fail, kvhook};
use fixture::{HOSTILE_WORDS, comparison};
use kvhook::eval::{Evaluation, Verdict};
use kvhook::page;
use kvhook::results::Comparison;
use serde_json::Value;

const PLUGIN: &str = "mine";

/// A comparison of `n` passages: the plugin with these KL, and controls by name with theirs.
fn made(n: usize, own: impl Fn(usize) -> f64, controls: &[(&str, &dyn Fn(usize) -> f64)]) -> Comparison {
    let mut made = comparison(n);
    made.settings.reference = PLUGIN.into();
    let pattern = made.arms[2].clone();
    made.arms.truncate(1);
    let arms = [(PLUGIN, &own as &dyn Fn(usize) -> f64)].into_iter().chain(controls.iter().copied());
    for (name, kl) in arms {
        let mut arm = pattern.clone();
        arm.name = name.into();
        for (passage, measures) in arm.measures.iter_mut().enumerate() {
            measures.quality.kl = kl(passage);
            measures.passkey_found = Some(true);
        }
        made.arms.push(arm);
    }
    made
}

/// Passages that differ much, alike for all arms.
fn difficulty(passage: usize) -> f64 {
    0.01 * (1 + passage * 7 % 11) as f64
}

/// A small scatter of one arm's own.
fn scatter(passage: usize) -> f64 {
    1.0 + 0.1 * ((passage * 5 % 7) as f64 / 3.0 - 1.0)
}

#[test]
fn verdicts_follow_paired_differences() {
    let unlike = |passage: usize| difficulty(passage) * if passage.is_multiple_of(2) { 0.7 } else { 1.4 };
    let worse = |passage: usize| difficulty(passage) * 2.0 * scatter(passage);
    let better = |passage: usize| difficulty(passage) * 0.5 * scatter(passage + 2);
    let comparison = made(12, difficulty, &[("random", &worse), ("streaming", &better), ("key_diff", &unlike)]);
    let evaluation = Evaluation::of(&comparison, PLUGIN, 12);
    let verdicts: Vec<Verdict> = evaluation.against.iter().map(|against| against.verdict).collect();
    assert_eq!(verdicts, [Verdict::Better, Verdict::Worse, Verdict::Undecided]);
    let sentences: Vec<&str> = evaluation.against.iter().map(|against| against.sentence.as_str()).collect();
    assert!(sentences[0].starts_with("Better than random with guard: KL 0.5"), "{}", sentences[0]);
    assert!(sentences[1].starts_with("Worse than streaming: KL 1.9"), "{}", sentences[1]);
    assert!(evaluation.against[1].kl.unwrap().interval.unwrap().covers(2.0), "{}", sentences[1]);
    assert!(
        sentences[2].starts_with("No difference from key_diff that these 12 passages can show"),
        "{}",
        sentences[2]
    );
    assert_eq!(
        evaluation.conclusion,
        "By KL it chooses better than chance, but keeping the most recent entries is better, and costs nothing: better than \
         random with guard; worse than streaming; not told apart from key_diff."
    );
    assert!(evaluation.problems.is_empty() && !evaluation.failed);
    // The passages differ tenfold: unpaired, nothing could be told.
    let ratio = evaluation.against[0].kl.unwrap();
    let interval = ratio.interval.unwrap();
    assert!(interval.covers(0.5) && interval.high - interval.low < 0.1, "{ratio:?}");
}

#[test]
fn few_passages_claim_nothing() {
    let worse = |passage: usize| difficulty(passage) * 2.0;
    for n in 1..5 {
        let evaluation = Evaluation::of(&made(n, difficulty, &[("random", &worse)]), PLUGIN, 24);
        assert_eq!(evaluation.against[0].verdict, Verdict::Undecided);
        assert!(evaluation.against[0].sentence.contains("cannot tell"), "{}", evaluation.against[0].sentence);
        assert!(evaluation.conclusion.starts_with("KL does not show"), "{}", evaluation.conclusion);
        assert!(evaluation.problems[0].contains(&format!("after {n} of 24 passages")), "{:?}", evaluation.problems);
    }
}

#[test]
fn what_went_wrong_comes_first() {
    let same = |passage: usize| difficulty(passage);
    let mut comparison = made(8, difficulty, &[("random", &same)]);
    comparison.arms[1].fallbacks = [("panic".to_owned(), 2), ("poisoned".to_owned(), 14)].into();
    comparison.arms[2].measures.iter_mut().for_each(|measures| measures.entries_after /= 2);
    let evaluation = Evaluation::of(&comparison, PLUGIN, 8);
    assert!(evaluation.failed);
    assert!(evaluation.problems[0].contains("mine failed: 2 × panic, 14 × poisoned"), "{:?}", evaluation.problems);
    assert!(evaluation.problems[1].contains("random with guard kept 50 %"), "{:?}", evaluation.problems);
    comparison.arms[1].fallbacks = [("no_gain".to_owned(), 2)].into();
    let evaluation = Evaluation::of(&comparison, PLUGIN, 8);
    assert!(!evaluation.failed && evaluation.problems[0].contains("did not compress everything: 2 × no_gain"));
}

#[test]
fn passkeys_are_told_apart_by_the_sign_test() {
    let same = |passage: usize| difficulty(passage);
    let mut comparison = made(12, difficulty, &[("random", &same), ("streaming", &same)]);
    // Random loses six keys, which is 1 in 32 by chance, streaming five.
    for (arm, lost) in [(2, 6), (3, 5)] {
        comparison.arms[arm].measures[..lost].iter_mut().for_each(|measures| measures.passkey_found = Some(false));
    }
    let evaluation = Evaluation::of(&comparison, PLUGIN, 12);
    let sentence = evaluation.costs.iter().find(|sentence| sentence.contains("passkey")).unwrap();
    assert!(sentence.contains("in 12 of 12") && sentence.contains("random with guard 6 (fewer)"), "{sentence}");
    assert!(sentence.contains("streaming 7."), "{sentence}");
    assert!(
        evaluation.conclusion.ends_with(" It finds more passkeys than random with guard."),
        "{}",
        evaluation.conclusion
    );
}

#[test]
fn a_plugin_that_changes_nothing_is_not_praised() {
    let some = |passage: usize| difficulty(passage);
    let evaluation = Evaluation::of(&made(8, |_| 0.0, &[("random", &some)]), PLUGIN, 8);
    assert_eq!(evaluation.against[0].verdict, Verdict::Undecided);
    assert!(evaluation.against[0].sentence.contains("no comparison"), "{}", evaluation.against[0].sentence);
}

#[test]
fn page_begins_with_the_verdict() {
    let worse = |passage: usize| difficulty(passage) * 2.0 * scatter(passage);
    let mut comparison = made(8, difficulty, &[("random", &worse)]);
    comparison.arms[1].measures[0].first_words = HOSTILE_WORDS.into();
    let evaluation = Evaluation::of(&comparison, PLUGIN, 24);
    let page = page::render_evaluation(&comparison, &evaluation);
    std::fs::write(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("eval.html"), &page).unwrap();
    let [warning, conclusion, sentence, table] = [
        evaluation.problems[0].as_str(),
        evaluation.conclusion.as_str(),
        evaluation.against[0].sentence.as_str(),
        "<table>",
    ]
    .map(|part| page.find(part).unwrap_or_else(|| panic!("no {part}")));
    assert!(warning < conclusion && conclusion < sentence && sentence < table);
    for outside in ["http:", "https:", "src=", "href=", "url(", "<script", "NaN"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn controls_keep_as_much_of_each_layer_as_the_plugin() {
    let config = r#"{"history": "stride", "layers": {"0-9": 1.0, "10-": 0.3}}"#;
    let small = ["--prefix", "160", "--continuation", "12", "--passages", "3", "--minutes", "0.001", "--json"];
    let output = kvhook(&[&["eval", "truncate", "--config", config], &small[..]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).unwrap();
    let arms = report["comparison"]["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|arm| arm["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["full", "truncate", "random", "streaming", "key_diff", "snapkv"]);
    for arm in &arms[1..] {
        // 10 layers whole and 20 with 47 of 159 entries, of 3 KV heads.
        assert_eq!(arm["measures"][0]["entries_after"], 3 * (10 * 159 + 20 * 47), "{}", arm["name"]);
        assert!(arm["measures"][0]["quality"]["kl"].as_f64().unwrap() > 0.0);
    }
    assert_ne!(arms[2]["measures"][0]["quality"]["kl"], arms[3]["measures"][0]["quality"]["kl"]);
    // The time is over after the first passage.
    let evaluation = &report["evaluation"];
    assert!(evaluation["problems"][0].as_str().unwrap().contains("after 1 of 3 passages"), "{evaluation}");
    assert_eq!(evaluation["against"].as_array().unwrap().len(), 4);
    assert!(evaluation["against"].as_array().unwrap().iter().all(|against| against["verdict"] == "undecided"));
}

#[test]
fn a_plugin_that_does_nothing_is_told_so() {
    let small = ["--prefix", "64", "--continuation", "8", "--passages", "1"];
    fail(&[&["eval", "noop"], &small[..]].concat(), 1, &["`noop` compressed nothing", "63 tokens", "not compressed"]);
    let never = ["eval", "truncate", "--keep", "0.5", "--config", "min_tokens=4000"];
    fail(&[&never[..], &small].concat(), 1, &["min_tokens"]);
    fail(&[&["eval", "noop", "--keep", "0.5"], &small[..]].concat(), 2, &["no config key `keep`"]);
    fail(&[&["eval", "truncate", "--keep", "0.5", "--config", "budget=8"], &small[..]].concat(), 2, &["`budget`"]);
    fail(&[&["eval", "truncate", "--config", "history=most"], &small[..]].concat(), 4, &["arm `truncate`", "most"]);
    fail(&["eval", "./no-such.so"], 2, &["no-such.so"]);
}

/// Two arms and an uncompressed run over two prompts, twice into one record; then the report.
#[test]
fn probes_become_a_record_and_the_record_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let form = r#"{"kv_plugin": {"arms": [{"name": "same", "plugin": "noop"},
        {"name": "few", "plugin": "truncate", "config": "keep=0.2,sinks=1,recent=1"}]}}"#;
    let form = put("arms.json", form);
    let prompts = put(
        "prompts.txt",
        "The capital of France is the city of Paris, and the capital of Italy is the city of Rome. The capital of Spain is\n\
         \"One, two, three,\\nfour, five, six,\\nseven, eight, nine,\"\n",
    );
    let [record, page] =
        ["record.jsonl", "report.html"].map(|name| folder.path().join(name).to_str().unwrap().to_owned());
    let probe = ["probe", "--form", &form, "--prompts", &prompts, "--record", &record, "--max-new-tokens", "6"];
    for _ in 0..2 {
        let output = kvhook(&probe);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let lines: Vec<Value> =
        std::fs::read_to_string(&record).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<&str> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
    let once = [&["figures"], &["probe"; 6][..], &["figures"]].concat();
    assert_eq!(kinds, [&once[..], &once].concat());
    let arms: Vec<&str> = lines[1..4].iter().map(|line| line["arm"].as_str().unwrap()).collect();
    assert_eq!((arms[0], lines[1]["prompt"].as_str()), ("none", Some("prompts.txt:1")));
    for line in lines.iter().filter(|line| line["arm"] == "same") {
        let none = lines.iter().find(|none| none["arm"] == "none" && none["prompt"] == line["prompt"]).unwrap();
        assert_eq!(line["tokens"], none["tokens"]);
        assert!(line["kl"].as_array().unwrap().iter().all(|kl| kl == 0.0), "not even the last bit may differ");
        assert_eq!(line["kept"], line["of"]);
    }
    let few: Vec<&Value> = lines.iter().filter(|line| line["arm"] == "few").collect();
    // All but the first token of the answer come from the compressed cache.
    assert!(few.iter().all(|line| line["kl"].as_array().unwrap().iter().any(|kl| kl.as_f64().unwrap() > 1e-4)));
    let share = few[0]["kept"].as_f64().unwrap() / few[0]["of"].as_f64().unwrap();
    assert!((0.1..=0.2).contains(&share), "{share}");
    let of_few = |line: &Value| line["figures"]["arms"]["few"]["commits"].as_u64();
    assert_eq!(of_few(&lines[0]), Some(0));
    assert!(of_few(&lines[7]) >= Some(2));

    let output = kvhook(&["report", &record, "--against", "same", "--out", &page]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in
        ["same's answers differ from the uncompressed ones in 0 of 2 probes", "few's answers differ from same's in "]
    {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    assert!(std::fs::read_to_string(&page).unwrap().contains("</html>"));

    fail(&["report", "no-such.jsonl"], 2, &["no-such.jsonl"]);
    fail(&["report", &prompts], 2, &["no record", "line 1: it is not JSON", "docs/report.md"]);
    fail(&["report", &record, "--against", "b"], 2, &["no arm `b`"]);
    let bad = put("bad.json", r#"{"kv_plugin": {"plugin": "truncate", "config": "kep=1"}}"#);
    fail(&["probe", "--form", &bad, "--prompts", &prompts, "--record", &record], 4, &["kep"]);
    fail(&["probe", "--form", &form, "--prompts", &put("none", "\n"), "--record", &record], 2, &["no prompt"]);
}
