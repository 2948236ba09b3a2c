//! A run in the terminal: rows in groups of one shape and layout, each with its peers below.

use std::fmt::Write;

use super::peers::Peer;
use super::report::{Measurement, Report};
use crate::format::NONE;

/// What stands above the rows.
pub fn head(report: &Report) -> String {
    let hardware = &report.hardware;
    let mut text = hardware.name.clone();
    if let Some(driver) = &hardware.driver {
        let _ = write!(text, ", driver of {driver}");
    }
    let _ = write!(text, "\ncopy: {:.3} TB/s read and written", report.copy_bytes_per_second / 1e12);
    if let Some(products) = report.products_per_second {
        let source =
            if report.products_measured { "measured by the peers' script" } else { "an H100's, not measured here" };
        let _ = write!(text, "; bf16 products: {:.0} TFLOP/s ({source})", products / 1e12);
    }
    text += "\nus a layer; floors and their ratios, too; n and more: docs/bench.md\n";
    text
}

/// The newest row, with a heading where a group begins.
pub fn last_row(report: &Report) -> String {
    let mut rows = report.rows.iter().rev();
    let Some(row) = rows.next() else { return String::new() };
    let mut text = String::new();
    if rows.next().is_none_or(|before| (&before.shape, &before.form) != (&row.shape, &row.form)) {
        let _ = writeln!(text, "\n{}, {}, {} layers", row.shape, row.form, row.layers);
        let _ = writeln!(
            text,
            "{:17}{:>9} {:>5} {:>9} {:>17} {:>9} {:>9} {:>8} {:>8} {:>6} {:>7} {:>8} {:>8}",
            "operation",
            "tokens",
            "keep",
            "us/layer",
            "p10-p90",
            "all, ms",
            "whole, ms",
            "once",
            "phases",
            "/once",
            "/phases",
            "host us",
            "launches",
        );
    }
    line(&mut text, row);
    for peer in report.peers.iter().filter(|peer| peer.stands_beside(row)) {
        peer_line(&mut text, peer, row);
    }
    text
}

fn line(text: &mut String, row: &Measurement) {
    let tokens = match row.lengths[..] {
        [tokens] => tokens.to_string(),
        _ => format!("{} seqs", row.lengths.len()),
    };
    let device = row.device_us;
    let over = |floor: f64| if floor > 0.0 { format!("{:.2}", device.median / floor) } else { NONE.into() };
    let _ = writeln!(
        text,
        "{:17}{tokens:>9} {:>5} {:>9.2} {:>17} {:>9.3} {:>9.3} {:>8.2} {:>8.2} {:>6} {:>7} {:>8.1} {:>8}",
        row.operation,
        format!("1/{}", row.keep),
        row.of_layer(device.median),
        format!("{:.2}-{:.2}", row.of_layer(device.p10), row.of_layer(device.p90)),
        device.median / 1e3,
        row.whole_us.median / 1e3,
        row.of_layer(row.floor_once_us),
        row.of_layer(row.floor_phases_us),
        over(row.floor_once_us),
        over(row.floor_phases_us),
        row.host_us.median,
        row.launches.map_or_else(|| NONE.into(), |launches| launches.all().to_string()),
    );
}

/// Times of a peer, a layer, and how many times ours they are: eager beside ours with its gaps, a graph beside ours without.
fn peer_line(text: &mut String, peer: &Peer, row: &Measurement) {
    let part = |name: &str, time: Option<f64>, ours: f64| match time {
        Some(time) => {
            let layer = time / peer.layers as f64;
            let ratio = if ours > 0.0 { layer / ours } else { f64::NAN };
            format!("{name} {layer:>9.2} {:>8}", format!("({ratio:.2}x)"))
        }
        None => format!("{name} {NONE:>9} {:>8}", ""),
    };
    let eager = part("eager", peer.eager_us.map(|time| time.median), row.of_layer(row.whole_us.median));
    let graph = part("graph", peer.graph_us.map(|time| time.median), row.of_layer(row.device_us.median));
    let _ = writeln!(text, "    {:28} {eager}   {graph}", peer.peer);
}

#[cfg(test)]
mod tests {
    use super::super::report::{Counted, FORMAT, Hardware, Microseconds};
    use super::*;

    fn times(median: f64) -> Microseconds {
        Microseconds { median, p10: median * 0.9, p90: median * 1.1, n: 50 }
    }

    fn report() -> Report {
        Report {
            format: FORMAT,
            date: "2000-01-01T00:00:00Z".into(),
            version: "0.0.0".into(),
            hardware: Hardware { device: "cuda".into(), name: "A device".into(), driver: Some("CUDA 13.0".into()) },
            copy_bytes_per_second: 3e12,
            products_per_second: Some(7e14),
            products_measured: true,
            exponentials_per_second: None,
            rows: vec![Measurement {
                name: "a contiguous 8192 1/2 key_norm".into(),
                shape: "a".into(),
                form: "contiguous".into(),
                lengths: vec![8192],
                keep: 2,
                operation: "key_norm".into(),
                layers: 32,
                device_us: times(640.0),
                whole_us: times(960.0),
                host_us: times(50.0),
                host_commit_us: times(20.0),
                plugin_us: Some(10.0),
                launches: Some(Counted { kernels: 5, memsets: 2, copies: 1 }),
                floor_once_us: 320.0,
                floor_phases_us: 400.0,
            }],
            failed: Vec::new(),
            peers: vec![Peer {
                peer: "kvpress Knorm".into(),
                operation: "key_norm".into(),
                shape: "a".into(),
                form: "contiguous".into(),
                tokens: 8192,
                keep: 2,
                layers: 8,
                eager_us: Some(times(960.0)),
                graph_us: None,
                note: String::new(),
            }],
        }
    }

    #[test]
    fn times_ratios_and_peers_of_a_row() {
        let report = report();
        let text = last_row(&report);
        let lines: Vec<&str> = text.trim().lines().collect();
        assert_eq!(lines[0], "a, contiguous, 32 layers");
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        let expected = [
            "key_norm",
            "8192",
            "1/2",
            "20.00",
            "18.00-22.00",
            "0.640",
            "0.960",
            "10.00",
            "12.50",
            "2.00",
            "1.60",
            "50.0",
            "8",
        ];
        assert_eq!(words, expected);
        // 120 us a layer beside 30 with gaps.
        let words: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(words, ["kvpress", "Knorm", "eager", "120.00", "(4.00x)", "graph", NONE]);
        assert!(head(&report).contains("3.000 TB/s") && head(&report).contains("700 TFLOP/s (measured"));
    }

    #[test]
    fn a_report_comes_back_from_its_json() {
        let report = report();
        assert_eq!(serde_json::from_str::<Report>(&report.to_json()).unwrap(), report);
    }

    #[test]
    fn peers_of_other_rows_stand_elsewhere() {
        let mut report = report();
        report.peers[0].tokens = 4096;
        assert!(!last_row(&report).contains("kvpress"));
    }
}
