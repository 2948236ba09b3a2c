//! The kernels alone: top-k and the gather in place.

use kvhook_kernels::Protected;
use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::select::{self, Gather, gather};
use kvhook_kernels::cuda::top_k::{TopK, top_k};
use kvhook_kernels::cuda::{CudaError, DeviceSlice, Rows, Verdict};

use super::super::cache::Cache;
use super::super::cpu::random_lists;
use super::super::error::BenchError;
use super::super::machine::{Machine, Memory, Work};
use super::super::rows::Row;
use super::super::shapes::Random;
use super::Cuda;

/// Lists and scores of so many layers differ; those of the others are the same again.
const DISTINCT: usize = 4;

/// The kernels alone, on the first sequence of a cache.
pub(super) struct Moves<'a> {
    cuda: &'a Cuda,
    cache: &'a Cache<'a>,
    /// Of each layer; none: lists are given.
    choices: Vec<TopK>,
    gathers: Vec<Gather>,
    verdict: Verdict,
    scratch: DeviceSlice<u8>,
    _memory: Vec<Memory<'a>>,
}

fn failed(operation: &'static str) -> impl Fn(CudaError) -> BenchError {
    move |error| BenchError::Kernel { operation, answer: error.to_string() }
}

fn slice<T>(memory: &Memory<'_>) -> Result<DeviceSlice<T>, BenchError> {
    // SAFETY: the memory lives as long as the work, and to free it waits for the device.
    unsafe { DeviceSlice::new(memory.address, memory.bytes / size_of::<T>()) }.map_err(failed("lending memory"))
}

impl<'a> Moves<'a> {
    pub(super) fn new(cuda: &'a Cuda, cache: &'a Cache<'a>, row: &Row, with_top_k: bool) -> Result<Self, BenchError> {
        let sequence = cache.sequences[0];
        let (tokens, heads, layers) = (sequence.tokens, cache.shape.kv_heads, cache.shape.layers);
        let keep = row.kept(tokens);
        let mut random = Random::new(3);
        let given: Vec<Vec<u32>> = (0..DISTINCT).map(|_| random_lists(tokens, keep, heads, &mut random)).collect();
        let all: Vec<u32> = (0..layers).flat_map(|layer| &given[layer % DISTINCT]).copied().collect();
        let lists = Memory::of(cuda, &all)?;
        let word = Memory::new(cuda, 8)?;
        let verdict = Verdict::new(slice(&word)?).map_err(failed("a verdict"))?;
        verdict.clear(&cuda.kernels, cuda.queue()).map_err(failed("a verdict"))?;
        let mut memory = vec![word];

        let list = |layer: usize| {
            let all = slice::<u32>(&lists)?;
            all.part(layer * heads * keep..(layer + 1) * heads * keep).map_err(failed("lending memory"))
        };
        let mut choices = Vec::new();
        if with_top_k {
            let scores: Vec<u32> = (0..DISTINCT * heads * tokens).map(|_| (random.unit() as f32).to_bits()).collect();
            let all: Vec<u32> = (0..layers)
                .flat_map(|layer| scores.chunks(heads * tokens).nth(layer % DISTINCT))
                .flatten()
                .copied()
                .collect();
            let scores = Memory::of(cuda, &all)?;
            for layer in 0..layers {
                let of_layer = layer * heads * tokens..(layer + 1) * heads * tokens;
                choices.push(TopK {
                    scores: slice::<f32>(&scores)?.part(of_layer).map_err(failed("lending memory"))?,
                    heads,
                    protected: Protected { sinks: 4, recent: 32 },
                    out: list(layer)?,
                });
            }
            memory.push(scores);
        }
        let mut gathers = Vec::new();
        for tensor in 0..2 * layers {
            let (address, layout, table) = cache.rows(tensor, &sequence);
            // SAFETY: the cache is that long, and its table names blocks of it.
            let rows = unsafe { Rows::new(address, layout, table) }.map_err(failed("describing rows"))?;
            gathers.push(Gather {
                source: rows,
                destination: rows,
                indices: Indices::per_head(list(tensor / 2)?, keep),
                tail: 0..0,
                destination_start: 0,
            });
        }
        let scratch = Memory::new(cuda, select::scratch_bytes(&gathers).map_err(failed("gather"))?)?;
        let lent = slice(&scratch)?;
        memory.extend([scratch, lists]);
        Ok(Self { cuda, cache, choices, gathers, verdict, scratch: lent, _memory: memory })
    }
}

impl Work for Moves<'_> {
    fn set_up(&mut self) -> Result<(), BenchError> {
        self.cuda.refill(&self.cache.memory)
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let (device, stream) = (&self.cuda.kernels, self.cuda.queue());
        if !self.choices.is_empty() {
            top_k(device, stream, &self.choices, &self.verdict).map_err(failed("top_k"))?;
        }
        gather(device, stream, &self.gathers, Some(&self.verdict), self.scratch).map_err(failed("gather"))
    }
}
