//! Changes to live sequences between steps: cut, fork, reset; and what plugins did to them.

use crate::cache::{LayerCache, RankCache, SequenceId};
use crate::error::{Error, Result};
use crate::hooks::SequenceReport;
use crate::runner::{Runner, Work};

impl Runner {
    /// Takes the last `rows` rows of each layer away, as after tokens that were only tried.
    ///
    /// # Errors
    /// Before anything is changed: [`Error::UnknownSequence`]; [`Error::CutTooFar`] where a layer would be left without
    /// rows; [`Error::Plugin`] where a compression has already dropped rows behind the cut; [`Error::OutOfBlocks`] where
    /// a shared block would have to be copied. [`Error::RankStopped`].
    pub fn cut(&mut self, id: SequenceId, rows: usize) -> Result<()> {
        let mut tails = self.private_tails(id, rows)?;
        let (hooks, pool, sequence) = self.hooked_parts(id)?;
        let next_position = sequence.next_position.saturating_sub(rows as u32);
        let lengths: Vec<u64> = sequence.layers.iter().map(|layer| (layer.len - rows) as u64).collect();
        let told = hooks.map_or(Ok(()), |hooks| hooks.cut(pool, id, &lengths, next_position));
        if let Err(error) = told {
            tails.give_back(self);
            return Err(error);
        }
        let (pool, sequence) = self.parts_mut(id)?;
        for (index, layer) in sequence.layers.iter_mut().enumerate() {
            layer.len -= rows;
            if let Some(pool) = pool.as_deref() {
                let gone = layer.blocks.split_off(layer.len.div_ceil(pool.block_size()));
                tails.released.push((index, gone));
            }
        }
        sequence.next_position = next_position;
        // What comes next need not be the prompt.
        sequence.prompt.truncate(next_position as usize);
        tails.take_over(self, id)
    }

