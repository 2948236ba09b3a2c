//! Runs steps over sequences: the level below requests, for measurements and for the scheduler.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::{BlockPool, CacheConfig, CacheKind, SequenceCache, SequenceId};
use crate::device::Backend;
use crate::error::{Error, Result};
use crate::forward::forward;
use crate::hooks::{Cache, FreeReason, Hooks, KvPlugins, PluginConfig, StepTag};
use crate::model::Model;
use crate::rank::{Batch, BatchSequence, Phase, Ranks};

/// A row of logits, `[vocab]`.
pub type LogitsRow = Vec<f32>;

/// Which rows of a sequence's part of a step give logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: a chunk in the middle of a prompt.
    None,
    /// The last one.
    Last,
    /// All of them.
    All,
}

/// How [`Runner::score`] feeds its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// All in one step. Each token sees those before it, so the logits are those of [`Scoring::OneByOne`], faster.
    Together,
    /// One step for each token, as in decode: what a plugin does while the sequence grows takes part.
    OneByOne,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// The sequence; at most once in a step.
    pub sequence: SequenceId,
    /// Its next tokens, at least one.
    pub tokens: &'a [u32],
    /// Prefill or decode.
    pub phase: Phase,
    /// Whether the last token is the last of the prompt.
    pub prompt_ends: bool,
    /// Which logits are wanted.
    pub logits: Logits,
}

/// How a sequence begins.
#[derive(Debug, Clone, Copy, Default)]
pub struct Begin<'a> {
    /// The tokens by which it takes over and publishes blocks.
    pub prompt: &'a [u32],
    /// Tokens that are run as prefill: those of the prompt, and of the answer so far when it is computed again.
    pub prefill: usize,
    /// Most rows that are taken over.
    pub prefix_limit: usize,
    /// The arm that serves it; `none`: no plugin; `None`: chosen by key and weights.
    pub arm: Option<&'a str>,
    /// What the arm is chosen by: the same key, the same arm; empty: the sequence itself.
    pub key: &'a str,
}

impl<'a> Begin<'a> {
    /// A prompt that may take over any prefix, on an arm chosen by weight.
    pub fn new(prompt: &'a [u32]) -> Self {
        Self { prompt, prefill: prompt.len(), prefix_limit: prompt.len(), arm: None, key: "" }
    }
}

/// What a change to a sequence touches.
pub(crate) type HookedParts<'a> = (Option<&'a mut Hooks>, Option<&'a mut BlockPool>, &'a mut SequenceCache);

/// A model with its ranks, caches and sequences.
#[derive(Debug)]
pub struct Runner {
    model: Arc<Model>,
    config: CacheConfig,
    ranks: Ranks,
    /// `None`: contiguous.
    pool: Option<BlockPool>,
    sequences: HashMap<SequenceId, SequenceCache>,
    /// `None`: no plugins, and no cost.
    hooks: Option<Hooks>,
}

impl Runner {
    /// Starts the ranks and makes their caches.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting that cannot work; [`Error::RankStopped`] where a thread cannot be started;
    /// [`Error::Device`] for a device that this build or this machine does not have, or that has too little memory;
    /// [`Error::UnsupportedModel`] for a model that the device does not run.
    pub fn new(model: Arc<Model>, config: CacheConfig) -> Result<Self> {
        let heads = model.config.heads;
        if config.ranks == 0 || config.ranks > heads {
            return Err(Error::Config {
                setting: "ranks",
                found: config.ranks.to_string(),
                expected: format!("1 to {heads}, the model's query heads"),
            });
        }
        let pool = match config.kind {
            CacheKind::Contiguous => None,
            CacheKind::Paged { block_size, blocks } => {
                if block_size == 0 {
                    let (found, expected) = ("0".into(), "at least 1".into());
                    return Err(Error::Config { setting: "block_size", found, expected });
                }
                if u32::try_from(blocks).is_err() || blocks == 0 {
                    let (found, expected) = (blocks.to_string(), format!("1 to {}", u32::MAX));
                    return Err(Error::Config { setting: "blocks", found, expected });
                }
                Some(BlockPool::new(model.config.layers, blocks, block_size, config.prefix_sharing))
            }
        };
        let backend = Backend::open(config.device, &model)?;
        let ranks = Ranks::start(&model.config, &config, backend)?;
        Ok(Self { model, config, ranks, pool, sequences: HashMap::new(), hooks: None })
    }

