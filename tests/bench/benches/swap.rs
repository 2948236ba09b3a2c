//! What a swap costs the path that serves.
//!
//! One thread serves: begin, ask, prepare, commit and free of one small sequence after another, with 64 and with 1,024
//! others live, all of which move to the new instances. A second thread gives the arm new instances, again and again: they
//! are made, exchanged, the sequences moved one by one, and the old ones told of each. For each swap the longest call is
//! noted that overlaps it. In turns, the second thread spins for as long instead. (A plugin's file is read and hashed before
//! all that, with no lock that the serving path takes, and is not part of this.)
//!
//! Where another program took a core away from either thread meanwhile, the round is left out: that is a pause of the
//! machine's. The gate is the goal: the median over the swaps is at most 50 us above that without.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kvhook_abi::raw::KvhPluginEntry;
use kvhook_bench::measure::{Gates, print_machine};
use kvhook_bench::rig::{Operator, Rig, Shape};
use kvhook_bench::{Result, error, model};

/// Most by which a swap may delay a call, in us.
const GATE: f64 = 50.0;
/// Swaps, and as many times without.
const ROUNDS: usize = 2000;
const SHAPE: Shape = Shape { name: "small", layers: 2, kv_heads: 2, head_dim: 8, length: 64, block_size: 0 };
const CONFIG: &str = "keep=0.5,sinks=2,recent=4";

fn main() -> ExitCode {
    error::exit(run())
}

fn run() -> Result<Gates> {
    // SAFETY: the plugin's library, which the host loads, too.
    let library = unsafe { libloading::Library::new(model::plugin_folder().join("libkvhook_truncate.so"))? };
    // SAFETY: its type in the contract; the entry is static, and the library stays loaded.
    let entry = unsafe { library.get::<unsafe extern "C" fn() -> *const KvhPluginEntry>("kvh_plugin_entry_v1")?() };
    let mut gates = Gates::default();
    print_machine();
    println!("longest call while the other thread is at work, {ROUNDS} times each; us");
    println!(
        "{:>5} {:12} {:>7} {:>8} {:>8} {:>8} {:>8} {:>9}",
        "live", "other thread", "rounds", "p50", "p90", "p99", "max", "its work"
    );
    for live in [64, 1024] {
        let rig = Rig::new(SHAPE, CONFIG)?;
        rig.hold(live)?;
        let [swap, spin] = measure(rig, Entry(entry))?;
        let above = swap.longest(0.5) - spin.longest(0.5);
        let verdict = gates.check(above <= GATE);
        spin.print(live, "spins", "");
        swap.print(live, "swaps", &format!("{above:+.1} us of {GATE} {verdict}"));
    }
    Ok(gates)
}

#[derive(Clone, Copy)]
struct Entry(*const KvhPluginEntry);

// SAFETY: a static that nobody writes.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// Something that a thread did, and how often a core had been taken away from it when it was done.
#[derive(Clone, Copy)]
struct Done {
    start: Instant,
    end: Instant,
    preempted: i64,
}

impl Done {
    fn now(start: Instant) -> Self {
        Self { start, end: Instant::now(), preempted: preempted() }
    }

    fn micros(&self) -> f64 {
        (self.end - self.start).as_secs_f64() * 1e6
    }
}

/// For each round, the longest call of the serving thread, and how long the other one's work took; both in us.
struct Seen(Vec<(f64, f64)>);

impl Seen {
    /// The longest call that overlaps each round; calls follow one another.
    fn of(calls: &[Done], rounds: &[(Done, i64)]) -> Self {
        let of = |(round, before): &(Done, i64)| {
            let first = calls.partition_point(|call| call.end < round.start);
            let last = calls.partition_point(|call| call.start <= round.end);
            let within = calls.get(first..last)?;
            let undisturbed =
                first.checked_sub(1).and_then(|place| calls.get(place))?.preempted == within.last()?.preempted;
            let longest = within.iter().map(Done::micros).fold(0.0, f64::max);
            (undisturbed && round.preempted == *before).then_some((longest, round.micros()))
        };
        Self(rounds.iter().filter_map(of).collect())
    }

    /// A quantile of the longest calls.
    fn longest(&self, quantile: f64) -> f64 {
        Self::quantile(self.0.iter().map(|seen| seen.0), quantile)
    }

    fn quantile(values: impl Iterator<Item = f64>, quantile: f64) -> f64 {
        let mut values: Vec<f64> = values.collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get((values.len() as f64 * quantile) as usize).or(values.last()).copied().unwrap_or(0.0)
    }

    fn print(&self, live: usize, name: &str, verdict: &str) {
        let work = Self::quantile(self.0.iter().map(|seen| seen.1), 0.5);
        let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|quantile| self.longest(quantile));
        let rounds = self.0.len();
        println!("{live:5} {name:12} {rounds:7} {p50:8.1} {p90:8.1} {p99:8.1} {max:8.1} {work:9.1} {verdict}");
    }
}

/// With swaps, and without.
fn measure(mut rig: Rig, entry: Entry) -> Result<[Seen; 2]> {
    let done = AtomicBool::new(false);
    let operator = rig.operator();
    let mut calls = Vec::with_capacity(1 << 22);
    let rounds = std::thread::scope(|scope| -> Result<_> {
        let other = scope.spawn(|| {
            let worked = work(operator, entry);
            done.store(true, Relaxed);
            worked
        });
        let mut served = Ok(());
        while !done.load(Relaxed) && served.is_ok() {
            let start = Instant::now();
            served = rig.compress().map(drop);
            calls.push(Done::now(start));
        }
        // A thread that panicked measured nothing.
        let worked = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        served.and(worked)
    })?;
    Ok(rounds.map(|rounds| Seen::of(&calls, &rounds)))
}

fn work(operator: Operator, entry: Entry) -> Result<[Vec<(Done, i64)>; 2]> {
    let mut rounds = [Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS)];
    for _ in 0..ROUNDS {
        let (before, start) = (preempted(), Instant::now());
        // SAFETY: the rig lives until this thread is joined; the entry is the plugin's.
        unsafe { operator.swap(CONFIG, entry.0)? };
        let swapped = Done::now(start);
        rounds[0].push((swapped, before));
        std::thread::sleep(Duration::from_micros(500));
        let (before, start) = (preempted(), Instant::now());
        while start.elapsed() < swapped.end - swapped.start {
            std::hint::spin_loop();
        }
        rounds[1].push((Done::now(start), before));
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(rounds)
}

/// How often a core was taken away from this thread.
fn preempted() -> i64 {
    let mut usage = [0i64; 18];
    // SAFETY: Linux's `struct rusage` of a 64-bit machine is 18 words; 1 is RUSAGE_THREAD.
    unsafe { getrusage(1, usage.as_mut_ptr()) };
    // The last of them is `ru_nivcsw`.
    usage[17]
}

unsafe extern "C" {
    fn getrusage(who: i32, usage: *mut i64) -> i32;
}
