//! Ordinary memory: calls return when they are done.

use std::alloc::{Layout as Allocation, alloc, dealloc};
use std::time::{Duration, Instant};

use half::bf16;
use kvhook_abi::raw::{KVH_DEVICE_CPU, KvhDevice};
use kvhook_host::raw::KvhookCallbacks;
use kvhook_kernels::{Indices, KernelError, Protected, Rows, parallel, select, top_k};

use super::cache::Cache;
use super::error::BenchError;
use super::machine::{Machine, Measured, Memory, RUNS, Spread, WARM_UP, Work};
use super::report::Hardware;
use super::rows::Row;
use super::shapes::Random;
use crate::machine::this_machine;

/// Bytes of random numbers that caches are filled from.
const PATTERN: usize = (8 << 20) + 112;
/// Bytes of the copy that the bandwidth is taken of: well beyond every cache of the processor.
const COPY: usize = 512 << 20;
const ALIGNMENT: usize = 256;
/// A row's calls are as many as begin within this time, but at least [`LEAST_RUNS`] and at most [`RUNS`].
const TIME_FOR_A_ROW: Duration = Duration::from_secs(2);
const LEAST_RUNS: usize = 5;

/// This machine's cores and memory.
pub struct Cpu {
    pattern: Vec<u8>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// Makes the numbers that caches are filled with.
    pub fn new() -> Self {
        Self { pattern: random_bytes(PATTERN) }
    }
}

/// Uniform bf16 from -1 to 1.
pub(super) fn random_bytes(bytes: usize) -> Vec<u8> {
    let mut random = Random::new(1);
    (0..bytes / 2).flat_map(|_| bf16::from_f32((2.0 * random.unit() - 1.0) as f32).to_ne_bytes()).collect()
}

fn allocation(bytes: usize) -> Result<Allocation, BenchError> {
    Allocation::from_size_align(bytes.max(1), ALIGNMENT).map_err(|_| BenchError::Memory { bytes })
}

impl Machine for Cpu {
    fn describe(&self) -> Hardware {
        let machine = this_machine(None);
        Hardware { device: "cpu".into(), name: format!("{}, {} cores", machine.cpu, machine.cores), driver: None }
    }

    fn device(&self) -> KvhDevice {
        KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 }
    }

    fn stream(&self) -> *mut core::ffi::c_void {
        core::ptr::null_mut()
    }

    fn callbacks(&self) -> KvhookCallbacks {
        KvhookCallbacks {
            struct_size: size_of::<KvhookCallbacks>(),
            context: core::ptr::null_mut(),
            log: None,
            log_max_level: None,
            allocate: None,
            free: None,
        }
    }

    fn exponentials(&self) -> Option<f64> {
        None
    }

    fn copy_bandwidth(&self) -> Result<f64, BenchError> {
        let from = vec![1u8; COPY];
        let mut to = vec![0u8; COPY];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let part = COPY.div_ceil(threads);
        let samples = (0..10).map(|_| {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
                    scope.spawn(move || to.copy_from_slice(from));
                }
            });
            start.elapsed().as_secs_f64()
        });
        let seconds = Spread::of(samples.collect()).median;
        std::hint::black_box(&to);
        Ok(2.0 * COPY as f64 / seconds)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, BenchError> {
        // SAFETY: the size is not 0.
        let address = unsafe { alloc(allocation(bytes)?) };
        if address.is_null() { Err(BenchError::Memory { bytes }) } else { Ok(address as u64) }
    }

    fn free(&self, address: u64, bytes: usize) {
        if let Ok(allocation) = allocation(bytes) {
            // SAFETY: allocated above with the same layout.
            unsafe { dealloc(address as *mut u8, allocation) };
        }
    }

    fn write(&self, memory: &Memory<'_>, bytes: &[u8]) -> Result<(), BenchError> {
        let length = bytes.len().min(memory.bytes);
        // SAFETY: the memory is that long, and nobody else uses it.
        unsafe { (memory.address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), length) };
        Ok(())
    }

    fn refill(&self, memory: &Memory<'_>) -> Result<(), BenchError> {
        for start in (0..memory.bytes).step_by(self.pattern.len()) {
            let length = self.pattern.len().min(memory.bytes - start);
            // SAFETY: the part lies inside the memory, which nobody else uses.
            unsafe {
                (memory.address as *mut u8).add(start).copy_from_nonoverlapping(self.pattern.as_ptr(), length);
            }
        }
        Ok(())
    }

    fn moves<'a>(&'a self, cache: &'a Cache<'a>, row: &Row, top_k: bool) -> Result<Box<dyn Work + 'a>, BenchError> {
        let sequence = cache.sequences[0];
        let (tokens, heads) = (sequence.tokens, cache.shape.kv_heads);
        let keep = row.kept(tokens);
        let mut random = Random::new(3);
        let lists = (0..cache.shape.layers).map(|_| random_lists(tokens, keep, heads, &mut random)).collect();
        let scores = match top_k {
            true => (0..cache.shape.layers * heads * tokens).map(|_| random.unit() as f32).collect(),
            false => Vec::new(),
        };
        Ok(Box::new(Moves { machine: self, cache, keep, lists, scores }))
    }

    fn measure(&self, work: &mut dyn Work) -> Result<Measured, BenchError> {
        let [mut samples, mut commits] = [Vec::new(), Vec::new()];
        let start = Instant::now();
        for run in 0..WARM_UP + RUNS {
            work.set_up()?;
            let begin = Instant::now();
            work.prepare()?;
            if !work.is_ready()? {
                return Err(BenchError::NoVerdict { seconds: 0 });
            }
            let middle = begin.elapsed().as_secs_f64();
            work.commit()?;
            let seconds = begin.elapsed().as_secs_f64();
            work.tear_down()?;
            if run >= WARM_UP {
                samples.push(seconds);
                commits.push(seconds - middle);
            }
            if samples.len() >= LEAST_RUNS && start.elapsed() > TIME_FOR_A_ROW {
                break;
            }
        }
        let [spread, host_commit] = [samples, commits].map(Spread::of);
        Ok(Measured { device: spread, whole: spread, host: spread, host_commit, launches: None })
    }
}

