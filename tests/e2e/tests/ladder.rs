//! The quality ladder: what compression by `truncate`, from its shared library, costs on real text.
//!
//! A prefix `x_0..x_{T-1}` and a continuation `y_1..y_M` from the same text. The cache of `x_0..x_{T-2}` is compressed;
//! then `x_{T-1}` and the continuation are fed at their logical positions, so that all `M` distributions come from the
//! compressed cache. They are compared with those of the full cache: KL in nats a token, and perplexity.
//!
//! Same in, same out: the figures are the same on every machine, and each gate is about twice what was measured when it
//! was set. The orders and the two negative cases show that the figures tell good from bad.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use kvhook_e2e::measured::Measured;
use kvhook_e2e::model::{bits, paged, runner, text};
use kvhook_engine::quality::{paired_difference, perplexity, summarise};
use kvhook_engine::runner::LogitsRow;
use kvhook_engine::{Begin, CacheConfig, Device, Runner, Scoring};
// Builds the plugin's shared library.
use kvhook_truncate as _;

/// Tokens of the prefix and of the continuation.
const T: usize = 1024;
const M: usize = 128;
const BLOCK: usize = 16;

/// First tokens of the passages in each text.
const PASSAGES: [(&str, [usize; 2]); 2] =
    [("moby-dick.txt", [2_000, 16_000]), ("state-of-the-union.txt", [3_000, 20_000])];

const KEY_DIFF: &str = "history=top,importance=key_diff";
const ATTENTION: &str = "history=top,importance=attention";
const RANDOM: &str = "history=sample,importance=uniform";

/// One arm and the most KL that it may have.
struct Arm {
    name: &'static str,
    config: String,
    keep: f64,
    gate: Option<f64>,
}

fn arms() -> Vec<Arm> {
    let arm = |name, keep: f64, rest: &str, gate| Arm { name, config: format!("keep={keep},{rest}"), keep, gate };
    vec![
        arm("identity", 1.0, "history=none", None),
        arm("streaming-50", 0.5, "history=none", Some(0.05)),
        arm("streaming-25", 0.25, "history=none", Some(0.12)),
        arm("key_diff-50", 0.5, KEY_DIFF, Some(0.08)),
        arm("key_diff-25", 0.25, KEY_DIFF, Some(0.15)),
        arm("snapkv-50", 0.5, ATTENTION, Some(0.025)),
        arm("snapkv-25", 0.25, ATTENTION, Some(0.07)),
        arm("random-50", 0.5, RANDOM, None),
        arm("random-25", 0.25, RANDOM, None),
        arm("unguarded-50", 0.5, &format!("{RANDOM},sinks=0,recent=0"), None),
        arm("unguarded-25", 0.25, &format!("{RANDOM},sinks=0,recent=0"), None),
    ]
}

/// Logits of the continuation behind a prefix that `arm` compressed.
fn continuation(runner: &mut Runner, passage: &[u32], arm: &str, kept: usize, restart: bool) -> Vec<LogitsRow> {
    let (prefix, rest) = passage.split_at(T - 1);
    // The same prefix is prefilled once: its blocks stay in the pool until others need them.
    let (id, _) = runner.prefill_on(&Begin { arm: Some(arm), ..Begin::new(prefix) }, T).unwrap();
    let report = runner.report(id).unwrap();
    assert!(report.failures.is_empty(), "{arm}: {report:?}");
    assert!(report.lengths.iter().all(|length| *length == kept), "{arm}: {report:?}");
    assert_eq!(report.next_position as usize, T - 1);
    assert_eq!(report.commits.len(), usize::from(kept < T - 1), "{arm}: {report:?}");
    assert!(report.commits.iter().all(|commit| commit.bytes_freed > 0), "{arm}: {report:?}");
    if restart {
        runner.parts_mut(id).unwrap().1.next_position = kept as u32;
    }
    let rows = runner.score(id, &rest[..M], Scoring::Together).unwrap();
    runner.free(id).unwrap();
    rows
}

/// Logits of the continuation behind nothing but the last token of the prefix.
fn alone(runner: &mut Runner, rest: &[u32]) -> Vec<LogitsRow> {
    let id = runner.begin_on(&Begin { arm: Some("none"), ..Begin::new(&[]) }).unwrap();
    let rows = runner.score(id, &rest[..M], Scoring::Together).unwrap();
    runner.free(id).unwrap();
    rows
}