    /// The same with plugins that compress the caches.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Plugin`] where an arm cannot be made.
    pub fn with_plugins(model: Arc<Model>, config: CacheConfig, plugins: &PluginConfig) -> Result<Self> {
        let mut runner = Self::new(model, config)?;
        runner.hooks = Some(Hooks::new(&runner.model.config, &config, plugins, &runner.ranks)?);
        Ok(runner)
    }

    /// The plugins, if there are any: their arms may be changed while sequences run.
    pub fn plugins(&self) -> Option<&Arc<KvPlugins>> {
        self.hooks.as_ref().map(Hooks::plugins)
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The cache's settings.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// The device that it runs on.
    pub fn backend(&self) -> &Backend {
        self.ranks.backend()
    }

    /// The ranks, to run work on their threads.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// The blocks of a paged cache.
    pub fn pool(&self) -> Option<&BlockPool> {
        self.pool.as_ref()
    }

    /// The blocks of a paged cache and a sequence, to edit both in one go.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn parts_mut(&mut self, id: SequenceId) -> Result<(Option<&mut BlockPool>, &mut SequenceCache)> {
        let sequence = self.sequences.get_mut(&id).ok_or(Error::UnknownSequence(id))?;
        Ok((self.pool.as_mut(), sequence))
    }

    /// A sequence's lengths, blocks and next position.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn sequence(&self, id: SequenceId) -> Result<&SequenceCache> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence(id))
    }

    /// Bytes allocated for K and V on all ranks.
    ///
    /// # Errors
    /// [`Error::RankStopped`].
    pub fn cache_bytes(&self) -> Result<usize> {
        Ok(self.ranks.run(|rank| rank.cache.bytes())?.into_iter().sum())
    }

    /// Blocks that a new sequence could get in every layer; `None` for a contiguous cache, which has no limit.
    pub fn usable_blocks(&self) -> Option<usize> {
        self.pool.as_ref().map(BlockPool::usable_blocks)
    }

    /// Rows of a block, where sequences share prefixes by blocks; `None` where they do not.
    pub fn shared_block_size(&self) -> Option<usize> {
        self.pool.as_ref().filter(|_| self.config.prefix_sharing).map(BlockPool::block_size)
    }

    /// Whether a new sequence of `rows` rows would fit now.
    pub fn fits(&self, rows: usize) -> bool {
        self.pool.as_ref().is_none_or(|pool| rows.div_ceil(pool.block_size()) <= pool.usable_blocks())
    }

    /// Begins a sequence, which takes over the blocks of an equal beginning of another prompt, if there are any.
    ///
    /// At most `prefix_limit` rows are taken over, and never the whole prompt: at least its last token must be run, to
    /// give logits. The rows taken over are [`SequenceCache::shared`].
    ///
    /// With plugins, the arm is chosen by weight; should the host refuse the sequence, it runs without one.
    pub fn begin(&mut self, prompt: &[u32], prefix_limit: usize) -> SequenceId {
        self.begin_or_without(&Begin { prefix_limit, ..Begin::new(prompt) })
    }

    /// The same, where arm and key are given.
    ///
    /// # Errors
    /// [`Error::Plugin`] for an arm that there is not; then no sequence has begun.
    pub fn begin_on(&mut self, begin: &Begin<'_>) -> Result<SequenceId> {
        let id = SequenceId::unused();
        let limit = match &mut self.hooks {
            Some(hooks) => hooks.begin(id, begin)?,
            None => begin.prefill,
        };
        Ok(self.insert(id, begin, limit))
    }

    /// The same, on no arm should the host refuse it.
    pub(crate) fn begin_or_without(&mut self, begin: &Begin<'_>) -> SequenceId {
        self.begin_on(begin).unwrap_or_else(|error| {
            tracing::warn!(target: "kvhook", "a sequence runs without plugin: {error}");
            self.insert(SequenceId::unused(), begin, begin.prefill)
        })
    }

    fn insert(&mut self, id: SequenceId, begin: &Begin<'_>, limit: usize) -> SequenceId {
        let mut sequence = SequenceCache::new(self.model.config.layers, begin.prompt);
        if let Some(pool) = &mut self.pool {
            let last = begin.prompt.len().saturating_sub(1);
            pool.share_prefix(&mut sequence, limit.min(begin.prefix_limit).min(last));
        }
        self.sequences.insert(id, sequence);
        id
    }

    /// Makes sure that a sequence has room for `rows` more rows. [`step`](Self::step) does so by itself.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`], with nothing taken; [`Error::UnknownSequence`].
    pub fn reserve(&mut self, id: SequenceId, rows: usize) -> Result<()> {
        let sequence = self.sequences.get_mut(&id).ok_or(Error::UnknownSequence(id))?;
        let Some(pool) = &mut self.pool else { return Ok(()) };
        let reserved = pool.reserve(sequence, rows);
        if reserved.is_ok() || !self.hooks.as_mut().is_some_and(|hooks| hooks.drop_reservations(pool)) {
            return reserved;
        }
        pool.reserve(sequence, rows)
    }

    /// Runs one step: writes K and V of each sequence's tokens and returns the logits wanted, in the order of `work`.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Empty`], [`Error::DuplicateSequence`], [`Error::UnknownSequence`],
    /// [`Error::UnknownToken`], [`Error::ContextFull`], [`Error::OutOfBlocks`], [`Error::SharedBlock`].
    /// Then only [`Error::RankStopped`], [`Error::Device`] where another device than the CPU fails or has no memory left,
    /// and [`Error::SplitCommit`] for a defect of the host, or such a device.
    pub fn step(&mut self, work: &[Work<'_>]) -> Result<Vec<Vec<LogitsRow>>> {
        if work.is_empty() {
            return Err(Error::Empty { what: "the step" });
        }
        let mut batch = Batch { sequences: Vec::with_capacity(work.len()), rows: 0 };
        let mut tokens = Vec::new();
        let mut wanted = Vec::new();
        for part in work {
            if batch.sequences.iter().any(|other| other.id == part.sequence) {
                return Err(Error::DuplicateSequence(part.sequence));
            }
            let sequence = self.batch_sequence(part, batch.rows)?;
            batch.rows += sequence.rows;
            batch.sequences.push(sequence);
            tokens.extend_from_slice(part.tokens);
            match part.logits {
                Logits::None => {}
                Logits::Last => wanted.push(batch.rows - 1),
                Logits::All => wanted.extend(batch.rows - part.tokens.len()..batch.rows),
            }
        }
        let mut logits = forward(&self.model, &self.ranks, batch, &tokens, &wanted)?.into_iter();
        let mut answers = Vec::with_capacity(work.len());
        for part in work {
            let rows = match part.logits {
                Logits::None => 0,
                Logits::Last => 1,
                Logits::All => part.tokens.len(),
            };
            answers.push(logits.by_ref().take(rows).collect());
            let (pool, sequence) = self.parts_mut(part.sequence)?;
            for layer in &mut sequence.layers {
                layer.len += part.tokens.len();
            }
            sequence.next_position += part.tokens.len() as u32;
            if let Some(pool) = pool {
                pool.publish(sequence);
            }
        }
        if let Some(hooks) = &mut self.hooks {
            let (config, kind) = (&self.model.config, self.config.dtype);
            let mut cache = Cache {
                ranks: &self.ranks,
                pool: self.pool.as_mut(),
                sequences: &mut self.sequences,
                row_bytes: 2 * kind.bytes() * config.head_dim * self.ranks.kv_heads(),
            };
            hooks.after_step(&mut cache, work)?;
        }
        Ok(answers)
    }

    /// Checks one sequence's part of a step, gives it room, and describes it for the ranks.
    fn batch_sequence(&mut self, part: &Work<'_>, first_row: usize) -> Result<BatchSequence> {
        let rows = part.tokens.len();
        if rows == 0 {
            return Err(Error::Empty { what: "a sequence's part of the step" });
        }
        let context = self.model.config.context;
        let position = self.sequence(part.sequence)?.next_position as usize;
        if position + rows > context {
            return Err(Error::ContextFull { position: position.max(context), context });
        }
        self.reserve(part.sequence, rows)?;
        let tag = self.hooks.as_ref().map_or_else(StepTag::default, |hooks| hooks.tag(part.sequence));
        let (pool, sequence) = self.parts_mut(part.sequence)?;
        if let Some(pool) = pool {
            for (layer, cache) in sequence.layers.iter().enumerate() {
                let tail = cache.blocks.get(cache.len / pool.block_size());
                if let Some(&block) = tail.filter(|block| !pool.is_private(layer, **block)) {
                    return Err(Error::SharedBlock { sequence: part.sequence, layer, block });
                }
            }
        }
        Ok(BatchSequence {
            id: part.sequence,
            first_row,
            rows,
            first_position: sequence.next_position,
            layers: sequence.layers.clone(),
            prompt_ends: part.prompt_ends,
            phase: part.phase,
            tag,
        })
    }

    /// Begins a sequence and runs its whole prompt, `chunk` tokens a step; the logits are those of its last token.
    ///
    /// # Errors
    /// As [`step`](Self::step), and [`Error::Empty`] for an empty prompt; the sequence is then freed.
    pub fn prefill(&mut self, prompt: &[u32], chunk: usize) -> Result<(SequenceId, LogitsRow)> {
        self.prefill_on(&Begin::new(prompt), chunk)
    }

    /// The same, where arm, key and prefix limit are given.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill); [`Error::Plugin`] for an arm that there is not.
    pub fn prefill_on(&mut self, begin: &Begin<'_>, chunk: usize) -> Result<(SequenceId, LogitsRow)> {
        let (id, prompt) = (self.begin_on(begin)?, begin.prompt);
        let logits = self.prefill_rest(id, prompt, chunk.max(1));
        if logits.is_err() {
            self.free(id)?;
        }
        Ok((id, logits?))
    }

    fn prefill_rest(&mut self, id: SequenceId, prompt: &[u32], chunk: usize) -> Result<LogitsRow> {
        let mut last = None;
        let mut done = self.sequence(id)?.shared;
        while done < prompt.len() {
            let tokens = &prompt[done..prompt.len().min(done + chunk)];
            done += tokens.len();
            let prompt_ends = done == prompt.len();
            let logits = if prompt_ends { Logits::Last } else { Logits::None };
            let work = Work { sequence: id, tokens, phase: Phase::Prefill, prompt_ends, logits };
            last = self.step(&[work])?.pop().and_then(|mut rows| rows.pop());
        }
        last.ok_or(Error::Empty { what: "the prompt" })
    }

    /// Feeds given tokens to a sequence and returns the logits behind each of them.
    ///
    /// To score a continuation `y` of a prompt `x`, prefill all of `x` but its last token, and score that token and all
    /// of `y` but its last: row `i` then predicts `y[i]`.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn score(&mut self, id: SequenceId, tokens: &[u32], scoring: Scoring) -> Result<Vec<LogitsRow>> {
        let size = match scoring {
            Scoring::Together => tokens.len().max(1),
            Scoring::OneByOne => 1,
        };
        let mut rows = Vec::with_capacity(tokens.len());
        for tokens in tokens.chunks(size) {
            let work = Work { sequence: id, tokens, phase: Phase::Decode, prompt_ends: false, logits: Logits::All };
            rows.extend(self.step(&[work])?.into_iter().flatten());
        }
        Ok(rows)
    }

    pub(crate) fn pool_mut(&mut self) -> Option<&mut BlockPool> {
        self.pool.as_mut()
    }

    pub(crate) fn hooks(&self) -> Option<&Hooks> {
        self.hooks.as_ref()
    }

    pub(crate) fn hooks_mut(&mut self) -> Option<&mut Hooks> {
        self.hooks.as_mut()
    }

    /// Plugins, blocks and a sequence.
    pub(crate) fn hooked_parts(&mut self, id: SequenceId) -> Result<HookedParts<'_>> {
        let sequence = self.sequences.get_mut(&id).ok_or(Error::UnknownSequence(id))?;
        Ok((self.hooks.as_mut(), self.pool.as_mut(), sequence))
    }

    /// Adds a copy of a sequence.
    pub(crate) fn insert_copy(&mut self, id: SequenceId, copy: SequenceCache) {
        self.sequences.insert(id, copy);
    }

    /// Tells the plugins that all sequences end; those are still to be freed.
    pub(crate) fn reset_hooks(&mut self) -> Vec<SequenceId> {
        if let Some(hooks) = &mut self.hooks {
            hooks.reset(self.pool.as_mut());
        }
        self.sequences.keys().copied().collect()
    }

    /// Ends a sequence: its blocks go back to the pool, its buffers are dropped.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::RankStopped`].
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.free_because(id, FreeReason::Finished)
    }

    /// The same; plugins are told why.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    pub fn free_because(&mut self, id: SequenceId, reason: FreeReason) -> Result<()> {
        if let Some(hooks) = &mut self.hooks {
            hooks.free(self.pool.as_mut(), id, reason);
        }
        let mut sequence = self.sequences.remove(&id).ok_or(Error::UnknownSequence(id))?;
        if let Some(pool) = &mut self.pool {
            pool.free(&mut sequence);
            return Ok(());
        }
        self.ranks.run(move |rank| rank.cache.free(id))?;
        Ok(())
    }
}
