//! What hooks cost decode, and what a cut saves, on the real model.
//!
//! Candidates decode the same tokens one step each in turn, beginning with another one in each round, each in a runner of its
//! own within one process. A round gives one ratio for each; the table shows their median and its 95 % interval (order
//! statistics: no assumption on the distribution). `again` is the first candidate once more: what the method itself
//! finds where there is no difference.
//!
//! Gates, on the median: `noop`, which observes every layer of every step, less than 1 %; a runner with plugins switched on
//! but no arms, against one without, less than 1 % (nothing that can be told from `again`); decode after a cut to n entries
//! within 5 % of decode at a native length of n.

use std::process::ExitCode;
use std::sync::Arc;

use kvhook_bench::measure::{Gates, Interval, median, print_machine, time};
use kvhook_bench::{Result, error, model};
use kvhook_engine::rank::Phase;
use kvhook_engine::runner::{Logits, Work};
use kvhook_engine::{CacheConfig, CacheKind, Model, Runner, SequenceId};

const PROMPT: usize = 1500;
const CUT: usize = 256;
const PAGED: CacheKind = CacheKind::Paged { block_size: 16, blocks: 256 };

/// A sequence in a runner of its own.
struct Candidate {
    name: &'static str,
    runner: Runner,
    sequence: SequenceId,
    /// Seconds of each step.
    steps: Vec<f64>,
}

impl Candidate {
    fn new(name: &'static str, mut runner: Runner, prompt: &[u32]) -> Result<Self> {
        let (sequence, _) = runner.prefill(prompt, 512)?;
        Ok(Self { name, runner, sequence, steps: Vec::new() })
    }

    fn step(&mut self, token: u32) -> Result<()> {
        let work = Work {
            sequence: self.sequence,
            tokens: &[token],
            phase: Phase::Decode,
            prompt_ends: false,
            logits: Logits::Last,
        };
        let mut stepped = Ok(Vec::new());
        let took = time(|| stepped = self.runner.step(&[work]));
        stepped?;
        self.steps.push(took.as_secs_f64());
        Ok(())
    }
}

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    let rounds = std::env::args().filter_map(|text| text.parse().ok()).next().unwrap_or(300);
    let model = model::load()?;
    let text = model::novel(&model, PROMPT + rounds + WARM_UP)?;
    let mut gates = Gates::default();
    print_machine();
    hooks(&model, &text, rounds, &mut gates)?;
    for (kind, name) in [(CacheKind::Contiguous, "contiguous"), (PAGED, "paged")] {
        cut(&model, &text, rounds / 2, kind, name, &mut gates)?;
    }
    Ok(gates)
}

/// Steps before those that are measured.
const WARM_UP: usize = 8;

fn hooks(model: &Arc<Model>, text: &[u32], rounds: usize, gates: &mut Gates) -> Result<()> {
    let (prompt, answer) = text.split_at(1024);
    let cache = CacheConfig::default();
    let plain = || -> Result<Runner> { Ok(Runner::new(Arc::clone(model), cache)?) };
    let mut candidates = [
        Candidate::new("no plugins", plain()?, prompt)?,
        Candidate::new("again", plain()?, prompt)?,
        Candidate::new("no arms", model::runner(model, cache, &[])?, prompt)?,
        Candidate::new("noop", model::runner(model, cache, &[("noop", "noop", "observe=all")])?, prompt)?,
    ];
    take_turns(&mut candidates, answer, rounds)?;
    println!("\ndecode behind {} tokens, contiguous f32, {rounds} rounds", prompt.len());
    let (first, others) = candidates.split_at(1);
    print_first(&first[0]);
    for candidate in others {
        let more = Interval::of_percent(&first[0].steps, &candidate.steps);
        let verdict = match candidate.name {
            "again" => "",
            _ => gates.check(more.median < 1.0),
        };
        print_other(candidate, &more, verdict);
    }
    Ok(())
}

fn cut(model: &Arc<Model>, text: &[u32], rounds: usize, kind: CacheKind, name: &str, gates: &mut Gates) -> Result<()> {
    let (prompt, answer) = text.split_at(PROMPT);
    let cache = CacheConfig { kind, ..CacheConfig::default() };
    let config = format!("budget={CUT},history=top,importance=key_diff");
    let plain = || -> Result<Runner> { Ok(Runner::new(Arc::clone(model), cache)?) };
    let mut candidates = [
        Candidate::new("native 256", plain()?, &prompt[..CUT])?,
        Candidate::new("again", plain()?, &prompt[..CUT])?,
        Candidate::new("1500 cut to 256", model::runner(model, cache, &[("cut", "truncate", &config)])?, prompt)?,
        Candidate::new("1500 uncut", plain()?, prompt)?,
    ];
    let lengths = candidates[2].runner.report(candidates[2].sequence)?.lengths;
    assert!(lengths.iter().all(|&length| length == CUT), "{lengths:?}: expected a cut to {CUT} entries");
    take_turns(&mut candidates, answer, rounds)?;
    println!("\ndecode after a cut, {name} f32, {rounds} rounds");
    let (first, others) = candidates.split_at(1);
    print_first(&first[0]);
    for candidate in others {
        let more = Interval::of_percent(&first[0].steps, &candidate.steps);
        let verdict = match candidate.name {
            "1500 cut to 256" => gates.check(more.median.abs() <= 5.0),
            _ => "",
        };
        print_other(candidate, &more, verdict);
    }
    Ok(())
}

fn take_turns(candidates: &mut [Candidate], answer: &[u32], rounds: usize) -> Result<()> {
    let count = candidates.len();
    for (round, &token) in answer.iter().take(WARM_UP + rounds).enumerate() {
        for turn in 0..count {
            candidates[(round + turn) % count].step(token)?;
        }
    }
    candidates.iter_mut().for_each(|candidate| drop(candidate.steps.drain(..WARM_UP)));
    Ok(())
}

fn print_first(candidate: &Candidate) {
    println!("{:18} {:7.2} ms a step", candidate.name, 1e3 * median(&candidate.steps));
}

fn print_other(candidate: &Candidate, more: &Interval, verdict: &str) {
    let Interval { low, median: middle, high } = more;
    let step = 1e3 * median(&candidate.steps);
    println!("{:18} {step:7.2} ms a step  {middle:+6.2} %  [{low:+.2}, {high:+.2}]  {verdict}", candidate.name);
}