/// Runs every arm over every passage.
fn measure(arms: &[Arm], device: Device) -> BTreeMap<&'static str, Measured> {
    let plugins: Vec<_> = arms.iter().map(|arm| (arm.name, "truncate", arm.config.as_str())).collect();
    let blocks = 2 * (T + M).div_ceil(BLOCK) + 16;
    let mut runner = runner(CacheConfig { device, ..paged(BLOCK, blocks) }, &plugins, 0);
    let mut measured: BTreeMap<_, Measured> = BTreeMap::new();
    for (name, starts) in PASSAGES {
        let tokens = text(name);
        for start in starts {
            let passage = &tokens[start..start + T + M];
            let targets = &passage[T..];
            let full = continuation(&mut runner, passage, "none", T - 1, false);
            measured.entry("full").or_default().add(&full, &full, targets);
            measured.entry("no prefix").or_default().add(&full, &alone(&mut runner, &passage[T - 1..]), targets);
            for arm in arms {
                let kept = ((T - 1) as f64 * arm.keep) as usize;
                let rows = continuation(&mut runner, passage, arm.name, kept, false);
                if arm.name == "identity" {
                    assert!(rows.iter().zip(&full).all(|(a, b)| bits(a) == bits(b)), "keep=1 changes logits");
                }
                measured.entry(arm.name).or_default().add(&full, &rows, targets);
            }
            let rows = continuation(&mut runner, passage, "streaming-25", (T - 1) / 4, true);
            measured.entry("restarted-25").or_default().add(&full, &rows, targets);
        }
    }
    measured
}

#[test]
fn compression_costs_no_more_than_its_gate() {
    climb(Device::Cpu);
}

#[cfg(feature = "cuda")]
#[test]
fn compression_on_a_cuda_device_costs_no_more_than_its_gate() {
    if let Some(device) = kvhook_e2e::model::cuda() {
        climb(device);
    }
}

fn climb(device: Device) {
    let arms = arms();
    let measured = measure(&arms, device);
    println!("T = {T}, M = {M}, {} passages; mean and standard error over passages", PASSAGES.len() * 2);
    println!("{:<14} {:>16} {:>8} {:>7}  gate", "arm", "KL", "PPL", "top-1");
    let order = [("full", None), ("no prefix", None)].into_iter().chain(arms.iter().map(|arm| (arm.name, arm.gate)));
    for (name, gate) in order.chain([("restarted-25", None)]) {
        let Measured { kl, loss, agreement } = &measured[name];
        let (kl, ppl, top1) = (summarise(kl), perplexity(summarise(loss).mean), summarise(agreement).mean);
        let gate = gate.map_or(String::new(), |gate| format!("<= {gate}"));
        println!("{name:<14} {:>7.4} +- {:.4} {ppl:>8.2} {:>6.1}%  {gate}", kl.mean, kl.standard_error, 100.0 * top1);
    }

    for arm in &arms {
        if let Some(gate) = arm.gate {
            let kl = measured[arm.name].kl();
            assert!(kl <= gate, "{}: KL {kl:.4} is above {gate}", arm.name);
        }
    }
    for keep in ["50", "25"] {
        let [good, random] = ["snapkv", "random"].map(|name| &measured[format!("{name}-{keep}").as_str()].kl);
        let difference = paired_difference(good, random);
        assert!(difference.mean < 0.0, "SnapKV is not better than random at {keep} %: {difference:?}");
        let unguarded = measured[format!("unguarded-{keep}").as_str()].kl();
        let guarded = measured[format!("random-{keep}").as_str()].kl();
        assert!(unguarded > 5.0 * guarded, "random rows without sinks look good at {keep} %: KL {unguarded:.4}");
    }
    let unguarded = measured["unguarded-25"].kl();
    assert!(unguarded > 0.5, "random rows without sinks look good: KL {unguarded:.4}");
    let restarted = measured["restarted-25"].kl();
    assert!(restarted > 1.0, "keys rotated for other positions look good: KL {restarted:.4}");
}
