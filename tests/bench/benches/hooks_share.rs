//! The whole `truncate` hook in percent of prefill, by importance, on the real model.
//!
//! A quarter is kept. The hook is everything that the arm's figures count: `bound`, `before_attention` (which keeps the last
//! queries for `attention`), `on_prefill_done` (scores, choice) and the host's commit. What it is compared with is the
//! median prefill of the same tokens, over all arms and none, less the hook. The gate is a tenth: a prompt is read once, and
//! hooks that cost more would take back what they save.

use std::process::ExitCode;
use std::time::Duration;

use kvhook_bench::measure::{Gates, median, print_machine, time};
use kvhook_bench::{Result, error, model};
use kvhook_engine::hooks::Figures;
use kvhook_engine::{Begin, CacheConfig, Runner};

/// Most of the prefill's time, in percent.
const GATE: f64 = 10.0;

const ARMS: [(&str, &str, &str); 7] = [
    ("recent", "truncate", "keep=0.25,history=none"),
    ("stride", "truncate", "keep=0.25,history=stride"),
    ("key_norm", "truncate", "keep=0.25,history=top,importance=key_norm"),
    ("key_diff", "truncate", "keep=0.25,history=top,importance=key_diff"),
    ("attention", "truncate", "keep=0.25,history=top,importance=attention"),
    ("sample-uniform", "truncate", "keep=0.25,history=sample,importance=uniform"),
    ("sample-key_diff", "truncate", "keep=0.25,history=sample,importance=key_diff"),
];

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    let model = model::load()?;
    let mut gates = Gates::default();
    print_machine();
    for (tokens, rounds) in [(1024, 5), (4096, 1)] {
        let prompt = model::novel(&model, tokens)?;
        let mut runner = model::runner(&model, CacheConfig::default(), &ARMS)?;
        let mut plain = Vec::new();
        for _ in 0..rounds {
            for arm in ["none"].into_iter().chain(ARMS.map(|(arm, ..)| arm)) {
                let before = whole(&figures(&runner, arm)?);
                let took = prefill(&mut runner, &prompt, arm)?;
                plain.push((took - (whole(&figures(&runner, arm)?) - before)).as_secs_f64());
            }
        }
        let plain = 1e3 * median(&plain);
        println!("\nprefill of {tokens} tokens, contiguous f32, {rounds} rounds: {plain:.0} ms");
        println!(
            "{:16} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10}",
            "importance", "observe", "score", "commit", "rest", "whole ms", "of prefill"
        );
        for (arm, ..) in ARMS {
            line(&runner, arm, rounds, plain, &mut gates)?;
        }
    }
    Ok(gates)
}

/// Time of a prefill on an arm; the sequence is freed.
fn prefill(runner: &mut Runner, prompt: &[u32], arm: &str) -> Result<Duration> {
    let begin = Begin { arm: Some(arm), ..Begin::new(prompt) };
    let mut done = None;
    let took = time(|| done = Some(runner.prefill_on(&begin, 512)));
    if let Some(done) = done {
        runner.free(done?.0)?;
    }
    Ok(took)
}

/// Of an arm; of `none`, zeroes.
fn figures(runner: &Runner, arm: &str) -> Result<Figures> {
    match runner.plugins().filter(|_| arm != "none") {
        Some(plugins) => Ok(plugins.figures(arm)?),
        None => Ok(Figures::default()),
    }
}

/// Time of the whole hook.
fn whole(figures: &Figures) -> Duration {
    let Figures { bound, before_attention, on_prefill_done, on_free, commit, .. } = figures;
    bound.total + before_attention.total + on_prefill_done.total + on_free.total + commit.total
}

fn line(runner: &Runner, arm: &str, rounds: usize, plain: f64, gates: &mut Gates) -> Result<()> {
    let figures = figures(runner, arm)?;
    let ms = |time: Duration| 1e3 * time.as_secs_f64() / rounds as f64;
    let whole = ms(whole(&figures));
    let share = 100.0 * whole / plain;
    println!(
        "{arm:16} {:9.2} {:9.2} {:9.2} {:9.2} {whole:9.2} {share:8.2} % {}",
        ms(figures.before_attention.total),
        ms(figures.on_prefill_done.total),
        ms(figures.commit.total),
        ms(figures.bound.total + figures.on_free.total),
        gates.check(share <= GATE && figures.commits == rounds as u64),
    );
    Ok(())
}
