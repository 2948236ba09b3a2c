//! A step on the device: the caller's thread enqueues everything, for all ranks at once. The ranks' threads take part
//! where a cache may have to grow and where somebody looks at a step.

use std::sync::Arc;

use super::kernels::{
    Angles, Attention, Combine, Embed, Item, Norm, Parameters, Product, Rope, SPLIT, Swiglu, Write, enqueue,
};
use super::memory::Buffer;
use super::{Cuda, Driver};
use crate::cache::KvDtype;
use crate::error::Result;
use crate::model::{Config, Model};
use crate::rank::{Batch, HeadShard, OnDevice, Ranks, Room};

/// Up to so many rows, and bytes of the splits' results, the splits of a query are attended by blocks of their own.
const SPLIT_ROWS: usize = 64;
const SPLIT_BYTES: usize = 256 << 20;

/// As [`forward`](crate::forward::forward).
pub(crate) fn forward(
    cuda: &Cuda,
    model: &Model,
    ranks: &Ranks,
    batch: Batch,
    tokens: &[u32],
    wanted: &[usize],
) -> Result<Vec<Vec<f32>>> {
    let batch = Arc::new(batch);
    let shared = Arc::clone(&batch);
    let rooms = ranks.run(move |rank| rank.make_room(&shared))?.into_iter().collect::<Result<Vec<Room>>>()?;
    let plan = Plan::new(&cuda.driver, &model.config, &batch, &rooms, tokens, wanted)?;
    let step = Step { cuda, config: &model.config, dtype: ranks.dtype(), ranks, batch, plan };
    let x = step.layers(rooms.iter().any(|room| room.observed))?;
    step.logits(&x, wanted.len())
}

/// What the kernels are told of a step, in one copy to the device.
struct Plan {
    _words: Buffer<u32>,
    /// By layer, rank and sequence.
    items: Buffer<Item>,
    /// Addresses in `words`.
    tokens: u64,
    positions: u64,
    sequence_of_row: u64,
    wanted: u64,
    /// The block table of each layer and sequence, by layer; 0: none.
    tables: Vec<Vec<u64>>,
    /// The most splits of a query, by layer.
    splits: Vec<usize>,
    most_rows: usize,
    most_kv_heads: usize,
}

impl Plan {
    fn new(
        driver: &Arc<Driver>,
        config: &Config,
        batch: &Batch,
        rooms: &[Room],
        tokens: &[u32],
        wanted: &[usize],
    ) -> Result<Self> {
        let mut words = Words(tokens.to_vec());
        let positions = words.add(batch.positions());
        let of_sequence = |(index, rows): (usize, usize)| std::iter::repeat_n(index as u32, rows);
        let sequence_of_row =
            words.add(batch.sequences.iter().map(|sequence| sequence.rows).enumerate().flat_map(of_sequence));
        let wanted = words.add(wanted.iter().map(|row| *row as u32));
        let mut table_starts: Vec<Vec<Option<usize>>> = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let start_of = |(index, sequence): (usize, &crate::rank::BatchSequence)| {
                let blocks = &sequence.layers[layer].blocks;
                match layer.checked_sub(1) {
                    _ if blocks.is_empty() => None,
                    // As long as layers move in step, one table serves all.
                    Some(before) if sequence.layers[before].blocks == *blocks => table_starts[before][index],
                    _ => Some(words.add(blocks.iter().copied())),
                }
            };
            let starts = batch.sequences.iter().enumerate().map(start_of).collect();
            table_starts.push(starts);
        }
        let words = Buffer::from_slice(driver, &words.0)?;
        let address = |start: usize| words.address() + (start * size_of::<u32>()) as u64;
        let tables: Vec<Vec<u64>> =
            table_starts.iter().map(|starts| starts.iter().map(|start| start.map_or(0, address)).collect()).collect();

        let mut items = Vec::with_capacity(config.layers * rooms.len() * batch.sequences.len());
        for (layer, tables) in tables.iter().enumerate() {
            for room in rooms {
                for (index, sequence) in batch.sequences.iter().enumerate() {
                    let place = &room.places[layer * batch.sequences.len() + index];
                    items.push(Item {
                        k: place.k,
                        v: place.v,
                        table: tables[index],
                        stride_block: place.layout.stride_block as u64,
                        stride_head: place.layout.stride_head as u64,
                        block_size: place.layout.block_size as u32,
                        cached: sequence.layers[layer].len as u32,
                        first_row: sequence.first_row as u32,
                        rows: sequence.rows as u32,
                        ..heads_of(&room.shard)
                    });
                }
            }
        }
        let splits_of = |layer: usize| {
            let rows = batch.sequences.iter().map(|sequence| sequence.layers[layer].len + sequence.rows);
            rows.max().unwrap_or(0).div_ceil(SPLIT)
        };
        Ok(Self {
            tokens: address(0),
            positions: address(positions),
            sequence_of_row: address(sequence_of_row),
            wanted: address(wanted),
            tables,
            splits: (0..config.layers).map(splits_of).collect(),
            most_rows: batch.sequences.iter().map(|sequence| sequence.rows).max().unwrap_or(0),
            most_kv_heads: rooms.iter().map(|room| room.shard.kv_heads.len()).max().unwrap_or(0),
            items: Buffer::from_slice(driver, &items)?,
            _words: words,
        })
    }
}

