//! Ranks: a thread for each shard of the KV heads, which alone touches the shard's cache.

use std::borrow::Cow;
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::attention::attend;
use crate::cache::{CacheConfig, KvDtype, LayerCache, RankCache, SequenceId};
use crate::device::Backend;
use crate::error::{Error, Result};
use crate::hooks::StepTag;
use crate::model::Config;

/// The KV heads of one rank, and the query heads that it computes with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadShard {
    /// KV heads, numbered over the whole model.
    pub kv_heads: Range<usize>,
    /// Query heads, numbered over the whole model.
    pub query_heads: Range<usize>,
    /// Query heads for each KV head, in the whole model.
    pub group: usize,
}

impl HeadShard {
    /// The shard of rank `rank` of `ranks`.
    ///
    /// Up to as many ranks as KV heads, the KV heads are split and their query heads follow. With more, a KV head is
    /// replicated on neighbouring ranks, which split its query heads.
    pub fn new(config: &Config, rank: usize, ranks: usize) -> Self {
        let group = config.group();
        if ranks <= config.kv_heads {
            let kv_heads = share(config.kv_heads, rank, ranks);
            let query_heads = kv_heads.start * group..kv_heads.end * group;
            return Self { kv_heads, query_heads, group };
        }
        let kv_head = rank * config.kv_heads / ranks;
        let first = (kv_head * ranks).div_ceil(config.kv_heads);
        let end = ((kv_head + 1) * ranks).div_ceil(config.kv_heads);
        let of_group = share(group, rank - first, end - first);
        let query_heads = kv_head * group + of_group.start..kv_head * group + of_group.end;
        Self { kv_heads: kv_head..kv_head + 1, query_heads, group }
    }

    /// The query heads of one KV head, both counted within the shard.
    pub fn group_of(&self, kv_head: usize) -> Range<usize> {
        let head = self.kv_heads.start + kv_head;
        let within = |query: usize| query.clamp(self.query_heads.start, self.query_heads.end) - self.query_heads.start;
        within(head * self.group)..within((head + 1) * self.group)
    }
}

/// Part `index` of `parts` of `0..count`, as even as possible.
fn share(count: usize, index: usize, parts: usize) -> Range<usize> {
    index * count / parts..(index + 1) * count / parts
}

/// What a sequence is doing in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its prompt is being read.
    Prefill,
    /// Its answer is being written, or scored.
    Decode,
}

/// The sequences of one step.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The sequences, in the order of their rows.
    pub sequences: Vec<BatchSequence>,
    /// Rows of all sequences: new tokens.
    pub rows: usize,
}

impl Batch {
    /// Position of each row.
    pub fn positions(&self) -> Vec<u32> {
        let rows = |sequence: &BatchSequence| {
            (0..sequence.rows as u32).map({
                let first = sequence.first_position;
                move |row| first + row
            })
        };
        self.sequences.iter().flat_map(rows).collect()
    }
}

/// One sequence's part of a step.
#[derive(Debug, Clone)]
pub struct BatchSequence {
    /// The sequence.
    pub id: SequenceId,
    /// Its first row in the batch.
    pub first_row: usize,
    /// Its rows: new tokens.
    pub rows: usize,
    /// Position of its first row; the others follow.
    pub first_position: u32,
    /// For each layer the rows cached before this step, and the blocks, which have room for the new rows too.
    pub layers: Vec<LayerCache>,
    /// Whether the last row is the last of the prompt.
    pub prompt_ends: bool,
    /// Prefill or decode.
    pub phase: Phase,
    /// What plugins are told of it.
    pub tag: StepTag,
}

/// What some heads of a step hold, `[rows, heads, head_dim]`, where the step runs. A row has no gaps.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a> {
    /// Address of the first element, on the step's device.
    pub address: *const c_void,
    /// Rows: new tokens of all sequences.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Type of the elements.
    pub dtype: KvDtype,
    lent: PhantomData<&'a [f32]>,
}

impl<'a> HeadRows<'a> {
    /// Rows in ordinary memory, one behind the other.
    fn on_cpu(values: &'a [f32], rows: usize, head_dim: usize) -> Self {
        let heads = values.len() / rows.max(1) / head_dim;
        let address = values.as_ptr().cast();
        Self { address, rows, heads, head_dim, stride: heads * head_dim, dtype: KvDtype::F32, lent: PhantomData }
    }
}

