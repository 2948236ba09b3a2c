//! Time that a plugin takes, told apart from time that it waits for a processor.

use std::fs;
use std::time::{Duration, Instant};

/// How much longer than its limit of processor time something may take by the clock, since other programs run too.
const PATIENCE: u32 = 20;
/// What the kernel counts processor time in, in `/proc` (`USER_HZ` is 100 wherever Linux runs).
const TICK: Duration = Duration::from_millis(10);

/// A moment from which time is counted.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Instant,
    processor: Option<Duration>,
}

impl Clock {
    /// Now.
    pub fn start() -> Self {
        Self { processor: processor_time(), wall: Instant::now() }
    }

    /// Time by the clock since then.
    pub fn elapsed(&self) -> Duration {
        self.wall.elapsed()
    }

    /// Processor time of this process since then, in steps of 10 ms, but no more than the clock says: other threads of the
    /// process count too. By the clock where the system does not tell.
    pub fn busy(&self) -> Duration {
        let wall = self.elapsed();
        match (self.processor, processor_time()) {
            (Some(before), Some(now)) => now.saturating_sub(before).min(wall),
            _ => wall,
        }
    }

    /// The time since then, where more processor time than `limit` was used, or far more passed.
    pub fn over(&self, limit: Duration) -> Option<Duration> {
        let (busy, wall) = (self.busy(), self.elapsed());
        if busy > limit { Some(busy) } else { (wall > limit * PATIENCE).then_some(wall) }
    }
}

/// Processor time of all threads of this process so far, also of those that ended.
fn processor_time() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name in brackets may hold anything; `utime` and `stime` are the 12th and 13th field behind it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11);
    let mut ticks = || times.next()?.parse::<u32>().ok();
    Some(TICK * (ticks()? + ticks()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_counts_and_waiting_does_not() {
        let clock = Clock::start();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(clock.over(Duration::from_millis(250)), None);
        let mut work = 0u64;
        while clock.busy() < Duration::from_millis(250) {
            work = std::hint::black_box(work + 1);
        }
        assert!(clock.over(Duration::from_millis(200)).is_some());
    }
}
