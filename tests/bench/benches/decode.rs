//! What hooks cost decode, and what a cut saves, on the real model.
//!
//! Candidates decode the same tokens one step each in turn, in an order drawn anew for each round, each in a runner of its own
//! within one process. A round gives one ratio for each; the table shows their median and its 95 % interval (order
//! statistics: no assumption on the distribution). What they are compared with is there twice, `again` being the second:
//! the mean of the two is the base of all ratios, and the ratio of the second to the first is what the method itself finds
//! where there is no difference.
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
    let rounds = std::env::args().filter_map(|text| text.parse().ok()).next().unwrap_or(600);
    let model = model::load()?;
    let text = model::novel(&model, PROMPT + rounds + WARM_UP)?;
    let mut gates = Gates::default();
    print_machine();
    hooks(&model, &text, rounds, &mut gates)?;
    for (kind, name) in [(CacheKind::Contiguous, "contiguous"), (PAGED, "paged")] {
        cut(&model, &text, rounds / 4, kind, name, &mut gates)?;
    }
    Ok(gates)
}

/// Steps before those that are measured.
const WARM_UP: usize = 8;

/// Sets of runners, made anew in another order: where in memory a runner's cache happens to lie can cost as much as what is
/// looked for here.
const SETS: usize = 6;

fn hooks(model: &Arc<Model>, text: &[u32], rounds: usize, gates: &mut Gates) -> Result<()> {
    let (prompt, answer) = text.split_at(1024);
    let cache = CacheConfig::default();
    let plain = || -> Result<Runner> { Ok(Runner::new(Arc::clone(model), cache)?) };
    let make = |name| -> Result<Candidate> {
        let runner = match name {
            "no arms" => model::runner(model, cache, &[])?,
            "noop" => model::runner(model, cache, &[("noop", "noop", "observe=all")])?,
            _ => plain()?,
        };
        Candidate::new(name, runner, prompt)
    };
    let names = ["no plugins", "again", "no arms", "noop"];
    let mut steps = vec![Vec::new(); names.len()];
    for set in 0..SETS {
        let order: Vec<usize> = (0..names.len()).map(|place| (place + set) % names.len()).collect();
        let mut candidates = order.iter().map(|&which| make(names[which])).collect::<Result<Vec<_>>>()?;
        take_turns(&mut candidates, answer, rounds / SETS)?;
        for (which, candidate) in order.into_iter().zip(candidates) {
            steps[which].extend(candidate.steps);
        }
    }
    println!("\ndecode behind {} tokens, contiguous f32, {SETS} sets of {} rounds", prompt.len(), rounds / SETS);
    let named: Vec<(&str, &[f64])> = names.into_iter().zip(steps.iter().map(Vec::as_slice)).collect();
    print(&named, |name, more| match name {
        "again" => "",
        _ => gates.check(more.median < 1.0),
    });
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
    let named: Vec<(&str, &[f64])> = candidates.iter().map(|each| (each.name, each.steps.as_slice())).collect();
    print(&named, |name, more| match name {
        "1500 cut to 256" => gates.check(more.median.abs() <= 5.0),
        _ => "",
    });
    Ok(())
}

fn take_turns(candidates: &mut [Candidate], answer: &[u32], rounds: usize) -> Result<()> {
    let count = candidates.len();
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = 1u64;
    for &token in answer.iter().take(WARM_UP + rounds) {
        for place in (1..count).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(place, (random >> 33) as usize % (place + 1));
        }
        for &turn in &order {
            candidates[turn].step(token)?;
        }
    }
    candidates.iter_mut().for_each(|candidate| drop(candidate.steps.drain(..WARM_UP)));
    Ok(())
}

/// Prints candidates with their steps' seconds, of which the first two are the same thing twice.
fn print(candidates: &[(&str, &[f64])], mut verdict: impl FnMut(&str, &Interval) -> &'static str) {
    let [(_, first), (_, second), ..] = candidates else { return };
    let base: Vec<f64> = first.iter().zip(*second).map(|(first, second)| (first + second) / 2.0).collect();
    for (place, (name, steps)) in candidates.iter().enumerate() {
        let step = 1e3 * median(steps);
        if place == 0 {
            println!("{name:18} {step:7.2} ms a step");
            continue;
        }
        let more = Interval::of_percent(if place == 1 { first } else { &base }, steps);
        let verdict = verdict(name, &more);
        let Interval { low, median: middle, high } = more;
        println!("{name:18} {step:7.2} ms a step  {middle:+6.2} %  [{low:+.2}, {high:+.2}]  {verdict}");
    }
}