    /// A new sequence with the same rows. Full blocks are shared; a contiguous cache is copied.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Plugin`] where a plugin keeps state for the sequence; [`Error::OutOfBlocks`]
    /// where a block that both would write cannot be copied; [`Error::Device`] where another device than the CPU has no
    /// memory for a copy: then there is no fork. [`Error::RankStopped`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let tails = self.tails(id, 0, |_| true)?;
        let fork = SequenceId::unused();
        let (hooks, pool, _) = self.hooked_parts(id)?;
        let told = hooks.map_or(Ok(()), |hooks| hooks.fork(pool, id, fork));
        if let Err(error) = told {
            tails.give_back(self);
            return Err(error);
        }
        let mut copy = self.sequence(id)?.clone();
        let (pool, _) = self.parts_mut(id)?;
        if let Some(pool) = pool {
            let size = pool.block_size();
            for (index, layer) in copy.layers.iter_mut().enumerate() {
                layer.blocks.truncate(layer.len.div_ceil(size));
                for &block in &layer.blocks {
                    pool.retain(index, block);
                }
            }
        }
        self.insert_copy(fork, copy);
        let copied = self.ranks().run(move |rank| match &mut rank.cache {
            RankCache::Contiguous(cache) => cache.fork(id, fork),
            RankCache::Paged(_) => Ok(()),
        });
        let copied = match copied.and_then(|copied| copied.into_iter().collect::<Result<()>>()) {
            Ok(()) => tails.take_over(self, fork),
            Err(error) => {
                tails.give_back(self);
                Err(error)
            }
        };
        if let Err(error) = copied {
            // The cause is told, not what may follow from it.
            let _ = self.free(fork);
            return Err(error);
        }
        Ok(fork)
    }

    /// Ends all sequences, as after a change of the cache.
    ///
    /// # Errors
    /// [`Error::RankStopped`].
    pub fn reset(&mut self) -> Result<()> {
        let ids = self.reset_hooks();
        ids.into_iter().try_for_each(|id| self.free(id))
    }

    /// Whether a plugin will be asked about a sequence once this part of a step has run.
    pub fn will_ask(&self, part: &Work<'_>) -> bool {
        let position = self.sequence(part.sequence).map_or(0, |sequence| sequence.next_position);
        self.hooks().is_some_and(|hooks| hooks.will_ask(part, position))
    }

    /// Says how many leading rows of a sequence waiting requests would take over, if they were still there.
    ///
    /// They count as shared when plugins are asked: compressing a sequence alone must not make others compute them again.
    pub fn set_wanted_rows(&mut self, id: SequenceId, rows: usize) {
        if let Some(hooks) = self.hooks_mut() {
            hooks.set_wanted_rows(id, rows);
        }
    }

    /// What compression did to a live sequence.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn report(&self, id: SequenceId) -> Result<SequenceReport> {
        let sequence = self.sequence(id)?;
        let heads = self.ranks().kv_heads();
        let entry_bytes = 2 * self.config().dtype.bytes() * self.model().config.head_dim;
        let lengths: Vec<usize> = sequence.layers.iter().map(|layer| layer.len).collect();
        let entries = heads * lengths.iter().sum::<usize>();
        let entries_full = heads * lengths.len() * sequence.next_position as usize;
        let report = SequenceReport {
            lengths,
            next_position: sequence.next_position,
            entries_full,
            entries,
            bytes_full: entries_full * entry_bytes,
            bytes: entries * entry_bytes,
            ..SequenceReport::default()
        };
        Ok(self.hooks().map_or(report.clone(), |hooks| hooks.report(id, report)))
    }

    /// Positions of the rows that a sequence holds, by rank, layer and KV head of the rank.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Plugin`]; [`Error::RankStopped`].
    pub fn survivors(&self, id: SequenceId) -> Result<Vec<Vec<Vec<Vec<u32>>>>> {
        let sequence = self.sequence(id)?;
        let next_position = sequence.next_position;
        let lengths: Vec<usize> = sequence.layers.iter().map(|layer| layer.len).collect();
        let uid = self.report(id)?.uid;
        let plugins = self.plugins().filter(|_| uid != 0).cloned();
        let of_ranks = self.ranks().run(move |rank| {
            let of_layer = |(layer, &length): (usize, &usize)| match &plugins {
                Some(plugins) => plugins.positions(rank, uid, layer, length, next_position),
                None => Ok(vec![(0..length as u32).collect(); rank.shard.kv_heads.len()]),
            };
            lengths.iter().enumerate().map(of_layer).collect::<Result<Vec<_>>>()
        })?;
        of_ranks.into_iter().collect()
    }

    /// Copies for the last blocks that the rows left after a cut end in, where others use or can find them.
    fn private_tails(&mut self, id: SequenceId, rows: usize) -> Result<Tails> {
        let sequence = self.sequence(id)?;
        let short = sequence.layers.iter().enumerate().find(|(_, layer)| layer.len <= rows);
        if let Some((layer, cache)) = short {
            return Err(Error::CutTooFar { sequence: id, rows, layer, length: cache.len });
        }
        self.tails(id, rows, |private| !private)
    }

    /// Takes a block for each layer whose last one, after `rows` rows are gone, is partly filled and to be copied, which
    /// may depend on whether it is private.
    fn tails(&mut self, id: SequenceId, rows: usize, copies: impl Fn(bool) -> bool) -> Result<Tails> {
        let (pool, sequence) = self.parts_mut(id)?;
        let mut tails = Tails::default();
        let Some(pool) = pool else { return Ok(tails) };
        let size = pool.block_size();
        for (index, LayerCache { len, blocks }) in sequence.layers.iter().enumerate() {
            let left = len - rows;
            let Some(&block) = blocks.get(left / size).filter(|_| !left.is_multiple_of(size)) else { continue };
            if copies(pool.is_private(index, block)) {
                match pool.allocate(index, 1) {
                    Ok(taken) => tails.copies.extend(taken.into_iter().map(|to| (index, left / size, block, to))),
                    Err(error) => {
                        for (layer, _, _, to) in tails.copies {
                            pool.release(layer, &[to]);
                        }
                        return Err(error);
                    }
                }
            }
        }
        Ok(tails)
    }
}

/// Last blocks that a sequence gets copies of.
#[derive(Default)]
struct Tails {
    /// Layer, place in its table, the block there, and the one that takes its place.
    copies: Vec<(usize, usize, u32, u32)>,
    /// Blocks of layers that go.
    released: Vec<(usize, Vec<u32>)>,
}

impl Tails {
    /// Nothing is to be copied after all.
    fn give_back(&self, runner: &mut Runner) {
        if let Some(pool) = runner.pool_mut() {
            for &(layer, _, _, to) in &self.copies {
                pool.release(layer, &[to]);
            }
        }
    }

    /// Copies the rows on every rank and puts the copies into the tables. On an error they are given back.
    fn take_over(self, runner: &mut Runner, id: SequenceId) -> Result<()> {
        let copies = self.copies.clone();
        let copied = runner.ranks().run(move |rank| match &mut rank.cache {
            RankCache::Paged(cache) => {
                copies.iter().try_for_each(|&(layer, _, from, to)| cache.copy_block(layer, from, to))
            }
            RankCache::Contiguous(_) => Ok(()),
        });
        if let Err(error) = copied.and_then(|copied| copied.into_iter().collect::<Result<()>>()) {
            self.give_back(runner);
            return Err(error);
        }
        let (pool, sequence) = runner.parts_mut(id)?;
        let Some(pool) = pool else { return Ok(()) };
        for (layer, blocks) in self.released {
            pool.release(layer, &blocks);
        }
        for (layer, place, from, to) in self.copies {
            sequence.layers[layer].blocks[place] = to;
            pool.release(layer, &[from]);
        }
        Ok(())
    }
}
