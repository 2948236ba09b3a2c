//! Where a cache lies, and how time is taken there.

use core::ffi::c_void;

use kvhook_abi::raw::KvhDevice;
use kvhook_host::raw::KvhookCallbacks;

use super::cache::Cache;
use super::error::BenchError;
use super::report::Hardware;
use super::rows::Row;

/// Calls that are timed for each row.
pub const RUNS: usize = 50;
/// Calls before them.
pub const WARM_UP: usize = 3;
/// How long a verdict is waited for.
pub const PATIENCE_SECONDS: u64 = 20;

/// One compression of everything in a cache, again and again.
///
/// Where the host has to look at what the device found before the rest can be enqueued, that splits the work in two.
pub trait Work {
    /// Makes the cache what it was, and begins sequences. Not timed.
    ///
    /// # Errors
    /// What the machine, the host or the plugin say.
    fn set_up(&mut self) -> Result<(), BenchError>;

    /// Enqueues the first half.
    ///
    /// # Errors
    /// As above.
    fn prepare(&mut self) -> Result<(), BenchError>;

    /// Whether the second half may be enqueued.
    ///
    /// # Errors
    /// As above.
    fn is_ready(&mut self) -> Result<bool, BenchError> {
        Ok(true)
    }

    /// Enqueues the second half.
    ///
    /// # Errors
    /// As above.
    fn commit(&mut self) -> Result<(), BenchError> {
        Ok(())
    }

    /// Gives up between the halves. Not timed.
    ///
    /// # Errors
    /// As above.
    fn abandon(&mut self) -> Result<(), BenchError> {
        Ok(())
    }

    /// Mean seconds of a plugin in each call so far; none without one.
    fn in_plugin(&self) -> Option<f64> {
        None
    }

    /// Ends the sequences. Not timed.
    ///
    /// # Errors
    /// As above.
    fn tear_down(&mut self) -> Result<(), BenchError> {
        Ok(())
    }
}

/// A middle and a spread, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Samples.
    pub n: usize,
}

impl Spread {
    /// Of samples; zeros of none. Percentiles are samples: the one at a share of `n`, rounded down.
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let n = samples.len();
        let at =
            |share: f64| samples.get(((n as f64 * share) as usize).min(n.saturating_sub(1))).copied().unwrap_or(0.0);
        Self { median: at(0.5), p10: at(0.1), p90: at(0.9), n }
    }
}

/// What a call puts on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launches {
    /// Kernels.
    pub kernels: usize,
    /// Memory that is set.
    pub memsets: usize,
    /// Memory that is copied.
    pub copies: usize,
}

/// What one row takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Time of the device. The stream is held until a half is enqueued, so there are no gaps of the host's in it.
    pub device: Spread,
    /// From the first half's begin to the second one's end on the device, with nothing held: gaps, and the wait for the
    /// verdict, count.
    pub whole: Spread,
    /// Time of the host, to enqueue both halves.
    pub host: Spread,
    /// The second half's part of it.
    pub host_commit: Spread,
    /// None where nothing is launched, or it cannot be counted.
    pub launches: Option<Launches>,
}

/// Ordinary memory or a device.
pub trait Machine {
    /// What it is, for the report.
    fn describe(&self) -> Hardware;

    /// As a model names it.
    fn device(&self) -> KvhDevice;

    /// The stream that takes all work; null in ordinary memory.
    fn stream(&self) -> *mut c_void;

    /// The memory that a host gets. Callable as long as the machine lives.
    fn callbacks(&self) -> KvhookCallbacks;

    /// Exponentials a second, if a floor counts them.
    fn exponentials(&self) -> Option<f64>;

    /// Bytes a second, read and written, of a large copy.
    ///
    /// # Errors
    /// Those of memory and driver.
    fn copy_bandwidth(&self) -> Result<f64, BenchError>;

    /// An address of memory at a multiple of 256 bytes.
    ///
    /// # Errors
    /// [`BenchError::Memory`].
    fn allocate(&self, bytes: usize) -> Result<u64, BenchError>;

    /// Gives it back; nothing uses it any more.
    fn free(&self, address: u64, bytes: usize);

    /// Copies to memory that came from [`Machine::allocate`], and waits for it.
    ///
    /// # Errors
    /// Those of the driver.
    fn write(&self, memory: &Memory<'_>, bytes: &[u8]) -> Result<(), BenchError>;

    /// Fills memory with random bf16, the same each time; on a device in the stream's order.
    ///
    /// # Errors
    /// Those of the driver.
    fn refill(&self, memory: &Memory<'_>) -> Result<(), BenchError>;

    /// The kernels alone: rows by given indices, with `top_k` also the choice of them.
    ///
    /// # Errors
    /// Those of memory and driver.
    fn moves<'a>(&'a self, cache: &'a Cache<'a>, row: &Row, top_k: bool) -> Result<Box<dyn Work + 'a>, BenchError>;

    /// Times work.
    ///
    /// # Errors
    /// What the work says; those of the driver.
    fn measure(&self, work: &mut dyn Work) -> Result<Measured, BenchError>;
}

/// Memory of a machine.
pub struct Memory<'a> {
    machine: &'a dyn Machine,
    /// Where it begins.
    pub address: u64,
    /// Its length.
    pub bytes: usize,
}

impl<'a> Memory<'a> {
    /// Fresh memory.
    ///
    /// # Errors
    /// [`BenchError::Memory`].
    pub fn new(machine: &'a dyn Machine, bytes: usize) -> Result<Self, BenchError> {
        Ok(Self { machine, address: machine.allocate(bytes)?, bytes })
    }

    /// Memory with a content.
    ///
    /// # Errors
    /// [`BenchError::Memory`]; those of the driver.
    pub fn of(machine: &'a dyn Machine, words: &[u32]) -> Result<Self, BenchError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let memory = Self::new(machine, bytes.len())?;
        machine.write(&memory, &bytes)?;
        Ok(memory)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        self.machine.free(self.address, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_of_known_samples() {
        let spread = Spread::of((1..=50).rev().map(f64::from).collect());
        assert_eq!(spread, Spread { median: 26.0, p10: 6.0, p90: 46.0, n: 50 });
        assert_eq!(Spread::of(vec![3.0]), Spread { median: 3.0, p10: 3.0, p90: 3.0, n: 1 });
        assert_eq!(Spread::of(Vec::new()).n, 0);
    }
}