/// Lists of words, one behind the other.
struct Words(Vec<u32>);

impl Words {
    /// Where the list begins.
    fn add(&mut self, list: impl IntoIterator<Item = u32>) -> usize {
        let start = self.0.len();
        self.0.extend(list);
        start
    }
}

/// An item with a rank's heads and nothing else.
fn heads_of(shard: &HeadShard) -> Item {
    Item {
        k: 0,
        v: 0,
        table: 0,
        stride_block: 0,
        stride_head: 0,
        block_size: 0,
        cached: 0,
        first_row: 0,
        rows: 0,
        first_kv_head: shard.kv_heads.start as u32,
        kv_heads: shard.kv_heads.len() as u32,
        first_query_head: shard.query_heads.start as u32,
        query_heads: shard.query_heads.len() as u32,
    }
}

/// A step that is being enqueued.
struct Step<'a> {
    cuda: &'a Cuda,
    config: &'a Config,
    dtype: KvDtype,
    ranks: &'a Ranks,
    batch: Arc<Batch>,
    plan: Plan,
}

impl Step<'_> {
    fn rows(&self) -> u32 {
        self.batch.rows as u32
    }

    fn buffer<T: Copy>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::new(&self.cuda.driver, len)
    }

    fn enqueue(&self, parameters: &impl Parameters) -> Result<()> {
        // SAFETY: the parameters name buffers of this step, the weights and the caches, all of the sizes that the model and
        // the batch give them. Buffers go back in the stream's order; caches are the ranks', who have made room.
        unsafe { enqueue(&self.cuda.driver, parameters) }
    }

    /// Enqueues all layers; the residual stream behind them, `[rows, hidden]`.
    fn layers(&self, observed: bool) -> Result<Buffer<f32>> {
        let (config, weights, rows) = (self.config, &self.cuda.weights, self.batch.rows);
        let (hidden, width) = (config.hidden as u32, config.feed_forward);
        let columns = config.heads + 2 * config.kv_heads;
        let x: Buffer<f32> = self.buffer(rows * config.hidden)?;
        let normed: Buffer<f32> = self.buffer(rows * config.hidden)?;
        let qkv: Buffer<f32> = self.buffer(rows * columns * config.head_dim)?;
        // As the cache has them.
        let rounded: Buffer<u8> = self.buffer(rows * columns * config.head_dim * self.dtype.bytes())?;
        let attended: Buffer<f32> = self.buffer(rows * config.heads * config.head_dim)?;
        let gate_up: Buffer<f32> = self.buffer(rows * 2 * width)?;
        let gated: Buffer<f32> = self.buffer(rows * width)?;
        let pairs = config.head_dim / 2;
        let angles: Buffer<[f32; 2]> = self.buffer(rows * pairs)?;
        self.enqueue(&Embed {
            panels: weights.embedding.panels.address(),
            tokens: self.plan.tokens,
            out: x.address(),
            rows: self.rows(),
            hidden,
        })?;
        self.enqueue(&Angles {
            positions: self.plan.positions,
            frequencies: weights.frequencies.address(),
            out: angles.address(),
            rows: self.rows(),
            pairs: pairs as u32,
        })?;
        let splits = Splits::new(self)?;
        for (layer, weight) in weights.layers.iter().enumerate() {
            let norm = |weight: &Buffer<f32>| Norm {
                x: x.address(),
                chosen: 0,
                weight: weight.address(),
                out: normed.address(),
                rows: self.rows(),
                hidden,
                epsilon: config.rms_eps,
            };
            self.enqueue(&norm(&weight.attention_norm))?;
            self.enqueue(&Product::new(normed.address(), &weight.qkv, qkv.address(), self.rows(), false))?;
            self.enqueue(&Rope {
                x: qkv.address(),
                angles: angles.address(),
                out: rounded.address(),
                rows: self.rows(),
                heads: columns as u32,
                turned: (config.heads + config.kv_heads) as u32,
                pairs: pairs as u32,
                dtype: self.dtype,
            })?;
            if observed {
                self.observe(layer, rounded.address())?;
            }
            self.attend(layer, &rounded, &splits, &attended)?;
            self.enqueue(&Product::new(attended.address(), &weight.attention_output, x.address(), self.rows(), true))?;
            self.enqueue(&norm(&weight.feed_forward_norm))?;
            self.enqueue(&Product::new(normed.address(), &weight.gate_up, gate_up.address(), self.rows(), false))?;
            let (gate_up, out) = (gate_up.address(), gated.address());
            self.enqueue(&Swiglu { gate_up, out, rows: self.rows(), width: width as u32 })?;
            self.enqueue(&Product::new(gated.address(), &weight.down, x.address(), self.rows(), true))?;
        }
        Ok(x)
    }

    /// Shows a layer to whoever looks at the ranks' steps, on the ranks' threads.
    fn observe(&self, layer: usize, qkv: u64) -> Result<()> {
        let step = Arc::new(OnDevice {
            layer,
            batch: Arc::clone(&self.batch),
            qkv,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            dtype: self.dtype,
            tables: self.plan.tables[layer].clone(),
            backend: self.ranks.backend().clone(),
        });
        self.ranks.run(move |rank| rank.observe(&step))?;
        Ok(())
    }

    /// Enqueues the writing of a layer's new rows, and attention over all.
    fn attend(&self, layer: usize, rounded: &Buffer<u8>, splits: &Splits, attended: &Buffer<f32>) -> Result<()> {
        let (config, plan) = (self.config, &self.plan);
        let (ranks, sequences) = (self.ranks.count(), self.batch.sequences.len());
        let items = plan.items.address() + (layer * ranks * sequences * size_of::<Item>()) as u64;
        self.enqueue(&Write {
            qkv: rounded.address(),
            items,
            sequence_of_row: plan.sequence_of_row,
            rows: self.rows(),
            sequences: sequences as u32,
            heads: config.heads as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            ranks: ranks as u32,
            dtype: self.dtype,
        })?;
        let (partial, partial_sums) = splits.addresses();
        self.enqueue(&Attention {
            qkv: rounded.address(),
            items,
            out: attended.address(),
            partial,
            partial_sums,
            heads: config.heads as u32,
            columns: (config.heads + 2 * config.kv_heads) as u32,
            head_dim: config.head_dim as u32,
            group: config.group() as u32,
            kv_heads: plan.most_kv_heads as u32,
            splits: plan.splits[layer] as u32,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
            most_rows: plan.most_rows as u32,
            item_count: (ranks * sequences) as u32,
            dtype: self.dtype,
        })?;
        self.enqueue(&Combine {
            partial,
            partial_sums,
            items,
            sequence_of_row: plan.sequence_of_row,
            out: attended.address(),
            rows: self.rows(),
            heads: config.heads as u32,
            head_dim: config.head_dim as u32,
            splits: plan.splits[layer] as u32,
        })
    }

    /// Waits for the logits of the wanted rows, if there are any; else the device works on.
    fn logits(&self, x: &Buffer<f32>, wanted: usize) -> Result<Vec<Vec<f32>>> {
        if wanted == 0 {
            return Ok(Vec::new());
        }
        let (config, weights) = (self.config, &self.cuda.weights);
        let last: Buffer<f32> = self.buffer(wanted * config.hidden)?;
        let logits: Buffer<f32> = self.buffer(wanted * config.vocab)?;
        self.enqueue(&Norm {
            x: x.address(),
            chosen: self.plan.wanted,
            weight: weights.output_norm.address(),
            out: last.address(),
            rows: wanted as u32,
            hidden: config.hidden as u32,
            epsilon: config.rms_eps,
        })?;
        let output = weights.output.as_ref().unwrap_or(&weights.embedding);
        self.enqueue(&Product::new(last.address(), output, logits.address(), wanted as u32, false))?;
        let logits = logits.read(wanted * config.vocab)?;
        Ok(logits.chunks_exact(config.vocab).map(<[f32]>::to_vec).collect())
    }
}

/// Room for the splits' results, where splits have blocks of their own.
struct Splits(Option<(Buffer<f32>, Buffer<[f32; 2]>)>);

impl Splits {
    fn new(step: &Step<'_>) -> Result<Self> {
        let most = step.plan.splits.iter().copied().max().unwrap_or(0);
        let results = step.batch.rows * step.config.heads * most;
        let values = results * step.config.head_dim;
        if step.batch.rows > SPLIT_ROWS || values * size_of::<f32>() > SPLIT_BYTES {
            return Ok(Self(None));
        }
        Ok(Self(Some((step.buffer(values)?, step.buffer(results)?))))
    }

    /// Of the results and of their sums; 0 without room.
    fn addresses(&self) -> (u64, u64) {
        self.0.as_ref().map_or((0, 0), |(values, sums)| (values.address(), sums.address()))
    }
}