/// For each head a random choice of `keep` of the tokens, ascending.
pub(super) fn random_lists(tokens: usize, keep: usize, heads: usize, random: &mut Random) -> Vec<u32> {
    let mut all = Vec::with_capacity(heads * keep);
    for _ in 0..heads {
        let mut wanted = keep;
        for token in 0..tokens {
            if random.below(tokens - token) < wanted {
                all.push(token as u32);
                wanted -= 1;
            }
        }
    }
    all
}

/// The kernels alone.
struct Moves<'a> {
    machine: &'a Cpu,
    cache: &'a Cache<'a>,
    keep: usize,
    /// Of each layer.
    lists: Vec<Vec<u32>>,
    /// Of all layers; empty: lists are given.
    scores: Vec<f32>,
}

impl Work for Moves<'_> {
    fn set_up(&mut self) -> Result<(), BenchError> {
        self.machine.refill(&self.cache.memory)
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let failed = |operation| move |error: KernelError| BenchError::Kernel { operation, answer: error.to_string() };
        let (sequence, heads) = (self.cache.sequences[0], self.cache.shape.kv_heads);
        if !self.scores.is_empty() {
            let tasks: Vec<_> = self.lists.iter_mut().zip(self.scores.chunks(heads * sequence.tokens)).collect();
            let protected = Protected { sinks: 4, recent: 32 };
            parallel::for_each(tasks, self.scores.len() * 4, |(list, scores)| {
                top_k::top_k_heads(scores, heads, protected, list)
            })
            .map_err(failed("top_k"))?;
        }
        let tensor = |tensor: usize| {
            let (address, layout, table) = self.cache.rows(tensor, &sequence);
            // SAFETY: the cache is as described; each task has a tensor of its own.
            let rows = unsafe { Rows::new(address as *mut u8, layout, table) }?;
            Ok((rows, Indices::per_head(&self.lists[tensor / 2], self.keep)))
        };
        let tasks = (0..2 * self.cache.shape.layers).map(tensor).collect::<Result<Vec<_>, _>>();
        tasks
            .and_then(|tasks| {
                parallel::for_each(tasks, self.cache.memory.bytes, |(rows, indices)| {
                    select::gather(&rows, &rows, 0..heads, &indices, 0)
                })
            })
            .map_err(failed("gather"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_choices() {
        let lists = random_lists(50, 20, 3, &mut Random::new(1));
        assert_eq!(lists.len(), 60);
        for list in lists.chunks(20) {
            assert!(list.windows(2).all(|pair| pair[0] < pair[1]) && list[19] < 50);
        }
        assert_ne!(lists[..20], lists[20..40]);
    }

    #[test]
    fn memory_is_filled_alike_each_time() {
        let machine = Cpu::new();
        let memory = Memory::new(&machine, PATTERN + 300).unwrap();
        machine.refill(&memory).unwrap();
        // SAFETY: just filled.
        let bytes = unsafe { std::slice::from_raw_parts(memory.address as *const u8, memory.bytes) };
        let before = bytes.to_vec();
        assert_eq!(before[..300], before[PATTERN..]);
        assert!(before.chunks(256).all(|row| row.iter().any(|&byte| byte != 0)));
        machine.refill(&memory).unwrap();
        assert!(bytes == before);
    }
}
