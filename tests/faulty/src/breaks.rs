//! Ways to break a conformance rule that are not a wrong plan or a failing function.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::Duration;

use kvhook_abi::kernels::KernelError;
use kvhook_abi::{Call, Memory, PluginError, SequenceView};

kvhook_abi::words! {
    /// What an instance does that no plugin may.
    pub enum Breaks {
        /// Nothing.
        Nothing = "nothing",
        /// Its plan depends on what other instances did.
        Independence = "independence",
        /// Its bound depends on the order of calls.
        Bound = "bound",
        /// Its plan depends on the layout.
        Layout = "layout",
        /// Its plan depends on the sequence's name.
        Uid = "uid",
        /// Its plan depends on the thread.
        Thread = "thread",
        /// It panics where memory is refused.
        Memory = "memory",
        /// It panics where a key is not a number.
        Numbers = "numbers",
        /// It panics at the last possible name of a sequence.
        Strange = "strange",
        /// It remembers a sequence that is over.
        Free = "free",
        /// It is slow to make.
        Time = "time",
        /// It writes to memory that is not there.
        Crash = "crash",
        /// It never returns.
        Hang = "hang",
        /// It ends the process.
        Exit = "exit",
    }
}

/// Plans of all instances so far.
static PLANS: AtomicU64 = AtomicU64::new(0);

/// What one instance needs to break a rule.
pub(crate) struct Breaker {
    breaks: Breaks,
    made_by: ThreadId,
    bounds: AtomicU64,
    seen: Vec<u64>,
}

impl Breaker {
    pub(crate) fn new(breaks: Breaks) -> Self {
        if breaks == Breaks::Time {
            work(Duration::from_millis(1500));
        }
        Self { breaks, made_by: thread::current().id(), bounds: AtomicU64::new(0), seen: Vec::new() }
    }

    /// Rows by which a bound is too large.
    pub(crate) fn more_rows(&self) -> u64 {
        if self.breaks == Breaks::Bound { self.bounds.fetch_add(1, Ordering::Relaxed) % 2 } else { 0 }
    }

    /// Before a sequence is planned: whether the plan shall be another one than that of a good plugin.
    pub(crate) fn strays(&mut self, call: &Call<'_>, sequence: &SequenceView<'_>) -> Result<bool, PluginError> {
        let plans = PLANS.fetch_add(1, Ordering::Relaxed);
        let again = self.seen.contains(&sequence.uid());
        self.seen.push(sequence.uid());
        Ok(match self.breaks {
            Breaks::Independence => plans.is_multiple_of(2),
            Breaks::Layout => {
                let layout = *sequence.layer(0)?.k()?.layout();
                layout.stride_head > layout.stride_token
            }
            Breaks::Uid => sequence.uid() > 100,
            Breaks::Thread => thread::current().id() != self.made_by,
            Breaks::Free => again,
            Breaks::Memory => {
                let memory = call.allocate::<u8>(Memory::Call, 8).map(drop);
                assert!(memory.is_ok(), "no memory");
                false
            }
            Breaks::Numbers => {
                keys_are_numbers(sequence)?;
                false
            }
            Breaks::Strange => {
                assert!(sequence.uid() < u64::MAX, "a name that cannot be");
                false
            }
            Breaks::Crash => {
                // SAFETY: none; the first page belongs to nobody, and to write there is the damage.
                unsafe { std::ptr::without_provenance_mut::<u8>(64).write_volatile(1) };
                false
            }
            Breaks::Hang => loop {
                thread::sleep(Duration::from_secs(1));
            },
            Breaks::Exit => std::process::exit(0),
            Breaks::Nothing | Breaks::Bound | Breaks::Time => false,
        })
    }

    /// When a sequence is over.
    pub(crate) fn forget(&mut self, uid: u64) {
        if self.breaks != Breaks::Free {
            self.seen.retain(|seen| *seen != uid);
        }
    }
}

fn keys_are_numbers(sequence: &SequenceView<'_>) -> Result<(), PluginError> {
    let internal = |error: KernelError| PluginError::Internal(error.to_string());
    for index in 0..sequence.layer_count() {
        let layer = sequence.layer(index)?;
        let k = layer.k()?;
        let mut row = vec![0.0; k.head_dim()];
        k.load(layer.length() / 2, 0, &mut row).map_err(internal)?;
        assert!(row.iter().all(|value| value.is_finite()), "a key that is no number");
    }
    Ok(())
}

/// Works for this much processor time, however busy the machine is.
fn work(time: Duration) {
    let used = || {
        let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        text.split_whitespace().next().and_then(|nanoseconds| nanoseconds.parse::<u64>().ok())
    };
    let end = used().map(|used| used + time.as_nanos() as u64);
    while used() < end {
        std::hint::black_box((0..10_000).sum::<u64>());
    }
}
