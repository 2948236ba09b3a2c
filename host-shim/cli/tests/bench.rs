//! `kvhook bench` on the CPU: what it prints and writes, and how it refuses.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output};

use kvhook::bench::report::Report;
use kvhook::bench::shapes::SMOLLM;

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvhook")).arg("bench").args(arguments).output().unwrap()
}

/// What a run must print on standard error, and its exit code.
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let output = bench(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

#[test]
fn rows_of_a_small_cache_with_a_peer() {
    let folder = tempfile::tempdir().unwrap();
    let (json, peers) = (folder.path().join("bench.json"), folder.path().join("peers.json"));
    let time = r#"{"median": 4000.0, "p10": 3900.0, "p90": 4100.0, "n": 50}"#;
    let peer = format!(
        r#"{{"peer": "another program", "operation": "key_norm", "shape": "smollm2-135m", "form": "contiguous",
            "tokens": 256, "keep": 2, "layers": 2, "eager_us": {time}, "graph_us": null, "note": ""}}"#
    );
    std::fs::write(&peers, format!(r#"{{"format": 1, "products_per_second": null, "rows": [{peer}]}}"#)).unwrap();
    let rows = ["smollm2-135m 256 key_norm", "smollm2-135m 256 streaming-blocks", "smollm2-135m 256 commit contiguous"];
    let mut arguments = vec!["--device", "cpu", "--json", json.to_str().unwrap(), "--peers", peers.to_str().unwrap()];
    rows.iter().for_each(|words| arguments.extend(["--rows", words]));
    let output = bench(&arguments);
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{err}");

    let report: Report = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let names: Vec<&str> = report.rows.iter().map(|row| row.name.as_str()).collect();
    let expected = [
        "smollm2-135m contiguous 256 1/2 commit",
        "smollm2-135m contiguous 256 1/2 key_norm",
        "smollm2-135m paged-16 256 1/2 key_norm",
        "smollm2-135m paged-16 256 1/2 streaming-blocks",
    ];
    assert_eq!(names, expected);
    assert!(report.copy_bytes_per_second > 1e8 && report.products_per_second.is_none());
    for row in &report.rows {
        let time = row.device_us;
        assert!(time.n >= 5 && 0.0 < time.p10 && time.p10 <= time.median && time.median <= time.p90, "{row:?}");
        assert!(out.contains(&row.operation), "{out}");
    }
    // A half of 2.9 MB is read, and written.
    let floor = SMOLLM.cache_bytes(256) as f64 / report.copy_bytes_per_second * 1e6;
    assert!((report.rows[0].floor_once_us / floor - 1.0).abs() < 1e-9);
    // Nothing moves, but the host and the plugin are asked.
    assert_eq!(report.rows[3].floor_phases_us, 0.0);
    assert!(report.rows[1].plugin_us.is_some_and(|time| time > 0.0 && time < report.rows[1].host_us.p90 * 10.0));
    assert_eq!(report.peers.len(), 1);
    // 4,000 us for 2 layers; only the contiguous row has the peer.
    assert_eq!(out.matches("another program").count(), 1, "{out}");
    assert!(out.contains("2000.00"), "{out}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    refused(
        &["--device", "cpu", "--rows", "smollm2-135m 257"],
        2,
        &["smollm2-135m 257", "smollm2-135m contiguous 256"],
    );
    refused(&["--device", "cpu", "--peers", "no/such/file"], 2, &["no/such/file"]);
    refused(&["--rows", "commit"], 2, &["--device"]);
    // Without a device, or without the code for one.
    if !cfg!(feature = "cuda") || !std::path::Path::new("/dev/nvidiactl").exists() {
        refused(&["--device", "cuda"], 3, &["--device cpu"]);
    }
}
