//! Ranks: a thread for each shard of the KV heads, which alone touches the shard's cache.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::attention::attend;
use crate::cache::{CacheConfig, LayerCache, RankCache, SequenceId};
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

/// What a rank is about to write and attend over in one layer. All values are f32, q and k after RoPE.
#[derive(Debug)]
pub struct LayerStep<'a> {
    /// The layer.
    pub layer: usize,
    /// Queries, `[rows, query heads of the shard, head_dim]`, without gaps.
    pub q: &'a [f32],
    /// New keys, `[rows, KV heads of the shard, head_dim]`, without gaps.
    pub k: &'a [f32],
    /// New values, as `k`.
    pub v: &'a [f32],
    /// Channels of a head.
    pub head_dim: usize,
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
    pub fn layer_step(&mut self, layer: usize, batch: &Batch, qkv: &[f32], heads: usize, kv_heads: usize) -> Vec<f32> {
        let columns = |first: usize, heads: &Range<usize>| {
            let from = (first + heads.start) * self.head_dim;
            from..from + heads.len() * self.head_dim
        };
        let stride = qkv.len() / batch.rows.max(1);
        let q = gather(qkv, stride, columns(0, &self.shard.query_heads));
        let k = gather(qkv, stride, columns(heads, &self.shard.kv_heads));
        let v = gather(qkv, stride, columns(heads + kv_heads, &self.shard.kv_heads));
        if let Some(observer) = &mut self.observer {
            let (head_dim, shard, cache) = (self.head_dim, &self.shard, &self.cache);
            observer.before_attention(&LayerStep { layer, q: &q, k: &k, v: &v, head_dim, shard, cache, batch });
        }
        self.write(layer, batch, &k, &v);
        self.attend(layer, batch, &q)
    }

    fn write(&mut self, layer: usize, batch: &Batch, k: &[f32], v: &[f32]) {
        let (heads, head_dim) = (self.shard.kv_heads.len(), self.head_dim);
        for sequence in &batch.sequences {
            let LayerCache { len, blocks } = &sequence.layers[layer];
            let mut view = self.cache.layer(sequence.id, layer, *len, len + sequence.rows);
            for row in 0..sequence.rows {
                for head in 0..heads {
                    let at = ((sequence.first_row + row) * heads + head) * head_dim;
                    let channels = at..at + head_dim;
                    view.write(blocks, len + row, head, &k[channels.clone()], &v[channels]);
                }
            }
        }
    }

    fn attend(&mut self, layer: usize, batch: &Batch, q: &[f32]) -> Vec<f32> {
        let stride = self.shard.query_heads.len() * self.head_dim;
        match &mut self.cache {
            // One pool for all sequences: one parallel region.
            RankCache::Paged(cache) => attend(&cache.layer(layer), q, &batch.sequences, layer, &self.shard),
            RankCache::Contiguous(cache) => {
                let mut out = Vec::with_capacity(q.len());
                for sequence in &batch.sequences {
                    let rows = sequence.layers[layer].len + sequence.rows;
                    let view = cache.layer(sequence.id, layer, rows, rows);
                    let q = &q[sequence.first_row * stride..][..sequence.rows * stride];
                    out.extend(attend(&view, q, std::slice::from_ref(sequence), layer, &self.shard));
                }
                out
            }
        }
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
    /// Starts the threads.
    ///
    /// # Errors
    /// [`Error::RankStopped`] where a thread cannot be started.
    pub fn start(model: &Config, cache: &CacheConfig) -> Result<Self> {
        let start = |rank: usize| {
            let shard = HeadShard::new(model, rank, cache.ranks);
            let (config, layers, head_dim) = (*cache, model.layers, model.head_dim);
            let (sender, receiver): (Sender<Job>, Receiver<Job>) = channel();
            let body = move || {
                let cache = RankCache::new(&config, layers, shard.kv_heads.len(), head_dim);
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
        Ok(Self { ranks: (0..cache.ranks).map(start).collect::<Result<_>>()?, kv_heads })
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
        let ranks = Ranks::start(&config(3, 3), &CacheConfig { ranks: 3, ..CacheConfig::default() }).unwrap();
        assert_eq!(ranks.run(|state| state.rank).unwrap(), [0, 1, 2]);
        let result = ranks.run(|state| assert_ne!(state.rank, 1));
        assert!(matches!(result, Err(Error::RankStopped { rank: 1, .. })));
        assert!(matches!(ranks.run(|_| ()), Err(Error::RankStopped { rank: 1, .. })));
    }
}
