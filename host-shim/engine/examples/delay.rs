//! What a server's users feel when a long sequence is compressed: 31 sequences decode while one of `TOKENS` tokens (32,768)
//! ends its prompt, is compressed and decodes with them. The tokens are made up, so the answers mean nothing; the work is
//! real.
//!
//! `cargo run --release -p kvhook-engine --features cuda --example delay [TOKENS [DEVICE]]`, with `truncate`'s library beside
//! the program.

use std::sync::Arc;
use std::time::Instant;

use kvhook_engine::model::fetch;
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, Work};
use kvhook_engine::{
    ArmConfig, Begin, CacheConfig, CacheKind, Device, Error, KvDtype, Model, PluginConfig, Result, Runner, SequenceId,
};

const OTHERS: usize = 31;
const SHORT: usize = 512;
const CHUNK: usize = 2048;
/// Steps before the long prompt ends, and from then on.
const BEFORE: usize = 40;
const AFTER: usize = 40;

const ARMS: [(&str, &str); 4] = [
    ("streaming", "keep=0.25"),
    ("key_norm", "keep=0.25,history=top,importance=key_norm"),
    ("key_diff", "keep=0.25,history=top,importance=key_diff"),
    ("attention", "keep=0.25,history=top,importance=attention"),
];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let tokens: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(32_768);
    let device = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(Device::Cuda(0));
    let mut model = Model::load(&fetch::default_model(|_, _| {})?)?;
    // More than it was trained for.
    model.config.context = model.config.context.max(tokens + AFTER + 1);
    let model = Arc::new(model);
    let blocks = 2 * tokens.div_ceil(16) + OTHERS * (SHORT + BEFORE + AFTER + 2).div_ceil(16) + 64;
    let kind = CacheKind::Paged { block_size: 16, blocks };
    let cache = CacheConfig { kind, dtype: KvDtype::F16, ranks: 1, prefix_sharing: false, device };
    let arms = ARMS.map(|(name, config)| ArmConfig::new(name, "truncate", config)).to_vec();
    let plugins = PluginConfig { arms, commit_lag: 1, ..PluginConfig::default() };
    let mut runner = Runner::with_plugins(model, cache, &plugins)?;
    println!("{OTHERS} sequences of {SHORT} tokens decode, one of {tokens} joins them; ms of a step, {device}");
    println!(
        "{:<12}{:>16}{:>16}{:>16}{:>16}",
        "arm", "median before", "slowest before", "slowest after", "median after"
    );
    // Once to warm up.
    for (index, arm) in ["none", "none"].into_iter().chain(ARMS.map(|arm| arm.0)).enumerate() {
        let row = measure(&mut runner, arm, tokens)?;
        if index > 0 {
            println!("{arm:<12}{:>16.2}{:>16.2}{:>16.2}{:>16.2}", row[0], row[1], row[2], row[3]);
        }
    }
    Ok(())
}

fn token(place: usize) -> u32 {
    (1_000 + place * 7_919 % 40_000) as u32
}

/// Milliseconds: the median and the slowest step before the long prompt ends, the slowest and the median from then on.
fn measure(runner: &mut Runner, arm: &str, tokens: usize) -> Result<[f64; 4]> {
    let long: Vec<u32> = (0..tokens).map(token).collect();
    let mut ids = Vec::new();
    for other in 0..OTHERS {
        let prompt: Vec<u32> = (0..SHORT).map(|place| token(place + 31 * other)).collect();
        ids.push(runner.prefill_on(&Begin { arm: Some("none"), ..Begin::new(&prompt) }, CHUNK)?.0);
    }
    let id = runner.begin_on(&Begin { arm: Some(arm), ..Begin::new(&long) })?;
    let (head, last) = long.split_at(tokens - 1);
    for chunk in head.chunks(CHUNK) {
        let (tokens, phase) = (chunk, Phase::Prefill);
        runner.step(&[Work { sequence: id, tokens, phase, prompt_ends: false, logits: Logits::None }])?;
    }
    // The device still works on the prompt; the first step waits for that.
    steps(runner, &ids, None, 1)?;
    let before = steps(runner, &ids, None, BEFORE)?;
    // The prompt's last token runs beside the others' next ones.
    let first = step(runner, &ids, Some((id, last, Phase::Prefill)))?;
    let after = steps(runner, &ids, Some(id), AFTER)?;
    let report = runner.report(id)?;
    if report.commits.len() != usize::from(arm != "none") {
        let (found, expected) = (format!("{:?}", report.kept), "a commit".into());
        return Err(Error::Config { setting: "the arm", found, expected });
    }
    ids.push(id);
    ids.into_iter().try_for_each(|id| runner.free(id))?;
    let slowest = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
    Ok([median(&before), slowest(&before), slowest(&after).max(first), median(&after)])
}

fn steps(runner: &mut Runner, others: &[SequenceId], long: Option<SequenceId>, count: usize) -> Result<Vec<f64>> {
    let next = [token(5)];
    (0..count).map(|_| step(runner, others, long.map(|id| (id, next.as_slice(), Phase::Decode)))).collect()
}

fn step(runner: &mut Runner, others: &[SequenceId], long: Option<(SequenceId, &[u32], Phase)>) -> Result<f64> {
    let next = [token(5)];
    let decode = |sequence| (sequence, next.as_slice(), Phase::Decode);
    let work: Vec<Work<'_>> = others
        .iter()
        .copied()
        .map(decode)
        .chain(long)
        .map(|(sequence, tokens, phase)| Work {
            sequence,
            tokens,
            phase,
            prompt_ends: phase == Phase::Prefill,
            logits: Logits::Last,
        })
        .collect();
    let start = Instant::now();
    runner.step(&work)?;
    Ok(1e3 * start.elapsed().as_secs_f64())
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}