/// What a rank is about to write and attend over in one layer, q and k after RoPE. On the CPU all values are f32; on a
/// CUDA device they have the cache's dtype, and are there for work that is enqueued on the stream during the call.
#[derive(Debug)]
pub struct LayerStep<'a> {
    /// The layer.
    pub layer: usize,
    /// Queries, of the query heads of the shard.
    pub q: HeadRows<'a>,
    /// New keys, of the KV heads of the shard.
    pub k: HeadRows<'a>,
    /// New values, as `k`.
    pub v: HeadRows<'a>,
    /// Where they lie, and the cache.
    pub backend: &'a Backend,
    /// Address of each sequence's block table on a CUDA device; empty on the CPU, where the batch has them.
    pub tables: &'a [u64],
    /// The rank's heads.
    pub shard: &'a HeadShard,
    /// Its cache, before the step's K and V are written.
    pub cache: &'a RankCache,
    /// Whose rows they are.
    pub batch: &'a Batch,
}

/// Looks at each layer of each step before its K and V are written.
pub trait StepObserver: Send {
    /// Called on the rank's thread, layers in order, one call at a time. It can only look.
    fn before_attention(&mut self, step: &LayerStep<'_>);

    /// Whether it wants to look at a step of this batch. A CUDA device then waits for the ranks' threads in each layer.
    fn wants(&self, batch: &Batch) -> bool {
        !batch.sequences.is_empty()
    }
}

/// What a rank's thread owns.
pub struct RankState {
    /// The rank.
    pub rank: usize,
    /// Its heads.
    pub shard: HeadShard,
    /// Channels of a head.
    pub head_dim: usize,
    /// Its KV.
    pub cache: RankCache,
    /// Who looks at its steps. `None` costs one check for each layer.
    pub observer: Option<Box<dyn StepObserver>>,
}

impl RankState {
    /// Writes a step's K and V of one layer and attends.
    ///
    /// `qkv` is `[rows, heads + 2 * kv_heads, head_dim]` of the whole model; the result is
    /// `[rows, query heads of the shard, head_dim]`.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn layer_step(
        &mut self,
        layer: usize,
        batch: &Batch,
        qkv: &[f32],
        heads: usize,
        kv_heads: usize,
    ) -> Result<Vec<f32>> {
        let columns = |first: usize, heads: &Range<usize>| {
            let from = (first + heads.start) * self.head_dim;
            from..from + heads.len() * self.head_dim
        };
        let stride = qkv.len() / batch.rows.max(1);
        let q = gather(qkv, stride, columns(0, &self.shard.query_heads));
        let k = gather(qkv, stride, columns(heads, &self.shard.kv_heads));
        let v = gather(qkv, stride, columns(heads + kv_heads, &self.shard.kv_heads));
        if let Some(observer) = &mut self.observer {
            let rows = |values| HeadRows::on_cpu(values, batch.rows, self.head_dim);
            observer.before_attention(&LayerStep {
                layer,
                q: rows(&q),
                k: rows(&k),
                v: rows(&v),
                backend: &Backend::Cpu,
                tables: &[],
                shard: &self.shard,
                cache: &self.cache,
                batch,
            });
        }
        self.write(layer, batch, &k, &v)?;
        self.attend(layer, batch, &q)
    }

    fn write(&mut self, layer: usize, batch: &Batch, k: &[f32], v: &[f32]) -> Result<()> {
        let (heads, head_dim) = (self.shard.kv_heads.len(), self.head_dim);
        for sequence in &batch.sequences {
            let LayerCache { len, blocks } = &sequence.layers[layer];
            let mut view = self.cache.layer(sequence.id, layer, *len, len + sequence.rows)?;
            for row in 0..sequence.rows {
                for head in 0..heads {
                    let at = ((sequence.first_row + row) * heads + head) * head_dim;
                    let channels = at..at + head_dim;
                    view.write(blocks, len + row, head, &k[channels.clone()], &v[channels]);
                }
            }
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize, batch: &Batch, q: &[f32]) -> Result<Vec<f32>> {
        let stride = self.shard.query_heads.len() * self.head_dim;
        match &mut self.cache {
            // One pool for all sequences: one parallel region.
            RankCache::Paged(cache) => Ok(attend(&cache.layer(layer), q, &batch.sequences, layer, &self.shard)),
            RankCache::Contiguous(cache) => {
                let mut out = Vec::with_capacity(q.len());
                for sequence in &batch.sequences {
                    let rows = sequence.layers[layer].len + sequence.rows;
                    let view = cache.layer(sequence.id, layer, rows, rows)?;
                    let q = &q[sequence.first_row * stride..][..sequence.rows * stride];
                    out.extend(attend(&view, q, std::slice::from_ref(sequence), layer, &self.shard));
                }
                Ok(out)
            }
        }
    }
}

/// Room for a step on one rank of a CUDA device.
#[cfg(feature = "cuda")]
pub(crate) struct Room {
    /// The rank's heads.
    pub(crate) shard: HeadShard,
    /// By layer and sequence.
    pub(crate) places: Vec<Place>,
    /// Whether somebody wants to look at the step.
    pub(crate) observed: bool,
}

/// Where one layer's K and V of one sequence lie.
#[cfg(feature = "cuda")]
pub(crate) struct Place {
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) layout: crate::cache::RowLayout,
}

