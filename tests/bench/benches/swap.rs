//! What a swap costs the path that serves.
//!
//! One thread serves: begin, ask, prepare, commit and free of one small sequence after another, with 64 and with 1,024
//! others live, all of which move to the new instances. A second thread gives the arm new instances, again and again: it
//! reads and hashes the plugin's file, makes the instances, exchanges them and moves the sequences. For each swap the
//! longest call that it overlaps is noted. For comparison the second thread reads and hashes the same file without any
//! swap, in turns, so that what the machine itself does to a thread is in both.
//!
//! The gate is the goal for a pause: the median over the swaps is at most 50 us above that without. The other quantiles
//! are those of the machine's scheduler, too, as the second row shows, and are not gated.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kvhook_bench::measure::{Gates, print_machine};
use kvhook_bench::rig::{Operator, Rig, Shape};
use kvhook_bench::{Error, Result, error, model};

/// Most by which a swap may delay a call, in us.
const GATE: f64 = 50.0;
/// Swaps, and as many times without.
const ROUNDS: usize = 300;
const SHAPE: Shape = Shape { name: "small", layers: 2, kv_heads: 2, head_dim: 8, length: 64, block_size: 0 };
const CONFIG: &str = "keep=0.5,sinks=2,recent=4";
const REPLACE: &str = r#"{"changes": [{"replace": {"name": "arm"}}]}"#;

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    let mut gates = Gates::default();
    print_machine();
    println!("longest call while the other thread is at work, {ROUNDS} times each; us");
    println!(
        "{:>5} {:16} {:>8} {:>8} {:>8} {:>8} {:>12}",
        "live", "other thread", "p50", "p90", "p99", "max", "its work, ms"
    );
    for live in [64, 1024] {
        let rig = Rig::new(SHAPE, CONFIG)?;
        rig.hold(live)?;
        let [swap, read] = measure(rig)?;
        let (above, verdict) =
            (swap.longest(0.5) - read.longest(0.5), gates.check(swap.longest(0.5) - read.longest(0.5) <= GATE));
        read.print(live, "reads and hashes", "");
        swap.print(live, "swaps", &format!("{above:+.1} us of {GATE} {verdict}"));
    }
    Ok(gates)
}

/// Times at which the other thread was at work.
type Windows = Mutex<Vec<(Instant, Instant)>>;

/// For each time that the other thread was at work, the longest call of the serving one, and how long the work took; both
/// in us.
struct Seen(Vec<(f64, f64)>);

impl Seen {
    /// A quantile of the longest calls.
    fn longest(&self, quantile: f64) -> f64 {
        let mut longest: Vec<f64> = self.0.iter().map(|seen| seen.0).collect();
        longest.sort_unstable_by(f64::total_cmp);
        longest.get((longest.len() as f64 * quantile) as usize).or(longest.last()).copied().unwrap_or(0.0)
    }

    fn print(&self, live: usize, name: &str, verdict: &str) {
        let work = self.0.iter().map(|seen| seen.1).sum::<f64>() / self.0.len().max(1) as f64 / 1e3;
        let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|quantile| self.longest(quantile));
        println!("{live:5} {name:16} {p50:8.1} {p90:8.1} {p99:8.1} {max:8.1} {work:12.1} {verdict}");
    }
}

/// With swaps, and with the file read only.
fn measure(mut rig: Rig) -> Result<[Seen; 2]> {
    let (done, windows): (AtomicBool, [Windows; 2]) = (AtomicBool::new(false), Default::default());
    let operator = rig.operator();
    let mut calls = Vec::with_capacity(1 << 20);
    std::thread::scope(|scope| -> Result<()> {
        let other = scope.spawn(|| {
            let worked = work(operator, &windows);
            done.store(true, Relaxed);
            worked
        });
        let mut served = Ok(());
        while !done.load(Relaxed) && served.is_ok() {
            let start = Instant::now();
            served = rig.compress().map(drop);
            calls.push((start, Instant::now()));
        }
        // A thread that panicked measured nothing.
        let worked = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        served.and(worked)
    })?;
    Ok(windows.map(|windows| seen(&calls, &windows.into_inner().unwrap_or_default())))
}

fn work(operator: Operator, windows: &[Windows; 2]) -> Result<()> {
    let path = model::plugin_folder().join("libkvhook_truncate.so");
    for round in 0..2 * ROUNDS {
        let start = Instant::now();
        if round % 2 == 0 {
            // SAFETY: the rig lives until this thread is joined.
            unsafe { operator.control(REPLACE)? };
        } else {
            let bytes = std::fs::read(&path).map_err(|source| Error::File { path: path.clone(), source })?;
            std::hint::black_box(kvhook_host::load::ContentHash::of(&bytes));
        }
        if let Ok(mut windows) = windows[round % 2].lock() {
            windows.push((start, Instant::now()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The longest call that overlaps each window. Calls follow one another.
fn seen(calls: &[(Instant, Instant)], windows: &[(Instant, Instant)]) -> Seen {
    let micros = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e6;
    let of = |&(start, end): &(Instant, Instant)| {
        let first = calls.partition_point(|call| call.1 < start);
        let within = calls[first..].iter().take_while(|call| call.0 <= end);
        let longest = within.map(|call| micros(call.0, call.1)).fold(0.0, f64::max);
        (longest, micros(start, end))
    };
    Seen(windows.iter().map(of).collect())
}
