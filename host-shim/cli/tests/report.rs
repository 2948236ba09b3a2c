//! The faces of a comparison: JSON, terminal table, HTML page.

mod fixture;

use std::path::Path;

use fixture::{HOSTILE_NAME, HOSTILE_WORDS, comparison};
use kvhook::args::Output;
use kvhook::error::CliError;
use kvhook::results::Comparison;
use kvhook::{page, report, table};

fn read(text: &str) -> Result<Comparison, CliError> {
    Comparison::from_json(text, Path::new("results.json"))
}

#[test]
fn json_comes_back_as_it_was() {
    let comparison = comparison(4);
    assert_eq!(read(&comparison.to_json()).unwrap(), comparison);
}

#[test]
fn a_broken_run_survives_json() {
    let mut comparison = comparison(2);
    comparison.arms[3].measures[0].quality.nll = f64::NAN;
    comparison.arms[3].measures[0].quality.perplexity = f64::INFINITY;
    let back = read(&comparison.to_json()).unwrap();
    let quality = back.arms[3].measures[0].quality;
    assert!(quality.nll.is_nan() && quality.perplexity.is_nan());
    assert!(page::render(&back).contains("–"));
}

#[test]
fn other_files_are_refused() {
    assert!(matches!(read("{}"), Err(CliError::NotResults { .. })));
    let newer = r#"{"comparison": {"format": 99}}"#;
    assert!(matches!(read(newer), Err(CliError::ResultsFormat { found: 99, .. })));
}

#[test]
fn summary_follows_from_the_measures() {
    let comparison = comparison(4);
    let summary = comparison.summary();
    let recent = &summary[3];
    assert_eq!((recent.entries_per_head_before, recent.entries_per_head_after), (1024.0, 256.0));
    assert_eq!(recent.kept_fraction.mean, 0.25);
    assert!(recent.paired.is_none(), "the reference has no difference to itself");
    // The made-up arms have KL 0.14 w and 0.22 w with one w for each passage: the difference is -0.08 w, and the
    // ratio of the means is that of the factors.
    let paired = summary[4].paired.as_ref().unwrap();
    assert!((paired.kl.mean / recent.kl.mean + 0.08 / 0.22).abs() < 1e-12);
    assert!((paired.kl.standard_error.unwrap() / recent.kl.standard_error.unwrap() - 0.08 / 0.22).abs() < 1e-9);
    // Quality::new: NLL - NLL_full = 0.8 KL on each passage.
    let loss = comparison.arms[3].measures[1].quality;
    assert!((loss.perplexity_ratio.ln() - 0.8 * loss.kl).abs() < 1e-12);
    let gain = comparison.passages[1].nll_no_prefix.unwrap() - comparison.passages[1].nll_full;
    assert!((loss.recovered_context.unwrap() - (1.0 - 0.8 * loss.kl / gain)).abs() < 1e-12);
}

#[test]
fn tables_fit_their_width() {
    let comparison = comparison(4);
    let measures = table::measures(&comparison);
    for text in [&measures, &table::details(&comparison), &table::first_words(&comparison, 0)] {
        println!("{text}");
        let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= usize::from(table::WIDTH), "{widest} columns:\n{text}");
    }
    let row = measures.lines().find(|line| line.contains("keydiff-25")).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[1..3], ["1024→256", "22.5→5.6"]);
    assert_eq!(cells[8], "2/4");
    assert!(table::measures(&fixture::comparison(1)).contains("1 passage, so no errors are given"));
    assert_eq!(table::fallbacks(&comparison).lines().count(), 2);
}

#[test]
fn delivery_writes_all_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let files = Output { json: Some(folder.path().join("r.json")), html: Some(folder.path().join("r.html")) };
    let (comparison, mut out) = (comparison(4), Vec::new());
    report::deliver(&comparison, &files, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    for part in ["perplexity", "Differences are to `recent-25`", "no_gain", "First words after made-up-0.txt"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let json = std::fs::read_to_string(folder.path().join("r.json")).unwrap();
    assert_eq!(read(&json).unwrap(), comparison);
    assert!(std::fs::read_to_string(folder.path().join("r.html")).unwrap().ends_with("</html>"));

    let nowhere = Output { json: Some(folder.path().join("none/r.json")), html: None };
    let error = report::deliver(&comparison, &nowhere, &mut Vec::new()).unwrap_err();
    assert_eq!(error.exit_code(), kvhook::error::EXIT_OUTPUT);
}

#[test]
fn page_is_well_formed_and_escaped() {
    for n in [1, 4, 8] {
        let page = page::render(&comparison(n));
        std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("page-{n}.html")), &page).unwrap();
        let xml = close_void(&page);
        let document = roxmltree::Document::parse(&xml).unwrap();
        let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).collect();
        assert!(texts.contains(&HOSTILE_WORDS), "words are shown as written");
        assert!(texts.contains(&HOSTILE_NAME), "names are shown as written");
        assert!(!document.descendants().any(|node| node.has_tag_name("script") || node.has_tag_name("b")));
        let plots = document.descendants().filter(|node| node.attribute("class") == Some("plot"));
        assert_eq!(plots.count(), 4);
    }
}

#[test]
fn page_fetches_nothing() {
    let page = page::render(&comparison(4));
    for outside in ["http:", "https:", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn few_passages_are_said_to_be_few() {
    assert!(page::render(&comparison(1)).contains("One passage only"));
    assert!(page::render(&comparison(4)).contains("4 passages only"));
    assert!(!page::render(&comparison(8)).contains("passages only"));
}

/// A comparison without arms or passages is drawn too: nothing divides by zero.
#[test]
fn nothing_measured_is_still_a_page() {
    let mut comparison = comparison(0);
    assert!(page::render(&comparison).contains("No passage was measured"));
    comparison.arms.clear();
    assert!(page::render(&comparison).contains("</html>"));
    assert!(!page::render(&comparison).contains("NaN"));
}

/// Writes as XML what HTML may leave open: the doctype, void elements and attributes without a value.
fn close_void(html: &str) -> String {
    let html = html.replace("<!DOCTYPE html>", "").replace("<br>", "<br/>").replace("<details open>", "<details>");
    let mut parts = html.split("<meta ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + "<meta " + &part.replacen('>', "/>", 1))
}