/// One layer of a step on a CUDA device, of all ranks.
#[cfg(feature = "cuda")]
pub(crate) struct OnDevice {
    pub(crate) layer: usize,
    pub(crate) batch: std::sync::Arc<Batch>,
    /// `[rows, heads + 2 * kv_heads, head_dim]` of the whole model, in the cache's dtype.
    pub(crate) qkv: u64,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dtype: KvDtype,
    /// Of each sequence.
    pub(crate) tables: Vec<u64>,
    pub(crate) backend: Backend,
}

#[cfg(feature = "cuda")]
impl RankState {
    /// Makes room for a step's rows in every layer; where they go.
    pub(crate) fn make_room(&mut self, batch: &Batch) -> Result<Room> {
        let layers = batch.sequences.first().map_or(0, |sequence| sequence.layers.len());
        let mut places = Vec::with_capacity(layers * batch.sequences.len());
        for layer in 0..layers {
            for sequence in &batch.sequences {
                let cached = sequence.layers[layer].len;
                let view = self.cache.layer(sequence.id, layer, cached, cached + sequence.rows)?;
                places.push(Place { k: view.k.as_ptr() as u64, v: view.v.as_ptr() as u64, layout: view.layout });
            }
        }
        let observed = self.observer.as_ref().is_some_and(|observer| observer.wants(batch));
        Ok(Room { shard: self.shard.clone(), places, observed })
    }

    /// Shows a layer to the observer, if there is one.
    pub(crate) fn observe(&mut self, step: &OnDevice) {
        let Some(observer) = &mut self.observer else { return };
        let rows = |first: usize, heads: &Range<usize>| HeadRows {
            address: (step.qkv + ((first + heads.start) * self.head_dim * step.dtype.bytes()) as u64) as *const c_void,
            rows: step.batch.rows,
            heads: heads.len(),
            head_dim: self.head_dim,
            stride: (step.heads + 2 * step.kv_heads) * self.head_dim,
            dtype: step.dtype,
            lent: PhantomData,
        };
        observer.before_attention(&LayerStep {
            layer: step.layer,
            q: rows(0, &self.shard.query_heads),
            k: rows(step.heads, &self.shard.kv_heads),
            v: rows(step.heads + step.kv_heads, &self.shard.kv_heads),
            backend: &step.backend,
            tables: &step.tables,
            shard: &self.shard,
            cache: &self.cache,
            batch: &step.batch,
        });
    }
}

/// Some columns of each row, without gaps.
fn gather(data: &[f32], stride: usize, columns: Range<usize>) -> Cow<'_, [f32]> {
    if columns == (0..stride) {
        return Cow::Borrowed(data);
    }
    Cow::Owned(data.chunks_exact(stride).flat_map(|row| &row[columns.clone()]).copied().collect())
}

type Job = Box<dyn FnOnce(&mut RankState) + Send>;

/// The ranks' threads. Work is handed to a rank as a closure that gets its state.
pub struct Ranks {
    ranks: Vec<Rank>,
    kv_heads: usize,
    backend: Backend,
    dtype: KvDtype,
}

struct Rank {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ranks({})", self.ranks.len())
    }
}

