//! Measuring: interleaved runs, medians, and a plain memcpy to compare with.

#![allow(dead_code, reason = "each benchmark uses a part of it")]

use std::time::{Duration, Instant};

use kvhook_kernels::parallel;

/// Runs of each candidate.
pub const RUNS: usize = 9;

/// Cores, and so threads.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// Time of one call.
pub fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// The middle one.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Times of two candidates that take turns.
pub struct Turns {
    /// Median of the first.
    pub first: Duration,
    /// Median of the second.
    pub second: Duration,
    /// Median of how many times as long as the second the first took, turn by turn: what slows down the machine for a
    /// while slows down both.
    pub ratio: f64,
}

/// Lets two candidates take turns, after one run of each to warm up.
pub fn take_turns(mut first: impl FnMut(), mut second: impl FnMut()) -> Turns {
    first();
    second();
    let turns: Vec<_> = (0..RUNS).map(|_| (time(&mut first), time(&mut second))).collect();
    let mut ratios: Vec<f64> = turns.iter().map(|(first, second)| first.as_secs_f64() / second.as_secs_f64()).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let (firsts, seconds) = turns.into_iter().unzip();
    Turns { first: median(firsts), second: median(seconds), ratio: ratios[RUNS / 2] }
}

/// Bytes over time.
pub fn gigabytes_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

/// Copies `bytes` from one half of `memory` to the other: one contiguous memcpy for each core.
pub fn memcpy(memory: &mut [u8], bytes: usize) {
    let (source, destination) = memory.split_at_mut(memory.len() / 2);
    let part = bytes.div_ceil(cores());
    let tasks = source[..bytes].chunks(part).zip(destination[..bytes].chunks_mut(part)).collect();
    let done: Result<(), ()> = parallel::for_each_on(cores(), tasks, |(source, destination): (&[u8], &mut [u8])| {
        destination.copy_from_slice(source);
        Ok(())
    });
    done.expect("copies do not fail");
}

/// Numbers that look random, the same in each run.
pub struct Random(pub u64);

impl Random {
    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }

    /// `count` of `length` tokens, ascending.
    pub fn subset(&mut self, length: usize, count: usize) -> Vec<u32> {
        let mut left = count;
        (0..length as u32)
            .filter(|&token| {
                let take = self.below(length - token as usize) < left;
                left -= usize::from(take);
                take
            })
            .collect()
    }
}