impl Ranks {
    /// Starts the threads, with a cache each on the device.
    ///
    /// # Errors
    /// [`Error::RankStopped`] where a thread cannot be started; [`Error::Device`] where another device than the CPU has no
    /// memory left.
    pub fn start(model: &Config, cache: &CacheConfig, backend: Backend) -> Result<Self> {
        let start = |rank: usize| {
            let shard = HeadShard::new(model, rank, cache.ranks);
            let head_dim = model.head_dim;
            let cache = RankCache::new(&backend, cache, model.layers, shard.kv_heads.len(), head_dim)?;
            let (sender, receiver): (Sender<Job>, Receiver<Job>) = channel();
            let body = move || {
                let mut state = RankState { rank, shard, head_dim, cache, observer: None };
                while let Ok(job) = receiver.recv() {
                    job(&mut state);
                }
            };
            let thread = std::thread::Builder::new()
                .name(format!("rank {rank}"))
                .spawn(body)
                .map_err(|error| Error::RankStopped { rank, reason: error.to_string() })?;
            Ok(Rank { jobs: Some(sender), thread: Some(thread) })
        };
        let kv_heads = (0..cache.ranks).map(|rank| HeadShard::new(model, rank, cache.ranks).kv_heads.len()).sum();
        let ranks = (0..cache.ranks).map(start).collect::<Result<_>>()?;
        Ok(Self { ranks, kv_heads, backend, dtype: cache.dtype })
    }

    /// Where they run.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Type of the cached keys and values.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// KV heads of all ranks together, replicated ones counted on each.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// How many ranks there are.
    pub fn count(&self) -> usize {
        self.ranks.len()
    }

    /// Runs a closure on every rank's thread at once and waits; the results are in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::RankStopped`] where a closure panicked, now or earlier.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl Fn(&mut RankState) -> T + Send + Sync + Clone + 'static,
    ) -> Result<Vec<T>> {
        let send = |(rank, handle): (usize, &Rank)| {
            let (sender, receiver) = channel();
            let work = work.clone();
            let job: Job = Box::new(move |state| {
                // A receiver that is gone means that the caller gave up waiting.
                let _ = sender.send(work(state));
            });
            let stopped = || Error::RankStopped { rank, reason: "its thread panicked earlier".into() };
            handle.jobs.as_ref().ok_or_else(stopped)?.send(job).map_err(|_| stopped())?;
            Ok(receiver)
        };
        let pending = self.ranks.iter().enumerate().map(send).collect::<Result<Vec<_>>>()?;
        let receive = |(rank, receiver): (usize, Receiver<T>)| {
            let panicked = |_| Error::RankStopped { rank, reason: "its thread panicked".into() };
            receiver.recv().map_err(panicked)
        };
        pending.into_iter().enumerate().map(receive).collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            rank.jobs = None;
            if let Some(thread) = rank.thread.take() {
                // A panic on the thread was reported to whoever waited for its result.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Pairing;

    fn config(heads: usize, kv_heads: usize) -> Config {
        Config {
            layers: 1,
            hidden: 8,
            feed_forward: 8,
            heads,
            kv_heads,
            head_dim: 8,
            rope_base: 1e4,
            rope_frequencies: vec![1.0; 4],
            pairing: Pairing::Interleaved,
            rms_eps: 1e-5,
            context: 64,
            vocab: 8,
        }
    }

    #[test]
    fn every_query_head_is_on_one_rank_beside_its_kv_head() {
        for (heads, kv_heads) in [(9, 3), (8, 8), (32, 4)] {
            let config = config(heads, kv_heads);
            for ranks in 1..=heads {
                let mut next = 0;
                for rank in 0..ranks {
                    let shard = HeadShard::new(&config, rank, ranks);
                    assert_eq!(shard.query_heads.start, next, "{ranks} ranks of {heads}/{kv_heads}");
                    next = shard.query_heads.end;
                    let mut local = 0;
                    for kv in 0..shard.kv_heads.len() {
                        let group = shard.group_of(kv);
                        assert_eq!(group.start, local);
                        local = group.end;
                        for query in group {
                            assert_eq!((shard.query_heads.start + query) / config.group(), shard.kv_heads.start + kv);
                        }
                    }
                    assert_eq!(local, shard.query_heads.len());
                }
                assert_eq!(next, heads);
            }
        }
    }

    #[test]
    fn a_panic_on_a_rank_is_an_error_and_stays_one() {
        let ranks =
            Ranks::start(&config(3, 3), &CacheConfig { ranks: 3, ..CacheConfig::default() }, Backend::Cpu).unwrap();
        assert_eq!(ranks.run(|state| state.rank).unwrap(), [0, 1, 2]);
        let result = ranks.run(|state| assert_ne!(state.rank, 1));
        assert!(matches!(result, Err(Error::RankStopped { rank: 1, .. })));
        assert!(matches!(ranks.run(|_| ()), Err(Error::RankStopped { rank: 1, .. })));
    }
}
